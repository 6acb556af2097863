import pytest
import torch
from torchvision.transforms.v2 import functional as torchvision_functional

from gac.data.augment import (
    POLICIES,
    Compose,
    CropAndFlip,
    Cutout,
    Erasing,
    Policy,
    Roll,
    crop_and_flip,
    make_policy,
    mean_color,
)
from gac.data.seeding import Stream, derive_seed


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "padding"),
    [((64, 3, 32, 32), 4), ((40, 1, 8, 8), 2), ((30, 3, 7, 12), 5), ((5, 2, 6, 5), 0), ((1, 3, 9, 9), 1)],
)
def test_equals_torchvision_image_by_image(shape, padding):
    images = random_images(*shape)
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(2 * padding + 1, (2, shape[0]), generator=generator)
    flip = torch.rand(shape[0], generator=generator) < 0.5

    result = crop_and_flip(images, top, left, flip, padding)

    for i, image in enumerate(images):
        expected = torchvision_functional.pad(image, [padding] * 4)
        expected = torchvision_functional.crop(expected, int(top[i]), int(left[i]), *shape[2:])
        if flip[i]:
            expected = torchvision_functional.horizontal_flip(expected)
        assert torch.equal(result[i], expected)
    assert result.dtype == torch.uint8


def test_padding_is_black():
    white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    corner = torch.tensor([0, 2])  # the image's top left beyond the window's by one pixel, and flush with it
    result = crop_and_flip(white, corner, corner, torch.tensor([False, False]), padding=1)
    expected = white.clone()
    expected[0, :, 0, :] = 0
    expected[0, :, :, 0] = 0
    expected[1, :, -1, :] = 0
    expected[1, :, :, -1] = 0
    assert torch.equal(result, expected)


def test_no_value_is_read_by_the_host():
    # A meta tensor has no values: .item() or a shape that depends on data would raise.
    offsets = torch.empty(8, dtype=torch.int64, device="meta")
    flip = torch.empty(8, dtype=torch.bool, device="meta")
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert crop_and_flip(images, offsets, offsets, flip, 4).shape == images.shape


def test_draws_cover_every_offset_and_both_sides_evenly():
    count, padding = 20_000, 2
    # One pixel lies at (row, column) = (2, 3); where it lands tells the offsets and the flip.
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 2, 3] = 255
    result = CropAndFlip(padding, horizontal_flip=True)(images, torch.Generator().manual_seed(3))
    row, column = result.flatten(1).argmax(1) // 8, result.flatten(1).argmax(1) % 8
    assert torch.equal(row.unique(), torch.arange(5))  # 2 - 2 .. 2 + 2
    # Unflipped it lands in columns 1..5, flipped in 2..6, each with probability 1/10.
    share = torch.bincount(column, minlength=8) / count
    expected = torch.tensor([0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.1, 0])
    assert torch.allclose(share, expected, atol=0.015)
    assert torch.allclose(torch.bincount(row)[:5] / count, torch.full((5,), 0.2), atol=0.015)
    # Independent of each other: every (row, column) pair in proportion.
    joint = torch.bincount(row * 8 + column, minlength=40).view(5, 8) / count
    assert torch.allclose(joint, expected.expand(5, 8) / 5, atol=0.01)


