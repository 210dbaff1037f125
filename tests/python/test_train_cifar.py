"""The training script's second network: its structure, converted beside not, resuming, and what refuses it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import train_googlenet
from inception_fused import GOOGLENET_BLOCKS, backend, explain
from inception_fused.conversion.converted import ConvertedBlock
from inception_fused.testing import Error, tolerance
from marks import more
from train_fakes import CPU, TINY, assert_same_run, raised, sentence
from training import checkpoints, loop
from training.checkpoints import CHECKPOINT_NAME, CheckpointError
from training.loop import Trainer
from training.networks import NETWORKS, CifarGoogLeNet, NormedInception, build_cifar
from training.presets import CIFAR_PRESETS, PRESETS_OF

RECIPE = dataclasses.replace(CIFAR_PRESETS["digits"], batch_size=8, epochs=2, image_size=8)
ARGUMENTS = ("--model", "cifar", "--device", "cpu", "--epochs", "2", "--batch-size", "8", "--image-size", "8")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch):
    """The network of NETWORKS with an eighth of the channels, on one thread: more only wait for one another."""
    monkeypatch.setitem(NETWORKS, "cifar", NETWORKS["cifar"]._replace(build=partial(build_cifar, divisor=8)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def converted(model: nn.Module) -> int:
    return sum(isinstance(module, ConvertedBlock) for module in model.modules())


def test_presets():
    assert list(PRESETS_OF) == list(NETWORKS)
    for name, recipe in CIFAR_PRESETS.items():
        assert (recipe.model, recipe.preset, recipe.image_size, recipe.weights) == ("cifar", name, 32, "pytorch")
        assert (recipe.dataset, recipe.block) == (PRESETS_OF["googlenet"][name].dataset, "fused")


def test_full_size():
    model = CifarGoogLeNet()
    rows = [line.split() for line in train_googlenet.shape_table(model, 3, 32).splitlines()]
    assert rows[2:] == [
        ["stem", "192x32x32"], ["stage3", "480x16x16"], ["stage4", "832x8x8"], ["stage5", "1024"], ["classifier", "10"],
    ]  # fmt: skip
    # That of the network which projects for CIFAR-10 train.
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_166_250
    assert not model.stem[1].running_mean.any()
    assert model.stem[1].num_batches_tracked == 0


def test_layers_and_channels():
    blocks = [module for module in CifarGoogLeNet().modules() if isinstance(module, NormedInception)]
    for block, (c, c1, c2, c3, c4) in zip(blocks, GOOGLENET_BLOCKS.values(), strict=True):
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convs] == [
            (c, c1, 1), (c, c2[0], 1), (c2[0], c2[1], 3),
            (c, c3[0], 1), (c3[0], c3[1], 3), (c3[1], c3[1], 3), (c, c4, 1),
        ]  # fmt: skip
        assert sum(isinstance(module, nn.BatchNorm2d) for module in block.modules()) == 7


def test_other_sizes_of_image():
    model = CifarGoogLeNet(7, 1, divisor=8)
    for size in ((8, 8), (33, 20)):
        assert model(torch.randn(1, 1, *size)).shape == (1, 7)
    with pytest.raises(ValueError, match="divisor: got 3, wants one of 1, 2, 4, 8"):
        CifarGoogLeNet(divisor=3)


def test_weights_are_pytorchs_own_for_either_block(tiny):
    fused, eager = (loop.build_model(dataclasses.replace(RECIPE, block=block), tiny) for block in ("fused", "eager"))
    assert (converted(fused), converted(eager)) == (9, 0)
    torch.manual_seed(RECIPE.seed)
    constructed = CifarGoogLeNet(10, 1, divisor=8).state_dict()
    for model in (fused, eager):
        assert list(model.state_dict()) == list(constructed)
        assert all(torch.equal(value, constructed[name]) for name, value in model.state_dict().items())


def test_converted_network_trains_bit_for_bit_as_the_plain_one(tiny):
    runs = [Trainer(dataclasses.replace(RECIPE, block=block), tiny, CPU) for block in ("fused", "eager")]
    assert [converted(run.model) for run in runs] == [9, 0]
    start = {name: value.clone() for name, value in runs[0].model.state_dict().items()}
    for run in runs:
        run._train_epoch()
        assert run.model.stem[1].num_batches_tracked == 3
        assert run.model.stage5[1].three[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_run(*runs)
    assert not any(torch.equal(value, start[name]) for name, value in runs[0].model.named_parameters())
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("wish", ["kernels", more("auto")])
def test_evaluation_of_the_converted_network(tiny, wish):
    fused, eager = (Trainer(dataclasses.replace(RECIPE, block=block), tiny, CPU).model for block in ("fused", "eager"))
    x = torch.rand(2, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    for _ in range(8):
        eager(x)  # statistics that are not those of the start
    fused.load_state_dict(eager.state_dict())
    for mode in (True, False):
        with backend("kernels"):
            assert "9 of 9 run kernels now" in " ".join(str(explain(fused.train(mode))).split())
    with torch.no_grad(), backend(wish):
        ours = fused(x)
    with torch.no_grad():
        theirs = eager.eval()(x)
        truth = eager.double()(x.double())
    bound = tolerance(torch.float32, 10**5)
    assert Error.of(ours, truth).within(bound)
    assert Error.of(theirs, truth).within(bound)


def test_command_line(cli, tmp_path, capsys):
    assert cli(*ARGUMENTS) == 0
    output = capsys.readouterr().out
    assert output.startswith("layer       output\ninput       1x1x8x8\nstem        24x8x8\n")
    assert "fused blocks, fp32, seed 0, CPU" in output
    assert "BatchNorm" not in output
    out = Path("runs", "digits-cifar-fused")
    assert {path.name for path in out.iterdir()} == {CHECKPOINT_NAME, "weights.pt", "history.json", "curve.png"}
    record = json.loads((out / "history.json").read_text(encoding="utf-8"))
    assert record["recipe"] == dataclasses.asdict(RECIPE)
    assert [row["lr"] for row in record["epochs"]] == pytest.approx([RECIPE.lr, RECIPE.lr / 2])
    CifarGoogLeNet(10, 1, divisor=8).load_state_dict(torch.load(out / "weights.pt", weights_only=True))


def test_a_fault_and_the_command_that_goes_on(cli, second_epoch, capsys):
    """To where a run without the fault, and without conversion, ends, bit for bit."""
    second_epoch(raised(MemoryError()))
    assert cli(*ARGUMENTS) == 1
    said = sentence(capsys)
    assert (
        "error: out of memory; epoch 1 of 2 is saved; free memory, or train anew with a --batch-size below 8; " in said
    )
    assert cli(*shlex.split(said.partition("go on with: ")[2])[2:]) == 0
    capsys.readouterr()
    assert cli(*ARGUMENTS, "--block", "eager") == 0
    ours, theirs = (
        checkpoints.read_checkpoint(out / CHECKPOINT_NAME).state
        for out in (Path("runs", "digits-cifar-fused"), Path("runs", "digits-cifar-eager"))
    )
    assert ours["epoch"] == 2
    assert [row["loss"] for row in ours["history"]] == [row["loss"] for row in theirs["history"]]
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_resuming_with_another_model_is_refused(cli, tmp_path, capsys, tiny):
    path = tmp_path / CHECKPOINT_NAME
    Trainer(RECIPE, tiny, CPU).save(path)
    assert cli("--device", "cpu", "--resume", str(path), "--model", "googlenet") == 2
    wanted = f"--resume {path}: was trained with --model cifar, got --model googlenet; leave --model out, or train anew"
    assert wanted in capsys.readouterr().err


def test_a_checkpoint_that_names_no_model_is_googlenets(cli, tmp_path, capsys, tiny):
    path = tmp_path / CHECKPOINT_NAME
    Trainer(TINY, tiny, CPU).save(path)
    state = torch.load(path)
    assert state["recipe"].pop("model") == "googlenet"
    torch.save(state, path)
    assert checkpoints.read_checkpoint(path).recipe == TINY
    assert cli("--device", "cpu", "--resume", str(path), "--model", "cifar") == 2
    assert "was trained with --model googlenet, got --model cifar; leave" in capsys.readouterr().err
    state["recipe"]["model"] = "resnet"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="got a network 'resnet', wants googlenet or cifar; train anew"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "least"), [(("--image-size", "31"), 32), (("--image-size", "7", "--model", "cifar"), 8)]
)
def test_an_image_that_is_too_small_for_the_network(cli, capsys, arguments, least):
    with pytest.raises(SystemExit) as caught:
        cli(*arguments)
    assert caught.value.code == 2
    wanted = f"argument --image-size: got '{arguments[1]}', wants a whole number from {least} to 1024\n"
    assert capsys.readouterr().err.endswith(wanted)
