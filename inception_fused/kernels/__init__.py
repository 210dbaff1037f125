"""The Triton kernels of the block, one file each: formula and GEMM mapping, device code, launcher.

grouped_gemm.py (K1), pool_proj.py (K2), conv_fprop.py (K3, K4), pack.py; device code that they share is in
common.py, the ATen twin of each launcher in aten.py. Importing any of them but aten.py and views.py needs Triton.
"""
