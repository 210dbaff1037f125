"""What explain, verify, precompile and checked mode say to somebody who has not read the README."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from inception_fused import FusedInception, InceptionInputError, backend, convert_, explain, precompile, verify
from inception_fused.op import checking
from inception_fused.tools.explanation import Explanation, Row
from marks import full

CONFIG = (24, 16, (8, 24), (8, 16), 8)
X = torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(1))


class Normed(nn.Module):
    """A block with BatchNorm behind each convolution; ``wrong`` takes the place of the last."""

    def __init__(self, c=24, wrong=None):
        super().__init__()

        def conv(c, k, r=1):
            return nn.Sequential(nn.Conv2d(c, k, r, padding=r // 2), nn.BatchNorm2d(k), nn.ReLU())

        self.one, self.two = conv(c, 16), nn.Sequential(conv(c, 8), conv(8, 24, 3))
        self.three = nn.Sequential(conv(c, 8), conv(8, 16, 3))
        self.four = nn.Sequential(nn.MaxPool2d(3, 1, 1), wrong or conv(c, 8))

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x), self.three(x), self.four(x)], 1)


class Net(nn.Module):
    """Flattens what its block returns as old models do."""

    def __init__(self, block=None):
        super().__init__()
        self.block, self.head = block or FusedInception(*CONFIG), nn.Linear(64 * 30, 3)

    def forward(self, x):
        x = self.block(x)
        return self.head(x.view(x.size(0), -1))


VIEWED = "x = self.block(x)\n", "x.view(x.size(0), -1)"
CURE = "a fused block returns channels_last memory, which .view cannot flatten; write .flatten(1) or .reshape there"


def last(explanation):
    """The line below the table."""
    return " ".join(str(explanation).split("\n\n")[0].splitlines()[-2:])


def test_explain_says_what_runs_in_this_mode():
    """BatchNorm may train, or some of it be frozen."""
    model = convert_(nn.Sequential(Normed(), Normed(64)))
    frozen = copy.deepcopy(model)
    frozen[1].two.eval()
    for some in (model, frozen, copy.deepcopy(model).eval()):
        with backend("kernels"):
            assert last(explain(some)).endswith("2 of 2 are fused blocks; 2 of 2 run kernels now")
            assert {row.path for row in explain(some).rows} == {"kernels"}
        with backend("eager"):
            assert last(explain(some)).endswith("0 of 2 run kernels now, because backend is eager")
        assert last(explain(some)).endswith(
            "2 of 2 are fused blocks; 0 of 2 run kernels now, because x is on the CPU; kernels run on a CUDA device, "
            "or on a CPU under TRITON_INTERPRET=1 INCEPTION_FUSED_BACKEND=kernels"
        )
        assert explain(some).notes == ()
        # In eval the launch that rewrites weights folds BatchNorm into them, whatever their strides are.
        saves = ["convert_(model, channels_last=True) saves it" in row.remedy for row in explain(some).rows]
        assert saves == [some.training] * 2
    model[1].one[1] = nn.SyncBatchNorm(16)
    with backend("kernels"):
        assert last(explain(model)).endswith(
            "1 of 2 run kernels now; 1 does not, because one.1 is a SyncBatchNorm, not a BatchNorm2d"
        )


def test_a_reason_of_several_lines_is_shown_in_one():
    (*_, line, _) = str(Explanation((Row("a", "Block", "converted", "5x5", "eager: one\n\n  two"),))).splitlines()
    assert line.endswith("eager: one two")


def test_explain_counts_what_is_left_alone():
    model = convert_(nn.Sequential(Normed(), Normed(64, wrong=nn.AvgPool2d(3, 1, 1))).eval())
    with backend("kernels"):
        text = str(explain(model))
    assert text.endswith("1 of 2 are fused blocks; 1 of 2 run kernels now")
    assert last(explain(nn.Sequential(Normed()))).endswith("0 of 1 is a fused block; convert_(model) converts it")


@pytest.mark.parametrize("x", [None, X], ids=["model", "with x"])
def test_explain_survives_a_block_without_parameters(x):
    """Such as one whose layers were quantized."""
    block = convert_(Normed().eval())
    for layers in [m for m in block.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layers[i] = nn.Identity()
    assert not list(block.parameters())
    (row,) = explain(block, x).rows
    assert row.state == "converted"
    assert row.path.startswith("eager: one.0 is an Identity, not a Conv2d")


@pytest.mark.parametrize("tool", [verify, precompile], ids=["verify", "precompile"])
def test_an_unconverted_model_is_told_to_convert(tool):
    with pytest.raises(InceptionInputError) as caught:
        tool(nn.Sequential(Normed(), Normed(64)), X)
    said = "whose Inception blocks are not converted (0, 1); call inception_fused.convert_(model) first"
    assert str(caught.value) == f"model: got Sequential {said}"
    with pytest.raises(InceptionInputError) as caught:
        tool(nn.Sequential(Normed(wrong=nn.AvgPool2d(3, 1, 1))), X)
    assert str(caught.value).startswith(
        "model: got Sequential without any fused block: 0 looks like one, but four.1 is an AvgPool2d; a branch"
    )
    with pytest.raises(
        InceptionInputError, match=re.escape("convert_(model) where it has Inception blocks of its own")
    ):
        tool(nn.Linear(2, 2), X)


@pytest.mark.parametrize("tool", [explain, verify, precompile], ids=["explain", "verify", "precompile"])
@pytest.mark.parametrize("block", [FusedInception, lambda *_: convert_(Normed().eval())], ids=["built", "converted"])
def test_a_view_behind_a_block_is_recognised(tool, block):
    with pytest.raises(InceptionInputError) as caught:
        tool(Net(block(*CONFIG)), X)
    text = str(caught.value)
    assert text.startswith("model: model(x) fails: view size is not compatible")
    assert "forward, line " in text
    assert text.endswith(f"{VIEWED[1]}): {CURE}")
    assert "x: got" not in text


def test_another_view_is_not_blamed_on_a_block():
    class Other(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).view(2, -1)

    with pytest.raises(InceptionInputError, match=r"^x: got shape \(2, 24, 5, 6\)"):
        explain(nn.Sequential(Other(), Normed()), X)


def test_explain_reads_the_forwards_of_a_model():
    (note,) = explain(Net()).notes
    assert re.fullmatch(rf"Net.forward, line \d+: {re.escape(f'{VIEWED[1]}: {CURE}.')}", note)
    assert explain(nn.Sequential(FusedInception(*CONFIG))).notes == ()


def test_checked_mode_names_the_cure():
    net = Net()
    with checking.checked(), pytest.raises(RuntimeError, match=re.escape(CURE)) as caught:
        net(X)
    assert "view size is not compatible" in str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        net(X)
    assert CURE not in str(caught.value)
    with checking.checked(), pytest.raises(RuntimeError) as caught:
        X.permute(0, 3, 2, 1).view(2, -1)
    assert CURE not in str(caught.value)


@full
def test_checked_mode_by_the_environment(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import torch\nfrom inception_fused import FusedInception\n"
        "FusedInception(24, 16, (8, 24), (8, 16), 8)(torch.randn(2, 24, 5, 6)).view(2, -1)\n"
    )
    import os

    done = subprocess.run(
        [sys.executable, script], env=os.environ | {"INCEPTION_FUSED_CHECK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert CURE in done.stderr
