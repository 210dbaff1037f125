"""What this machine has and what the block will do on it; ``verify`` checks the block there.

``python -m inception_fused [info] [--json]`` prints the facts. ``python -m inception_fused verify`` runs the stem (b2)
and the nine blocks of GoogLeNet, checks every slice and gradient against float64 and shows what they cost beside eager
PyTorch. ``python -m inception_fused plan`` shows every launch's tile and why it is taken, ``plan --network`` what each
part of the network takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from inception_fused.block.googlenet_blocks import (
    BRANCH3,
    GOOGLENET_BLOCKS,
    GOOGLENET_LAUNCHED,
    branch3_options,
    spatial_size,
)
from inception_fused.block.reference import Inception
from inception_fused.conversion.fused_blocks import blocks_of
from inception_fused.errors import InceptionInputError, KernelError
from inception_fused.modules.googlenet import GoogLeNet
from inception_fused.op import backends, dispatch
from inception_fused.op.backends import parse
from inception_fused.plan import choice, explain_network, tuned
from inception_fused.plan.cards import CARDS, H200, known
from inception_fused.plan.explain_plan import explain, legend
from inception_fused.tools import verification
from inception_fused.tools.capture import Item, capture
from inception_fused.tools.environment import format_info, gpu_problem, info, tiles_in_force
from inception_fused.tools.picture import check_picture

PROGRAM = "python -m inception_fused"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

STEM = "stem"
"""In GOOGLENET_LAUNCHED the two convolutions of the stem."""

SIZES = {"cuda": (32, 224), "cpu": (2, 64), "interpreted": (1, 32)}
"""Batch and image side where none is asked for: on a CPU all take less than a minute."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all is well; 1: a block is beyond its bound, or a kernel failed; 2: a wrong call."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "verify":
        return _verify(arguments[1:])
    if arguments and arguments[0] == "plan":
        return _plan(arguments[1:])
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", default="info", choices=["info", "verify", "plan"],
        help='see also "verify --help", "plan --help"',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.command != "info":
        parser.error(f'"{chosen.command}" comes first: python -m inception_fused {chosen.command} --help')
    try:
        facts = info()
    except InceptionInputError as error:
        parser.error(str(error))
    print(json.dumps(facts, indent=2) if chosen.json else format_info(facts))
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        backend = backends.current()
        if chosen.picture:
            check_picture(chosen.picture)
        if chosen.json and not chosen.json.absolute().parent.is_dir():
            parser.error(f"--json: got {str(chosen.json)!r}, wants a file in a folder that exists")
        device = _device(chosen.device, parser)
        on = "interpreted" if device.type == "cpu" and parse(backend).demands_kernels else device.type
        batch, side = (
            given or usual for given, usual in zip((chosen.batch, chosen.image_size), SIZES[on], strict=True)
        )
        result = verification.check(
            _items(chosen.blocks, DTYPES[chosen.dtype], device, batch, side),
            device, backward=chosen.backward, progress=_progress,
        )  # fmt: skip
        print(result)
        if chosen.json:
            chosen.json.write_text(json.dumps(result.to_json(), indent=2) + "\n")
        if chosen.picture:
            result.save_picture(chosen.picture)
    except (InceptionInputError, OSError) as error:
        parser.error(str(error))
    except (KernelError, torch.OutOfMemoryError) as error:
        print(f"{PROGRAM} verify: {error}", file=sys.stderr)
        return 1
    return 0 if result.ok else 1


