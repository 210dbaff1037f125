"""The operators: what runs them, forward, backward, autograd, and the check of a call."""
