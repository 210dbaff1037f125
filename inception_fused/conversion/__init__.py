"""Inception blocks of any model: found, tried, made to run the kernels, and turned back."""
