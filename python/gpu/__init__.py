"""The stages of gpu_check.py, and the run that they are part of."""
