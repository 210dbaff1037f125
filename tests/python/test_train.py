"""The training script: recipes, initial weights, resuming bit for bit, and what its errors say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train_googlenet
from inception_fused import FusedInception, GoogLeNet, Inception
from marks import more
from train_fakes import CPU, TINY, assert_same_run
from training import checkpoints, loop
from training.checkpoints import CHECKPOINT_NAME, CheckpointError
from training.loop import Trainer, TrainingError
from training.presets import PRESETS


def test_presets():
    seed, digits = PRESETS["seed"], PRESETS["digits"]
    assert (seed.dataset, seed.image_size, seed.batch_size, seed.epochs) == ("fashion-mnist", 96, 128, 10)
    assert (seed.optimizer, seed.lr, seed.cosine, seed.weights) == ("sgd", 0.1, False, "xavier_uniform")
    assert (digits.dataset, digits.image_size, digits.batch_size) == ("digits", 32, 32)
    for name, recipe in PRESETS.items():
        assert (recipe.preset, recipe.block, recipe.dtype, recipe.seed) == (name, "fused", "fp32", 0)


def test_optimizers(tiny):
    seed, digits = (Trainer(PRESETS[name], tiny, CPU).optimizer for name in ("seed", "digits"))
    assert (type(seed), type(digits)) == (torch.optim.SGD, torch.optim.AdamW)
    assert [seed.defaults[key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0, 0]
    assert [digits.defaults[key] for key in ("lr", "weight_decay")] == [5e-4, 1e-2]


def test_learning_rate_over_the_epochs(tiny):
    for preset, expected in (("digits", [1, 0.5 + math.sqrt(0.125), 0.5]), ("seed", [1, 1, 1])):
        trainer = Trainer(dataclasses.replace(PRESETS[preset], epochs=4), tiny, CPU)
        assert [trainer._lr_factor(epoch) for epoch in range(3)] == pytest.approx(expected)


def fans(module: nn.Module) -> tuple[int, int]:
    window = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
    return module.weight.shape[1] * window, module.weight.shape[0] * window


def test_xavier_uniform(tiny):
    torch.manual_seed(PRESETS["seed"].seed)
    constructed = GoogLeNet(10, 1, block=Inception).state_dict()
    model = loop.build_model(PRESETS["seed"], tiny)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in, fan_out = fans(module)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert module.weight.abs().max() <= bound, name
            # The smallest layer has 3072 values: all of them miss the last 2 % with a chance of e^-62.
            assert module.weight.abs().max() >= 0.98 * bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert torch.equal(module.bias, constructed[f"{name}.bias"]), name


def test_kaiming_normal(tiny):
    for name, module in loop.build_model(PRESETS["digits"], tiny).named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Five standard deviations of the estimate of a standard deviation: 5 / sqrt(2 n).
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            expected = math.sqrt(2 / fans(module)[0])
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance), name
            assert not module.bias.any(), name


def test_blocks_start_from_the_same_weights(tiny):
    fused = loop.build_model(TINY, tiny)
    eager = loop.build_model(dataclasses.replace(TINY, block="eager"), tiny)
    assert any(isinstance(module, FusedInception) for module in fused.modules())
    assert not any(isinstance(module, FusedInception) for module in eager.modules())
    for name, value in fused.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name


def test_shape_table(tiny):
    model = loop.build_model(PRESETS["seed"], tiny)
    rows = [line.split() for line in train_googlenet.shape_table(model, 1, 96).splitlines()]
    assert rows[:2] == [["layer", "output"], ["input", "1x1x96x96"]]
    assert [name for name, _ in rows[2:]] == ["b1", "b2", "b3", "b4", "b5", "classifier"]
    assert [shape for _, shape in rows[2:]] == ["64x24x24", "192x12x12", "480x6x6", "832x3x3", "1024", "10"]


def test_images_are_scaled_and_resized(tiny):
    trainer = Trainer(TINY, tiny, CPU)
    x, labels = trainer._batch(trainer.train_set, torch.tensor([3, 1]))
    expected = nn.functional.interpolate(tiny.train_images[[3, 1]] / 16, size=(32, 32), mode="bilinear")
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, expected)
    assert labels.tolist() == [3, 1]


def test_fused_and_eager_agree_on_the_first_step(tiny):
    index = torch.arange(8)
    fused, eager = (Trainer(dataclasses.replace(TINY, block=b), tiny, CPU) for b in ("fused", "eager"))
    torch.testing.assert_close(fused._step(index), eager._step(index))
    for a, b in zip(fused.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_same_seed_same_run_other_seed_other_run(tiny):
    recipe = dataclasses.replace(TINY, epochs=1)
    runs = [Trainer(dataclasses.replace(recipe, seed=seed), tiny, CPU) for seed in (0, 0, 1)]
    for run in runs:
        run.run_epoch()
    assert_same_run(runs[0], runs[1])
    assert runs[0].history[0]["loss"] != runs[2].history[0]["loss"]


@pytest.mark.parametrize("dtype", ["fp32", more("bf16")])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, tiny, dtype):
    recipe = dataclasses.replace(TINY, dtype=dtype)
    whole = Trainer(recipe, tiny, CPU)
    whole.fit(tmp_path / "whole")

    cut = Trainer(recipe, tiny, CPU)
    cut.run_epoch()
    cut.save(tmp_path / CHECKPOINT_NAME)
    cut._step(torch.arange(8))  # the beginning of the second epoch is lost
    checkpoint = checkpoints.read_checkpoint(tmp_path / CHECKPOINT_NAME)
    assert checkpoint.recipe == recipe
    resumed = Trainer(checkpoint.recipe, tiny, CPU)
    resumed.restore(checkpoint)
    resumed.fit(tmp_path / "resumed")
    assert_same_run(whole, resumed)
    states = [torch.load(tmp_path / name / CHECKPOINT_NAME)["rng"]["cpu"] for name in ("whole", "resumed")]
    assert torch.equal(*states)


def test_fp16_takes_the_gradient_scaler_along(tmp_path, tiny):
    trainer = Trainer(dataclasses.replace(TINY, dtype="fp16"), tiny, CPU)
    trainer._step(torch.arange(4))
    trainer.scaler.update(1024.0)
    trainer.save(tmp_path / CHECKPOINT_NAME)
    resumed = Trainer(trainer.recipe, tiny, CPU)
    resumed.restore(checkpoints.read_checkpoint(tmp_path / CHECKPOINT_NAME))
    assert resumed.scaler.get_scale() == 1024.0


def test_loss_that_is_not_finite_ends_the_run(tiny):
    trainer = Trainer(TINY, tiny, CPU)
    nn.init.constant_(trainer.model.classifier.bias, math.nan)
    with pytest.raises(TrainingError, match=r"epoch 1: the loss is nan; .* --lr below 0\.0005"):
        trainer.run_epoch()


def test_killed_while_writing_keeps_the_last_checkpoint(tmp_path, monkeypatch, tiny):
    trainer = Trainer(TINY, tiny, CPU)
    path = tmp_path / CHECKPOINT_NAME
    trainer.save(path)
    before = path.read_bytes()

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_and_foreign_checkpoints(tmp_path, tiny):
    path = tmp_path / CHECKPOINT_NAME
    Trainer(TINY, tiny, CPU).save(path)
    other = Trainer(TINY, dataclasses.replace(tiny, num_classes=3), CPU)
    with pytest.raises(CheckpointError, match="does not fit this network"):
        other.restore(checkpoints.read_checkpoint(path))
    content = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged, or no checkpoint") as caught:
            checkpoints.read_checkpoint(path)
        assert str(path) in str(caught.value)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this script"):
        checkpoints.read_checkpoint(path)
    torch.save({"format": checkpoints.CHECKPOINT_FORMAT, "recipe": {"preset": "digits"}}, path)
    with pytest.raises(CheckpointError, match="written by another version"):
        checkpoints.read_checkpoint(path)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            checkpoints.read_checkpoint(missing)


def test_command_line_leaves_its_files(cli, tmp_path, capsys):
    assert cli("--device", "cpu", "--epochs", "2", "--batch-size", "10") == 0
    output = capsys.readouterr().out
    assert output.startswith("layer       output\ninput       1x1x32x32\nb1          64x8x8\n")
    assert "20 training and 6 test images; fused blocks, fp32, seed 0" in output
    assert output.count("\nepoch ") == 2
    assert "final test accuracy " in output
    out = tmp_path / "runs" / "digits-fused"
    files = {CHECKPOINT_NAME, "weights.pt", "history.json", "curve.png"}
    assert {path.name for path in out.iterdir()} == files
    assert all(str(Path("runs", "digits-fused", name)) in output for name in files)
    record = json.loads((out / "history.json").read_text(encoding="utf-8"))
    recipe = dataclasses.replace(PRESETS["digits"], epochs=2, batch_size=10)
    assert record["recipe"] == dataclasses.asdict(recipe)
    assert [row["epoch"] for row in record["epochs"]] == [1, 2]
    assert [row["lr"] for row in record["epochs"]] == pytest.approx([5e-4, 2.5e-4])
    model = GoogLeNet(block=Inception)
    model.load_state_dict(torch.load(out / "weights.pt", weights_only=True))
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_run_says_how_to_go_on(cli, capsys, monkeypatch):
    run_epoch = Trainer.run_epoch

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.epoch == stop_at:
            raise KeyboardInterrupt
        return run_epoch(self)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    stop_at = 0
    assert cli("--out", "o", "--device", "cpu") == 130
    assert "nothing was saved" in capsys.readouterr().err
    stop_at = 1
    assert cli("--out", "o", "--device", "cpu", "--epochs", "2") == 130
    path = Path("o", CHECKPOINT_NAME)
    hint = f"go on with: python python/train_googlenet.py --resume {path} --device cpu\n"
    error = capsys.readouterr().err
    assert error.endswith(hint)
    assert error.count("\n") == 1
    stop_at = -1
    assert cli("--resume", str(path), "--device", "cpu") == 0
    assert "resumed after epoch 1 of 2" in capsys.readouterr().out


def test_arguments_that_differ_from_the_checkpoint(cli, tmp_path, capsys, tiny):
    path = tmp_path / CHECKPOINT_NAME
    Trainer(TINY, tiny, CPU).save(path)
    others = "preset=seed epochs=3 batch-size=7 lr=0.5 image-size=64 block=eager dtype=bf16 seed=1"
    for other in others.split():
        option, value = f"--{other}".split("=")
        assert cli("--device", "cpu", "--resume", str(path), option, value) == 2
        error = capsys.readouterr().err
        assert f"--resume {path}: was trained with {option} " in error
        assert f"got {option} {value}; leave {option} out" in error


def test_more_epochs_where_the_learning_rate_is_constant(tmp_path):
    recipe = PRESETS["seed"]
    checkpoint = checkpoints.Checkpoint(tmp_path / CHECKPOINT_NAME, recipe, {})
    parse = train_googlenet.parse
    longer = train_googlenet.choose_recipe(parse(["--epochs", "12"]), CPU, checkpoint)
    assert longer == dataclasses.replace(recipe, epochs=12)
    with pytest.raises(train_googlenet.UsageError, match="was trained with --epochs 10, got --epochs 9"):
        train_googlenet.choose_recipe(parse(["--epochs", "9"]), CPU, checkpoint)


def test_gpu_that_torch_does_not_see_stops_auto(cli, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_googlenet, "gpu_problem", lambda: "the driver is too old. Do this.")
    assert cli() == 2
    expected = "--device auto: the driver is too old. Do this; to train on the CPU, add --device cpu\n"
    assert capsys.readouterr().err.endswith(expected)
    monkeypatch.setattr(train_googlenet, "gpu_problem", lambda: None)
    assert train_googlenet.choose_device("auto") == CPU
    assert cli("--device", "cuda:1") == 2
    assert "--device cuda:1: torch sees no NVIDIA GPU here; " in capsys.readouterr().err


def test_device_among_those_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_googlenet.choose_device("auto") == torch.device("cuda")
    assert train_googlenet.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(train_googlenet.UsageError, match="wants one of the 2 GPU"):
        train_googlenet.choose_device("cuda:2")


WRONG = "--epochs=0 --epochs=ten --batch-size=-1 --lr=0 --lr=nan --image-size=31 --seed=-1 --device=gpu"


@pytest.mark.parametrize("argument", WRONG.split())
def test_wrong_arguments(cli, capsys, argument):
    with pytest.raises(SystemExit) as caught:
        cli(argument)
    assert caught.value.code == 2
    name, value = argument.split("=")
    assert f"argument {name}: got {value!r}, wants" in capsys.readouterr().err


def test_other_wrong_calls(cli, tmp_path, capsys):
    (tmp_path / "file").touch()
    for args, message in (
        (("--download",), "--download: fetches Fashion-MNIST, for --preset seed"),
        (("--preset", "seed"), "not found; run again with --download"),
        (("--resume", "none.pt"), "none.pt: no such file"),
        (("--out", "file"), "--out file: cannot be made"),
    ):
        assert cli("--device", "cpu", *args) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_package_is_answered_with_the_command(cli, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli("--device", "cpu") == 2
    expected = f'error: {package} cannot be imported .*; run pip install -e "\\.\\[train\\]"\n'
    assert re.search(expected, capsys.readouterr().err)
