"""The Triton kernels of the block, one file each: formula and GEMM mapping, device code, launcher.

plan/kernel_table.py says which file is which kernel. Device code that they share is in common.py; probe.py is the
smallest launch there is. Importing any of them needs Triton. Each launcher has an ATen twin in runtime/aten.py or, of
BatchNorm's, runtime/aten_norms.py.
"""
