"""One page about a checkpoint: its scores and what its network does inside, with every table and figure behind it."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
from matplotlib.figure import Figure

from gac.analysis import figures
from gac.analysis.energy import PUBLISHED_NOTE, Energy, measure_energy
from gac.analysis.firing import LayerFiring, measure_firing, record_spikes
from gac.analysis.gates import Gates, measure_gates
from gac.analysis.saliency import Saliency, measure_saliency
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation
from gac.evaluation.report import Report
from gac.evaluation.sample import Sample, undecided
from gac.execution.footprint import feature_maps
from gac.files import atomic_folder, writing

_TEMPLATE = "report.html.jinja"
SHOWN = 4
"""Test images of which predictions, gates and spikes are drawn."""


@dataclass(frozen=True)
class Column:
    """A column of a table; ``form`` is how its values are written in the page (the files have them in full)."""

    title: str
    form: str = "{}"
    help: str = ""

    def write(self, value: Any) -> str:
        """Return a value as the page has it."""
        return "–" if value is None else self.form.format(value)


@dataclass(frozen=True)
class Table:
    """A table of the page, and the CSV file of the same name."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] | None = None
    """The last row in the page."""
    most: int = 1000
    """Rows in the page, at most."""

    def is_number(self, column: int) -> bool:
        """Return whether a column holds numbers, which are aligned and sorted as such."""
        return all(isinstance(row[column], int | float | None) for row in self.rows)

    def to_csv(self) -> str:
        """Return the table as CSV."""
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(column.title for column in self.columns)
        table.writerows(self.rows)
        return file.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure with its description for those who do not see it."""

    figure: Figure
    description: str

    @property
    def width(self) -> int:
        """Its width in CSS pixels."""
        return round(96 * self.figure.get_figwidth())


def write_report(
    report: Report, sha256: str, energy: Energy, folder: Path, layer: str | None = None, may_replace: bool = False
) -> None:
    """Write index.html, which needs nothing else, and the CSV, JSON, PNG and SVG files behind it to a new folder.

    The folder appears once everything is in it.

    Args:
        report: With a sample of test images, on which the network is measured.
        sha256: Digest of the checkpoint's file.
        energy: What :func:`gac.analysis.energy.measure_energy` says of the network on the sample.
        folder: Missing or empty.
        layer: Of which saliency maps are drawn, by default that of :func:`default_layer`.
        may_replace: Whether the folder may hold an earlier report, which is deleted, and nothing else.

    Raises:
        InputError: If there is no such layer, or its output is not [T, B, C, H, W].
        ResultsNotWritten: If the folder holds something else or cannot be written.
    """
    write_files(report_files(report, sha256, energy, layer), folder, may_replace)


def report_files(report: Report, sha256: str, energy: Energy, layer: str | None = None) -> dict[str, bytes]:
    """Return the files of a report by name; see :func:`write_report`."""
    sample = report.sample
    layer = layer or default_layer(sample)
    with sample.running():
        firing = measure_firing(sample.network, sample.inputs())
        gates = None
        if report.coding == "gac":
            (gates,) = measure_gates(sample.network, sample.inputs(), maps=0)
        pictures = dict(_pictures(report, energy, firing, gates, layer))
    tables = dict(_tables(report, energy, firing, gates))
    files = {f"tables/{name}.csv": _encode(table.to_csv()) for name, table in tables.items()}
    predictions = io.BytesIO()
    report.write_predictions(predictions)
    files["tables/predictions.csv"] = predictions.getvalue()
    svgs = {}
    for name, picture in pictures.items():
        svgs[name] = figures.to_svg(picture.figure, picture.description)
        files[f"figures/{name}.svg"] = _encode(svgs[name])
        png = io.BytesIO()
        picture.figure.savefig(png, format="png")
        files[f"figures/{name}.png"] = png.getvalue()
    names = sorted([*files, "index.html", "report.json"])
    files["index.html"] = _encode(
        _page(
            report=report,
            scores=report.scores if isinstance(report.scores, Evaluation) else None,
            sample=sample,
            sha256=sha256,
            energy=energy,
            spikes=sum(int(layer.spikes.sum()) for layer in firing),
            neurons=sum(layer.spikes.numel() * layer.neurons for layer in firing),
            rasters=_rasters(firing),
            channels=sum(layer.spikes.shape[1] for layer in firing),
            dead=sum(len(layer.dead_channels) for layer in firing),
            gates=gates,
            layer=layer,
            tables=tables,
            pictures=pictures,
            svgs=svgs,
            published_note=PUBLISHED_NOTE,
            files=names,
        )
    )
    values = report.to_dict() | {
        "sha256": sha256,
        "sample": str(sample),
        "energy": energy.to_dict(),
        "firing": [layer.to_dict() for layer in firing],
        "gates": None if gates is None else gates.to_dict(),
        "files": names,
    }
    files["report.json"] = f"{json.dumps(values, indent=2)}\n".encode()
    return files


def write_files(files: Mapping[str, bytes], folder: Path, may_replace: bool) -> None:
    """Write the files of a report to a folder; see :func:`write_report`."""
    with writing(folder), atomic_folder(folder, is_report if may_replace else lambda path: False) as made:
        for name, content in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def energy_of(report: Report) -> Energy:
    """Return the energy of a report's network on its sample of images."""
    with report.sample.running():
        return measure_energy(report.sample.network, report.sample.inputs())


