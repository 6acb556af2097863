"""Images per second of a trained network on this machine's CPU, beside what each program scores.

python -m benchmarks.deploy (--help lists all options). ours is this package in float32; the others run the network's
ONNX file, as ``python -m gac.export deploy`` makes it. Accuracy and predictions that differ from ours are counted
first, on test images; a float32 program that differs in more than one of a hundred is not timed. Times are medians, in
brackets the quartiles, of single calls that follow without a pause. The programs take turns, in as many threads as
PyTorch has (OMP_NUM_THREADS).
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import MeasurementError, Table
from gac.command_line import at_least
from gac.errors import InputError
from gac.export.deploy import made_for
from gac.export.engines import Engine, Precision, open_model
from gac.export.fidelity import Fidelity
from gac.export.onnx import build_model, measure
from gac.export.source import Source, open_source

OURS = "ours"
PROGRAMS: dict[str, tuple[Engine, Precision]] = {
    "onnxruntime-f32": ("onnxruntime", "f32"),
    "onnxruntime-int8": ("onnxruntime", "int8"),
    "openvino-f32": ("openvino", "f32"),
    "openvino-bf16": ("openvino", "bf16"),
    "openvino-int8": ("openvino", "int8"),
}
TABLE = Table(
    *(("program", 16), ("batch", 5), ("ms", 8), ("[quartiles]", 16), ("images/s", 8), ("x ours", 6)),
    *(("top-1 %", 7), ("differ", 6), ("MB", 5)),
)


def prepare(names: Sequence[str], source: Source, calibration: int, skipped: dict[str, str]) -> dict[str, Any]:
    """Return, by name, what runs each program and what was found about it; why others do not run goes to ``skipped``.

    Raises MeasurementError for a float32 program that classifies other than our network.
    """
    model = build_model(source)
    found = {}
    for name in names:
        engine, precision = PROGRAMS[name]
        try:
            made = made_for(engine, precision, model, source, calibration)
        except InputError as error:
            skipped[name] = str(error)
            continue
        fidelity = measure(source, made, engine=engine, precision=precision)
        if precision == "f32" and 100 * fidelity.predictions_differ > fidelity.images:
            raise MeasurementError(
                f"{name} gives {fidelity.predictions_differ} of {fidelity.images} images another class than ours, both"
                " in float32: it runs another network"
            )
        content = made.SerializeToString()
        found[name] = {"fidelity": fidelity, "run": open_model(engine, content, precision)[1], "bytes": len(content)}
    return found


def _ours(source: Source, x: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            return source.network(x).mean(0)

    return call


def _row(name: str, batch: int, timing: dict[str, Any], ours_ms: float, found: dict[str, Any] | None) -> dict[str, Any]:
    row = {"program": name, "batch": batch, "images_per_second": 1000 * batch / timing["median_ms"], **timing}
    row["times_ours"] = ours_ms / timing["median_ms"]
    if found is not None:
        row |= {"fidelity": asdict(found["fidelity"]), "bytes": found["bytes"]}
    return row


def _print(row: dict[str, Any], fidelity: Fidelity | None, top1: float) -> None:
    low, high = row["quartiles_ms"]
    cells = [row["batch"], f"{row['median_ms']:.2f}", f"[{low:.2f}, {high:.2f}]", f"{row['images_per_second']:,.0f}"]
    cells += [f"{row['times_ours']:.2f}", f"{top1:.2f}"]
    cells += ["-", "-"] if fidelity is None else [fidelity.predictions_differ, f"{row['bytes'] / 1e6:.1f}"]
    TABLE.row(row["program"], *cells)


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    if report.device.type != "cpu":
        raise InputError(f"these programs run on the CPU, not on {report.device}: leave out --device")
    source, skipped = open_source(options.checkpoint, options.images, options.root), {}
    found = prepare(options.programs, source, options.calibration, skipped)
    report.begin(source=source.metadata(), tried_on=source.tried_on, skipped=skipped)
    report.line("network", f"{source.config.model.name}, T={source.network.T}, {source.tried_on}")
    for name, reason in skipped.items():
        report.line("skipped", f"{name}: {reason}")
    if not found:
        raise InputError("none of the programs runs here: install them with pip install '.[deploy]'")
    print()
    TABLE.header()
    images = torch.cat([x for x, _ in source.test_images()], -4)
    first = next(iter(found.values()))["fidelity"]
    for batch in options.batch:
        chosen = torch.arange(batch) % images.shape[-4]
        x = images.index_select(-4 % images.dim(), chosen).contiguous()
        calls = {OURS: _ours(source, x)}
        calls |= {name: partial(each["run"], np.asarray(x)) for name, each in found.items()}
        timings = common.time_in_turns(calls, report.device, options.rounds, options.calls)
        for name, timing in timings.items():
            row = _row(name, batch, timing, timings[OURS]["median_ms"], found.get(name))
            fidelity = None if name == OURS else found[name]["fidelity"]
            correct = first.correct if fidelity is None else fidelity.correct_exported
            _print(row, fidelity, 100 * correct / first.images)
            report.add("rows", [row])


PARSER = common.make_parser("benchmarks.deploy", __doc__, "all measurements")
PARSER.set_defaults(device="cpu")
help = "file of train.py, weights of this package, or the name of a network that travels in it"
PARSER.add("--checkpoint", help, default="digits", metavar="FILE")
PARSER.add("--root", "folder of the data set; None: where it lay in training", metavar="FOLDER")
PARSER.add("--programs", "what is measured beside ours", choices=list(PROGRAMS), default=list(PROGRAMS))
PARSER.add("--batch", "images per call", type=at_least(1), default=[1, 32], metavar="B")
PARSER.add("--images", "test images to compare on, evenly spread", type=at_least(1), default=256, metavar="N")
PARSER.add("--calibration", "training images for int8", type=at_least(1), default=256, metavar="N")
PARSER.add("--rounds", "turns that every program gets", type=at_least(1), default=5)
PARSER.add("--calls", "timed calls in a turn, after an untimed one", type=at_least(1), default=5)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
