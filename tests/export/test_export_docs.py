"""What docs/export.md shows runs as it is written."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys, digits_onnx, digits_program):
    (tmp_path / "digits.onnx").write_bytes(digits_onnx.SerializeToString())
    (tmp_path / "digits_int8.onnx").write_bytes(digits_onnx.SerializeToString())
    (tmp_path / "digits.pt2").write_bytes(digits_program)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8").partition("## NIR")[0], flags=re.DOTALL
    )
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    classes, tensor = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[('\d'(, )?){5}\]", classes)
    assert tensor.startswith("tensor([")


def test_every_file_entry_is_explained(digits_onnx):
    table = re.findall(r"^\| (`.*?`) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    explained = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert {each.key for each in digits_onnx.metadata_props} <= explained
