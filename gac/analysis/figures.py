"""Figures of what is measured on a network: matplotlib's, to be saved in any format or put into a page as SVG."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from gac.analysis.energy import Energy
from gac.analysis.firing import LayerFiring
from gac.analysis.gates import Gates
from gac.analysis.saliency import Saliency
from gac.data import DataInfo
from gac.data.arrays import ArraySet
from gac.evaluation.predictions import ClassScore
from gac.evaluation.sample import Mistake

# Of text and lines; nothing else in a figure has this colour, so that a page can put its own in its place.
_INK = "#1a1a1b"
# Of Okabe and Ito's, which the colour-blind can tell apart.
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_RATES, _AROUND_HALF = "viridis", "PuOr_r"
_MOST_CLASSES = 30
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#bbbbbb",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    # The name of a class may have dollars in it.
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
}


def to_svg(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element for an HTML page, the same text for the same figure.

    Text stays text; it and the lines take the colour of the page's text (CSS ``color``), and the page's background
    shines through. Screen readers get the ``description``, which must be another one for each figure of a page.
    """
    file = io.StringIO()
    metadata = {"Title": description} | dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    # From the element on: XML's declaration and document type have no place in a page.
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    # Names that nothing refers to would be the same in every figure.
    used = set(re.findall(r"#([\w.-]+)", svg))
    return re.sub(r' id="([^"]+)"', lambda name: name[0] if name[1] in used else "", svg)


def energy_figure(energy: Energy) -> Figure:
    """Return bars of each layer's energy in the two conventions; a layer without a term in "paper" has one bar."""
    with _panel(6.4, 0.27 * len(energy.layers) + 1.3) as (figure, axes):
        places = np.arange(len(energy.layers))
        for offset, convention, color in ((-0.2, "paper", _ORANGE), (0.2, "full", _BLUE)):
            bars = [getattr(layer, f"{convention}_mj") or 0 for layer in energy.layers]
            total = getattr(energy, f"{convention}_mj")
            axes.barh(places + offset, bars, 0.4, color=color, label=f'"{convention}", {total:.4g} mJ in total')
        axes.set_yticks(places, [layer.layer for layer in energy.layers])
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.set_xlabel("energy for an image, mJ")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")
        axes.set_title(f"Energy by layer, mean over {energy.images} images")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def firing_rate_figure(layers: Sequence[LayerFiring]) -> Figure:
    """Return a heat map of each layer's firing rate at each time step; names have the dead and saturated channels."""
    rates = np.array([layer.rate_by_time for layer in layers])
    steps = rates.shape[1]
    with _panel(min(8.0, 4.0 + 0.5 * steps), 0.27 * len(layers) + 1.1) as (figure, axes):
        norm = Normalize(0, max(100 * rates.max(), 1e-9))
        _heat_map(figure, axes, 100 * rates, "firing rate, %", norm, write="{:.1f}" if steps <= 8 else None)
        axes.set_yticks(range(len(layers)), map(_with_silence, layers))
        axes.set_xticks(*_steps(steps))
        axes.set_xlabel("time step")
        axes.set_title("Firing rate by layer and time step")
    return figure


