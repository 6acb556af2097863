"""Write the tables of docs/performance.md from the files in benchmarks/results: python -m benchmarks.tables (--help).

In the page a comment such as <!-- throughput h200/throughput.json --> says what is made of which files; what was made
stands below it, up to <!-- end -->. "throughput", "kernels", "events" and "deploy" take what the benchmarks of these
names wrote; "others" makes a section for each GPU's folder whose throughput the page does not name.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.candidates import FLOOR, REFERENCE
from benchmarks.common import OUT_OF_MEMORY, ROOT, MeasurementError, grouped, markdown
from benchmarks.kernels import PARTS, bandwidth_of_all_layers
from gac.command_line import Parser, finish
from gac.files import atomic_write, writing

PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
END = "<!-- end -->"
WORK = ("train", "evaluation")
Content = dict[str, Any]


def read(path: Path) -> Content:
    """Return what a benchmark wrote. Raises MeasurementError if it is not there."""
    if not path.is_file():
        raise MeasurementError(f"{path}: no such file; write it with a benchmark's --json")
    return json.loads(path.read_text(encoding="utf-8"))


def throughput(*contents: Content) -> str:
    """Return the table of each T, batch and precision of benchmarks.throughput, and how many times as fast ours is.

    Of an implementation that several files have in the same memory order, the first counts.
    """
    setting = ("T", "batch", "precision")
    cells: dict[tuple, Content] = {}
    for cell in (cell for content in contents for cell in content["cells"]):
        cells.setdefault(tuple(cell[key] for key in (*setting, "implementation", "layout")), cell)
    parts = []
    for (T, batch, precision), found in grouped(cells.values(), *setting).items():
        parts += [f"T = {T}, batch {batch}, {precision}:", _times(found), *_ratios(found)]
        if densities := found[0].get("densities", {}).get("train"):
            numbers = " ".join(f"{density:.2f}" for density in densities)
            parts.append(f"Density of the convolutions' inputs in training, in their order:\n{numbers}.")
    return "\n\n".join(parts)


def _times(cells: Sequence[Content]) -> str:
    floor = fastest(cells, "train", FLOOR)
    training, evaluation = ([None if cell[what] == OUT_OF_MEMORY else cell[what] for cell in cells] for what in WORK)
    rates = [
        each and [1000 * cell["batch"] / ms for ms in (each["median_ms"], *reversed(each["quartiles_ms"]))]
        for cell, each in zip(cells, evaluation, strict=True)
    ]
    columns = {
        "Implementation": [cell["implementation"] for cell in cells],
        "Order": [cell["layout"] for cell in cells],
        "Training step, ms [quartiles]": _texts([t and [t["median_ms"], *t["quartiles_ms"]] for t in training], 200, 2),
        "x floor": [f"{each['median_ms'] / floor:.2f}" if each and floor else "-" for each in training],
        "images/s": _texts([each and [each["images_per_second"]] for each in training], 1000, 1),
        "Memory, GiB": [f"{cell['peak_bytes'] / 2**30:.2f}" if cell["peak_bytes"] else "-" for cell in cells],
        "Evaluation, images/s [quartiles]": _texts(rates, 1000, 1),
    }
    return _table(columns)


def _table(columns: dict[str, list[str]]) -> str:
    measured = {title: column for title, column in columns.items() if {*column} != {"-"}}
    return markdown([*measured], zip(*measured.values(), strict=True))


def _texts(column: Sequence[Sequence[float] | None], below: float, decimals: int) -> list[str]:
    """Return medians, with their quartiles if any; no decimals unless a median of the column is ``below`` something."""
    decimals = decimals if any(each and each[0] < below for each in column) else 0
    numbers = [[f"{value:,.{decimals}f}" for value in each or [0]] for each in column]
    texts = [median if not quartiles else f"{median} [{', '.join(quartiles)}]" for median, *quartiles in numbers]
    return [OUT_OF_MEMORY if each is None else text for each, text in zip(column, texts, strict=True)]


def fastest(cells: Iterable[Content], what: str, *names: str) -> float | None:
    """Return the shortest median in ms of these implementations, in any memory order; None if none was measured."""
    timings = [cell[what] for cell in cells if cell["implementation"] in names]
    return min((each["median_ms"] for each in timings if each != OUT_OF_MEMORY), default=None)


def _ratios(cells: Sequence[Content]) -> Iterator[str]:
    """Yield the table of how many times as fast as others the networks with our kernels are, if there are both."""
    names = dict.fromkeys(cell["implementation"] for cell in cells)
    ours = [name for name in names if name.startswith("ours-") and name != REFERENCE.name]
    trained = [cell for cell in cells if cell["train"] != OUT_OF_MEMORY]
    # Of several memory orders that of the fastest, which comes last.
    trained.sort(key=lambda cell: cell["train"]["median_ms"], reverse=True)
    peaks = {cell["implementation"]: cell["peak_bytes"] for cell in trained}
    columns: dict[str, list[str]] = defaultdict(list)
    for theirs, mine in product((name for name in names if name not in (*ours, FLOOR)), ours):
        times = {what: (fastest(cells, what, theirs), fastest(cells, what, mine)) for what in WORK}
        pairs = {"Training, times as fast": times["train"], "Evaluation, times as fast": times["evaluation"]}
        pairs["Memory, part of its"] = peaks.get(mine), peaks.get(theirs)
        ratios = {title: f"{over / under:.2f}" if over and under else "-" for title, (over, under) in pairs.items()}
        for title, text in ({"Network": mine, "Compared with": theirs} | ratios).items():
            columns[title].append(text)
    if columns:
        yield _table(columns)


def kernels(content: Content) -> str:
    """Return the table of benchmarks.kernels: each operation in all layers of a training step, and their sum."""
    rows = []
    for (dtype,), of_dtype in grouped(content["rows"], "dtype").items():
        step = {("a training step", "all"): [row for row in of_dtype if row["operation"] not in PARTS]}
        for (name, direction), layers in (grouped(of_dtype, "operation", "pass") | step).items():
            moved, rate = sum(row["bytes"] * row["layers"] for row in layers), bandwidth_of_all_layers(layers)
            cells = [OUT_OF_MEMORY, "-", "-"]
            if rate is not None:
                cells[:2] = f"{1000 * moved / rate:.2f}", f"{100 * rate / content['copy_bytes_per_second']:.0f} %"
                if all(row["peer"] != OUT_OF_MEMORY for row in layers):
                    peer = sum(row["peer"]["median_ms"] * row["layers"] for row in layers)
                    cells[2] = f"{peer * rate / (1000 * moved):.1f}"
            rows.append([name, direction, dtype, f"{moved / 1e9:.2f}", *cells])
    return markdown(["Operation", "Pass", "Type", "GB", "ms", "Of a copy's rate", "Times as fast as the peer"], rows)


def events(content: Content) -> str:
    """Return the table of benchmarks.events: speed-ups of all shapes, over the density, by pass and memory order."""
    columns = sorted(grouped(content["rows"], "pass", "order"), key=lambda column: (column[0], column[1] != "NHWC"))
    lines = []
    for (density,), rows in grouped(content["rows"], "density").items():
        found = grouped(rows, "pass", "order")
        cells = (" / ".join(f"{row['speed_up']:.1f}" for row in found[column]) for column in columns)
        lines.append([f"{density:.2f}", *cells])
    return markdown(["Density of spikes", *(f"{what.capitalize()}, {order}" for what, order in columns)], lines)


def deploy(content: Content) -> str:
    """Return the table of benchmarks.deploy: what each program takes, and how it scores beside ours."""
    first = next(row["fidelity"] for row in content["rows"] if "fidelity" in row)
    ours = {"correct_exported": first["correct"], "images": first["images"], "predictions_differ": "-"}
    lines = []
    for row in content["rows"]:
        scores = row.get("fidelity", ours)
        times = " ".join(_texts([[row["median_ms"], *row["quartiles_ms"]]], math.inf, 1))
        top1 = f"{100 * scores['correct_exported'] / scores['images']:.1f} %"
        rates = f"{row['images_per_second']:,.0f}", f"{row['times_ours']:.2f}"
        lines.append([row["program"], row["batch"], times, *rates, top1, scores["predictions_differ"]])
    titles = ["Program", "Batch", "ms [quartiles]", "Images/s", "Times ours", "Top-1", "Predictions that differ"]
    return markdown(titles, lines)


MADE_OF_FILES = {"throughput": throughput, "kernels": kernels, "events": events, "deploy": deploy}
COMMENT = rf"(?P<comment><!-- (?P<kind>{'|'.join(MADE_OF_FILES)}|others)(?P<files>(?: [\w./-]+)*) -->)"


def others(page: str, results: Path) -> str:
    """Return a section for each folder of a GPU's results whose throughput is not named in the page."""
    parts = []
    for path in sorted(results.glob("*/throughput.json")):
        content = read(path)
        environment = content["environment"]
        if environment["device"] == "CPU" or f" {path.relative_to(results).as_posix()} " in page:
            continue
        versions = "; ".join(f"{title} {environment[title]}" for title in ("torch", "CuPy", "SpikingJelly", "gac"))
        measured = f"{versions}. Measured {environment['date'][:10]} at commit {environment.get('commit', 'unknown')}:"
        parts += [f"### {environment['device']}", measured, f"`{environment['command']}`", throughput(content)]
        if (of_kernels := path.with_name("kernels.json")).exists():
            parts.append(kernels(read(of_kernels)))
    return "\n\n".join(parts)


