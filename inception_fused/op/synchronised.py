"""Statistics of a batch that lies on several processes: what SyncBatchNorm gathers between the two halves of a pass.

Every process has (count, mean, M2) of its rows. All of them combine all of these alike, in fp64 and in the order of
ranks, so each process gets the same bits. In the backward the two sums a channel are added up likewise, while the
gradients of gamma and beta stay sums over a process's own rows, which DistributedDataParallel averages as any other.
A process without rows takes part with a count of 0. As many collective calls are made on each process as the wanted
gradients ask for, so these have to be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from inception_fused.block.batch_stats import (
    BATCH,
    COEFFICIENTS,
    COUNT,
    MEAN,
    REST,
    SCALE,
    SHIFT,
    SYNCHRONISED,
    VAR,
    NormColumns,
)
from inception_fused.block.views import ChannelSlice


def share_statistics(stats: ChannelSlice, columns: Sequence[NormColumns], *, rows: int, group: str) -> None:
    """Makes the statistics of this process's rows those of all processes' rows, of columns in mode BATCH.

    stats: as norm_combine left them, or anything where ``rows`` is 0. rows: N*H*W here. group: its name.
    """
    table = stats.rows(SYNCHRONISED)
    own = table.new_zeros((4, stats.channels))
    if rows:
        own.copy_(torch.stack([table[MEAN], table[REST], table[VAR] * rows, torch.full_like(table[MEAN], rows)]))
    mean, rest, m2, counts = gathered(own, group).double().unbind(1)
    total = counts.sum(0)
    means = mean + rest
    mean = (counts * means).sum(0) / total
    # A process without rows has no mean that counts, and 0 * NaN is not 0.
    m2 = (m2 + torch.where(counts > 0, counts * (means - mean) ** 2, 0)).sum(0)
    rounded = mean.to(table.dtype)
    found = {MEAN: rounded, REST: (mean - rounded.double()).to(table.dtype), VAR: (m2 / total).to(table.dtype)}
    table[COUNT] = total
    for start, channels, mode, gamma, beta, _, _, eps in columns:
        if mode != BATCH:
            continue
        part = slice(start, start + channels)
        for row, values in found.items():
            table[row, part] = values[part]
        scale = 1 / (table[VAR, part] + eps).sqrt()
        table[SCALE, part] = scale if gamma is None else scale * gamma.to(scale.dtype)
        shift = -(table[REST, part] * table[SCALE, part])
        table[SHIFT, part] = shift if beta is None else shift + beta.to(shift.dtype)


def share_sums(
    parts: Tensor, stats: ChannelSlice, columns: Sequence[NormColumns], coefficients: ChannelSlice, *, group: str
) -> None:
    """Makes the coefficients of a backward those of all processes' sums, of columns in mode BATCH.

    parts: [ranges, 2, C] of this process, with no range where it has no rows. coefficients: as norm_grad_combine left
    them.
    """
    table, out = stats.rows(SYNCHRONISED), coefficients.rows(COEFFICIENTS)
    sums, dots = gathered(parts.sum(0), group).double().sum(0)
    for start, channels, mode, *_, eps in columns:
        if mode != BATCH:
            continue
        part = slice(start, start + channels)
        rest, var, scale, count = (table[row, part].double() for row in (REST, VAR, SCALE, COUNT))
        c1 = scale * (dots[part] - rest * sums[part]) / ((var + eps) * count)
        out[1, part], out[2, part] = c1, scale * sums[part] / count - c1 * rest


def gathered(t: Tensor, group: str) -> Tensor:
    """[processes, *t.shape]: everybody's t."""
    members = dist.distributed_c10d._resolve_process_group(group)
    found = t.new_empty((dist.get_world_size(members), *t.shape))
    dist.all_gather(list(found.unbind()), t.contiguous(), group=members)
    return found


def group_name(module: torch.nn.Module) -> str:
    """The name of the process group with which a layer shares its statistics, as PyTorch decides it; "" for none."""
    if not isinstance(module, torch.nn.SyncBatchNorm) or not module.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    members = module.process_group or dist.group.WORLD
    return members.group_name if dist.get_world_size(members) > 1 else ""
