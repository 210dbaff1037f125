"""The faults of seeded_faults.py: what a tired engineer might write, and the tests that should see it."""

from __future__ import annotations

from typing import NamedTuple

KERNEL_KINDS = ("guard", "stride", "mask", "accumulation", "store")
"""Bounds and borders; addresses; which values pass; sums; what is written where."""

GLUE_KINDS = ("saved", "order", "dtype", "needs", "format", "key", "probe", "fold", "limit", "path")
"""What is kept for a backward; of launches; of tensors; subsets of gradients; memory; of a launch that is remembered;
what is accepted; of BatchNorm; of 32 bits; which way a call takes."""


class Fault(NamedTuple):
    """``old``, which must occur exactly once in ``file``, becomes ``new``. tests: files or node ids, run in this order
    until one fails."""

    name: str
    file: str
    kind: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The text of the file with the fault in it. Raises ValueError where there is not one place for it."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text occurs {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


PACKAGE, TESTS = "inception_fused/", "tests/"


def fault(name: str, file: str, kind: str, old: str, new: str, breaks: str, *tests: str) -> Fault:
    """file: inside the package; tests: inside tests."""
    return Fault(name, PACKAGE + file, kind, old, new, breaks, tuple(TESTS + test for test in tests))


MOVED = "conversion/test_running_statistics.py"

