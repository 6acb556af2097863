"""The memory that a network's activations need at least: the outputs of its convolutions."""

from collections.abc import Iterator

from gac.config import TrainConfig
from gac.data import Data, DataInfo
from gac.execution.distributed import Ranks
from gac.memory import check_fits
from gac.models.ms_resnet import MSResNet


def check_evaluation(network: MSResNet, data: Data, train: TrainConfig, ranks: Ranks, amp: str) -> None:
    """Raise InputError if an evaluation batch does not fit the memory; of all layers only one is kept."""
    images = max(1, min(train.eval_batch_size, data.test.size) // ranks.size)
    check_fits(
        f"train.eval_batch_size {train.eval_batch_size} with {describe(network, data.info)}",
        (4 if amp == "off" else 2) * images * max(output_values(network, data.info)),
        "choose smaller ones",
    )


def describe(network: MSResNet, info: DataInfo) -> str:
    """Return what decides on the size of activations, in words."""
    width, pixels = network.stem.conv.out_channels, f"{info.height} x {info.width} pixels"
    return f"model.width {width} and model.T {network.T} on images of {pixels}"


def output_values(network: MSResNet, info: DataInfo) -> list[int]:
    """Return how many values the output of the stem and of both convolutions of each block has for an image."""
    stem, *others = (channels * height * width for channels, height, width in feature_maps(network, info))
    return [stem if repeats_an_image(network, info) else network.T * stem, *(network.T * each for each in others)]


def feature_maps(network: MSResNet, info: DataInfo) -> Iterator[tuple[int, int, int]]:
    """Yield channels, height and width of the output of the stem and of both convolutions of each block, pooled."""
    height, width = info.height, info.width
    # What is padded, and pooling in place of a convolution's stride, divides the sides and rounds up.
    stride, _ = network.stem.conv.stride
    height, width = -(-height // stride), -(-width // stride)
    yield network.stem.conv.out_channels, height, width
    for block in (block for stage in network.stages for block in stage):
        height, width = -(-height // block.stride), -(-width // block.stride)
        yield from [(block.conv2.conv.out_channels, height, width)] * 2


def repeats_an_image(network: MSResNet, info: DataInfo) -> bool:
    """Return whether the stem runs once for all time steps."""
    return info.frames is None and network.coding_name in ("gac", "direct")