def raster_figure(spikes: Tensor, layer: str, most: int = 200) -> Figure:
    """Return which neurons of a layer spike at which time step for one image: ``spikes`` are [T, C, H, W].

    Of more than ``most`` neurons every n-th is shown, in the order channel, row, column.
    """
    of_neurons = spikes.flatten(1).t().float().cpu().numpy()  # [neurons, T]
    every = -(-len(of_neurons) // most)
    shown = of_neurons[::every]
    neurons, steps = shown.shape
    with _panel(min(8.0, 3.2 + 0.5 * steps), 4.2) as (figure, axes):
        # Nearly whole cells, with the page's background where there is no spike.
        for step in range(steps):
            fired = np.flatnonzero(shown[:, step])
            axes.hlines(every * fired, step + 0.58, step + 1.42, color=_BLUE, linewidth=max(0.6, 200 / neurons))
        axes.set_xlim(0.5, steps + 0.5)
        axes.set_ylim(len(of_neurons) - 0.5, -0.5)
        axes.set_xticks(_steps(steps)[1])
        axes.set_xlabel("time step")
        axes.set_ylabel("neuron" if every == 1 else f"neuron (one in {every} shown)")
        axes.set_title(f"{layer}: {100 * of_neurons.mean():.1f} % of {len(of_neurons)} neurons spike in a step")
    return figure


def gate_figure(gates: Gates) -> Figure:
    """Return a heat map of the gate's mean at each time step and channel."""
    mean = gates.mean.numpy()
    with _panel(6.4, 0.3 * len(mean) + 1.4) as (figure, axes):
        _heat_map(figure, axes, mean, "gate", _around_half(mean), _AROUND_HALF)
        axes.set_yticks(*_steps(len(mean)))
        axes.set_ylabel("time step")
        axes.set_xlabel("channel")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{gates.layer}: mean over images and pixels, {gates.mean.mean():.3f} over all")
    return figure


def gate_maps_figure(
    images: Tensor, gates: Gates, data: DataInfo | ArraySet, captions: Sequence[str] | None = None
) -> Figure:
    """Return images [N, C, H, W] (or event frames [N, T, C, H, W]), each beside its gate at every time step.

    The images are normalised as ``data`` says; the gates are the mean over channels, of as many images as ``gates`` has
    maps of.
    """
    maps = gates.maps[: len(images)].numpy()
    count, steps = maps.shape[:2]
    norm = _around_half(maps)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.0 * (steps + 1) + 1.0, 1.0 * count + 0.7), dpi=150, layout="constrained")
        grid = figure.subplots(count, steps + 1, squeeze=False)
        for row, (axes_row, image) in enumerate(zip(grid, images, strict=False)):
            _show(axes_row[0], image, data)
            if captions is not None:
                axes_row[0].set_ylabel(_short(captions[row], 14))
            for step, axes in enumerate(axes_row[1:]):
                drawn = axes.imshow(maps[row, step], cmap=_AROUND_HALF, norm=norm)
                _bare(axes)
        grid[0, 0].set_title("image")
        for step, axes in enumerate(grid[0, 1:], 1):
            axes.set_title(f"t = {step}")
        figure.colorbar(drawn, ax=grid, label="gate, mean over channels", shrink=min(1.0, 2 / count))
    return figure


def saliency_figure(
    images: Tensor, saliency: Saliency, data: DataInfo | ArraySet, captions: Sequence[str] | None = None
) -> Figure:
    """Return images [N, C, H, W] (or event frames [N, T, C, H, W]) under their saliency maps, and the spikes beside.

    The maps are those of the mean over time and of each time step, in parts of the image's largest mean and of its
    largest value in any step; what is negative, and speaks against the class, is left out. The images are normalised
    as ``data`` says.
    """
    spikes = saliency.spikes.numpy()
    by_time, mean = (maps.clamp(min=0) for maps in (saliency.maps, saliency.mean[:, None]))
    shares = torch.cat([maps / maps.amax((1, 2, 3), keepdim=True).clamp(min=1e-30) for maps in (mean, by_time)], 1)
    shares = F.interpolate(shares, images.shape[-2:], mode="bilinear").numpy()
    titles = ["image", "mean over t", *(f"t = {step}" for step in range(1, shares.shape[1])), "spikes"]
    with mpl.rc_context(_STYLE):
        size = 1.0 * len(titles) + 1.8, 1.0 * len(images) + 0.9
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(len(images), len(titles), squeeze=False)
        for row, (axes_row, image) in enumerate(zip(grid, images, strict=True)):
            for axes in axes_row[:-1]:
                _show(axes, image, data)
            for axes, share in zip(axes_row[1:-1], shares[row], strict=True):
                # The image is seen where nothing speaks for the class.
                axes.imshow(share, cmap=_RATES, vmin=0, vmax=1, alpha=0.8 * share)
            counted = axes_row[-1].imshow(spikes[row], cmap="gray", vmin=0, vmax=max(1, spikes.max()))
            _bare(axes_row[-1])
            if captions is not None:
                lines = (_short(line, 16) for line in captions[row].splitlines())
                axes_row[0].set_ylabel("\n".join(lines), fontsize=8)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title)
        maps = ScalarMappable(Normalize(0, 1), _RATES)
        for drawn, label in ((counted, f"spikes in {saliency.spiking_layer}"), (maps, f"Grad-CAM of {saliency.layer}")):
            figure.colorbar(drawn, ax=grid, label=label, shrink=min(1.0, 2 / len(images)))
    return figure


