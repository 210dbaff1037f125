"""Training with fused kernels beside eager: two real steps, and a verdict that can be "no"."""

import json

import pytest
import torch

import compare_training
from compare_training import FIRST_STEPS, judge
from inception_fused.op.backends import current
from inception_fused.runtime.submit import count
from marks import full

CPU = torch.device("cpu")


@full
def test_first_steps_of_fused_kernels_are_eagers(tmp_path, capsys):
    arguments = ["--images", "48", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert compare_training.main(arguments) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "training_parity.json").read_text())
    assert found["weights"] == "channels_last"
    eager, fused = found["runs"]
    assert (eager["block"], fused["block"]) == ("eager", "fused")
    assert len(eager["losses"]) == len(fused["losses"]) == 2
    # The second loss is that of weights which every gradient has moved.
    assert abs(eager["losses"][1] - fused["losses"][1]) < 1e-5 < abs(eager["losses"][0] - eager["losses"][1])
    assert (tmp_path / "training_parity.png").stat().st_size > 10_000


def test_the_network_with_batch_norm_trains_with_kernels(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr(compare_training, "digits", lambda: tiny)
    asked, ran = [], []

    def spy(name):
        method = getattr(compare_training.Trainer, name)

        def run(self, *args):
            with count() as launches:
                result = method(self, *args)
            asked.append((name, current()))
            ran.append(len(launches))
            return result

        monkeypatch.setattr(compare_training.Trainer, name, run)

    spy("_step")
    spy("evaluate")
    arguments = ["--model", "cifar", "--epochs", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert compare_training.main(arguments) == 0, capsys.readouterr().out
    names = ("_step", "evaluate") * 2
    in_float64 = [("_step", "eager")]
    assert asked == [(name, wish) for wish in ("eager", "kernels") for name in names] + in_float64
    assert not any(ran[:4])
    assert all(launches > 3 * 12 for launches in ran[4:8:2]), "forward and backward of three blocks"
    found = json.loads((tmp_path / "training_parity_cifar.json").read_text())
    assert (found["network"], found["images"]) == ("three small blocks with BatchNorm", len(tiny.train_labels))
    eager, fused = found["runs"]
    assert eager["losses"] == pytest.approx(fused["losses"], rel=1e-4)
    assert eager["losses"][0] != eager["losses"][1]
    assert (tmp_path / "training_parity_cifar.png").stat().st_size > 10_000


def test_a_loss_may_be_as_far_from_float64_as_eagers():
    """With AdamW and BatchNorm eager's own rounding is 1e-3 of a loss after four steps."""
    exact, far = [loss * 1.001 for loss in LOSSES[:FIRST_STEPS]], [loss * 0.9995 for loss in LOSSES]
    runs = [run("eager", LOSSES, 0.98), run("fused", far, 0.98)]
    assert judge(runs, CPU, exact, 1000)["ok"]
    assert not judge(runs, CPU, LOSSES[:FIRST_STEPS], 1000)["ok"]


def run(block, losses, accuracy, seed=0):
    return {"block": block, "seed": seed, "losses": losses, "history": [{"epoch": 1, "test_accuracy": accuracy}]}


LOSSES = [2.0, 1.9, 1.8, 1.7, 1.6, 1.0]


@pytest.mark.parametrize(
    ("losses", "accuracy", "ok"),
    [
        (LOSSES, 0.98, True),
        ([*LOSSES[:-1], 1.1], 0.97, True),
        ([*LOSSES[:2], 1.81, *LOSSES[3:]], 0.98, False),
        (LOSSES, 0.95, False),
    ],
    ids=["equal", "a late loss and the spread of seeds", "an early loss", "the accuracy"],
)
def test_the_verdict(losses, accuracy, ok):
    runs = [run("eager", LOSSES, 0.98), run("fused", losses, accuracy), run("eager", LOSSES, 0.97, 1)]
    found = judge(runs, CPU, LOSSES[:FIRST_STEPS], 1000)
    assert found["ok"] == ok
    assert len(found["first_steps"]) == FIRST_STEPS


@pytest.mark.parametrize("argument", ["--epochs", "--seeds", "--images"])
def test_wrong_calls(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare_training.main([argument, "0"])
    assert stopped.value.code == 2
    assert f"{argument}: got 0, wants at least 1" in capsys.readouterr().err
