"""The report of result files, with pieces missing too; the sections of README.md that it generates."""

from __future__ import annotations

import json
import re

import pytest

import install_cases
from benchmarks import report
from benchmarks.cases.machine import sources_hash
from benchmarks.figures import readme
from benchmarks.figures.pictures import MissingLibraryError
from benchmarks.figures.report_tables import case_table, slower_points, sums_table
from benchmarks.figures.result_files import ResultFileError, load, newest
from result_fakes import gpu_check_file, launch, nine, record, row, suite_file

MARKS = "\n".join(f"<!-- figures:{name} -->\nold\n<!-- /figures:{name} -->" for name in readme.SECTIONS)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a README whose sections are to be filled, results to come and kernels."""
    for folder in ("benchmarks/results", "docs", "csrc", "inception_fused/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{MARKS}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def made(tmp_path, *paths):
    """The report of files, as main writes it."""
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "report.md").read_text()


def cells(text, first):
    """The cells of the row whose first cells are ``first``."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return next(row for row in rows if row[: len(first)] == first)


def test_a_case_shows_every_figure_beside_its_baselines(tmp_path):
    records = [
        record(us=10, x_floor=1.25, launches=4, peak_bytes=3 << 20, host_us=30.0),
        record("3a", "eager", 25, spread=0.02, launches=20, peak_bytes=9 << 20, host_us=99.0),
        record("3a", "ours_graph", 9), record("3a", "eager_graph", 24),
        record("3a", "eager_nchw", 50), record("3a", "compile", 22), record("3a", "compile_max_autotune", 20),
    ]  # fmt: skip
    text = case_table(load(suite_file(tmp_path / "a.json", records)))
    assert cells(text, ["block"]) == [
        "block", "3a batch 128 bf16 forward", "10.0", "9.0 / 24.0", "25.0", "50.0", "20.0 (max-autotune)",
        "2.50", "2.00", "1.25", "2.0", "4 / 20", "3 / 9", "30 / 99",
    ]  # fmt: skip


def test_a_case_with_ours_or_eager_alone_is_shown_all_the_same(tmp_path):
    records = [record("3a", host_us=30.0), record("3b", "eager", launches=20), record("4a", "compile")]
    text = case_table(load(suite_file(tmp_path / "a.json", records)))
    assert cells(text, ["block", "3a batch 128 bf16 forward"])[2:] == ["10.0", *[""] * 6, "", "1.0", "", "", "30 / -"]
    assert cells(text, ["block", "3b batch 128 bf16 forward"])[11] == "- / 20"
    assert cells(text, ["block", "4a batch 128 bf16 forward"])[6] == "10.0"


def test_sums_are_over_blocks_that_have_both(tmp_path):
    records = [*nine("ours", 90), *nine("eager", 180)[1:], record("GoogLeNet", suite="network", us=30)]
    records.append(record("GoogLeNet", "eager", 45, suite="network"))
    text = sums_table(load(suite_file(tmp_path / "a.json", records)).cases)
    assert cells(text, ["8 blocks"]) == [
        "8 blocks",
        "224x224",
        "bf16",
        "128",
        "forward",
        "80.0",
        "160.0",
        "2.00",
        "2.00",
    ]
    assert cells(text, ["network GoogLeNet"])[5:] == ["30.0", "45.0", "1.50", "1.50"]
    assert "compile" not in text


def test_blocks_of_two_windows_have_sums_of_their_own(tmp_path):
    two = {"suite": "two-3x3"}
    records = [*nine("ours", 90), *nine("eager", 180), *nine("ours", 45, **two), *nine("eager", 180, **two)]
    records += [record(us=7, batch=1, **two), record("3a", "eager", 21, batch=1, **two)]
    text = sums_table(load(suite_file(tmp_path / "a.json", records)).cases)
    assert cells(text, ["9 blocks"])[5:8] == ["90.0", "180.0", "2.00"]
    assert cells(text, ["9 blocks of two-3x3"])[5:8] == ["45.0", "180.0", "4.00"]
    assert cells(text, ["block 3a two-3x3"])[5:8] == ["7.0", "21.0", "3.00"]


def test_a_network_stands_beside_itself_with_pytorchs_stem(tmp_path):
    net = dict(suite="network", image=96, size=96)
    records = [record("googlenet", name, us, **net) for name, us in (("ours", 40), ("ours_blocks", 50), ("eager", 80))]
    text = sums_table(load(suite_file(tmp_path / "a.json", records)).cases)
    assert cells(text, ["what"])[5:8] == ["ours us", "ours, stem eager us", "eager us"]
    assert cells(text, ["network googlenet"])[5:8] == ["40.0", "50.0", "80.0"]
    without = [found for found in records if found.implementation != "ours_blocks"]
    assert "stem eager" not in sums_table(load(suite_file(tmp_path / "a.json", without)).cases)