def test_flip_off_keeps_the_crops():
    images = random_images(50, 3, 8, 8)
    flipped = CropAndFlip(2, horizontal_flip=True)(images, torch.Generator().manual_seed(3))
    plain = CropAndFlip(2, horizontal_flip=False)(images, torch.Generator().manual_seed(3))
    mirrored = (flipped != plain).flatten(1).any(1)
    assert 10 < mirrored.sum() < 40
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_is_torchvisions_for_each_group(name, channels):
    images = random_images(10, channels, 8, 8)
    before = torch.random.get_rng_state()
    result = Policy(name, group=4)(images, seeded(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(5, Stream.POLICY))
        transform = make_policy(name)
        expected = torch.cat([transform(images[:4]), transform(images[4:8]), transform(images[8:])])
    assert torch.equal(result, expected)
    assert (result.dtype, result.shape) == (images.dtype, images.shape)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_differs_between_groups_and_seeds(name):
    images = random_images(1, 3, 16, 16).expand(64, -1, -1, -1)
    result = Policy(name, group=8)(images, seeded(1))
    assert len(result.flatten(1).unique(dim=0)) > 4
    assert torch.equal(result, Policy(name, group=8)(images, seeded(1)))
    assert not torch.equal(result, Policy(name, group=8)(images, seeded(2)))


def test_erased_rectangles_are_torchvisions():
    count = 400
    white = torch.full((count, 3, 32, 32), 255, dtype=torch.uint8)
    result = Erasing(0.25, [10, 20, 30])(white, seeded(0))
    assert (white == 255).all()
    erased = (result != white).all(1)  # [B, H, W]
    hit = erased.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for mask, image in zip(erased[hit], result[hit], strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        rectangle = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert mask[rectangle].all()
        assert mask[rectangle].sum() == mask.sum()
        assert (image[:, mask] == torch.tensor([[10], [20], [30]])).all()
    area = erased[hit].flatten(1).float().mean(1)
    assert 0.01 < area.min() < 0.05
    assert 0.28 < area.max() < 0.35  # torchvision's share of the image is 0.02 to 0.33
    assert len(erased[hit].flatten(1).unique(dim=0)) > 0.9 * hit.sum()


@pytest.mark.parametrize("side", [1, 2, 5, 30])
def test_cutout_is_a_square_round_any_pixel(side):
    images = torch.full((2000, 3, 5, 7), 255, dtype=torch.uint8)
    result = Cutout(side, [10, 20, 30])(images, seeded(0))
    assert (images == 255).all()
    found = (result != images).all(1)  # [B, H, W]
    assert torch.equal(result, torch.where(found[:, None], torch.tensor([10, 20, 30]).view(3, 1, 1), images))
    # DeVries and Taylor's: from centre - side // 2 on, what lies outside being cut off.
    rows, columns = torch.arange(5)[:, None], torch.arange(7)
    allowed = set()
    for y in range(5):
        for x in range(7):
            top, left = y - side // 2, x - side // 2
            inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
            allowed.add(tuple(inside.flatten().tolist()))
    assert {tuple(mask.flatten().tolist()) for mask in found} == allowed


def test_erasing_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    images = random_images(20, 1, 8, 8)
    before = torch.random.get_rng_state()
    one, same, other = (Erasing(1.0, [0])(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_steps_follow_each_other():
    white = torch.full((30, 3, 8, 8), 255, dtype=torch.uint8)
    steps = [Erasing(1.0, [9, 9, 9]), Erasing(1.0, [7, 7, 7])]
    result = Compose(steps)(white, seeded(0))
    assert torch.equal(result, steps[1](steps[0](white, seeded(0)), seeded(0)))
    assert set(result.unique().tolist()) == {7, 255}  # one seed, one rectangle


def test_the_mean_color_is_what_normalisation_makes_zero_of():
    assert mean_color((0.5, 0.0, 1.0)) == [128, 0, 255]


def test_a_roll_is_torch_roll_by_every_shift_up_to_the_largest():
    images = random_images(400, 2, 5, 9)
    result = Roll(2)(images, seeded(0))
    shifts = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    found = [
        [shift for shift in shifts if torch.equal(torch.roll(image, shift, (-2, -1)), rolled)]
        for image, rolled in zip(images, result, strict=True)
    ]
    assert {len(each) for each in found} == {1}
    assert {each[0] for each in found} == set(shifts)


@pytest.mark.parametrize(
    "augmentation",
    [
        CropAndFlip(2, horizontal_flip=True),
        Roll(3),
        Policy("autoaugment_cifar10", 2),
        Policy("randaugment", 2),
        Cutout(4, [10, 20, 30]),
        Erasing(0.7, [10, 20, 30]),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_all_frames_of_a_sample_are_augmented_alike(augmentation):
    frames = random_images(6, 4, 3, 9, 11)
    before = frames.clone()
    for seed in range(5):
        result = augmentation(frames, torch.Generator().manual_seed(seed))
        assert result.shape == frames.shape
        for t in range(4):
            expected = augmentation(frames[:, t].contiguous(), torch.Generator().manual_seed(seed))
            assert torch.equal(result[:, t], expected)
        assert not torch.equal(result, frames)
    assert torch.equal(frames, before)
