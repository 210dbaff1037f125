"""The operators: backend and reasons, launcher, forward, backward, autograd, and the check of a call."""
