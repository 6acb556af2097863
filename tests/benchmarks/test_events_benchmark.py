"""The benchmark of convolutions by events at the smallest sizes: it must measure, and must refuse to when it should."""

import json
import re

import pytest

from benchmarks import events
from gac.ops import c_kernels, event_conv

SMALL = ["--device", "cpu", "--frames", "1", "--rounds", "1", "--repeats", "2", "--densities", "0.05", "0.4"]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.c_compiler]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SHAPES", ((64, 8), (128, 4)))


def test_measures_and_reports(tmp_path, capsys):
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = events.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    assert status == 0, capsys.readouterr().err
    rows = json.loads(files["json"].read_text())["rows"]
    # Shapes, densities, passes, memory orders.
    assert len(rows) == 2**4
    for row in rows:
        assert row["speed_up"] == pytest.approx(row["dense"]["median_ms"] / row["events"]["median_ms"])
        assert len(row["events"]["samples_ms"]) == 2
    printed = capsys.readouterr().out
    assert printed.count("crossover     ") == 8
    for line in printed.splitlines():
        if line.startswith("crossover"):
            assert re.search(r": (density 0\.\d\d|not passed, [\d.]+ to [\d.]+ times as fast)$", line)
    assert "64 channels, 8 x 8, weight gradient, NHWC" in printed
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert event_conv.MAX_DENSITY < 1


def test_a_wrong_convolution_is_not_timed(tmp_path, capsys, monkeypatch):
    right = event_conv._forward
    monkeypatch.setattr(event_conv, "_forward", lambda *given: (1.001 * right(*given)[0], *right(*given)[1:]))
    assert events.main([*SMALL, "--json", str(tmp_path / "result.json")]) == 1
    assert "forward of events in NCHW is off by" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_events_that_would_be_dense_are_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(event_conv, "_pays", lambda *_: False)
    assert events.main(SMALL) == 1
    assert "error: events are not used for 64 channels" in capsys.readouterr().err


def test_where_there_is_a_gpu_it_runs_on_the_cpu_as_written_in_the_docs():
    assert events.PARSER.parse_args([]).device == "cpu"


@pytest.mark.parametrize(
    ("speed_ups", "expected"), [([3.0, 2.0, 0.5], 0.1 + 0.1 * 2 / 3), ([3.0, 2.0, 1.5], None), ([0.9, 0.5, 0.4], None)]
)
def test_crossover(speed_ups, expected):
    rows = [{"density": density, "speed_up": ratio} for density, ratio in zip((0.05, 0.1, 0.2), speed_ups, strict=True)]
    assert events.crossover(rows[::-1]) == (None if expected is None else pytest.approx(expected))


def test_bad_input(capsys, monkeypatch):
    assert events.main([*SMALL, "--densities", "1.5"]) == 2
    assert capsys.readouterr().err == "error: --densities: expected numbers from 0 to 1, got 1.5\n"
    monkeypatch.setattr(c_kernels, "status", lambda: c_kernels.Status(False, "there is no C compiler: install gcc"))
    assert events.main(SMALL) == 2
    assert capsys.readouterr().err == "error: the C kernels cannot run: there is no C compiler: install gcc\n"
