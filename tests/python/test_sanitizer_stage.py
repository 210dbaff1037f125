"""gpu_check's sanitizer stage without a GPU: what a verdict needs, a tool that behaves as told, the cases."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

import gpu_check
from checks.block_cases import DTYPES, Block, backward
from gpu import sanitizer_cases, sanitizer_stage
from gpu.sanitizer_stage import CHECKS, Check, command_of, judge
from gpu.stages import STAGES
from inception_fused.block.views import row_stride
from inception_fused.plan.launches import USUAL
from inception_fused.runtime.submit import record

MEMCHECK, RACECHECK, FAULTY, OPTIONAL = (
    next(check for check in CHECKS if check.name == name)
    for name in ("memcheck", "racecheck", "self-check", "memcheck-triton")
)
BANNER = "========= COMPUTE-SANITIZER\n"
DONE = f"45 {sanitizer_cases.DONE}\n"
INVALID = "========= Invalid __global__ write of size 16 bytes\n=========     at grouped_gemm_kernel+0x1f0\n"
REFUSED = (
    "========= Error: Device not supported. "
    'Please refer to the "Supported Devices" section of the sanitizer documentation\n'
)
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: {0} displayed ({1} errors, {2} warnings)\n"


@pytest.mark.parametrize(
    ("check", "code", "text", "kind", "words"),
    [
        (Check("alone", None), 0, DONE, "value", "45 cases right"),
        (Check("alone", None), 1, "WRONG: torch.float16 unaligned: y1\n45 cases, 1 wrong\n", "error", "WRONG: torch.f"),
        (Check("alone", None), -11, "native torch.float32 128x128\n", "error", "exit code -11"),
        (Check("alone", None), 0, f"0 {sanitizer_cases.DONE}\n", "error", "did not end well"),
        (MEMCHECK, 0, BANNER + DONE + CLEAN, "value", "45 cases right, 0 errors"),
        (MEMCHECK, 86, BANNER + INVALID + DONE + "========= ERROR SUMMARY: 3 errors\n", "error", "3 errors"),
        # A tool that reports nothing of a program that never ran, or says nothing at all.
        (MEMCHECK, 0, BANNER + CLEAN, "error", "did not end well"),
        (MEMCHECK, 0, BANNER + DONE, "error", "no summary"),
        (MEMCHECK, 1, BANNER + "45 cases, 2 wrong\n" + CLEAN, "error", "did not end well"),
        (MEMCHECK, 255, "========= Error: Target application terminated before first\n", "error", "Target application"),
        (MEMCHECK, 86, BANNER + REFUSED + DONE + "========= ERROR SUMMARY: 2 errors\n", "skipped", "Supported Devices"),
        (MEMCHECK, None, BANNER, "error", "no result after 30 s"),
        (RACECHECK, 0, BANNER + DONE + RACES.format("0 hazards", 0, 0), "value", "0 errors"),
        (RACECHECK, 86, BANNER + DONE + RACES.format("1 hazard", 1, 0), "error", "1 errors"),
        (RACECHECK, 0, BANNER + DONE + RACES.format("2 hazards", 0, 2), "error", "2 errors"),
        (FAULTY, 86, BANNER + INVALID + "========= ERROR SUMMARY: 64 errors\n", "value", "sees the write"),
        (FAULTY, 0, BANNER + "wrote 1 KB beyond a tensor\n" + CLEAN, "error", "the tool sees nothing"),
        (
            FAULTY,
            86,
            BANNER + "========= Program hit error 1\n========= ERROR SUMMARY: 1 error\n",
            "error",
            "sees noth",
        ),
        (FAULTY, 86, BANNER + REFUSED + "========= ERROR SUMMARY: 1 error\n", "skipped", "not supported"),
        (OPTIONAL, None, BANNER, "skipped", "raise --budget"),
        (OPTIONAL, None, BANNER + INVALID, "error", "Invalid __global__ write"),
        (OPTIONAL, 1, "KernelError: Triton\n", "error", "no summary"),
    ],
)
def test_the_verdict(check, code, text, kind, words):
    row = judge(check, code, text, 30.0)
    assert words in row[kind]
    assert [key for key in ("value", "skipped", "error") if key in row] == [kind]


TOOL = f"""#!{sys.executable} -IS
import os, sys, time
tool = sys.argv[sys.argv.index("--tool") + 1] if "--tool" in sys.argv else "help"
if tool == "help":
    print("Version 2025.2.1.0 (build 1)\\n  --kernel-name arg\\n  --padding arg (=0)\\n  --launch-timeout arg")
    sys.exit()
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert "--padding" in sys.argv or tool != "memcheck"
faulty = "--overrun" in sys.argv
mode = os.environ["FAKE"]
if mode == "hangs" and tool == "racecheck":
    time.sleep(60)