def test_slower_points_are_listed_and_noise_is_named(tmp_path):
    records = [
        record("3a", us=10), record("3a", "eager", 8), record("3b", us=10.05), record("3b", "eager", 10),
        record("4a", us=10), record("4a", "eager", 11), record("4a", "ours_graph", 12),
    ]  # fmt: skip
    path = suite_file(tmp_path / "a.json", records)
    assert slower_points(load(path)) == [
        "block 3a batch 128 bf16 forward, ours: 0.80 x eager (10.0 us, eager 8.0 us)",
        "block 3b batch 128 bf16 forward, ours: 1.00 x eager (10.1 us, eager 10.0 us, within the spread of 1.0%)",
        "block 4a batch 128 bf16 forward, ours_graph: 0.92 x eager (12.0 us, eager 11.0 us)",
    ]
    text = made(tmp_path, path)
    assert all(f"- {line}" in text for line in slower_points(load(path)))


def test_a_report_of_both_kinds_of_file(tmp_path):
    pytest.importorskip("matplotlib")
    suite = suite_file(tmp_path / "suite.json", [record(), record(implementation="eager", us=30)], day=2)
    stages = {"baselines": [row("5a", "eager", 30)], "blocks": [row("5a")], "kernels": [launch()]}
    check = gpu_check_file(tmp_path / "results.json", **stages)
    text = made(tmp_path, suite, check)
    versions = "torch 2.11.0, CUDA 13.0, Triton 3.6.0, driver 580.1"
    assert f"- NVIDIA H200, {versions}, commit 0123456789ab, 2026-01-02, suite.json" in text
    assert "- NVIDIA H200, torch 2.11.0, driver 580.2, commit fedcba987654, 2026-01-01, results.json" in text
    assert "## Slower than eager channels_last\n\nNo point." in text
    assert "K1 us (x floor)" in text
    assert "3a batch 128 bf16 forward" in text
    assert "5a batch 128 bf16 forward" in text
    assert "says nothing about the kernels" not in text
    pictures = re.findall(r"\]\((.*?)\)", text)
    assert sorted(pictures) == ["floors.png", "speedup.png", "timeline.png"]
    assert all((tmp_path / "out" / name).stat().st_size for name in pictures)


def test_a_report_without_a_gpu_says_what_it_is_worth(tmp_path):
    pytest.importorskip("matplotlib")
    records = [record(device="cpu", dtype="fp32"), record(implementation="eager", device="cpu", dtype="fp32")]
    text = made(tmp_path, suite_file(tmp_path / "a.json", records, gpu=None, dirty=True, driver=None))
    assert report.CPU_ONLY in text
    assert "no GPU, a CPU, 2 cores" in text
    assert "commit 0123456789ab with changes" in text
    assert "## Slower than eager channels_last\n\nNot measured: no point has both on a GPU." in text
    assert "Speed-up over eager: not drawn, no GPU" in text


@pytest.mark.parametrize(
    "stages",
    [
        {},
        {"environment": {"status": "failed", "error": "x"}},
        {"blocks": {"status": "cut", "error": "nothing of the budget was left"}},
        {"blocks": {"status": "ok", "rows": [{"block": "3a", "skipped": "too large"}, {"error": "e\nx"}]}},
        {"ceilings": {"status": "ok", "figures": {"device": "NVIDIA H200", "bandwidth": 4e12}}},
    ],
)  # fmt: skip
def test_a_gpu_check_with_stages_missing_cut_or_failed(tmp_path, stages):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": 1, "stages": stages}))
    text = made(tmp_path, path)
    assert "No case was measured." in text or "| stage" in text
    assert "Not measured: no point has both on a GPU." in text
    assert ("NVIDIA H200" in text.splitlines()[2]) == ("ceilings" in stages)


