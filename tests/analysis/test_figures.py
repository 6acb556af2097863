"""Figures: what is drawn is what was measured, and SVG fits into a page."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from gac import create_model
from gac.analysis import figures
from gac.analysis.energy import measure_energy
from gac.analysis.firing import LayerFiring, measure_firing
from gac.analysis.gates import measure_gates
from gac.analysis.saliency import Saliency
from gac.data import DataInfo
from gac.evaluation.predictions import ClassScore
from gac.evaluation.sample import Mistake
from lively import lively

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INFO = DataInfo("made", 3, 3, 8, 8, None, None, 3, (0.5, 0.4, 0.3), (0.25, 0.5, 0.5))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return lively(create_model("gac_msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1]), IMAGES)


def drawn(figure: Figure, axes: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[axes].images[0].get_array())


def labels(ticks: list) -> list[str]:
    return [tick.get_text() for tick in ticks]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_energy_has_a_bar_for_each_convention(network: nn.Module) -> None:
    energy = measure_energy(network, [IMAGES])
    figure = figures.energy_figure(energy)
    (axes,) = figure.axes
    paper, full = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert paper == [layer.paper_mj or 0 for layer in energy.layers]
    assert full == [layer.full_mj for layer in energy.layers]
    assert labels(axes.get_yticklabels()) == [layer.layer for layer in energy.layers]
    legend = labels(figure.legends[0].get_texts())
    assert legend == [f'"paper", {energy.paper_mj:.4g} mJ in total', f'"full", {energy.full_mj:.4g} mJ in total']


def test_firing_rates_have_numbers_and_say_which_channels_are_no_use(network: nn.Module) -> None:
    layers = [*measure_firing(network, [IMAGES]), LayerFiring("odd", torch.tensor([[0, 8, 8], [0, 8, 1]]), 8)]
    figure = figures.firing_rate_figure(layers)
    assert drawn(figure).tolist() == [[pytest.approx(100 * rate) for rate in layer.rate_by_time] for layer in layers]
    assert texts(figure) == [f"{100 * rate:.1f}" for layer in layers for rate in layer.rate_by_time]
    assert labels(figure.axes[0].get_yticklabels())[-1] == "odd (1 dead, 1 saturated of 3)"
    long = LayerFiring("long", torch.arange(300).view(100, 3), 300)
    figure = figures.firing_rate_figure([long])
    assert texts(figure) == []
    assert labels(figure.axes[0].get_xticklabels()) == [str(step) for step in range(1, 101, 7)]


@pytest.mark.parametrize("most", [200, 7])
def test_a_raster_has_a_dash_for_each_spike(most: int) -> None:
    spikes = (torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    figure = figures.raster_figure(spikes, "lif", most)
    (axes,) = figure.axes
    dashes = {
        (int(segment[:, 0].mean()) - 1, int(segment[0, 1]))
        for lines in axes.collections
        for segment in lines.get_segments()
    }
    every = 1 if most == 200 else 6
    assert dashes == {(t, n) for t, n in spikes.flatten(1).nonzero().tolist() if n % every == 0}
    assert ("one in 6" in axes.get_ylabel()) is (every == 6)
    assert axes.get_title() == f"lif: {100 * spikes.mean():.1f} % of 40 neurons spike in a step"


def test_gates_stand_beside_their_images(network: nn.Module) -> None:
    (gates,) = measure_gates(network, [IMAGES], maps=2)
    figure = figures.gate_figure(gates)
    assert np.array_equal(drawn(figure), gates.mean.numpy())
    low, high = figure.axes[0].images[0].get_clim()
    assert low + high == pytest.approx(1)
    figure = figures.gate_maps_figure(IMAGES, gates, INFO, ["a", "b", "c"])
    assert len(figure.axes) == 2 * 3 + 1
    for row in range(2):
        for step in range(2):
            assert np.array_equal(drawn(figure, 3 * row + 1 + step), gates.maps[row, step].numpy())
    assert [figure.axes[place].get_ylabel() for place in (0, 3)] == ["a", "b"]


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_are_shown_without_their_normalisation(frames: int | None, channels: int) -> None:
    pixels = torch.rand(*(() if frames is None else (frames,)), channels, 6, 5)
    mean, std = (0.1, 0.2, 0.3)[:channels], (0.5, 0.6, 0.7)[:channels]
    info = DataInfo("made", 3, channels, 6, 5, None, None, 1, mean, std, frames=frames)
    image = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    names = ["first", "a class with a name that has no end", "third"]
    figure = figures.mistakes_figure([Mistake(image, 0, 2, 1, 0.987)], names, info)
    expected = pixels if frames is None else pixels.mean(0)
    expected = expected.permute(1, 2, 0) if channels == 3 else expected.sum(0)
    assert np.allclose(drawn(figure), expected.numpy(), atol=1e-6)
    assert figure.axes[0].get_title() == "a class with a …, 99 %\nis third"


def test_mistakes_fill_rows_of_six() -> None:
    mistakes = [Mistake(IMAGES[0], 0, 0, 1, 0.5)] * 8
    figure = figures.mistakes_figure(mistakes, ["a", "b"], INFO)
    assert [bool(axes.images) for axes in figure.axes] == [True] * 8 + [False] * 4


def test_accuracy_and_classes() -> None:
    figure = figures.accuracy_figure([50.0, 75.25])
    (line,) = figure.axes[0].lines
    assert (line.get_xdata().tolist(), list(line.get_ydata())) == ([1, 2], [50.0, 75.25])
    assert texts(figure) == ["50.00", "75.25"]
    classes = [ClassScore(f"c{k}", 10, k % 11, 10.0 * (k % 11)) for k in range(40)] + [ClassScore("none", 0, 0, None)]
    figure = figures.class_accuracy_figure(classes[:5] + classes[-1:])
    assert [bar.get_width() for bar in figure.axes[0].containers[0]] == [0, 10, 20, 30, 40]
    figure = figures.class_accuracy_figure(classes)
    widths = [bar.get_width() for bar in figure.axes[0].containers[0]]
    assert widths == sorted(10.0 * (k % 11) for k in range(40))[:30]
    assert "30 of 40 classes" in figure.axes[0].get_title()


@pytest.mark.parametrize("classes", [3, 25])
def test_the_confusion_matrix(classes: int) -> None:
    figure = figures.confusion_figure([[0, 0, 3], [0, 2, 1], [2, 1, 5]], [f"c{k}" for k in range(classes)])
    expected = np.zeros((classes, classes))
    expected[0, 0], expected[0, 2], expected[2, 1] = 75, 25, 100
    assert np.array_equal(drawn(figure), expected)
    assert figure.axes[0].get_title() == "Confusion matrix, 9 images, 3 of them right"
    assert texts(figure) == (["3", "1", "5"] if classes == 3 else [])
    few = classes == 3
    assert (labels(figure.axes[0].get_yticklabels()) == ["c0", "c1", "c2"]) is few


def test_svg_fits_into_a_page(network: nn.Module) -> None:
    energy = measure_energy(network, [IMAGES])
    (gates,) = measure_gates(network, [IMAGES])
    maps = figures.gate_maps_figure(IMAGES, gates, INFO)
    both = [
        figures.to_svg(figures.energy_figure(energy), "Energy of each layer"),
        figures.to_svg(maps, "Gates <of> images"),
    ]
    assert both[0] == figures.to_svg(figures.energy_figure(energy), "Energy of each layer")
    ids = []
    for svg, title in zip(both, ("Energy of each layer", "Gates <of> images"), strict=True):
        root = ElementTree.fromstring(svg)
        assert svg.startswith('<svg role="img" ')
        assert root.find("{http://www.w3.org/2000/svg}title").text == title
        assert "#1a1a1b" not in svg
        assert "currentColor" in svg
        assert "http" not in re.sub(r'"http://(www.w3.org|purl.org|creativecommons.org)/[^"]*"', "", svg)
        found = [element.get("id") for element in root.iter() if element.get("id")]
        referred = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", svg))
        assert referred <= set(found)
        ids += found
    assert len(set(ids)) == len(ids) > 0
    assert ">stem.conv<" in both[0]
    assert both[1].count('href="data:image/png;base64') >= maps.axes[0].get_gridspec().nrows * 3


def test_predictions_have_a_bar_for_each_class_and_the_largest_stands_out(network: nn.Module) -> None:
    probabilities = torch.tensor([[[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]], [[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]])
    figure = figures.prediction_figure(IMAGES[:2], probabilities, INFO, ["cat", "dog"])
    for row in range(2):
        image, *panels = figure.axes[3 * row : 3 * row + 3]
        assert image.get_ylabel() == ("cat", "dog")[row]
        for step, axes in enumerate(panels):
            bars = axes.patches
            expected = 100 * probabilities[step, row]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected.tolist())
            colors = [bar.get_facecolor() for bar in bars]
            assert [colors.count(color) for color in colors].index(1) == expected.argmax()
            assert labels(axes.texts) == [str(int(expected.argmax()))]
    # Those of the network: another data set's may be in another order.
    named = figures.prediction_figure(
        IMAGES[:2], probabilities, replace(INFO, class_names=("x", "y", "z")), names=["zero", "one", "two"]
    )
    assert [labels(axes.texts) for axes in named.axes if axes.texts] == [["one"], ["zero"], ["zero"], ["two"]]


def test_of_many_classes_each_image_has_the_most_probable() -> None:
    probabilities = torch.rand(2, 2, 300, generator=torch.Generator().manual_seed(0)).softmax(-1)
    figure = figures.prediction_figure(IMAGES[:2], probabilities, INFO)
    for row in range(2):
        best = probabilities[:, row].amax(0).argsort(descending=True)[:10].sort().values
        for step, axes in enumerate(figure.axes[3 * row + 1 : 3 * row + 3]):
            expected = 100 * probabilities[step, row, best]
            assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected.tolist())
            assert labels(axes.texts) == [str(int(best[expected.argmax()]))]


def test_saliency_is_drawn_over_the_image_where_it_is_positive() -> None:
    maps = torch.tensor([[[[1.0, -1.0], [0.0, 2.0]], [[1.0, 1.0], [-4.0, -2.0]]]])
    spikes = torch.tensor([[[3.0, 0.0], [1.0, 5.0]]])
    saliency = Saliency("stages.0", torch.tensor([1]), maps, "lif", spikes)
    figure = figures.saliency_figure(IMAGES[:1, :, :2, :2], saliency, INFO, ["cat\nseen as dog"])
    image, mean, *by_time, last = figure.axes[:5]
    assert [axes.get_title() for axes in (image, mean, *by_time, last)] == [
        "image", "mean over t", "t = 1", "t = 2", "spikes",
    ]  # fmt: skip
    assert image.get_ylabel() == "cat\nseen as dog"
    for axes, expected in (
        (mean, [[1.0, 0.0], [0.0, 0.0]]),
        (by_time[0], [[0.5, 0.0], [0.0, 1.0]]),
        (by_time[1], [[0.5, 0.5], [0.0, 0.0]]),
    ):
        under, over = axes.images
        assert np.asarray(over.get_array()).tolist() == expected
        assert np.asarray(over.get_alpha()) == pytest.approx(0.8 * np.array(expected))
        assert np.array_equal(under.get_array(), image.images[0].get_array())
    assert np.asarray(last.images[0].get_array()).tolist() == spikes[0].tolist()


def test_names_with_dollars_are_no_formulas() -> None:
    figure = figures.class_accuracy_figure([ClassScore(r"$\frac", 2, 1, 50.0), ClassScore("$x_$", 2, 2, 100.0)])
    svg = figures.to_svg(figure, "names")
    assert r">$\frac</text>" in svg
    assert ">$x_$</text>" in svg
