"""What a run is set up from: batches that BatchNorm cannot train on are refused, and no others."""

from dataclasses import replace

import pytest
import torch

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import Data
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS, Ranks
from gac.training.setup import check_memory, choose_device, create_network, open_data

CONFIG = Config(
    data=DataConfig(name="synthetic", synthetic_classes=3, image_size=4, synthetic_images=17),
    model=ModelConfig(T=1, width=4, depth=[1, 1, 1]),
    train=TrainConfig(batch_size=16),
    device="cpu",
)


def data_of(config: Config) -> Data:
    return open_data(config, torch.device("cpu"), None, SINGLE_PROCESS)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    ("name", "depth", "coding"),
    [
        ("gac_msresnet18_cifar", [1, 1, 1], "gac"),
        ("gac_msresnet18", [1, 1, 1, 1], "direct"),
        ("gac_msresnet18", [1, 1, 1, 1], "rate"),
    ],
)
def test_a_single_value_is_refused_where_batch_norm_fails(
    name: str, depth: list[int], coding: str, T: int, size: int
) -> None:
    model = replace(CONFIG.model, name=name, depth=depth, coding=coding, T=T)
    config = replace(CONFIG, model=model, data=replace(CONFIG.data, image_size=size, crop_padding=0))
    even = replace(config, data=replace(config.data, synthetic_images=16))
    network = create_network(even, data_of(even), SINGLE_PROCESS).train()
    try:
        network(torch.rand(1, 3, size, size))
    except ValueError:
        with pytest.raises(InputError, match=f"batch of 1 image of {size} x {size} pixels .* at model.T {T}: choose"):
            create_network(config, data_of(config), SINGLE_PROCESS)
    else:
        create_network(config, data_of(config), SINGLE_PROCESS)


@pytest.mark.parametrize(
    ("options", "images", "size", "remedy"),
    [
        ({"batch_size": 1}, 16, 1, "at the end of 16, or larger images"),
        ({"batch_size": 4, "accumulate_steps": 4}, 16, 1, "of 16, train.accumulate_steps below 4, or larger images"),
        ({"batch_size": 4, "accumulate_steps": 2}, 16, 1, None),
        ({"batch_size": 16}, 19, 2, "of 19, fewer than 2 processes, or larger images"),
        ({"batch_size": 16}, 20, 2, None),
        ({"batch_size": 16, "sync_batch_norm": True}, 19, 2, None),
    ],
)
def test_the_smallest_micro_batch_counts(
    options: dict[str, object], images: int, size: int, remedy: str | None
) -> None:
    data = replace(CONFIG.data, synthetic_images=images)
    config = replace(CONFIG, data=data, train=replace(CONFIG.train, **options))
    ranks = Ranks(size=size)
    if remedy is None:
        create_network(config, data_of(config), ranks)
        return
    with pytest.raises(InputError, match=f"BatchNorm cannot train on a single value per channel, .* {remedy}$"):
        create_network(config, data_of(config), ranks)


@pytest.mark.parametrize(
    ("model", "train", "named"),
    [
        ({"width": 60_000}, {}, r"a network of .* \(model\.width 60000, .*\) needs .* GiB of memory, and .* are free"),
        ({"kernel_size": 1024, "width": 512}, {}, r"model\.kernel_size 1024\) needs"),
        (
            {"T": 10_000, "width": 256},
            {},
            r"^train\.batch_size 16 with model\.width 256 and model\.T 10000 on images of 64 x",
        ),
        ({"T": 10_000, "width": 256}, {"batch_size": 1}, r"^train\.batch_size 1 with"),
        (
            {"T": 300, "width": 64},
            {"batch_size": 1, "eval_batch_size": 10_000},
            r"^train\.eval_batch_size 10000 with",
        ),
    ],
)
def test_memory_that_cannot_be_had_is_one_line_with_the_fields(
    model: dict, train: dict, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gac.memory.available_memory", lambda: 8 * 2**30)
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, image_size=64, synthetic_images=64),
        model=replace(CONFIG.model, **model),
        train=replace(CONFIG.train, **train),
    )
    data = data_of(config)
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=named):
        check_memory(config, data, torch.device("cpu"), SINGLE_PROCESS)
    check_memory(CONFIG, data_of(CONFIG), torch.device("cpu"), SINGLE_PROCESS)
    assert torch.get_rng_state().equal(before), "the initial weights would be others"


def test_only_one_process_overlaps_weight_gradients() -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, overlap_weight_gradients=True))
    assert choose_device(config, SINGLE_PROCESS).type == "cpu"
    with pytest.raises(InputError, match=r"^train\.overlap_weight_gradients .* and there are 2: leave it off$"):
        choose_device(config, Ranks(size=2))


def test_what_only_cuda_devices_do_is_said_on_others(caplog: pytest.LogCaptureFixture) -> None:
    for value in (False, "auto"):
        choose_device(replace(CONFIG, train=replace(CONFIG.train, cuda_graph=value)), SINGLE_PROCESS)
    assert not caplog.records
    asked = replace(CONFIG.train, cuda_graph=True, overlap_weight_gradients=True)
    choose_device(replace(CONFIG, train=asked), SINGLE_PROCESS)
    assert caplog.messages == [
        f"train.{name} true is for CUDA devices: on cpu it does nothing"
        for name in ("cuda_graph", "overlap_weight_gradients")
    ]
