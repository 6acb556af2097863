"""The tables of docs/performance.md: the page says what the files say, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.common import OUT_OF_MEMORY, MeasurementError, timing
from benchmarks.gpu import goals
from benchmarks.tables import PAGE, RESULTS, updated

H200 = RESULTS / "h200"


def test_the_page_says_what_the_files_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the page that the command writes."""
    copy = tmp_path / "performance.md"
    shutil.copyfile(PAGE, copy)
    monkeypatch.setattr(tables, "PAGE", copy)
    return copy


def test_a_figure_that_was_typed_is_found_and_replaced(page, capsys):
    right = page.read_text("utf-8")
    page.write_text(right.replace("| 42.86 [42.54, 43.47] |", "| 41.86 [42.54, 43.47] |"), "utf-8")
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().err.endswith("is not what the results say: run python -m benchmarks.tables\n")
    assert tables.main([]) == 0
    assert page.read_text("utf-8") == right


def timed(ms: float, batch: int = 4) -> dict[str, Any]:
    return timing([ms / 2, ms, 2 * ms]) | {"images_per_second": 1000 * batch / ms}


def cell(name: str, train: Any, evaluation: Any, layout: str = "NHWC", peak: int | None = None) -> dict[str, Any]:
    place = {"implementation": name, "T": 2, "batch": 4, "precision": "fp16", "layout": layout}
    return place | {"train": train, "evaluation": evaluation, "peak_bytes": peak}


def test_programs_stand_beside_ours_with_what_they_score():
    fidelity = {"images": 8, "correct": 6, "correct_exported": 5, "predictions_differ": 2}
    row = timed(40) | {"batch": 4, "times_ours": 1.0}
    rows = [row | {"program": "ours"}, row | {"program": "openvino-int8", "fidelity": fidelity}]
    assert tables.deploy({"rows": rows}).splitlines()[2:] == [
        "| ours | 4 | 40.0 [30.0, 60.0] | 100 | 1.00 | 75.0 % | - |",
        "| openvino-int8 | 4 | 40.0 [30.0, 60.0] | 100 | 1.00 | 62.5 % | 2 |",
    ]


def test_others_count_in_their_faster_order_and_of_equal_ones_the_first():
    first = [cell("ours-c", timed(400), timed(10)), cell("step-loop", timed(1000), timed(30), "NCHW")]
    second = [cell("ours-c", timed(100), timed(1)), cell("step-loop", timed(2000), timed(20))]
    lines = tables.throughput({"cells": first}, {"cells": second}).splitlines()
    assert lines == [
        "T = 2, batch 4, fp16:",
        "",
        "| Implementation | Order | Training step, ms [quartiles] | images/s | Evaluation, images/s [quartiles] |",
        "| --- | --- | --- | --- | --- |",
        "| ours-c | NHWC | 400 [300, 600] | 10.0 | 400.0 [266.7, 533.3] |",
        "| step-loop | NCHW | 1,000 [750, 1,500] | 4.0 | 133.3 [88.9, 177.8] |",
        "| step-loop | NHWC | 2,000 [1,500, 3,000] | 2.0 | 200.0 [133.3, 266.7] |",
        "",
        "| Network | Compared with | Training, times as fast | Evaluation, times as fast |",
        "| --- | --- | --- | --- |",
        "| ours-c | step-loop | 2.50 | 2.00 |",
    ]


def test_the_memory_of_others_is_that_of_their_faster_order():
    cells = [cell("ours-cupy", timed(10), timed(1), peak=2**30), cell("spikingjelly", timed(20), timed(2), peak=2**31)]
    slower = cell("spikingjelly", timed(30), timed(3), "NCHW", peak=2**32)
    for order in ([*cells, slower], [slower, *cells]):
        assert tables.throughput({"cells": order}).endswith("\n| ours-cupy | spikingjelly | 2.00 | 2.00 | 0.50 |")


