import torch
from PIL import Image
from torchvision import transforms

from gac.data.normalization import Normalization, pixel_statistics


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_equals_torchvision_bit_for_bit():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = random_images(10, 3, 32, 32)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([steps(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    result = Normalization(mean, std, torch.device("cpu"))(images)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_input_is_not_changed():
    images = random_images(2, 3, 4, 4)
    before = images.clone()
    Normalization((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))(images)
    assert torch.equal(images, before)


def test_statistics_are_those_of_the_pixels():
    # More images than a chunk holds, and channels of different spread.
    images = random_images(5000, 3, 4, 5) // torch.tensor([1, 2, 7], dtype=torch.uint8).view(3, 1, 1)
    mean, std = pixel_statistics(images)
    pixels = images.double() / 255
    expected_std, expected_mean = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), expected_mean, rtol=1e-12, atol=0)
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), expected_std, rtol=1e-12, atol=0)


def test_statistics_of_equal_pixels_have_no_spread():
    mean, std = pixel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8))
    assert mean == (0.2,)
    assert std == (0.0,)