print("========= COMPUTE-SANITIZER")
if mode == "unsupported":
    print({REFUSED!r} + {DONE!r} + "========= ERROR SUMMARY: 1 error")
    sys.exit(86)
errors = 3 if faulty and mode != "blind" or mode == "finds" and tool == "synccheck" else 0
if errors:
    print({INVALID!r} if faulty else "========= Barrier error detected. Divergent thread(s) in block")
print({DONE!r} + ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if tool == "racecheck"
                  else f"========= ERROR SUMMARY: {{errors}} errors"))
sys.exit(86 if errors else 0)
"""


@pytest.fixture
def fake_tool(run, loads, tmp_path, monkeypatch):
    """Runs the stage with a compute-sanitizer that behaves as told, and a program that is right by itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(TOOL)
    (folder / "compute-sanitizer").chmod(0o755)
    (tmp_path / "program.py").write_text(f"print({DONE!r}, end='')")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer_stage, "PROGRAM", tmp_path / "program.py")

    def run_it(mode: str) -> dict[str, dict]:
        monkeypatch.setenv("FAKE", mode)
        gpu_check.run_stages(run, [next(s for s in STAGES if s.name == "sanitizer")])
        return {row["name"]: row for row in run.stage["rows"]}

    return run_it


def test_a_clean_kernel_passes(fake_tool, run, tmp_path):
    rows = fake_tool("clean")
    assert list(rows) == ["alone", "self-check", "memcheck", "racecheck", "synccheck", "memcheck-triton"]
    assert run.stage["status"] == "ok"
    assert all("value" in row and row["seconds"] >= 0 for row in rows.values()), rows
    assert rows["self-check"]["errors"] == 3
    assert [rows[name]["errors"] for name in ("memcheck", "racecheck", "synccheck")] == [0, 0, 0]
    assert run.stage["figures"] == {"tool": str(tmp_path / "bin" / "compute-sanitizer"), "version": "2025.2.1.0"}
    assert "RACECHECK SUMMARY" in (tmp_path / "sanitizer-racecheck.log").read_text()


@pytest.mark.parametrize(
    ("mode", "failed", "words"),
    [("finds", "synccheck", "Barrier error detected"), ("blind", "self-check", "the tool sees nothing")],
)
def test_a_finding_and_a_blind_tool_fail_the_stage(fake_tool, run, mode, failed, words):
    rows = fake_tool(mode)
    assert [name for name, row in rows.items() if "error" in row] == [failed]
    assert words in rows[failed]["error"]
    assert run.stage["status"] == "failed"
    assert f"{failed} failed" in run.stage["error"]


def test_a_refused_device_is_skipped_in_the_tools_words_and_not_asked_again(fake_tool, run):
    rows = fake_tool("unsupported")
    assert run.stage["status"] == "ok"
    assert "value" in rows.pop("alone")
    assert all("Device not supported" in row["skipped"] for row in rows.values())
    assert [name for name, row in rows.items() if "seconds" in row] == ["self-check"]


def test_a_hanging_run_is_killed_and_the_next_one_runs(fake_tool, run, monkeypatch):
    monkeypatch.setattr(sanitizer_stage, "LEAST_S", 0.1)
    monkeypatch.setattr(sanitizer_stage, "SHARE", 8 / 1000)
    rows = fake_tool("hangs")
    assert "no result after" in rows["racecheck"]["error"]
    assert "value" in rows["synccheck"]
    assert run.stage["status"] == "failed"