def test_an_empty_suite_is_reported_as_such(tmp_path):
    assert "No case was measured." in made(tmp_path, suite_file(tmp_path / "a.json", []))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"benchmarks": [', "is no JSON"),
        ("", "is no JSON"),
        ("[]", "is neither pytest-benchmark's JSON nor gpu_check's"),
        ('{"benchmarks": {}}', "is neither"),
        ('{"benchmarks": [{"extra_info": {"suite": "block", "subject": "3a"}}]}', "lacks what a result file holds"),
        ('{"benchmarks": [1]}', "lacks what a result file holds"),
        ('{"stages": {"blocks": {"rows": [{"us": 1}]}}}', "lacks what a result file holds (KeyError: 'block'"),
        ('{"stages": {"blocks": 1}}', "lacks what a result file holds"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, capsys, content, words):
    path, out = tmp_path / "bad.json", tmp_path / "out"
    path.write_text(content)
    out.mkdir()
    (out / "report.md").write_text("what was there")
    good = suite_file(tmp_path / "good.json", [record()])
    assert report.main([str(good), str(path), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{path}: " in message
    assert words in message
    assert [p.name for p in out.iterdir()] == ["report.md"]
    assert (out / "report.md").read_text() == "what was there"


def test_without_matplotlib_the_tables_are_there(tmp_path, monkeypatch):
    def missing(files, folder):
        raise MissingLibraryError("install it")

    monkeypatch.setattr(report, "draw", missing)
    assert "No pictures: install it" in made(tmp_path, suite_file(tmp_path / "a.json", [record()]))


def test_of_a_folder_a_gpus_newest_files_are_read(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    assert newest(folder) == []
    suite_file(folder / "cpu.json", [record(device="cpu")], gpu=None, day=9)
    assert [m.path.name for m in newest(folder)] == ["cpu.json"]
    suite_file(folder / "old.json", [record()], day=1)
    suite_file(folder / "new.json", [record()], day=3)
    suite_file(folder / "other.json", [record()], gpu="NVIDIA B200", day=2)
    gpu_check_file(folder / "check.json", day=2)
    (folder / "installation.json").write_text('{"cases": []}')
    assert [m.path.name for m in newest(folder)] == ["new.json", "check.json"]
    (folder / "nvidia_b200").mkdir()
    suite_file(folder / "nvidia_b200" / "newest.json", [record()], gpu="NVIDIA B200", day=4)
    assert [m.path.name for m in newest(folder)] == ["newest.json"]
    assert "newest.json" in made(tmp_path, folder)


def test_an_empty_folder_says_how_to_measure(project, capsys):
    assert report.main([]) == 2
    assert "holds no result file; measure with" in capsys.readouterr().err


def test_readme_is_what_the_result_files_say():
    """Run `python benchmarks/report.py --readme` where this fails."""
    text = (report.ROOT / "README.md").read_text()
    assert set(re.findall("<!-- figures:(.*) -->", text)) == set(readme.SECTIONS)
    assert readme.rewritten(text, readme.sections(report.ROOT, report.RESULTS)) == text


def test_readme_follows_the_result_files(project):
    pytest.importorskip("matplotlib")
    results = project / "benchmarks" / "results"
    texts, cpu_records = [], [record(device="cpu"), record("3a", "eager", 11, device="cpu")]
    steps = [
        lambda: None,
        lambda: suite_file(results / "cpu.json", cpu_records, gpu=None),
        lambda: suite_file(results / "gpu.json", [record(us=10), record("3a", "eager", 30)], day=2),
        lambda: suite_file(results / "gpu.json", [record(us=20), record("3a", "eager", 30)], day=2),
    ]
    for step in steps:
        step()
        assert report.main(["--readme"]) == 0
        texts.append((project / "README.md").read_text())
        assert texts[-1].startswith("before\n<!-- figures:")
        assert texts[-1].endswith("-->\nafter\n")
    never, cpu, gpu, slow = texts
    assert "never been measured on a GPU" in never
    assert cpu == never
    assert report.CPU_ONLY not in gpu
    assert "measured on NVIDIA H200 at commit 0123456789ab; they have changed since" in gpu
    assert ("docs/speedup.png" in never, "docs/speedup.png" in gpu) == (False, True)
    assert cells(gpu, ["block 3a"])[-2:] == ["3.00", "3.00"]
    assert cells(slow, ["block 3a"])[-2:] == ["1.50", "1.50"]
    assert sorted(path.name for path in (project / "docs").iterdir()) == ["speedup.png", "timeline.png"]


def test_readme_says_what_a_gpu_has_confirmed(project):
    results = project / "benchmarks" / "results"
    assert "Nothing here has run on a GPU yet" in readme.status([], project, results)
    timed = load(suite_file(results / "gpu.json", [record()]))
    assert "has not checked it there" in readme.status([timed], project, results)
    path = gpu_check_file(results / "check.json")
    data = json.loads(path.read_text())
    data["stages"]["tests"] = {"status": "ok", "figures": {"passed": 295}}
    path.write_text(json.dumps(data))
    text = readme.status([timed, load(path)], project, results)
    assert "(NVIDIA H200, torch 2.11.0, driver 580.2, commit fedcba987654" in text
    assert "no stage failed, 295 GPU tests passed" in text
    data["stages"]["sanitizer"] = {"status": "failed"}
    path.write_text(json.dumps(data))
    assert "failed: sanitizer, 295" in readme.status([load(path)], project, results)


def test_readme_knows_whether_the_kernels_changed(project):
    kernel = project / "csrc" / "kernel.cuh"
    kernel.write_text("one")
    path = project / "benchmarks" / "results" / "gpu.json"
    suite_file(path, [record()], kernel_sources=sources_hash(project))
    assert "they have not changed since" in readme.freshness([load(path)], project)
    kernel.write_text("two")
    assert "they have changed since" in readme.freshness([load(path)], project)
    suite_file(path, [record()], kernel_sources=None)
    assert "is not recorded" in readme.freshness([load(path)], project)


def test_readme_is_left_alone_where_a_result_file_is_damaged(project, capsys):
    (project / "benchmarks" / "results" / "bad.json").write_text("{")
    before = (project / "README.md").read_text()
    assert report.main(["--readme"]) == 2
    assert "bad.json: is no JSON" in capsys.readouterr().err
    assert (project / "README.md").read_text() == before
    assert not list((project / "docs").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "<!-- figures:performance -->\n",
        "<!-- /figures:performance -->\n<!-- figures:performance -->\n",
        "<!-- figures:performance -->\n<!-- figures:timeline -->\n<!-- /figures:performance -->\n",
        "<!-- figures:nothing -->\n<!-- /figures:nothing -->\n",
    ],
)
def test_markers_must_be_pairs_with_a_known_name(text):
    with pytest.raises(ResultFileError, match=r"README.md: (the markers|no section)"):
        readme.rewritten(text, dict.fromkeys(readme.SECTIONS, "new"))


def test_the_hosts_time_is_what_test_host_measured(project):
    results = project / "benchmarks" / "results"
    path = suite_file(results / "a.json", [record(device="cpu")], gpu=None)
    assert "test_host.py --benchmark-only` measures it" in readme.host([load(path)], project, results)
    data = json.loads(path.read_text())
    data["benchmarks"] += [
        {
            "extra_info": {"suite": "host", "mode": mode, "implementation": f"ours, {way}", "launches": launches},
            "stats": {"min": us * 1e-6, "median": 2e-6 * us},
        }
        for mode, way, launches, us in (
            ("forward", "remembered", 4, 42), ("forward", "planned", 4, 240), ("training", "remembered", 15, 264),
        )
    ]  # fmt: skip
    more = {"block": "d2l's, converted", "weights": "KCRS", "mode": "forward", "launches": 5}
    data["benchmarks"].append(
        {
            "extra_info": {"suite": "host", "implementation": "ours, remembered", **more},
            "stats": {"min": 5e-5, "median": 6e-5},
        }
    )
    path.write_text(json.dumps(data))
    text = readme.host([load(path)], project, results)
    assert cells(text, ["forward"])[1:] == ["channels_last", "4", "42 (84)", "240 (480)"]
    assert cells(text, ["forward + backward"])[1:] == ["channels_last", "15", "264 (528)", ""]
    assert cells(text, ["forward, d2l's, converted"])[1:] == ["KCRS", "5", "50 (60)", ""]


def test_installation_is_what_install_cases_wrote(project):
    facts = [
        {"case": "nvcc", "what": "nvcc there", "status": "as expected", "seconds": 26.4, "seconds_again": 9.6,
         "build": {"built": True, "reason": None, "nvcc": "/usr/bin"}},
        {"case": "nothing", "what": "no nvcc", "status": "as expected", "seconds": 3.2, "build": {"built": False}},
        {"case": "wheel", "what": "a wheel", "status": "FAILED", "why": "broken"},
    ]  # fmt: skip
    path = project / "benchmarks" / "results" / "installation.json"
    assert "not recorded for this version" in readme.installation([], project, path.parent)
    install_cases.record(path, facts)
    assert "/usr/bin" not in path.read_text()
    text = readme.installation([], project, path.parent)
    assert cells(text, ["nvcc there"]) == ["nvcc there", "26; 10", "built"]
    assert cells(text, ["no nvcc"]) == ["no nvcc", "3", "left out, with reason and remedy"]
    assert cells(text, ["a wheel"]) == ["a wheel", "", "FAILED"]
    facts[1]["seconds"] = 4.4
    install_cases.record(path, facts)
    assert cells(readme.installation([], project, path.parent), ["no nvcc"])[1] == "4"
    path.write_text("[]")
    assert report.main(["--readme"]) == 2
    assert not list((project / "docs").iterdir())
