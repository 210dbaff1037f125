"""Benchmarks of the blocks and of whole networks: cases < figures < tests and commands."""