def _plan(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} plan",
        description="The tile of every Triton launch of GoogLeNet, forward and backward, and why it is taken: "
        "a rule, or a timing that python/tune.py made on this GPU. Or the whole network, part by part. Needs no GPU.",
    )
    parser.add_argument("blocks", nargs="?", type=_blocks, metavar="BLOCK", help="3a, or stem,4e; default all")
    whole = "the whole network: eager's floor and our forecast of each part, the stem's share"
    parser.add_argument("--network", action="store_true", help=whole)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the kernels (fp32 computes in TF32)")
    parser.add_argument("--batch", type=_positive, default=32, metavar="N", help="images (32)")
    parser.add_argument("--image-size", type=_positive, default=224, metavar="S", help="side of an image (224)")
    parser.add_argument("--card", choices=CARDS, help="a card of plan/cards.py, by the rules' tiles; default this GPU, "
                        "an H200 where there is none")  # fmt: skip
    parser.add_argument("--branch3", choices=BRANCH3, default="5x5", help="windows of branch 3 (5x5)")
    parser.add_argument("--batch-norm", action="store_true", help="BatchNorm in training behind every convolution")
    parser.add_argument("--rules", action="store_true", help="print the rules themselves instead")
    chosen = parser.parse_args(arguments)
    if chosen.rules:
        print(choice.describe())
        return 0
    if chosen.network and (chosen.blocks or chosen.batch_norm):
        got = "--batch-norm" if chosen.batch_norm else ",".join(chosen.blocks)
        parser.error(f"--network: got {got} with it; it is GoogLeNet with all its blocks, without BatchNorm")
    if chosen.batch_norm and STEM in (chosen.blocks or ()):
        parser.error("--batch-norm: got the stem with it, whose convolutions have none; wants blocks alone")
    gpu, card = None, CARDS[chosen.card] if chosen.card else H200
    print(f"tiles: {'rules (a card was named)' if chosen.card else tiles_in_force()}")
    if torch.cuda.is_available() and not chosen.card:
        device = torch.device("cuda", torch.cuda.current_device())
        gpu, (major, minor) = tuned.key(device), torch.cuda.get_device_capability(device)
        card = replace(known(gpu.name), capability=10 * major + minor)
        compiled = [kernel for kernel in choice.COMPILED if dispatch.usual(kernel, device) == "native"]
        if compiled:
            print(f"{' and '.join(compiled)} here: the compiled kernels, whose tiles are fixed; the table has Triton's")
    windows = BRANCH3[chosen.branch3]
    form = "" if chosen.branch3 == "5x5" else f", branch 3 {chosen.branch3}"
    if chosen.network:
        side = chosen.image_size
        print(f"GoogLeNet{form}, batch {chosen.batch}, {side}x{side} pixels, {chosen.dtype}")
        with torch.device("meta"):
            network = GoogLeNet(block=partial(Inception, **branch3_options(windows))).to(DTYPES[chosen.dtype])
        print(explain_network.explain(network, (chosen.batch, network.b1[0].in_channels, side, side), gpu, card))
        return 0
    print(legend(card))
    form += ", BatchNorm in training" * chosen.batch_norm
    for name in chosen.blocks or (GOOGLENET_BLOCKS if chosen.batch_norm else GOOGLENET_LAUNCHED):
        size = spatial_size(name, chosen.image_size)
        print(f"\n{name}{form if name != STEM else ''}, batch {chosen.batch}, {size}x{size} pixels, {chosen.dtype}")
        place = dict(branch3=windows, card=card, normed=chosen.batch_norm)
        print(explain(GOOGLENET_LAUNCHED[name], chosen.batch, size, DTYPES[chosen.dtype], gpu, **place))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} verify",
        description="Run GoogLeNet's stem and blocks (random weights, fixed seed) on this machine: every slice and "
        "gradient against float64; launches, memory and time beside eager PyTorch. Exit code 0: all within their "
        "bounds; 1: one is not; 2: a wrong call.",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (fp32 computes in TF32)")
    sizes = ", ".join(f"{size[0]} ({size[1]}) on {name}" for name, size in list(SIZES.items())[:2])
    parser.add_argument("--batch", type=_positive, metavar="N", help="images")
    parser.add_argument("--image-size", type=_positive, metavar="S", help=f"side of an image; batch (side): {sizes}")
    some = "some of stem and the nine"
    parser.add_argument("--blocks", type=_blocks, default=list(GOOGLENET_LAUNCHED), metavar="stem,4e", help=some)
    parser.add_argument("--no-backward", dest="backward", action="store_false", help="leave the gradients out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them, as .png, .svg or .pdf")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a positive integer")
    return int(text)


def _blocks(text: str) -> list[str]:
    names = text.replace(" ", "").split(",")
    wrong = [name for name in names if name not in GOOGLENET_LAUNCHED]
    if wrong:
        raise argparse.ArgumentTypeError(f"got {wrong[0]!r}, wants some of {','.join(GOOGLENET_LAUNCHED)}")
    return [name for name in GOOGLENET_LAUNCHED if name in names]


def _device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        parser.error(f"--device: got cuda, but {gpu_problem() or 'no NVIDIA driver answers here; use --device cpu'}")
    return torch.device("cuda", torch.cuda.current_device())


def _items(names: Sequence[str], dtype: torch.dtype, device: torch.device, batch: int, side: int) -> list[Item]:
    """The blocks with the inputs that they get inside GoogLeNet for normal images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GoogLeNet(in_channels=3)
        images = torch.randn(batch, 3, side, side)
    net = net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    blocks = dict(zip(GOOGLENET_LAUNCHED, blocks_of(net).values(), strict=True))
    images = images.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return capture(net, {name: blocks[name] for name in names}, images)


def _progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on stderr where tqdm is installed and a line each where it is not."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, item in enumerate(items, 1):
            print(f"block {item.name}, {number} of {len(items)}", file=sys.stderr)
            yield item
        return
    with tqdm(items, desc="blocks", unit="block", file=sys.stderr, leave=False) as bar:
        for item in bar:
            bar.set_postfix_str(item.name)
            yield item


if __name__ == "__main__":
    sys.exit(main())
