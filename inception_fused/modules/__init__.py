"""Modules that are built with fused blocks, and how they see what was done to their children."""