def updated(page: str, results: Path) -> str:
    """Return the page with the tables of what is in the folder. Raises MeasurementError for a comment on its own."""

    def make(found: re.Match) -> str:
        contents = [read(results / file) for file in found["files"].split()]
        made = others(page, results) if found["kind"] == "others" else MADE_OF_FILES[found["kind"]](*contents)
        return f"{found['comment']}\n" + (f"\n{made}\n\n" if made else "") + END

    after, made = re.subn(rf"{COMMENT}(?:(?!<!-- ).)*{END}", make, page, flags=re.DOTALL)
    if not made == page.count(END) == len(re.findall(COMMENT, page)):
        raise MeasurementError(f"a comment that begins or ends a table stands alone; each needs one and {END}")
    return after


def _write(check: bool) -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = updated(before, RESULTS)
    if check and after != before:
        raise MeasurementError("docs/performance.md is not what the results say: run python -m benchmarks.tables")
    if after != before:
        with writing(PAGE), atomic_write(PAGE) as file:
            file.write(after.encode())
    print("the tables are those of the results" if after == before else "wrote docs/performance.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = Parser("benchmarks.tables", __doc__)
    parser.add("--check", "write nothing; fail if the page is not what it should be", action="store_true")
    return finish(lambda: _write(parser.parse_args(arguments).check), MeasurementError)


if __name__ == "__main__":
    sys.exit(main())
