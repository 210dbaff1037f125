"""What train_googlenet.py and compare_training.py are made of."""
