"""The report: what the page and its files say is what was measured, and a browser shows it without complaint."""

import csv
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from browser import Browser, headless_chromium
from gac.analysis.firing import measure_firing
from gac.analysis.report import _pictures, energy_of, explain, report_files, write_files
from gac.checkpoint import read_checkpoint, read_config
from gac.checkpoint.weights import FOLDER
from gac.evaluation.published import PublishedResult
from gac.evaluation.report import Report, Unscored, evaluate_checkpoint
from gac.evaluation.sample import undecided
from gac.files import ResultsNotWritten

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scored(one_thread: None) -> Report:
    """The trained digits network, a class of which has a name that HTML and matplotlib could misread."""
    file = FOLDER / "digits.safetensors"
    payload = read_checkpoint(file)
    report = evaluate_checkpoint(file, payload, replace(read_config(payload), device="cpu"), sample=40)
    names = [*report.class_names[:3], "<b>$x_$</b>", *report.class_names[4:]]
    classes = [replace(each, name=name) for each, name in zip(report.classes, names, strict=True)]
    published = PublishedResult("gac_msresnet18_cifar", "cifar10", 4, 98.0, "a paper & its table")
    return replace(report, class_names=names, classes=classes, published=published)


@pytest.fixture(scope="module")
def folder(scored: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "page"
    write_files(files_of(scored), folder, may_replace=False)
    return folder


def files_of(report: Report) -> dict[str, bytes]:
    return report_files(report, "0123456789abcdef", energy_of(report))


@pytest.fixture(scope="module")
def browser() -> Browser:
    with headless_chromium() as browser:
        yield browser


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_and_json_have_what_was_measured(scored: Report, folder: Path) -> None:
    values = json.loads((folder / "report.json").read_text())
    assert values["files"] == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )
    assert [float(row["top-1 %"]) for row in rows(folder, "accuracy")] == scored.scores.top1_by_time
    assert [(row["class"], int(row["right"])) for row in rows(folder, "classes")] == [
        (each.name, each.correct) for each in scored.classes
    ]
    confusion = rows(folder, "confusion")
    assert sum(int(row["images"]) for row in confusion) == 360
    mistakes = [row["label"] != row["prediction"] for row in confusion]
    assert mistakes == sorted(mistakes, reverse=True)
    assert any(mistakes)
    assert len(rows(folder, "predictions")) == 360
    with scored.sample.running():
        firing = measure_firing(scored.sample.network, scored.sample.inputs())
    assert [layer["rate"] for layer in values["firing"]] == [layer.rate for layer in firing]
    for row, layer in zip(rows(folder, "firing"), firing, strict=True):
        assert row["layer"] == layer.layer
        assert [float(row[f"t = {t} %"]) for t in range(1, 5)] == pytest.approx([100 * r for r in layer.rate_by_time])
    energy = rows(folder, "energy")
    assert sum(float(row["full mJ"]) for row in energy) == pytest.approx(values["energy"]["full_mj"])
    assert sum(float(row["paper mJ"] or 0) for row in energy) == pytest.approx(values["energy"]["paper_mj"])
    for channel, row in enumerate(rows(folder, "gates")):
        assert float(row["mean"]) == values["gates"]["by_channel"][channel]


def test_every_figure_is_drawn_twice(folder: Path) -> None:
    svgs, pngs = (sorted(path.stem for path in folder.glob(f"figures/*.{kind}")) for kind in ("svg", "png"))
    assert svgs == pngs
    assert {
        "accuracy",
        "classes",
        "confusion",
        "energy",
        "firing",
        "gates",
        "gate_maps",
        "mistakes",
        "saliency",
    } <= set(svgs)
    for path in folder.glob("figures/*.png"):
        with Image.open(path) as picture:
            assert len(set(picture.convert("L").get_flattened_data())) > 20


