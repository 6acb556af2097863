"""The loader's benchmark on few images: it must measure the loader, and say when the need is not met."""

import json
import tempfile
import time

import pytest
from PIL import Image

from benchmarks import loader
from gac.data import image_folder
from image_tree import DAMAGED, write_split

SMALL = ["--device", "cpu", "--batch", "4", "--rounds", "2", "--image-size", "32", "--resize", "36"]


def run(tmp_path, *arguments):
    file = tmp_path / "result.json"
    assert loader.main([*SMALL, *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_measures_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = ["--make-images", "48", "--workers", "0", "2", "0", "--splits", "train", "test", "--need", "1e6"]
    report = run(tmp_path, *arguments)
    printed = capsys.readouterr().out
    assert [(cell["split"], cell["workers"]) for cell in report["cells"]] == [
        (split, workers) for split in ("train", "test") for workers in (0, 2)
    ]
    for cell in report["cells"]:
        assert cell["images_per_round"] == 4 * max(1, cell["workers"])
        assert len(cell["rounds_ms"]) == 2
        low, high = cell["quartiles"]
        assert 0 < low <= cell["images_per_second"] <= high
        assert cell["images_per_second"] == pytest.approx(1000 * cell["images_per_round"] * 2 / sum(cell["rounds_ms"]))
        assert cell["per_worker"] == pytest.approx(cell["images_per_second"] / max(1, cell["workers"]))
        assert cell["share_of_need"] == pytest.approx(cell["images_per_second"] / 1e6)
        assert cell["skipped_images"] == 0
    assert "48 images in 2 classes" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if line.startswith(("train  ", "test   "))]
    assert [row for row in rows if row[1] in ("0", "2")] == [
        ["train", "0"],
        ["train", "2"],
        ["test", "0"],
        ["test", "2"],
    ]
    assert printed.count("1,000,000 images/s are not reached; at ") == 2
    # The folder that was made is gone.
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_rate_is_that_of_the_workers(tmp_path, monkeypatch, capsys):
    def decode(path):
        time.sleep(0.02)
        return Image.new("RGB", (40, 30))

    monkeypatch.setattr(image_folder, "read_image", decode)
    report = run(tmp_path, "--make-images", "72", "--workers", "1", "3", "--need", "60", "--rounds", "3")
    one, three = (cell["images_per_second"] for cell in report["cells"])
    assert one <= 50
    assert 1.5 * one < three <= 150
    assert "60 images/s are reached with 3 workers" in capsys.readouterr().out


def test_counts_what_could_not_be_read(tmp_path):
    write_split(tmp_path / "data" / "train", images=200, damaged=tuple(DAMAGED))
    report = run(
        tmp_path, "--data.root", str(tmp_path / "data"), "--workers", "0", "--rounds", "47", "--no-auto-augment"
    )
    (cell,) = report["cells"]
    assert cell["skipped_images"] == 2
    assert cell["share_of_need"] is None
    assert report["transforms"]["augment"] == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --data.root --make-images is required"),
        (["--make-images", "8", "--data.root", "data"], "not allowed with argument"),
        (["--data.root", "absent"], "there is no folder absent; imagefolder needs train and val under --data.root"),
        (["--make-images", "39", "--workers", "2"], "too few: 3 + 2 rounds of 2 batches of 4 take 40; lower --workers"),
        (["--make-images", "8", "--need", "0"], "argument --need: expected a number >= 1, got '0'"),
        (["--make-images", "8", "--need", "fast"], "expected a number >= 1, got 'fast'"),
        (["--make-images", "8", "--workers", "-1"], "argument --workers: expected a whole number >= 0, got '-1'"),
        (["--make-images", "8", "--resize", "20"], "resize must be at least data.image_size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert loader.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_no_number_of_workers_is_measured_twice():
    default = loader.PARSER.get_default("workers")
    assert sorted(set(default)) == default
    assert loader.PARSER.parse_args(["--make-images", "8", "--workers", "2", "0", "2"]).workers == [2, 0]


def test_photographs_are_of_imagenets_size(tmp_path):
    loader.write_photographs(tmp_path, 40)
    paths = list(tmp_path.glob("*/*.JPEG"))
    assert len(paths) == 40
    assert len({path.stat().st_ino for path in paths}) == 16
    assert all(Image.open(path).size == (500, 375) for path in paths)
    assert 90_000 < sum(path.stat().st_size for path in paths) / 40 < 120_000
