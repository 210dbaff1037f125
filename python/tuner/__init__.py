"""What tune.py is made of: candidates, their operands and times, the choice among them."""
