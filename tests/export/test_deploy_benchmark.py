"""python -m benchmarks.deploy times programs that compute the network, and says what each scores."""

import json

import pytest
import torch

from benchmarks import deploy
from gac.export.fidelity import compare
from gac.export.forms import Mean

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--images", "40", "--calibration", "40", "--batch", "3", "--rounds", "1", "--calls", "2"]


def test_measures_and_reports(tmp_path, capsys, digits_onnx, monkeypatch):
    # Made once, as it takes seconds.
    monkeypatch.setattr(deploy, "build_model", lambda source: digits_onnx)
    file = tmp_path / "result.json"
    assert deploy.main([*SMALL, "--programs", "openvino-int8", "onnxruntime-f32", "--json", str(file)]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    ours, int8, f32 = report["rows"]
    assert [row["program"] for row in report["rows"]] == ["ours", "openvino-int8", "onnxruntime-f32"]
    assert report["tried_on"] == f32["fidelity"]["data"] == "40 of the 360 test images of digits"
    assert f32["fidelity"]["predictions_differ"] == 0
    assert int8["bytes"] < f32["bytes"] / 2
    for row in report["rows"]:
        assert row["images_per_second"] == pytest.approx(3000 / row["median_ms"])
        assert row["times_ours"] == pytest.approx(ours["median_ms"] / row["median_ms"])
    assert len(printed.splitlines()[-3:]) == 3
    assert printed.splitlines()[-1].startswith("onnxruntime-f32 ")


def test_a_program_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    def measure(source, made, engine, precision):
        shifted = Mean(source.network)
        shifted.network.head.bias.data = torch.arange(10.0)
        return compare(source.network, lambda x: (shifted(x), {}), source.test_images(), program="", data="")

    monkeypatch.setattr(deploy, "build_model", lambda source: None)
    monkeypatch.setattr(deploy, "made_for", lambda *arguments: None)
    monkeypatch.setattr(deploy, "measure", measure)
    assert deploy.main([*SMALL, "--programs", "openvino-f32"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "of 40 images another class than ours, both in float32: it runs another network" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--programs", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--device", "meta"], "device meta"),
        (["--images", "0"], "expected a whole number >= 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert deploy.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
