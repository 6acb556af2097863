"""CutMix and mixup: which of them takes a batch, and that they are torchvision's."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2

from gac.config import TrainConfig
from gac.training.mixing import Mixing

OFF = TrainConfig(epochs=10, cutmix="off")
BATCH = replace(OFF, cutmix="batch", cutmix_probability=1.0)
CLASSES = 5


def kinds(config: TrainConfig, batches: int = 400, epoch: int = 0) -> dict[str, float]:
    """Return the shares of batches that each kind of mixing takes."""
    torch.manual_seed(0)
    mixing = Mixing(config, CLASSES)
    cutmix_epoch = mixing.draw_for_epoch(epoch)
    # A distinct number in every image: CutMix keeps the numbers, mixup makes others.
    images = (2.0 ** torch.arange(8)).view(8, 1, 1, 1).expand(8, 1, 6, 6)
    labels = torch.arange(8) % CLASSES
    counts = {"cutmix": 0, "mixup": 0, "none": 0}
    for _ in range(batches):
        mixed, targets = mixing(images.clone(), labels, epoch, cutmix_epoch)
        if targets is labels:
            assert torch.equal(mixed, images)
            counts["none"] += 1
        else:
            assert targets.shape == (8, CLASSES)
            assert torch.allclose(targets.sum(1), torch.ones(8))
            counts["cutmix" if torch.isin(mixed, images).all() else "mixup"] += 1
    return {kind: count / batches for kind, count in counts.items()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OFF, {"cutmix": 0.0, "mixup": 0.0, "none": 1.0}),
        (replace(OFF, mixup_alpha=1.0), {"cutmix": 0.0, "mixup": 1.0, "none": 0.0}),
        (BATCH, {"cutmix": 1.0, "mixup": 0.0, "none": 0.0}),
        (replace(BATCH, cutmix_probability=0.5), {"cutmix": 0.5, "mixup": 0.0, "none": 0.5}),
        (replace(BATCH, mixup_alpha=1.0), {"cutmix": 0.5, "mixup": 0.5, "none": 0.0}),
        (replace(BATCH, mixup_alpha=1.0, cutmix_probability=0.5), {"cutmix": 0.25, "mixup": 0.5, "none": 0.25}),
        (replace(BATCH, cutmix="epoch"), {"cutmix": 1.0, "mixup": 0.0, "none": 0.0}),
        (replace(BATCH, cutmix="epoch", cutmix_probability=0.0), {"cutmix": 0.0, "mixup": 0.0, "none": 1.0}),
        (replace(BATCH, cutmix="epoch", mixup_alpha=1.0), {"cutmix": 0.5, "mixup": 0.5, "none": 0.0}),
        (
            replace(BATCH, cutmix="epoch", cutmix_probability=0.0, mixup_alpha=1.0),
            {"cutmix": 0.0, "mixup": 0.5, "none": 0.5},
        ),
    ],
)
def test_every_batch_is_left_to_one_of_them(config: TrainConfig, expected: dict[str, float]) -> None:
    # A CutMix box of no pixel or of all looks like no CutMix, and a mixup of next to 0 like none, now and then.
    assert kinds(config) == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("cutmix", ["epoch", "batch"])
def test_the_last_epochs_are_not_mixed_and_draw_nothing(cutmix: str) -> None:
    config = replace(BATCH, cutmix=cutmix, mixup_alpha=1.0, mix_off_epochs=3)
    assert kinds(config, epoch=6)["none"] < 0.1
    for epoch in (7, 8, 9):
        assert kinds(config, epoch=epoch)["none"] == 1.0
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        mixing = Mixing(config, CLASSES)
        mixing(torch.ones(2, 1, 4, 4), torch.arange(2), epoch, mixing.draw_for_epoch(epoch))
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (replace(OFF, mixup_alpha=0.3), v2.MixUp(alpha=0.3, num_classes=CLASSES)),
        (replace(BATCH, cutmix="epoch", cutmix_beta=0.7), v2.CutMix(alpha=0.7, num_classes=CLASSES)),
    ],
    ids=["mixup", "cutmix"],
)
def test_the_batches_are_torchvisions(config: TrainConfig, transform: v2.Transform) -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(3)
    mixed, targets = Mixing(config, CLASSES)(images.clone(), labels, 0, True)
    torch.manual_seed(3)
    expected, expected_targets = transform(images, labels)
    assert torch.equal(mixed, expected)
    assert torch.equal(targets, expected_targets)


@pytest.mark.parametrize("config", [BATCH, replace(OFF, mixup_alpha=1.0)], ids=["cutmix", "mixup"])
def test_all_frames_of_a_sample_are_mixed_alike(config: TrainConfig) -> None:
    frames = torch.rand(6, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % CLASSES
    torch.manual_seed(1)
    mixed, targets = Mixing(config, CLASSES)(frames, labels, 0, None)
    assert mixed.shape == frames.shape
    assert not mixed.equal(frames)
    for t in range(3):
        torch.manual_seed(1)
        expected, its_targets = Mixing(config, CLASSES)(frames[:, t], labels, 0, None)
        assert mixed[:, t].equal(expected)
        assert targets.equal(its_targets)
