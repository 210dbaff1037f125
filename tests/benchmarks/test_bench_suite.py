"""The cases as data, the records in the JSON, and the closing table."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.cases.records import COMPILE, FIELDS, SUITES, Record, load, load_machine, of_extra_info, with_ratios
from benchmarks.cases.runner import blocks_of, inputs_of, module_of
from benchmarks.cases.suite import Case, cases
from benchmarks.figures.closing import CPU_NOTE, closing, table
from inception_fused import GOOGLENET_BLOCKS, FusedInception
from inception_fused.conversion.converted import ConvertedBlock
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.pools import FusedPool
from inception_fused.modules.stem import FusedStem


def test_without_options_a_gpu_measures_three_blocks_and_the_network():
    chosen = cases(gpu=True)
    assert {case.subject for case in chosen} == {"3a", "4e", "5b", "googlenet"}
    normed = [case for case in chosen if case.suite == "batch-norm"]
    assert [case.mode for case in normed] == ["training"] * 3 * 5
    large = [case for case in chosen if case.subject == "googlenet" and case.image == 224]
    assert {case.implementation for case in large} == {"ours", "ours_blocks", "eager"}
    assert {(case.size, case.batch) for case in large} == {(224, 128)}
    others = [case for case in chosen if case not in (*normed, *large)]
    assert len(others) == 4 * 2 * 2 * 2 * 5
    assert {case.implementation for case in others} == {"ours", "ours_graph", "eager", "eager_nchw", "compile"}
    assert "3a-128-bf16-training-ours" in [case.id for case in others]
    assert {(case.image, case.size) for case in others if case.subject == "googlenet"} == {(96, 96)}
    assert sum(case.seconds for case in chosen if case.implementation not in COMPILE) < 400, "of 480, by the guess"
    assert {case.size for case in chosen if case.subject == "4e"} == {14}


def test_the_matrix_is_whole():
    chosen = cases(gpu=True, full=True)
    ids = [case.id for case in chosen]
    assert len(set(ids)) == len(ids)
    assert {case.suite for case in chosen} == set(SUITES)
    blocks = [case for case in chosen if case.suite == "block" and case.implementation == "ours"]
    assert len(blocks) == 9 * 2 * 3 * 3 * 2
    assert {case.implementation for case in chosen} >= set(COMPILE)
    assert {case.batch for case in chosen if case.implementation == "eager_graph"} == {1}
    assert {"kernelbench6-10-tf32-forward-compile_max_autotune", "3b@96-32-fp16-training-ours"} <= set(ids)
    assert {case.id for case in cases(gpu=True)} < set(ids)
    (six,) = (case for case in chosen if case.id == "kernelbench6-10-tf32-forward-ours")
    assert (six.point.config, six.point.activation, six.point.size) == (GOOGLENET_BLOCKS["4a"], None, 224)


@pytest.mark.parametrize("full", [False, True])
def test_a_cut_costs_what_is_worth_least(full):
    chosen = cases(gpu=True, full=full)
    compiled = [case.implementation in COMPILE for case in chosen]
    assert compiled == sorted(compiled)
    quick = [case for case in chosen if case.implementation not in COMPILE]
    assert [case.rank for case in quick] == sorted(case.rank for case in quick)
    assert [case.implementation for case in chosen[:4]] == ["ours", "eager", "ours_graph", "eager_nchw"]
    assert (chosen[0].batch, chosen[0].dtype, chosen[-1].batch, chosen[-1].dtype) == (128, "bf16", 1, "tf32")


def test_what_is_left_out():
    assert not any(case.implementation in COMPILE for case in cases(gpu=True, full=True, compile=False))
    small = cases(gpu=False)
    assert {case.implementation for case in small} == {"ours", "ours_blocks", "eager", "eager_nchw"}
    assert {case.dtype for case in small} == {"fp32"}
    assert {case.suite for case in small} == {"block", "network", "two-3x3", "batch-norm", "kernelbench6"}
    assert any("5b" in case.id for case in small), "what continuous integration asks for"
    assert max(case.batch for case in cases(gpu=False, full=True)) <= 4


@pytest.mark.parametrize("gpu", [False, True])
def test_a_network_is_measured_with_and_without_its_stem(gpu):
    chosen = [case for case in cases(gpu=gpu, full=True) if case.implementation == "ours_blocks"]
    assert {(case.suite, case.subject) for case in chosen} == {("network", "googlenet")}
    if gpu:
        points = {(case.image, case.batch, case.dtype, case.mode) for case in chosen}
        assert len(points) == len(chosen) == 2 * 3 * 3 * 2
        assert {(image, batch) for image, batch, *_ in points} == {(s, b) for s in (224, 96) for b in (1, 32, 128)}
    for case in chosen:
        others = [replace(case, implementation=name) for name in ("ours", "eager")]
        assert {other.id for other in others} < {found.id for found in cases(gpu=gpu, full=True)}
    case = replace(chosen[0], image=64, batch=1, dtype="fp32")
    found = {name: module_of(replace(case, implementation=name), "cpu", fused=True) for name in ("ours", "ours_blocks")}
    assert isinstance(found["ours"].b2, FusedStem)
    assert type(found["ours_blocks"].b2) is nn.Sequential
    assert not any(isinstance(m, (FusedPool, FusedEntry)) for m in found["ours_blocks"].modules())
    assert sum(isinstance(m, FusedPool) for m in found["ours"].modules()) == 4
    assert list(found["ours"].state_dict()) == list(found["ours_blocks"].state_dict())
    pairs = zip(found["ours"].parameters(), found["ours_blocks"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sum(isinstance(m, FusedInception) for m in found["ours_blocks"].modules()) == 9
    assert not any(isinstance(m, FusedStem) for m in module_of(case, "cpu").modules())


def test_blocks_of_two_windows():
    chosen = [case for case in cases(gpu=True, full=True) if case.suite == "two-3x3"]
    assert {case.subject for case in chosen} == set(GOOGLENET_BLOCKS)
    (case,) = (case for case in chosen if case.id == "4e-two-3x3-128-bf16-training-ours")
    assert (case.size, case.point.branch3, case.slices) == (14, (3, 3), (256, 320, 128, 128))
    shape = case.point.shape
    assert (shape.filters[3:6], shape.sides[3:6]) == ((32, 128, 128), (1, 3, 3))
    one = replace(case, suite="block")
    assert (one.point.branch3, one.id) == ((5,), "4e-128-bf16-training-ours")
    assert {point.branch3 for point in blocks_of(case)} == {(3, 3)}
    ours, eager = (module_of(replace(case, batch=1), "cpu", fused=fused) for fused in (True, False))
    assert [tuple(conv.weight.shape[:3]) for conv in (ours.p3_2, ours.p3_3)] == [(128, 32, 3), (128, 128, 3)]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), eager.parameters(), strict=True))
    # A convolution's output in two tensors more than of one window, and the weights.
    more = 14 * 14 * 128 * 2 * 128 + 9 * 128 * (32 + 128) + 128 - 25 * 32 * 128
    assert replace(case, implementation="eager").needed_bytes() - replace(
        one, implementation="eager"
    ).needed_bytes() == (2 * 4 * more)


def test_blocks_with_batch_norm():
    chosen = [case for case in cases(gpu=True, full=True) if case.suite == "batch-norm"]
    assert {case.subject for case in chosen} == set(GOOGLENET_BLOCKS)
    assert {case.mode for case in chosen} == {"training"}
    assert {case.implementation for case in chosen} >= {"ours", "ours_graph", "eager", *COMPILE}
    (case,) = (case for case in chosen if case.id == "4e-batch-norm-128-bf16-training-ours")
    assert (case.size, case.point.branch3, case.slices) == (14, (3,), (256, 320, 128, 128))
    ours, eager = (module_of(replace(case, batch=1), "cpu", fused=fused) for fused in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), eager.parameters(), strict=True))
    assert list(ours.state_dict()) == list(eager.state_dict())
    assert isinstance(ours, ConvertedBlock)
    assert not isinstance(eager, ConvertedBlock)
    assert ours.training
    # BatchNorm's output beside the usual two of a convolution, and ReLU's.
    assert case.needed_bytes() > replace(case, suite="two-3x3").needed_bytes() / 2


def test_memory_of_kernelbench_6_by_hand():
    """501,760 pixels of block 4a: x 480, six convolutions of 624 channels with a ReLU's output each, a pool of 480 with
    indices, an output of 512; the parity test in float64 with gradients doubles that of ours."""
    case = Case("kernelbench6", "4a", 224, 10, "tf32", "forward", "eager")
    pixels, weights = 10 * 224 * 224, 480 * (192 + 96 + 16 + 64) + 9 * 96 * 208 + 25 * 16 * 48 + 624
    elements, indices = pixels * (480 + 2 * 624 + 480 + 512) + weights, pixels * 480 * 8
    assert case.needed_bytes() == 4 * elements + indices + 2**30
    assert replace(case, mode="training").needed_bytes() == 8 * elements + indices + 2**30
    assert replace(case, implementation="ours").needed_bytes() == 16 * elements + indices + 2**30


def test_every_case_has_a_gate_and_work():
    for case in cases(gpu=True, full=True):
        assert all(0 < limit < 3 for limit in case.limits)
        works = case.works()
        assert len(works) == (11 if case.suite == "cifar" else 13 if case.is_network else 1)
        assert all(work.flop > 0 and work.bytes > 0 for work in works)
        assert case.needed_bytes() > 2**30
        assert len(blocks_of(case)) == (
            0 if case.suite in ("torchvision", "cifar", "batch-norm") else 9 if case.is_network else 1
        )


def test_an_implementation_gets_the_same_weights_and_inputs_as_any_other():
    case = Case("network", "googlenet", 32, 2, "bf16", "training", "ours")
    ours, eager = module_of(case, "cpu", torch.channels_last, fused=True), module_of(case, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), eager.parameters(), strict=True))
    (x, dy), (x_nchw, dy_nchw) = (inputs_of(case, "cpu", f) for f in (torch.channels_last, torch.contiguous_format))
    assert torch.equal(x, x_nchw)
    assert torch.equal(dy, dy_nchw)
    assert (x.dtype, tuple(x.shape), tuple(dy.shape), x.requires_grad) == (
        torch.bfloat16,
        (2, 1, 32, 32),
        (2, 10),
        False,
    )


def record(implementation, us, **changes):
    base = Record(
        suite="block", subject="3a", image=224, size=28, batch=128, dtype="bf16", mode="forward",
        implementation=implementation, device="a card", device_us=us, spread=0.01, calls=20, x_floor=us / 40,
    )  # fmt: skip
    return replace(base, **changes)


def test_ratios_are_against_the_same_point():
    found = with_ratios(
        [
            record("ours", 50.0),
            record("eager", 200.0),
            record("compile", 150.0),
            record("compile_max_autotune", 100.0),
            record("ours", 50.0, batch=1),
            record("eager", 40.0, batch=1),
            record("ours", 50.0, image=96),
        ]
    )
    assert [(r.x_eager, r.x_compile) for r in found] == [
        *((4.0, 2.0), (1.0, 0.5), (200 / 150, 100 / 150), (2.0, 1.0)),
        *((0.8, None), (1.0, None), (None, None)),
    ]


def test_a_cpu_has_no_ratios():
    found = with_ratios(replace(record(name, us), device="cpu") for name, us in (("ours", 50.0), ("eager", 200.0)))
    assert [(r.x_eager, r.x_compile) for r in found] == [(None, None)] * 2


def test_records_survive_the_json(tmp_path):
    kept = [record("ours", 50.0, launches=4), record("eager", 200.0)]
    entries = [{"name": r.implementation, "extra_info": {**r.extra_info(), "more": 1}} for r in kept]
    others = [{"name": "host", "extra_info": {"suite": "host", "device_us": 3.0}}, {"name": "x", "extra_info": {}}]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"machine_info": {"gpu": "a card"}, "benchmarks": [*others, *entries]}))
    assert load(path) == kept
    assert load_machine(path) == {"gpu": "a card"}
    assert of_extra_info(others[0]["extra_info"]) is None
    assert set(kept[0].extra_info()) == set(FIELDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "has no benchmarks"),
        ('{"benchmarks": [{"name": "n", "extra_info": {"suite": "block"}}]}', "n: not a record of this suite"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_the_closing_table():
    records = [
        record("ours", 50.0),
        record("eager", 200.0),
        record("compile", 100.0),
        record("ours", 50.0, batch=1),
        record("eager", 40.0, batch=1),
        record("ours", 50.0, batch=32, spread=0.2),
        record("eager", 48.0, batch=32, spread=0.1),
    ]
    text = closing(records, ["no time left"] * 2 + ["out of memory"], gpu=True)
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[0] == "us of device time image batch dtype mode ours eager compile x eager x compile x floor"
    assert lines[2] == "3a 224 128 bf16 forward 50.0 200.0 100.0 4.00 2.00 1.25"
    assert lines[3] == "3a 224 1 bf16 forward 50.0 40.0 < 0.80 1.25"
    assert "but it is at 2 of 3 points:" in text
    assert "3a image 224 batch 1 bf16 forward: 0.80 x eager\n" in text
    assert "3a image 224 batch 32 bf16 forward: 0.96 x eager, within the spread of the two" in text
    assert "  2 cases: no time left\n  1 case: out of memory" in text
    assert CPU_NOTE not in text


def test_the_closing_table_of_a_cpu_and_of_nothing():
    records = [replace(record(name, us), device="cpu", x_floor=None) for name, us in (("ours", 50.0), ("eager", 60.0))]
    text = closing(records, gpu=False)
    assert text.endswith(CPU_NOTE)
    assert "us of wall time" in text
    assert "x floor" not in text
    assert "slower" not in text
    assert "x eager" not in text
    assert closing([], ["no time left"], gpu=True) == "nothing was measured\n\nnot measured:\n  1 case: no time left"


def test_a_block_of_two_windows_is_called_so():
    records = [record("ours", 50.0), record("ours", 70.0, suite="two-3x3")]
    assert [line.split("  ")[0] for line in table(records).splitlines()[2:]] == ["3a", "3a two-3x3"]


def test_columns_stay_aligned_where_figures_are_missing():
    text = table([record("ours", 12345.6), record("eager_nchw", 7.0, subject="googlenet", suite="network")])
    head, rule, first, second = text.splitlines()
    assert first.index("12345.6") + len("12345.6") == head.index("ours") + len("ours")
    assert second.index("7.0") + len("7.0") == head.index("eager NCHW") + len("eager NCHW")
    assert set(rule) == {"-"}
