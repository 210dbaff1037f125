"""What looks at a model from outside: captures, measures, verifies, explains, precompiles."""
