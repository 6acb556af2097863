import pytest
import torch

from gac.coding.baselines import BaselineCoding


def test_rate_coding_spikes_in_proportion_to_the_intensity():
    torch.manual_seed(0)
    images = torch.tensor([0.0, 0.25, 0.75, 1.0]).view(1, 1, 2, 2)
    spikes = BaselineCoding("rate", T=4000)(images)
    assert set(spikes.unique().tolist()) == {0, 1}
    torch.testing.assert_close(spikes.mean(0), images, atol=0.03, rtol=0)


def test_latency_coding_spikes_once_and_earlier_for_brighter_pixels():
    images = torch.tensor([0.0, 0.4, 0.6, 1.0]).view(1, 1, 2, 2)
    spikes = BaselineCoding("latency", T=6)(images)
    assert torch.equal(spikes.sum(0), torch.ones_like(images))
    assert spikes.argmax(0).flatten().tolist() == [5, 3, 2, 0]


def test_phase_coding_gives_the_binary_digits_of_the_intensity():
    images = torch.rand(2, 3, 4, 4)
    T = 8
    spikes = BaselineCoding("phase", T)(images)
    weights = 2.0 ** -torch.arange(1, T + 1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close((spikes * weights).sum(0), images * (1 - 2.0**-T), atol=2.0**-T, rtol=0)


@pytest.mark.parametrize("coding", ["rate", "latency", "phase"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_call_encodes_its_own_images(coding, dtype):
    encoder = BaselineCoding(coding, T=3)
    dark, bright = torch.zeros(2, 1, 2, 2, dtype=dtype), torch.ones(2, 1, 2, 2, dtype=dtype)
    assert encoder(dark).shape == (3, 2, 1, 2, 2)
    assert encoder(bright)[0].min() == 1
    assert encoder(bright).dtype == dtype


@pytest.mark.parametrize("coding", ["rate", "latency", "phase"])
def test_standardised_images_are_refused(coding):
    with pytest.raises(ValueError, match=r"takes intensities in \[0, 1\], got \[-1, 0\]"):
        BaselineCoding(coding, T=4)(torch.tensor([[[[-1.0, 0.0]]]]))


@pytest.mark.parametrize("coding", ["rate", "latency", "phase"])
def test_what_is_no_number_is_no_intensity(coding: str) -> None:
    with pytest.raises(ValueError, match=r"takes intensities in \[0, 1\], got \[nan, nan\]"):
        BaselineCoding(coding, T=4)(torch.tensor([[[[0.5, float("nan")]]]]))


def test_latency_needs_more_than_one_time_step():
    with pytest.raises(ValueError, match="latency coding needs T >= 2"):
        BaselineCoding("latency", T=1)


def test_an_unknown_coding_is_refused():
    with pytest.raises(ValueError, match="coding must be one of rate, latency, phase"):
        BaselineCoding("burst", T=4)
