"""python -m gac.export: subcommands as users call them."""

import json

import onnx
import pytest

from gac.export import deploy, program
from gac.export.__main__ import SUBCOMMANDS, main


def test_a_file_and_how_far_it_is_from_our_network(tmp_path, capsys, digits_program, monkeypatch):
    # Made once, as it takes seconds.
    monkeypatch.setattr(program, "build_program", lambda source, form: digits_program)
    file = tmp_path / "digits.pt2"
    assert main(["program", "digits", str(file), "--images", "40"]) == 0
    printed = capsys.readouterr().out
    assert "on 40 of the 360 test images of digits" in printed
    assert "predictions  0 of 40 differ" in printed
    assert json.loads((tmp_path / "digits.pt2.fidelity.json").read_text())["images"] == 40


def test_deploy(tmp_path, capsys, digits_onnx, monkeypatch):
    monkeypatch.setattr(deploy, "build_model", lambda source: digits_onnx)
    file = tmp_path / "digits.onnx"
    assert main(["deploy", "digits", str(file), "--engine", "onnxruntime", "--images", "0"]) == 0
    assert "not compared with our network" in capsys.readouterr().out
    said = {each.key: json.loads(each.value) for each in onnx.load(file).metadata_props}
    assert (said["engine"], said["precision"], said["T"]) == ("onnxruntime", "f32", 4)
    assert [each.name for each in tmp_path.iterdir()] == ["digits.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onxn", "digits", "x.onnx"], "there is no subcommand 'onxn' (did you mean onnx?)"),
        (["program", "digits", "x.onnx"], "expected a file *.pt2, got 'x.onnx'"),
        (["onnx", "nothing", "x.onnx"], "checkpoint nothing: no such file"),
        (["program", "digits", "x.pt2", "--form", "step"], "the step form is for direct coding"),
        (["onnx", "digits", "x.onnx", "--images", "-1"], "expected a whole number >= 0"),
        (
            ["onnx", "digits", "x.onnx", "--root", "here"],
            "--root here is not read, as the network was trained on digits",
        ),
        (["deploy", "digits", "x.onnx", "--calibration", "9"], "--calibration is for int8, and --precision is f32"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [None, *SUBCOMMANDS])
def test_help(name, capsys):
    if name is None:
        assert main([]) == 0
        assert all(f"  {each}" in capsys.readouterr().out for each in list(SUBCOMMANDS)[:1])
        return
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "--images N" in capsys.readouterr().out