def write_saliency(report: Report, file: BinaryIO, layer: str | None = None, most: int = 8) -> None:
    """Write a PNG of ``most`` of the sample's images, evenly spread, under the saliency maps of a layer.

    The layer is by default that of :func:`default_layer`. Raises InputError as
    :func:`gac.analysis.saliency.measure_saliency` does.
    """
    sample = report.sample
    every = -(-len(sample.images) // most)
    shown = replace(sample, images=sample.images[::every], labels=sample.labels[::every], places=sample.places[::every])
    with shown.running():
        saliency = explain(shown, layer or default_layer(shown))
    saliency_figure(shown, saliency, report.class_names).savefig(file, format="png")


def default_layer(sample: Sample) -> str:
    """Return the name of the last stage whose maps have at least 4 x 4 pixels: smaller ones show no place."""
    _, *sizes = feature_maps(sample.network, sample.data)
    ends = accumulate(2 * len(stage) for stage in sample.network.stages)
    fit = [number for number, end in enumerate(ends) if min(sizes[end - 1][1:]) >= 4]
    return f"stages.{max(fit, default=0)}"


def explain(sample: Sample, layer: str) -> Saliency:
    """Return the saliency of a layer on a sample that is running, image by image, as gradients take memory."""
    return measure_saliency(sample.network, replace(sample, batch_size=1).inputs(), layer, steps=sample.steps)


def saliency_figure(sample: Sample, saliency: Saliency, names: Sequence[str]) -> Figure:
    """Return the figure of a sample's saliency, which says what each image is and what it is taken for."""
    captions = [
        f"{caption}\ntaken for {names[target]}"
        for caption, target in zip(_captions(sample, names), saliency.targets.tolist(), strict=True)
    ]
    return figures.saliency_figure(sample.images, saliency, sample.data, captions)


def _captions(sample: Sample, names: Sequence[str]) -> list[str]:
    if sample.data.num_classes:
        return [f"label {names[label]}" for label in sample.labels.tolist()]
    return [f"image {place}" for place in sample.places]


def check_replaceable(folder: Path) -> None:
    """Raise InputError if a report cannot replace what is in a folder: before hours of work rather than after them."""
    if folder.exists() and not is_report(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a report, which would be written there: move it away")


def is_report(folder: Path) -> bool:
    """Return whether a folder holds a report and nothing else; an empty one does not."""
    try:
        listed = json.loads((folder / "report.json").read_bytes())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return all(path.relative_to(folder).as_posix() in listed for path in folder.rglob("*") if not path.is_dir())


def _encode(text: str) -> bytes:
    # The name of a file may have bytes that are not UTF-8.
    return text.encode("utf-8", "backslashreplace")


def _page(**content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flat"] = _flat
    return environment.get_template(_TEMPLATE).render(content)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of nested sections with their full names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tables(
    report: Report, energy: Energy, firing: Sequence[LayerFiring], gates: Gates | None
) -> Iterator[tuple[str, Table]]:
    scores = report.scores
    if isinstance(scores, Evaluation):
        percent = Column("top-1 %", "{:.2f}")
        yield (
            "accuracy",
            Table(
                "Top-1 of the mean output over the first t time steps",
                [Column("t"), percent],
                list(enumerate(scores.top1_by_time, 1)),
            ),
        )
        yield (
            "classes",
            Table(
                "Accuracy of each class",
                [Column("class"), Column("images"), Column("right"), percent],
                [(each.name, each.images, each.correct, each.top1) for each in report.classes],
            ),
        )
        names = report.class_names
        yield (
            "confusion",
            Table(
                "Images by label and prediction, the most frequent mistakes first",
                [Column("label"), Column("prediction"), Column("images")],
                [
                    (names[label], names[prediction], images)
                    for label, prediction, images in sorted(
                        report.confusion, key=lambda entry: (entry[0] == entry[1], -entry[2])
                    )
                ],
                most=50,
            ),
        )
    millions = 1e6 * energy.images
    yield (
        "energy",
        Table(
            f"Operations and energy of an image by layer, mean over {energy.images} images",
            [
                Column("layer"),
                Column("input", help="spikes if every input value was 0 or 1"),
                Column("rate", "{:.4f}", "share of the input values that are not 0"),
                Column("fan-in", "{:g}", "inputs of an output"),
                Column("fan-out", "{:.4g}", "outputs that an input reaches, on average"),
                Column("M MAC", "{:.4f}", "millions of multiply-accumulates"),
                Column("M SynOp", "{:.4f}", "millions of synaptic operations"),
                Column("paper mJ", "{:.6f}", "in the paper's convention; – where it has no term for the layer"),
                Column("full mJ", "{:.6f}", "every operation of every layer"),
            ],
            [
                (
                    layer.layer,
                    "spikes" if layer.spiking else "real",
                    layer.rate,
                    layer.fan_in,
                    layer.fan_out,
                    layer.macs / millions,
                    layer.synops / millions,
                    layer.paper_mj,
                    layer.full_mj,
                )
                for layer in energy.layers
            ],
            ("total", *4 * [None], energy.macs / millions, energy.synops / millions, energy.paper_mj, energy.full_mj),
        ),
    )
    yield (
        "firing",
        Table(
            f"Firing rate of each spiking layer in percent, over {report.sample}",
            [
                Column("layer"),
                Column("channels"),
                Column("dead", help="channels of which no neuron ever spiked"),
                Column("saturated", help="channels of which every neuron always spiked"),
                Column("rate %", "{:.2f}"),
                *(Column(f"t = {step} %", "{:.2f}") for step in range(1, len(firing[0].rate_by_time) + 1)),
            ],
            [
                (
                    layer.layer,
                    layer.spikes.shape[1],
                    len(layer.dead_channels),
                    len(layer.saturated_channels),
                    100 * layer.rate,
                    *(100 * rate for rate in layer.rate_by_time),
                )
                for layer in firing
            ],
        ),
    )
    if gates is not None:
        yield (
            "gates",
            Table(
                f"Mean gate of each channel, over pixels and {report.sample}",
                [
                    Column("channel"),
                    Column("mean", "{:.4f}"),
                    *(Column(f"t = {step}", "{:.4f}") for step in range(1, len(gates.mean) + 1)),
                ],
                [
                    (channel, mean, *by_time)
                    for channel, (mean, by_time) in enumerate(
                        zip(gates.by_channel, gates.mean.t().tolist(), strict=True)
                    )
                ],
            ),
        )


def _rasters(firing: Sequence[LayerFiring]) -> dict[str, str]:
    """Return the names of the figures of spikes and their layers: the first, the last and some between."""
    last = len(firing) - 1
    places = sorted({last * part // 3 for part in range(4)})
    return {f"raster_{number}": firing[place].layer for number, place in enumerate(places, 1)}


def _pictures(
    report: Report, energy: Energy, firing: Sequence[LayerFiring], gates: Gates | None, layer: str
) -> Iterator[tuple[str, Picture]]:
    """Yield the figures by name, saliency that of a ``layer``; the sample must be running."""
    sample, scores, names = report.sample, report.scores, report.class_names
    if isinstance(scores, Evaluation):
        steps = ", ".join(f"{top1:.2f}" for top1 in scores.top1_by_time)
        yield (
            "accuracy",
            Picture(
                figures.accuracy_figure(scores.top1_by_time),
                f"Line: top-1 accuracy in percent after 1 to {len(scores.top1_by_time)} time steps: {steps}",
            ),
        )
        yield (
            "classes",
            Picture(
                figures.class_accuracy_figure(report.classes),
                "Bars: top-1 accuracy of each class; the table beside it has the numbers",
            ),
        )
        yield (
            "confusion",
            Picture(
                figures.confusion_figure(report.confusion, names),
                f"Heat map: images of each label by prediction; {scores.correct} of {scores.images} are right",
            ),
        )
        if sample.mistakes:
            what = "; ".join(f"{names[each.label]} taken for {names[each.prediction]}" for each in sample.mistakes)
            yield (
                "mistakes",
                Picture(
                    figures.mistakes_figure(sample.mistakes, names, sample.data),
                    f"Test images that the network takes for another class: {what}",
                ),
            )
    shown, probabilities = undecided(sample, SHOWN)
    captions = _captions(shown, names)
    yield (
        "predictions",
        Picture(
            figures.prediction_figure(shown.images, probabilities, shown.data, captions, names),
            "Test images, each with bars of its class probabilities after every time step: "
            + "; ".join(
                f"{caption}, taken for {' then '.join(names[k] for k in classes)}"
                for caption, classes in zip(captions, probabilities.argmax(-1).t().tolist(), strict=True)
            ),
        ),
    )
    yield (
        "energy",
        Picture(
            figures.energy_figure(energy),
            f"Bars: energy of each layer in two conventions, {energy.paper_mj:.4g} mJ in all in the paper's and"
            f" {energy.full_mj:.4g} mJ in full; the table below has the numbers",
        ),
    )
    yield (
        "firing",
        Picture(
            figures.firing_rate_figure(firing),
            "Heat map: firing rate of each layer at each time step; the table below has the numbers",
        ),
    )
    for name, spiking in _rasters(firing).items():
        spikes = record_spikes(shown.network, next(shown.inputs()), spiking)
        yield (
            name,
            Picture(
                figures.raster_figure(spikes[:, 0], f"{spiking}, {captions[0]}"),
                f"Raster: which neurons of layer {spiking} spike at which time step for one image ({captions[0]})",
            ),
        )
    if gates is not None:
        yield (
            "gates",
            Picture(
                figures.gate_figure(gates),
                f"Heat map: mean gate at each time step and channel, {gates.mean.mean():.3f} over all",
            ),
        )
        (of_shown,) = measure_gates(shown.network, shown.inputs(), maps=len(captions))
        yield (
            "gate_maps",
            Picture(
                figures.gate_maps_figure(shown.images, of_shown, shown.data, captions),
                f"Test images, each beside its gate at every time step, mean over channels: {', '.join(captions)}",
            ),
        )
    saliency = explain(shown, layer)
    yield (
        "saliency",
        Picture(
            saliency_figure(shown, saliency, names),
            f"Test images under the Grad-CAM of layer {layer}, mean over time and at each time step, and beside the"
            f" spikes of layer {saliency.spiking_layer}",
        ),
    )