def test_a_spent_budget_cuts_runs(fake_tool, run, monkeypatch):
    monkeypatch.setattr(sanitizer_stage, "SHARE", 0.0)
    run.stage["rows"] = []
    monkeypatch.setattr(sanitizer_stage, "CHECKS", CHECKS[:4])
    sanitizer_stage.sanitizer(run)
    assert run.stage["cut"] == 4
    assert run.stage["rows"] == []


def test_without_the_tool_the_program_runs_alone(fake_tool, run, monkeypatch):
    monkeypatch.setattr(sanitizer_stage, "find_tool", lambda: None)
    rows = fake_tool("clean")
    assert "value" in rows.pop("alone")
    assert all("install a CUDA toolkit" in row["skipped"] for row in rows.values())
    assert run.stage["status"] == "ok"


def test_the_tool_is_found_in_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text("")
    (tmp_path / "bin" / "compute-sanitizer").chmod(0o755)
    assert sanitizer_stage.find_tool() == str(tmp_path / "bin" / "compute-sanitizer")


def test_options_that_a_tool_does_not_know_are_left_out():
    known = "--kernel-name arg --padding arg --report-api-errors arg --launch-timeout arg --destroy-on-device-error"
    command = command_of(MEMCHECK, "tool", known)
    assert command[:5] == ["tool", "--tool", "memcheck", "--error-exitcode", "86"]
    assert command[command.index("--kernel-name") + 1] == "kernel_substring=grouped_gemm_kernel"
    assert "--target-processes" not in command
    assert "--padding" not in command_of(RACECHECK, "tool", known)
    assert command_of(FAULTY, "tool", "")[5:] == [sys.executable, str(sanitizer_stage.PROGRAM), "--overrun"]


