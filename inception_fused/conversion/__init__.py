"""Anybody's Inception blocks made to run the kernels, and back."""
