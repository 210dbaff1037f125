"""python -m inception_fused verify: what it writes, its exit codes, what it says without a GPU and without tqdm."""

import builtins
import json
import re

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS
from inception_fused import __main__ as command
from inception_fused.op import autograd, backends, reasons
from test_verify import quick  # noqa: F401  an autouse fixture


def test_command_writes_table_json_and_picture(tmp_path, capsys):
    files = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["--blocks", "4e,3a", "--batch", "1", "--image-size", "32", "--json", str(files[0])]
    assert command.main(["verify", *arguments, "--picture", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^3a +1x192x4x4 .* ok$", out, re.MULTILINE)
    assert "ok: every slice and gradient of 2 blocks is within its bound" in out
    data = json.loads(files[0].read_text())
    assert [block["name"] for block in data["blocks"]] == ["3a", "4e"]
    assert data["blocks"][0]["costs"]["launches_forward"]["eager"] == {"ours": 0, "aten": 14}
    assert len(data["blocks"][0]["parity"]) == 17
    assert "<svg" in files[1].read_text()


def test_command_interprets_kernels(capsys, monkeypatch):
    monkeypatch.setattr(backends, "_from_environment", "kernels")
    assert command.main(["verify", "--blocks", "3a", "--dtype", "bf16", "--no-backward"]) == 0
    out = capsys.readouterr().out
    assert "kernels ran, interpreted on the CPU" in out
    assert "time is left out" in out
    assert re.search(r"^3a +2 / 14$", out, re.MULTILINE)


def test_command_says_1_beyond_a_bound_and_for_a_kernel_that_fails(capsys, monkeypatch):
    reference = autograd.inception_reference
    small = ["verify", "--blocks", "3a", "--image-size", "32", "--no-backward"]
    monkeypatch.setattr(autograd, "inception_reference", lambda *a: reference(*a) * 1.03)
    assert command.main(small) == 1
    assert "NOT OK: beyond its bound: 3a: branch 1 (" in capsys.readouterr().out
    monkeypatch.setattr(backends, "_from_environment", "kernels")
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    assert command.main(small) == 1
    assert "demands kernels that cannot run: x is on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "3a,6z"], "got '6z', wants some of stem,3a,3b"),
        (["--batch", "0"], "got '0', wants a positive integer"),
        (["--dtype", "fp64"], "invalid choice"),
        (["--device", "cuda"], "--device: got cuda, but"),
        (["--picture", "no/such/folder.png"], "wants a file in a folder that exists"),
        (["--picture", "table.doc"], "wants a file name ending in one of"),
        (["--json", "no/such/file.json"], "wants a file in a folder that exists"),
    ],
)
def test_command_says_2_for_a_wrong_call(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        command.main(["verify", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, capsys):
    problem = "an NVIDIA driver for CUDA 12.8 answers, but torch sees no GPU; install a CUDA build of torch"
    monkeypatch.setattr("inception_fused.tools.verification.gpu_problem", lambda: problem)
    monkeypatch.setattr(command, "gpu_problem", lambda: problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["verify", "--blocks", "3a", "--image-size", "32", "--no-backward"]) == 0
    assert problem in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        command.main(["verify", "--device", "cuda"])
    assert problem in capsys.readouterr().err


def test_without_tqdm_progress_is_a_line_each(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    items = command._items(["3a"], torch.float32, torch.device("cpu"), 1, 32)
    assert list(command._progress(items)) == items
    assert "block 3a, 1 of 1" in capsys.readouterr().err


def test_info_is_as_before(capsys):
    assert command.main([]) == 0
    assert command.main(["info", "--json"]) == 0
    assert command.main(["--json"]) == 0
    assert "versions" in capsys.readouterr().out
    assert ["stem", *GOOGLENET_BLOCKS] == command._parser().get_default("blocks")
