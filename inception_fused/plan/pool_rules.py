"""Tiles of the max-pools of stride 2 (kernels/max_pool.py and max_pool_grad.py): rows are windows, or cells of 2x2.

Nothing is multiplied, and DRAM is the bound. Of 32x64 in 16-bit types each of 256 threads has one window of 16 bytes,
or one cell, in fp32 two. Of an H200's 4.3 TB/s a warp's bytes then take 134 cycles of a multiprocessor without taps,
140 with them and for the gradient; in fp32 267 and 274. Beside that, counted for sm_90 in bf16 and fp32, Triton 3.6.0:

                        without taps     with taps        gradient
    instructions issued   161, 308         345, 548         385, 489     four a cycle
    cycles of integers     36, 82          102, 176         115, 152     two instructions a cycle

Of sm_80 they are the same within a tenth.
"""

from __future__ import annotations

from inception_fused.plan.rules import Rule, RuleSet, Tried

_TRIED = Tried(((16, 64), (32, 64), (16, 128)), ((32, 64), (64, 64), (32, 128)), stages=(1,))

MAX_POOL = RuleSet("P1", Rule("only", 32, 64, 32, 1, 8), tried=_TRIED)
MAX_POOL_GRAD = RuleSet("P2", Rule("only", 32, 64, 32, 1, 8), tried=_TRIED)