def accuracy_figure(top1_by_time: Sequence[float]) -> Figure:
    """Return the top-1 accuracy, in percent, of the outputs' mean over the first t time steps, against t."""
    steps = np.arange(1, len(top1_by_time) + 1)
    with _panel(min(6.4, 2.6 + 0.4 * len(steps)), 2.6) as (figure, axes):
        axes.plot(steps, top1_by_time, color=_BLUE, marker="o", markersize=4.5)
        for step, top1 in zip(steps, top1_by_time, strict=True) if len(steps) <= 10 else ():
            # Beside a line that rises from the first point.
            offset = (0, -12) if step == 1 and top1 < max(top1_by_time[:2]) else (0, 6)
            axes.annotate(f"{top1:.2f}", (step, top1), offset, textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(_steps(len(steps))[1])
        axes.margins(x=0.1, y=0.2)
        axes.grid(axis="y")
        axes.set_xlabel("time steps t")
        axes.set_ylabel("top-1, %")
        axes.set_title("Accuracy of the mean output over steps 1..t")
    return figure


def prediction_figure(
    images: Tensor,
    probabilities: Tensor,
    data: DataInfo | ArraySet,
    captions: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Return images [N, C, H, W] (or event frames [N, T, C, H, W]), each beside the class probabilities at every step.

    ``probabilities``, [T, N, K], are those of the outputs' mean over the first t steps; the largest has the other
    colour, and the class's name or, without ``names`` of the network's classes, its number. Of more than 30 classes
    each image has the 10 that are most probable at any step. The images are normalised as ``data`` says.
    """
    steps, count, classes = probabilities.shape
    few = classes <= _MOST_CLASSES
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.5 * (steps + 1), 1.25 * count + 0.5), dpi=150, layout="constrained")
        grid = figure.subplots(count, steps + 1, squeeze=False)
        for row, (axes_row, image) in enumerate(zip(grid, images, strict=True)):
            _show(axes_row[0], image, data)
            if captions is not None:
                axes_row[0].set_ylabel(_short(captions[row], 14))
            of_image = probabilities[:, row].cpu()
            shown = torch.arange(classes) if few else of_image.amax(0).topk(10).indices.sort().values
            for axes, shares in zip(axes_row[1:], of_image[:, shown].numpy(), strict=True):
                best = shares.argmax()
                colors = [_ORANGE if k == best else _BLUE for k in range(len(shown))]
                axes.bar(range(len(shown)), 100 * shares, color=colors)
                name = names[shown[best]] if names else str(int(shown[best]))
                axes.text(best, 100 * shares[best] + 3, _short(name, 10), ha="center", va="bottom", fontsize=8)
                axes.set_ylim(0, 125)
                axes.set_yticks((0, 50, 100), ("0", "50", "100 %") if axes is axes_row[1] else ("", "", ""))
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.tick_params(labelsize=7.5, labelbottom=few and row == count - 1)
                axes.grid(axis="y")
        grid[0, 0].set_title("image")
        for step, axes in enumerate(grid[0, 1:], 1):
            axes.set_title(f"t = {step}")
        which = "class" if few else "the 10 most probable classes"
        figure.supxlabel(f"{which}, with probability after steps 1..t", fontsize=9)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Return the confusion matrix: ``confusion`` has [label, prediction, number of images] for pairs that occur.

    Colours are shares of a label's images, on a scale that shows small ones. Up to 20 classes have their numbers and
    names, more have neither.
    """
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for label, prediction, images in confusion:
        counts[label, prediction] = images
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(names) <= 20
    side = 1.6 + 0.34 * len(names) if few else 5.6
    with _panel(side + 0.9, side) as (figure, axes):
        norm = PowerNorm(0.5, 0, 100)
        _heat_map(figure, axes, shares, "% of the class's images", norm)
        for label, prediction, images in confusion if few else ():
            axes.text(prediction, label, images, **_on(norm(shares[label, prediction])))
        if few:
            short = [_short(name, 14) for name in names]
            axes.set_yticks(range(len(names)), short)
            axes.set_xticks(range(len(names)), short, rotation=0 if max(map(len, short)) <= 2 else 90)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.set_title(f"Confusion matrix, {counts.sum()} images, {counts.trace()} of them right")
    return figure


def class_accuracy_figure(classes: Sequence[ClassScore]) -> Figure:
    """Return bars of each class's top-1 accuracy; of more than 30 classes the 30 that are recognised least."""
    scored = [each for each in classes if each.top1 is not None]
    shown = scored
    title = "Accuracy by class"
    if len(scored) > _MOST_CLASSES:
        shown = sorted(scored, key=lambda each: each.top1)[:_MOST_CLASSES]
        title = f"The {_MOST_CLASSES} of {len(scored)} classes that are recognised least"
    with _panel(5.6, 0.24 * len(shown) + 1.0) as (figure, axes):
        bars = axes.barh(range(len(shown)), [each.top1 for each in shown], 0.7, color=_BLUE)
        axes.bar_label(bars, [f"{each.correct} of {each.images}" for each in shown], padding=3, fontsize=8)
        axes.set_yticks(range(len(shown)), [_short(each.name, 24) for each in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 118)
        axes.set_xticks(range(0, 101, 20))
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.grid(axis="x")
        axes.set_xlabel("top-1")
        axes.set_title(title)
    return figure


def mistakes_figure(mistakes: Sequence[Mistake], names: Sequence[str], data: DataInfo | ArraySet) -> Figure:
    """Return the images of mistakes (at least one) with prediction, its probability, and label."""
    columns = min(6, len(mistakes))
    rows = -(-len(mistakes) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.35 * columns, 1.75 * rows), dpi=150, layout="constrained")
        for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
            axes.set_axis_off()
        for axes, mistake in zip(grid.flat, mistakes, strict=False):
            axes.set_axis_on()
            _show(axes, mistake.image, data)
            prediction, label = (_short(names[k], 16) for k in (mistake.prediction, mistake.label))
            axes.set_title(f"{prediction}, {100 * mistake.probability:.0f} %\nis {label}", fontsize=8)
    return figure


@contextmanager
def _panel(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of this size in inches with one pair of axes, in this module's style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield figure, figure.subplots()


def _heat_map(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    label: str,
    norm: Normalize,
    colors: str = _RATES,
    write: str | None = None,
) -> None:
    """Draw a matrix with its colour bar; ``write`` is the format of the numbers in its cells."""
    drawn = axes.imshow(values, cmap=colors, norm=norm, aspect="auto")
    figure.colorbar(drawn, ax=axes, label=label)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values) if write else ():
        axes.text(column, row, write.format(value), **_on(norm(value)))


def _with_silence(layer: LayerFiring) -> str:
    """Return the name of a layer with the number of channels that are dead or saturated, if any are."""
    found = {"dead": len(layer.dead_channels), "saturated": len(layer.saturated_channels)}
    channels = ", ".join(f"{count} {what}" for what, count in found.items() if count)
    return f"{layer.layer} ({channels} of {layer.spikes.shape[1]})" if channels else layer.layer


def _on(share: float) -> dict[str, object]:
    """Return the style of a number in a cell whose colour is at this place of the colour map."""
    return {"color": "white" if share < 0.6 else "black", "ha": "center", "va": "center", "fontsize": 7.5}


def _around_half(values: np.ndarray) -> Normalize:
    """Return a scale whose middle is 1/2, where a gate is that attention does not move."""
    reach = max(abs(values - 0.5).max(), 1e-3)
    return Normalize(0.5 - reach, 0.5 + reach)


def _show(axes: Axes, image: Tensor, data: DataInfo | ArraySet) -> None:
    """Draw a normalised image [C, H, W], or the mean of event frames [T, C, H, W], of which channels are added up."""
    mean, std = (np.reshape(each, (-1, 1, 1)) for each in (data.mean, data.std))
    pixels = image.cpu().numpy() * std + mean
    if pixels.ndim == 4:
        pixels = pixels.mean(0)
    if len(pixels) == 3:
        axes.imshow(pixels.transpose(1, 2, 0).clip(0, 1))
    else:
        axes.imshow(pixels.sum(0), cmap="gray")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _steps(steps: int) -> tuple[range, list[int]]:
    """Return places and labels of time steps 1..T on an axis that counts from 0, at most about 16."""
    places = range(0, steps, -(-steps // 16))
    return places, [place + 1 for place in places]


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
