"""python -m gac.demo: what it prints is what the network does, and the page is there."""

import re
import socket

import pytest
import torch

import gac
from gac.analysis.report import is_report
from gac.data.digits import load_digits
from gac.demo import main


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The demo's output folder and what it printed, made without a network connection."""
    folder = tmp_path_factory.mktemp("demo") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the demo opened a connection"))
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        threads = torch.get_num_threads()
        assert main(["--output", str(folder)]) == 0
        assert torch.get_num_threads() == threads
    return folder, "\n".join(printed)


def test_the_page_is_written_and_named(done):
    folder, printed = done
    (page,) = re.findall(r"^all of it +(.+)$", printed, flags=re.MULTILINE)
    assert page == str(folder / "index.html")
    assert "99.17 %" in (folder / "index.html").read_text()
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"accuracy", "predictions", "gate_maps", "raster_1", "firing", "energy", "saliency"} <= names
    assert is_report(folder)


def test_what_is_said_of_the_images_is_what_the_network_says(done, one_thread):
    _, printed = done
    network, transform, card = gac.load_pretrained("digits")
    test = load_digits().splits["test"]
    lines = re.findall(r"^test image +(\d+): label (\d), taken for ([\d ]+) after 1..t steps$", printed, re.MULTILINE)
    assert len(lines) == 4
    for place, label, answers in lines:
        place = int(place)
        with torch.inference_mode():
            classes = network(transform(test.images[place : place + 1])).cumsum(0).argmax(-1).flatten().tolist()
        assert [int(each) for each in answers.split()] == classes
        assert int(label) == test.labels[place]
        assert len(set(classes)) > 1
    said = [float(each) for each in re.findall(r"t = 1\.\.\d +([\d.]+) %", printed)]
    assert said == pytest.approx(card["scores"]["float16"]["top1_by_time"], abs=1)
    assert card["command"] in printed


def test_energy_names_both_conventions_and_the_images(done):
    _, printed = done
    paper, full = map(float, re.search(r"energy +([\d.]+) mJ .*\"paper\", ([\d.]+) mJ in", printed).groups())
    assert 0 < paper < full < 0.1
    assert "180 of the 360 test images of digits" in printed


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file" / "page")]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'file' / 'page'}: ")
    assert main(["--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path} holds something else than a report")
    assert main(["--outptu", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--outptu" in line
