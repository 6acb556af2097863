"""Device names."""

import pytest
import torch

from gac.errors import InputError
from gac.training.device import select_device


def test_cpu() -> None:
    assert select_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "cpu:0"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or cuda:N"):
        select_device(name)


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="device cuda:99 is not there"):
        select_device("cuda:99")


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_cuda_device_becomes_the_current_one(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_device(name) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]
