"""What the commands and the tests ask of a device, of a block's kernels and of its binaries."""