def test_what_had_no_memory_stands_in_the_table(tmp_path):
    content = json.loads((H200 / "throughput.json").read_text())
    for each in content["cells"]:
        if each["implementation"] in ("step-loop", "convolution-floor"):
            each |= {"train": OUT_OF_MEMORY, "evaluation": OUT_OF_MEMORY, "peak_bytes": None}
    (tmp_path / "throughput.json").write_text(json.dumps(content))
    lines = tables.throughput(content).splitlines()
    assert "| step-loop | NCHW | out of memory | out of memory | - | out of memory |" in lines
    assert lines[4].startswith("| ours-cupy | NHWC | 42.86 [42.54, 43.47] | 5,973 | 10.74 | 19,547 ")
    assert "| ours-cupy | step-loop | - | - | - |" in lines
    assert "memory of a training step over spikingjelly's" in {goal["goal"] for goal in goals(tmp_path)}


def row(operation: str, direction: str, ms: float | None, peer: float | None, layers: int = 1) -> dict[str, Any]:
    ours, theirs = (OUT_OF_MEMORY if each is None else timing([each]) for each in (ms, peer))
    place = {"operation": operation, "pass": direction, "dtype": "float16", "layers": layers, "bytes": 2 * 10**9}
    return place | {"ours": ours, "peer": theirs}


def test_a_training_step_is_the_sum_over_layers_without_what_others_contain():
    rows = [row("lif", "forward", 1, 9), row("norm_lif", "forward", 1, 3, layers=2), row("gate_lif", "forward", 2, 2)]
    *_, sums = tables.kernels({"rows": rows, "copy_bytes_per_second": 2e12}).splitlines()
    # Six GB in 4 ms; the peers take 8.
    assert sums == "| a training step | all | float16 | 6.00 | 4.00 | 75 % | 2.0 |"
    rows.append(row("gate_lif", "backward", None, 2))
    lines = tables.kernels({"rows": rows, "copy_bytes_per_second": 2e12}).splitlines()
    assert "| gate_lif | backward | float16 | 2.00 | out of memory | - | - |" in lines
    assert lines[-1] == "| a training step | all | float16 | 8.00 | out of memory | - | - |"


def test_another_gpu_gets_its_section_and_a_cpu_none(tmp_path, page):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    shutil.copytree(H200, results / "another")
    content = json.loads((H200 / "throughput.json").read_text())
    content["environment"]["device"] = "NVIDIA Another, sm_90"
    (results / "another" / "throughput.json").write_text(json.dumps(content))
    content["environment"]["device"] = "CPU"
    (results / "cpu" / "throughput.json").write_text(json.dumps(content))
    before = page.read_text("utf-8")
    after = updated(before, results)
    section = after[after.index("### NVIDIA Another, sm_90") : after.index("## On a CPU")]
    for made in (tables.throughput(content), tables.kernels(json.loads((H200 / "kernels.json").read_text()))):
        assert section.count(made) == 1
    assert after.count("### ") == before.count("### ") + 1
    assert "Measured 2026-11-26 at commit 5637646d93c4-dirty:" in section
    assert updated(after, results) == after
    # Without its folder it goes.
    assert updated(after, RESULTS) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- throughput h200/throughput.json -->\n", "a comment that begins or ends a table stands alone"),
        ("<!-- end -->\n", "a comment that begins or ends a table stands alone"),
        (
            "<!-- throughput h200/throughput.json -->\n<!-- throughput h200/throughput.json -->\n<!-- end -->",
            "a comment that begins or ends a table stands alone",
        ),
        ("<!-- events cpu/nothing.json -->\n<!-- end -->", "nothing.json: no such file; write it with a benchmark's"),
    ],
    ids=["no end", "no beginning", "two beginnings", "no file"],
)
def test_what_the_page_says_wrong(text, message):
    with pytest.raises(MeasurementError, match=message):
        updated(text, RESULTS)