def test_the_page_says_what_the_network_is_and_needs_nothing_else(scored: Report, folder: Path) -> None:
    page = (folder / "index.html").read_text()
    for said in (
        "99.17 %", "98.00", "+1.17", "a paper &amp; its table", "0123456789abcdef", "312,074 parameters", "train.seed",
        f"{len(scored.sample.images)} of the 360",
    ):  # fmt: skip
        assert said in page
    assert "<b>" not in page
    loaded = re.findall(r'(?:src|xlink:href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert loaded
    assert all(each.startswith(("data:", "#")) for each in loaded)
    assert "<link" not in page
    links = re.findall(r'<a [^>]*href="([^"#][^"]*)"', page)
    assert all((folder / link).is_file() for link in links)
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_what_is_drawn_is_of_the_steps_that_were_scored(scored: Report) -> None:
    file = FOLDER / "digits.safetensors"
    payload = read_checkpoint(file)
    report = evaluate_checkpoint(file, payload, replace(read_config(payload), device="cpu"), {"T": 1}, sample=90)
    sample = report.sample
    first, last = (torch.tensor(each.predictions.ranked[:, 0])[sample.places] for each in (report, scored))
    other = first != last
    assert other.sum() > 2
    changed = replace(sample, images=sample.images[other], labels=sample.labels[other])
    with sample.running():
        assert explain(changed, "stages.0").targets.tolist() == first[other].tolist()
        _, probabilities = undecided(changed, len(changed.images))
    assert probabilities.argmax(-1).tolist() == [first[other].tolist()]


def test_a_sample_of_several_processes_is_not_called_that_of_all_images(scored: Report) -> None:
    assert str(scored.sample) == "40 of the 360 test images of digits, evenly spread"
    assert str(replace(scored.sample, processes=2)).endswith("evenly spread over those of one of 2 processes")


def test_classes_have_the_names_that_the_network_knows(scored: Report) -> None:
    names = [f"n{k}" for k in range(10)]
    sample = replace(scored.sample, data=replace(scored.sample.data, class_names=tuple("abcdefghij")))
    with sample.running():
        energy, firing = energy_of(scored), measure_firing(sample.network, sample.inputs())
        pictures = _pictures(replace(scored, sample=sample, class_names=names), energy, firing, None, "stages.0")
        picture = next(each for name, each in pictures if name == "predictions")
    drawn = {text.get_text() for axes in picture.figure.axes for text in axes.texts}
    assert drawn
    assert drawn <= set(names)


def test_a_page_has_no_scores_without_labels_and_no_gates_without_gated_attention(scored: Report) -> None:
    sample = replace(scored.sample, images=scored.sample.images[:6], mistakes=[])
    sample = replace(sample, data=replace(sample.data, num_classes=0))
    unlabelled = replace(scored, scores=Unscored(360, 1.0), published=None, classes=None, confusion=None, sample=sample)
    # A bare state dict does not say its network either.
    unlabelled = replace(unlabelled, coding="rate", config={"data": unlabelled.config["data"], "device": "cpu"})
    files = files_of(unlabelled)
    page = files["index.html"].decode()
    assert "top-1" not in page
    assert "Firing rates" in page
    assert "Gates" not in page
    assert "<h1>network on digits</h1>" in page
    assert "Rate coding draws its spikes at random" in page
    assert "tables/classes.csv" not in files


def test_only_an_earlier_report_is_replaced(folder: Path, tmp_path: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in json.loads((folder / "report.json").read_text())["files"]}
    page = tmp_path / "page"
    write_files(files, page, may_replace=False)
    with pytest.raises(ResultsNotWritten, match="no empty folder"):
        write_files(files, page, may_replace=False)
    write_files(files | {"index.html": b"newer"}, page, may_replace=True)
    assert (page / "index.html").read_bytes() == b"newer"
    for name, content in (("tables/mine.txt", ""), ("report.json", "[]")):
        (page / name).write_text(content)
        before = sorted(page.rglob("*"))
        with pytest.raises(ResultsNotWritten, match=f"cannot write {re.escape(str(page))}: .*no empty folder"):
            write_files(files, page, may_replace=True)
        assert sorted(page.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1440])
def test_a_browser_shows_the_page(browser: Browser, folder: Path, width: int, scheme: str) -> None:
    browser.open(folder / "index.html", width, scheme)
    kept = Path(os.environ.get("GAC_TEST_SCREENSHOTS", folder.parent))
    kept.mkdir(parents=True, exist_ok=True)
    browser.screenshot(kept / f"report_{width}_{scheme}.png")
    assert browser.console() == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    pictures, drawn = browser.run(
        "const svgs = [...document.querySelectorAll('figure svg')];"
        "return [svgs.length, svgs.filter((svg) => svg.getBoundingClientRect().height > 50).length]"
    )
    assert pictures == drawn == len(list(folder.glob("figures/*.svg")))
    # Those of pixels are images in the SVG.
    images = browser.run(
        "return Promise.all([...document.querySelectorAll('image')].map((each) => {"
        "  const image = new Image(); image.src = each.href.baseVal;"
        "  return image.decode().then(() => image.naturalWidth)}))"
    )
    assert len(images) > 10
    assert min(images) > 0
    background, text = browser.run(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    )
    levels = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (background, text)]
    assert (levels[0] > levels[1]) == (scheme == "light")
    # Text of figures is as large as can be read.
    smallest = browser.run(
        "return Math.min(...[...document.querySelectorAll('svg text')].map((each) => each.getBBox().height"
        " * each.getScreenCTM().a || Infinity))"
    )
    assert smallest > 5


def test_tables_are_sorted_by_the_keyboard(browser: Browser, folder: Path) -> None:
    browser.open(folder / "index.html", 1440)
    column = (
        "const table = document.querySelector('#energy table');"
        "const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === 'paper mJ');"
    )
    browser.run(f"{column} table.tHead.rows[0].cells[place].firstChild.focus()")
    enter = "\ue007"
    found = []
    for _ in range(2):
        browser.press(enter)
        found.append(
            browser.run(
                f"{column} return [table.tHead.rows[0].cells[place].ariaSort,"
                " [...table.tBodies[0].rows].map((row) => row.cells[place].textContent)]"
            )
        )
    (up, ascending), (down, descending) = found
    assert (up, down) == ("ascending", "descending")
    assert ascending == descending[::-1]
    missing = ascending.count("–")
    assert 0 < missing < len(ascending)
    assert ascending[:missing] == missing * ["–"]
    numbers = [float(each) for each in ascending[missing:]]
    assert numbers == sorted(numbers)


def names_of(browser: Browser, role: str) -> list[str]:
    """Return what the elements of a role are called to who does not see them, once the browser has worked that out."""
    for _ in range(50):
        nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
        names = [node["name"]["value"] for node in nodes if not node["ignored"] and node["role"]["value"] == role]
        if names:
            break
        time.sleep(0.1)
    return names


def test_what_is_seen_has_a_name_for_those_who_do_not_see_it(browser: Browser, folder: Path) -> None:
    browser.open(folder / "index.html", 380)
    for role in ("image", "table", "button", "region", "navigation"):
        names = names_of(browser, role)
        assert names, role
        assert all(names), role
    # What scrolls is reached by the keyboard.
    assert browser.run(
        "const scrolling = [...document.querySelectorAll('.scroll, .picture')]"
        "  .filter((each) => each.scrollWidth > each.clientWidth);"
        "return scrolling.length > 3 && scrolling.every((each) => each.tabIndex === 0)"
    )
