"""The ranks of a run: the processes that train one network together, one on each GPU.

torchrun starts them and numbers them in the environment. A process without such numbers is alone: rank 0 of one, with
no process group and no DistributedDataParallel, for which every method here returns what it was given.

A step. All ranks know the global batch, whose images seed and epoch alone choose. It is cut into equal parts of
ceil(images / ranks), of which the last are filled up with images that do not count: ranks whose parts had different
sizes would compile different networks, and one without images would leave the others waiting for its gradients. The
loss of a rank is the sum over its images that count, over the mean number of them on a rank, so that the average of
the ranks' gradients, which DistributedDataParallel takes, is the gradient of the mean over the batch.

Gradients go through NCCL between GPUs. All else, a number here and there, goes through gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import faults

T = TypeVar("T")

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
"""What torchrun puts into the environment, in the order of a :class:`Ranks`."""

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""What it puts there too: where the ranks find each other."""


class RefusedError(Exception):
    """What at least one rank cannot begin with, raised on every rank alike; its text has a line for each reason."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its run.

    rank, world: its number, and of how many.
    local_rank, local_world: the same among those of this machine.
    nodes: how many machines there are.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    nodes: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """The rank that torchrun has made of this process.

        Raises:
            RefusedError: what is in the environment numbers no rank, or says not where the others are.
        """
        if not all(name in os.environ for name in NUMBERS) or os.environ["WORLD_SIZE"] == "1":
            return cls()
        got = {name: os.environ.get(name, "") for name in (*NUMBERS, *ADDRESS)}
        numbers = [int(got[name]) if got[name].isdecimal() else -1 for name in NUMBERS]
        ranks = cls(*numbers)
        right = 0 <= ranks.rank < ranks.world and min(numbers) >= 0 and ranks.nodes > 0
        if not (right and got["MASTER_ADDR"] and got["MASTER_PORT"].isdecimal()):
            text = " ".join(f"{name}={value}" for name, value in got.items())
            raise RefusedError(f"environment: got {text}, wants what torchrun sets; start with torchrun, or unset RANK")
        return ranks

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints, shows the bar and writes the files."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank}"

    def join(self, store: dist.Store) -> None:
        """Make the process group."""
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)

    def say(self, text: str) -> None:
        """Print to stdout, on rank 0. Raises :class:`training.faults.StdoutError`."""
        if self.first:
            faults.say(text)

    def part(self, index: Tensor) -> tuple[Tensor, int]:
        """This rank's images of a global batch: their indices [ceil(n / world)], and how many of them count.

        index: [n], n at least 1. Those that count come first, those behind them are the first images of the batch.
        """
        size = -(-len(index) // self.world)
        own = index[self.rank * size : (self.rank + 1) * size]
        missing = size - len(own)
        return (torch.cat([own, index[:missing]]) if missing else own), len(own)

    def sum(self, value: float) -> float:
        """The sum over all ranks: of floats in float64, of integers in int64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
        dist.all_reduce(total)
        return total.item()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.sum(0)

    def together(self, work: Callable[[], T], *expected: type[Exception]) -> T:
        """What work returns on this rank, if no rank raises one of the expected errors.

        Raises:
            RefusedError: a rank does; before each different message the first rank that has it, unless that is rank 0.
        """
        value, message = None, None
        try:
            value = work()
        except expected as error:
            message = str(error)
        messages = self.gather(message)
        refusals = {text: messages.index(text) for text in messages if text is not None}
        if refusals:
            lines = [f"rank {rank}: error: {text}" if rank else f"error: {text}" for text, rank in refusals.items()]
            raise RefusedError("\n".join(lines))
        return value  # type: ignore[return-value]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as training steps call it: with gradients that are averaged over the ranks.

        A compiled network is compiled inside: Dynamo sees that DistributedDataParallel calls it, and cuts its graph
        where a bucket of gradients ends, so that sending them overlaps with the backward as it does without compiling.
        """
        if self.world == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def settle(self, network: nn.Module, backward: Callable[[], object]) -> None:
        """Run one backward through the wrapped network, and take back all that it does to the network's state.

        The first backward tells DistributedDataParallel in which order gradients come, and before the second forward it
        sorts its buckets by that. An element's place in a bucket decides in which order the ranks' values are added,
        which from three ranks on decides their rounding. Without this a resumed run, which has its first backward
        again, would leave the run that it goes on with: its first step would add in another order.
        """
        if self.world == 1:
            return
        kept = [buffer.clone() for buffer in network.buffers()]
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            backward()
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), kept, strict=True):
                buffer.copy_(value)

    def same_buffers(self, network: nn.Module) -> None:
        """Give every rank the buffers of rank 0: BatchNorm's running statistics, which each takes of its own images."""
        if self.world == 1:
            return
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)

    def launcher(self) -> list[str]:
        """The words of a command before the script: what starts as many processes as there are."""
        if self.world == 1:
            return ["python"]
        nodes = ["--nnodes", str(self.nodes)] if self.nodes > 1 else []
        return ["torchrun", *nodes, "--nproc-per-node", str(self.local_world)]


ALONE = Ranks()