def test_the_names_of_the_watched_kernels_are_those_of_the_sources():
    text = "".join(
        path.read_text() for folder in ("csrc", "inception_fused/kernels")
        for path in sorted((sanitizer_stage.PROGRAM.parents[2] / folder).iterdir()) if path.suffix in (".py", ".cuh")
    )  # fmt: skip
    for name in sanitizer_stage.NATIVE_KERNELS:
        assert re.search(rf"__global__ void .*{name}\(", text)
    assert {name for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE) if name != "probe_kernel"} == set(
        sanitizer_stage.TRITON_KERNELS
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cases_take_every_tile_of_the_native_kernel(dtype):
    known = USUAL.forward.reductions.kernel.native
    compiled = {(*tile, True) for tile in (*known.large, known.small)} | {(*known.unaligned, False)}
    taken = {}
    for case in sanitizer_cases.CASES:
        block_m, block_n, aligned = taken[case.name] = sanitizer_cases.native_tile(
            sanitizer_cases.make(case, dtype, "cpu")
        )
        assert case.name.startswith(f"{block_m}x{block_n}" if aligned else "unaligned"), case
    assert set(taken.values()) == compiled


def test_the_cases_are_slices_too():
    for case in sanitizer_cases.CASES:
        block = sanitizer_cases.make(case, torch.bfloat16, "cpu")
        assert row_stride(block.x) == (case.wide[0] if case.wide else case.config.in_channels)
        if case.wide:
            last = block.x.storage_offset() + (block.shape.gemm_m - 1) * case.wide[0] + case.config.in_channels
            assert last == block.x.untyped_storage().nbytes() // 2, "x ends where the allocation ends"


def test_a_wrong_result_of_a_case_is_found():
    for case in sanitizer_cases.CASES[3:]:
        block = sanitizer_cases.make(case, torch.float32, "cpu")
        out = block.forward("eager", save=case.save)
        sanitizer_cases.check(block, out, "native")
        y = out[0].clone()
        y[-1, 0, -1, -1] += 1
        with pytest.raises(AssertionError, match="y1"):
            sanitizer_cases.check(block, (y, *out[1:]), "native")
        if case.save:
            wrong = out[1].clone()
            wrong[-1, block.shape.r_offsets[1]] += 1
            with pytest.raises(AssertionError, match="r5"):
                sanitizer_cases.check(block, (out[0], wrong, *out[2:]), "native")
        if len(out[2]):
            wrong = out[2].clone()
            wrong[-1, 0] ^= 1
            with pytest.raises(AssertionError, match="bits of y1"):
                sanitizer_cases.check(block, (*out[:2], wrong, out[3]), "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stems_cases_are_judged(dtype, monkeypatch):
    """Triton's alone, interpreted, at a small size: a wrong element of y, of a gradient."""
    assert set(sanitizer_cases.cases("triton")) - set(sanitizer_cases.cases("native")) == {*sanitizer_cases.STEM_CASES}
    for case in sanitizer_cases.STEM_CASES:
        block = sanitizer_cases.make(case._replace(shape=(2, 3, 5)), dtype, "cpu")
        assert row_stride(block.x) == (case.wide[0] if case.wide else case.config.in_channels)
        out = block.forward("kernels")
        sanitizer_cases.check(block, out, "triton")
        wrong = out[0].clone()
        wrong[-1, 0, -1, -1] += 1
        with pytest.raises(AssertionError, match="^2: Error"):
            sanitizer_cases.check(block, (wrong, *out[1:]), "triton")
        wrong = out[2].clone()
        wrong[-1, 0] ^= 1
        with pytest.raises(AssertionError, match="bits of y2"):
            sanitizer_cases.check(block, (*out[:2], wrong, out[3]), "triton")
        monkeypatch.setattr(sanitizer_cases, "called", lambda case, call: [g * 1.5 for g in call()])
        with pytest.raises(AssertionError, match="gradient of x"):
            sanitizer_cases.check_gradients(case, block, out, "triton")


def test_the_program_counts_its_cases(monkeypatch, capsys):
    """With every kernel in ATen, since there is no device here."""
    make, forward = sanitizer_cases.make, Block.forward
    monkeypatch.setattr(sanitizer_cases, "CASES", [c for c in sanitizer_cases.CASES[3:] if not c.own_stream])
    monkeypatch.setattr(sanitizer_cases, "NORMED_CASES", ())
    monkeypatch.setattr(sanitizer_cases, "make", lambda case, dtype: make(case, dtype, "cpu"))
    monkeypatch.setattr(Block, "forward", lambda self, wish, save: forward(self, "eager", save=save))
    monkeypatch.setattr(sanitizer_cases, "backward", lambda block, out, dy, wish: backward(block, out, dy, "eager"))
    assert sanitizer_cases.main(["--kernels", "native"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"30 {sanitizer_cases.DONE}"
    assert judge(Check("alone", None), 0, last, 1.0)["value"] == "30 cases right"

    def wrong_backward(block, out, dy, wish):
        dx, *rest = backward(block, out, dy, "eager")
        return [dx * 1.5, *rest]

    with monkeypatch.context() as patched:
        patched.setattr(sanitizer_cases, "backward", wrong_backward)
        assert sanitizer_cases.main([]) == 1
        saving = sum(case.save for case in sanitizer_cases.CASES) * len(DTYPES)
        assert capsys.readouterr().out.count("gradient of x: Error") == saving

    def wrong(self, wish, save):
        y, *rest = forward(self, "eager", save=save)
        return y + 1, *rest

    monkeypatch.setattr(Block, "forward", wrong)
    assert sanitizer_cases.main([]) == 1
    text = capsys.readouterr().out
    assert text.endswith("30 cases, 30 wrong\n")
    assert "WRONG: torch.float32 unaligned: y1" in judge(Check("alone", None), 1, text, 1.0)["error"]


def test_the_overrun_overruns_y_and_nothing_else():
    with record() as launches:
        sanitizer_cases.overrun("cpu")
    (launch,) = launches
    a = launch.arguments
    size = {name: a[name][0].tensor.numel() for name in ("x", "y", "r")}
    assert a["bits"] == (0, 0)
    assert (a["m"] - 8) * a["y"][1] == size["y"]
    assert a["m"] * a["x"][1] == size["x"]
    assert a["m"] * a["r"][1] == size["r"]
    assert all(a[name][0].offset == 0 for name in ("x", "y", "r"))
    assert [w.tensor.numel() for w in a["w"]] == [k * a["c"] for k in a["k"]]
    assert (*a["tile"], a["aligned"]) == (*USUAL.forward.reductions.kernel.native.small, True)