FAULTS = (
    fault(
        "K1: channels of x unguarded", "kernels/grouped_gemm.py", "guard",
        "x = tl.load(x_ptrs + k0, mask=mask_m[:, None] & (offs_k < C - k0)[None, :], other=0.0)",
        "x = tl.load(x_ptrs + k0, mask=mask_m[:, None], other=0.0)",
        "NaN beside a slice of channels reaches every output, as 0 * NaN",
        "kernels/test_kernels.py::test_layouts_of_x",
    ),
    fault(
        "K1: base of x in 32 bits", "kernels/grouped_gemm.py", "stride",
        "x_ptr + m0.to(tl.int64) * x_stride", "x_ptr + m0 * x_stride",
        "rows from element 2**31 on are read elsewhere",
        "kernels/test_addresses.py",
    ),
    fault(
        "K2: the last of equal values wins", "kernels/common.py", "mask",
        "tl.where(x > best, name, arg)", "tl.where(x >= best, name, arg)",
        "gradients of ties go to another pixel than PyTorch's",
        "kernels/test_pool.py::test_every_window",
    ),
    fault(
        "K2: a tile with NaN is not computed again", "kernels/pool_proj.py", "mask",
        "if tl.max((most != most).to(tl.int32)) != 0:", "if tl.max((most != most).to(tl.int32)) > 1:",
        "a tile with NaN keeps the taps of the scan that does not know it, and bf16 beyond 2**121 is NaN",
        "kernels/test_pool.py::test_every_window",
    ),
    fault(
        "K3, K4: weights by the step", "kernels/conv_fprop.py", "stride",
        "w_shift += C\n", "w_shift += BLOCK_K\n",
        "another tap's weights wherever C is no multiple of BLOCK_K",
        "kernels/test_kernels.py::test_odd_shapes",
    ),
    fault(
        "K3, K4: rows beyond M", "kernels/conv_fprop.py", "guard",
        "return tl.where(mask_m, every_row * inside_w & inside_h, 0)", "return every_row * inside_w & inside_h",
        "reads behind the last image, which B2's sums add up",
        "kernels/test_tiles.py::test_no_access_outside_a_tensor",
    ),
    fault(
        "bits: NaN does not pass", "kernels/common.py", "mask",
        "passes = y != 0", "passes = y > 0",
        "ReLU's gradient stops at NaN in fp32",
        "kernels/test_pool.py::test_nan_and_inf_through_the_whole_block",
    ),
    fault(
        "bits: of the value before rounding", "kernels/common.py", "store",
        "store_bits(bits_tile, out, offs_m, mask_m, pid_n, K, bits_stride, BLOCK_M, BLOCK_N)",
        "value = affine_relu(acc, shift, scale, HAS_SHIFT, HAS_SCALE, RELU)\n"
        "        store_bits(bits_tile, value, offs_m, mask_m, pid_n, K, bits_stride, BLOCK_M, BLOCK_N)",
        "a gradient passes where y was rounded to 0",
        "kernels/test_kernels.py::test_what_rounds_to_zero_masks",
    ),
    fault(
        "N1: rows beyond M", "kernels/norm_stats.py", "guard",
        "delta = tl.where((offs_m < left)[:, None], x.to(ACC) - pivot[None, :] - mean, 0.0)",
        "delta = x.to(ACC) - pivot[None, :] - mean",
        "places of a column with one row less take a zero for it",
        "kernels/test_norms.py::test_parts",
    ),
    fault(
        "N1: no pivot", "kernels/norm_stats.py", "accumulation",
        "x.to(ACC) - pivot[None, :] - mean, 0.0)", "x.to(ACC) - mean, 0.0)",
        "channels far from zero lose the bits of their variance, and N2 adds the pivot all the same",
        "kernels/test_norms.py::test_parts",
    ),
    fault(
        "N2: the last range is a whole one", "kernels/norm_combine.py", "accumulation",
        "tl.where(left == 0, M - (ranges - 1) * rows, 0)", "tl.where(left == 0, rows, 0)",
        "the last range's mean counts for rows that are not there",
        "kernels/test_norms.py::test_statistics",
    ),
    fault(
        "N2: what rounding left out is dropped", "kernels/norm_combine.py", "accumulation",
        "rest = (pivot - (total - back)) + (offset - back)", "rest = zeros",
        "a channel far from zero is normalised beside its mean",
        "kernels/test_norms.py::test_nothing_cancels",
    ),
    fault(
        "N3: NaN becomes zero", "kernels/norm_apply.py", "mask",
        "y = tl.where(y < 0, 0.0, y).to(y.dtype)", "y = tl.where(y > 0, y, 0.0).to(y.dtype)",
        "ReLU hides NaN, as PyTorch's does not",
        "kernels/test_norms.py::test_apply",
    ),
    fault(
        "N3, N4, N6: two roundings", "kernels/common.py", "mask",
        "tl.fma(centred, scale[None, :], shift[None, :])", "(centred * scale[None, :] + shift[None, :])",
        "a mask that is computed again is another wherever the compiler fuses in one kernel alone",
        "kernels/test_norms.py::test_apply",
    ),
    fault(
        "N4: zero passes", "kernels/norm_grad_stats.py", "mask",
        "g = tl.where(y <= 0, 0.0, g)", "g = tl.where(y < 0, 0.0, g)",
        "gradients of beta and gamma count what ReLU has stopped",
        "kernels/test_norm_gradients.py::test_gradient_of_any_layout",
    ),
    fault(
        "N5: c2 without the rest", "kernels/norm_grad_combine.py", "accumulation",
        "c2 = tl.where(in_batch, scale * (s1 / pixels) - c1 * rest, 0.0)",
        "c2 = tl.where(in_batch, scale * (s1 / pixels), 0.0)",
        "the gradients of raw values of a channel far from zero do not add up to zero",
        "kernels/test_norm_gradients.py::test_coefficients",
    ),
    fault(
        "N6: zero times infinity", "kernels/norm_grad_apply.py", "mask",
        "centred = tl.where((c1 == 0)[None, :], 0.0, centred)", "centred = centred",
        "behind a frozen BatchNorm an infinite value makes its gradient NaN",
        "kernels/test_norm_gradients.py::test_gradient_of_any_layout",
    ),
    fault(
        "K1+K2: the second half's programs", "kernels/pool_and_reduce.py", "guard",
        "pid - programs, x_ptr, w1_ptr", "pid, x_ptr, w1_ptr",
        "K1's first tiles are nobody's, its programs behind the last compute nothing",
        "kernels/test_pairs.py::test_to_the_bit",
    ),
    fault(
        "K3+K4: the second half's weights", "kernels/conv_pair.py", "stride",
        "pid - programs, x_ptr2, w_ptr2,", "pid - programs, x_ptr2, w_ptr1,",
        "K3 multiplies by the 5x5 branch's filters",
        "kernels/test_pairs.py::test_to_the_bit",
    ),
    fault(
        "B1: bytes of bits rounded down", "kernels/mask_grad.py", "stride",
        "bytes1, bytes2, bytes3 = tl.cdiv(K1, 8), tl.cdiv(K2, 8), tl.cdiv(K3, 8)",
        "bytes1, bytes2, bytes3 = K1 // 8, K2 // 8, K3 // 8",
        "masks of the branches behind one of 13 channels",
        "kernels/test_backward.py::test_variants",
    ),
    fault(
        "B1: sums in the dtype of dy", "kernels/mask_grad.py", "accumulation",
        "total += tl.sum(dy.to(ACC), axis=0)", "total += tl.sum(dy, axis=0)",
        "biases' gradients in fp16 lose what many rows add",
        "kernels/test_backward.py::test_odd_shapes",
    ),
    fault(
        "B2: padding of dr not written", "kernels/conv_dgrad.py", "store",
        "mask = mask_m[:, None] & (n < width)[None, :]", "mask = mask_m[:, None] & (n < C)[None, :]",
        "B3 multiplies what was in memory by zero",
        "kernels/test_backward.py::test_variants",
    ),
    fault(
        "B3: last word of taps", "kernels/grouped_dgrad.py", "guard",
        "mask_m[:, None] & (words * NIBBLES < C)[None, :]",
        "mask_m[:, None] & (words * NIBBLES + NIBBLES <= C)[None, :]",
        "the pool's gradient of the last of an odd number of channels",
        "kernels/test_backward.py::test_variants",
    ),
    fault(
        "B4: a range rounded down", "kernels/conv_wgrad.py", "accumulation",
        "span = triton.cdiv(triton.cdiv(gemm_m, tile.BLOCK_K), splits) * tile.BLOCK_K",
        "span = triton.cdiv(gemm_m // splits, tile.BLOCK_K) * tile.BLOCK_K",
        "the last pixels of a batch are in no range",
        "kernels/test_backward.py::test_every_pixel_is_in_one_range",
    ),
    fault(
        "B4: a row below the image", "kernels/common.py", "guard",
        "word |= ((row + i >= 2) & (row + i < H + 2)).to(tl.int32) << i",
        "word |= ((row + i >= 2) & (row + i <= H + 2)).to(tl.int32) << i",
        "windows' gradients at an image's last row meet the next image",
        "kernels/test_backward.py::test_odd_shapes",
    ),
    fault(
        "B4: a step over several images", "kernels/conv_wgrad.py", "stride",
        "pixel, advance = first % HW, BLOCK_K % HW", "pixel, advance = first % HW, BLOCK_K",
        "border words are read behind the last",
        "kernels/test_wgrad.py",
    ),
    fault(
        "B5: the group's first column", "kernels/reduce.py", "needs",
        "w_start = (0, (K0 - first) * C, 0, (K0 + r5 - first) * C, 0, 0, 0)",
        "w_start = (0, K0 * C, 0, (K0 + r5) * C, 0, 0, 0)",
        "a reduction's gradient where branch 1's weight is frozen",
        "op/test_gradients.py::test_only_the_wanted_gradients",
    ),
    fault(
        "B5: the place of t's bias sums", "kernels/reduce.py", "stride",
        "b_start = (0, 0, K0, r5, t, K0 + K2, K0 + K2 + K5)", "b_start = (0, 0, K0, r5, r5, K0 + K2, K0 + K2 + K5)",
        "the bias between two windows gets the sums of the reduction before it",
        "kernels/test_reduce.py::test_every_output_and_no_idle_program",
    ),
    fault(
        "B2: dr5 before dt", "plan/launches.py", "order",
        "for row in (dgrad, *reversed(later))),", "for row in (dgrad, *later)),",
        "of two windows the first one's gradient is read before it is there",
        "plan/test_launches.py", "op/test_two_windows.py::test_only_the_wanted_gradients",
    ),
    fault(
        "pack: eps behind the root", "kernels/pack.py", "fold",
        "scale = 1.0 / (tl.sqrt_rn(var + eps) if acc == tl.float32 else tl.sqrt(var + eps))",
        "scale = 1.0 / ((tl.sqrt_rn(var) if acc == tl.float32 else tl.sqrt(var)) + eps)",
        "BatchNorm's scale, most of all of small variances",
        "kernels/test_pack.py::test_batch_norm_becomes_scale_and_shift",
    ),
    fault(
        "pack_dgrad: taps not turned round", "kernels/pack_dgrad.py", "store",
        "to = (c[:, None] * RS + (RS - 1 - tap)) * row + k[None, :]",
        "to = (c[:, None] * RS + tap) * row + k[None, :]",
        "dgrad correlates instead of convolving",
        "kernels/test_backward.py::test_variants",
    ),
    fault(
        "float64 adds up in fp32", "runtime/launch.py", "accumulation",
        "return tl.float64 if dtype == torch.float64 else tl.float32", "return tl.float32",
        "gradient checks in float64",
        "op/test_gradients.py::test_gradcheck_in_float64",
    ),
    fault(
        "inference remembered whatever eps", "op/operators.py", "key",
        '("infer", relu, backend, strict(x), len(norms), tuple(eps))',
        '("infer", relu, backend, strict(x), len(norms))',
        "a block with another eps gets the first one's",
        "op/test_batch_norm.py::test_what_makes_a_kind",
    ),
    fault(
        "fake dx in the layout of x", "op/operators.py", "format",
        "dx = torch.empty_like(x, memory_format=torch.channels_last)", "dx = torch.empty_like(x)",
        "compiled code expects other strides than it gets",
        "op/test_compile.py::test_opcheck_backward",
    ),
    fault(
        "r not saved for the bias of 5x5's reduction", "op/gradients.py", "saved",
        "(relu and any(wanted.inner))", "(relu and wanted.inner[0])",
        "that gradient alone is not masked",
        "op/test_gradients.py::test_only_the_wanted_gradients",
    ),
    fault(
        "gradients in the dtype of x", "op/gradients.py", "dtype",
        "grads = [torch.empty_like(w) if need else None for w, need",
        "grads = [torch.empty_like(w, dtype=x.dtype) if need else None for w, need",
        "fp32 parameters under autocast get gradients rounded to 16 bits",
        "kernels/test_backward.py::test_layouts_and_dtypes_of_weights",
    ),
    fault(
        "wgrad before dgrad", "op/gradients.py", "order",
        "        reduce = self.dgrad(packed)\n        if dx is not None:\n            self.input_grad(packed, dx)\n"
        "        self.finish(self.wgrad(out, reduce), grads)\n",
        "        partials = self.wgrad(out, None)\n        reduce = self.dgrad(packed)\n        if dx is not None:\n"
        "            self.input_grad(packed, dx)\n        self.finish(partials._replace(reduce=reduce), grads)\n",
        "the reductions' weights from a dr that is not there yet",
        "kernels/test_backward.py::test_variants",
    ),
    fault(
        "temporaries side by side", "runtime/replay.py", "key",
        "size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT", "size += storage.nbytes()",
        "a launch from memory gets addresses off 16 bytes",
        "runtime/test_replay.py::test_temporaries_lie_where_their_binary_was_compiled_for",
    ),
    fault(
        "autocast forgotten on the short way", "op/autograd.py", "path",
        "        and not autocast_enabled(x)\n", "",
        "fp32 under autocast",
        "modules/test_module.py::test_autocast",
    ),
    fault(
        "32 bits without the gradients' rows", "plan/choice.py", "limit",
        "widest = max(x_row_stride, shape.grads_width, shape.c)", "widest = max(x_row_stride, shape.c)",
        "offsets into wide rows of gradients",
        "plan/test_plan.py::test_sizes_beyond_32_bits_are_noticed",
    ),
    fault(
        "TF32 by the most general setting", "op/reasons.py", "path",
        "for level in (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends):",
        "for level in (torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv):",
        "strict fp32 for convolutions alone is not honoured",
        "op/test_dispatch.py::test_tf32_setting",
    ),
    fault(
        "gamma's gradient by the scale", "block/folding.py", "fold",
        "_times(total, self.rstds[i], ", "_times(total, self.scales[i], ",
        "right as long as gamma is 1, where training begins",
        "op/test_batch_norm.py::test_variants",
    ),
    fault(
        "running variance as the biased one", "conversion/batch_norm_training.py", "fold",
        "unbiased = pixels / (pixels - 1)", "unbiased = 1",
        "running_var is too small by one part in the number of pixels",
        MOVED,
    ),
    fault(
        "momentum the other way round", "conversion/batch_norm_training.py", "fold",
        "        kept += [1 - momentum] * 2\n", "        momentum = 1 - momentum\n        kept += [1 - momentum] * 2\n",
        "running statistics are those of the last batch",
        MOVED,
    ),
    fault(
        "statistics of a frozen layer move", "conversion/batch_norm_training.py", "path",
        "if item[0].training and item[0].track_running_stats]", "if item[0].training]",
        "a layer that does not track them changes",
        MOVED,
    ),
    fault(
        "convert's probe without large values", "conversion/trial.py", "probe",
        "SCALES = (1.0, 100.0, 0.01)", "SCALES = (1.0, 1.0, 0.01)",
        "a forward that clamps far out is taken for a block",
        "conversion/test_odd_models.py::test_left_alone",
    ),
    fault(
        "running statistics in training", "conversion/inspection.py", "path",
        "mean, var = (None, None) if training else (b[", "mean, var = (b[",
        "a BatchNorm that trains is folded as a frozen one",
        "conversion/test_sync_batch_norm.py::test_a_converted_model",
    ),
    fault(
        "INCEPTION_FUSED_CHECK without our NaN", "op/checking.py", "probe",
        "finite = eager.isfinite() & truth", "finite = ours.isfinite() & eager.isfinite() & truth",
        "a kernel that writes NaN passes",
        "op/test_checking.py::test_a_spoilt_gradient_is_named",
    ),
)  # fmt: skip
