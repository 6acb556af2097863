import pytest
import torch
from torch import nn

from gac import BatchFirst, create_model
from lively import lively


class Recorder(nn.Module):
    def forward(self, x):
        self.seen, self.logits = x, torch.zeros(3, 2, 5)
        return self.logits


def test_the_layouts_differ_by_views_alone():
    inner = Recorder()
    x = torch.randn(2, 3, 1, 4, 4)
    logits = BatchFirst(inner)(x)
    assert inner.seen.shape == (3, 2, 1, 4, 4)
    assert inner.seen.data_ptr() == x.data_ptr()
    assert logits.shape == (2, 3, 5)
    assert logits.data_ptr() == inner.logits.data_ptr()


def test_images_pass_as_they_are():
    inner = Recorder()
    images = torch.randn(2, 1, 4, 4)
    BatchFirst(inner)(images)
    assert inner.seen is images


def test_logits_equal_those_of_the_time_first_network():
    net = create_model("gac_msresnet18_cifar", 5, 3, width=4, depth=[1, 1, 1], backend="torch")
    lively(net, torch.randn(3, 16, 3, 8, 8))
    x = torch.randn(2, 3, 3, 8, 8)
    logits = BatchFirst(net)(x)
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits.transpose(0, 1), net(x.transpose(0, 1)))


def test_a_wrong_T_is_refused_in_the_callers_layout():
    net = BatchFirst(create_model("gac_msresnet18_cifar", 5, 3, width=4, depth=[1, 1, 1]))
    with pytest.raises(ValueError, match=r"expected a sequence \[B, T=3, C, H, W\], got \[2, 5, 3, 8, 8\]"):
        net(torch.zeros(2, 5, 3, 8, 8))
