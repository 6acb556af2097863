"""Device names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gac.errors import InputError
from gac.execution.device import (
    autocast,
    check_precision,
    describe_precision,
    network_input,
    select_device,
    unused_gpus,
)
from gac.execution.distributed import Ranks


def test_cpu() -> None:
    assert select_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this a machine whose torch sees no GPU and whose nvidia-smi is a script."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unused_gpus.cache_clear()
    yield install
    unused_gpus.cache_clear()


TWO_GPUS = """[ "$1" = -L ] && echo 'GPU 0: NVIDIA H100 (UUID: GPU-5e)' && echo 'GPU 1: NVIDIA H100 (UUID: GPU-5f)' \
&& echo '  MIG 1g.10gb     Device  0: (UUID: MIG-60)'"""


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "is built without CUDA; install a CUDA build of torch"),
        ("13.0", "is built for CUDA 13.0 and finds no device; update the NVIDIA driver, or install"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(driver, monkeypatch, caplog, cuda, reason):
    driver(TWO_GPUS)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert select_device("auto").type == "cpu"
    found = f"there is a GPU (NVIDIA H100), but torch {torch.__version__} {reason}"
    assert found in caplog.text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=re.escape(f"sees 0 CUDA devices: use --device auto or cpu; {found}")):
        select_device("cuda")


def test_the_cpu_is_taken_quietly_where_it_was_chosen_or_is_all_there_is(driver, monkeypatch, caplog):
    assert select_device("auto").type == "cpu"
    for script in ("echo No devices found; exit 6", "echo no driver >&2; exit 9", "echo"):
        driver(script)
        unused_gpus.cache_clear()
        assert select_device("auto").type == "cpu"
    driver(TWO_GPUS)
    unused_gpus.cache_clear()
    assert select_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert select_device("auto").type == "cpu"
    assert not caplog.records


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "cpu:0", "mps:x", "vulkan!"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="device must be auto, cpu, cuda, cuda:N or another accelerator of PyTorch"):
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


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_half_precision_with_loss_scaling_needs_a_cuda_device():
    with pytest.raises(ValueError, match=r"train\.amp fp16 needs a CUDA device, got cpu; use bf16 or off"):
        check_precision(CPU, "fp16")
    check_precision(CPU, "bf16")
    check_precision(CUDA, "fp16")


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_networks_run_in_the_precision_asked_for(amp, dtype):
    with autocast(CPU, amp):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("allowed", "capability", "expected"),
    [(True, (9, 0), "float32 with TF32 convolutions"), (False, (9, 0), "float32"), (True, (7, 5), "float32")],
)
def test_tf32_is_named(monkeypatch, allowed, capability, expected):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert describe_precision(CUDA, "off") == expected
    assert describe_precision(CPU, "off") == "float32"
    assert describe_precision(CUDA, "fp16") == "fp16"


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1", "hpu", "meta"])
def test_an_accelerator_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"^device {name} is not there, PyTorch sees .*: use --device auto or cpu$"):
        select_device(name)


@pytest.mark.parametrize("name", ["xpu", "xpu:1"])
def test_another_accelerator_is_taken_with_a_warning(name: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert select_device(name) == torch.device(name)
    assert f"not tried on {name}" in caplog.text
    with pytest.raises(InputError, match="device xpu:2 is not there, PyTorch sees 2 x xpu"):
        select_device("xpu:2")
    with pytest.raises(InputError, match="several processes need CUDA devices or the CPU"):
        select_device(name, Ranks(0, 2))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_event_frames_become_a_sequence(order: torch.memory_format) -> None:
    images, frames = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 3, 4, 5)
    assert network_input(images, order).equal(images)
    assert network_input(images, order).is_contiguous(memory_format=order)
    sequence = network_input(frames, order)
    assert sequence.equal(frames.transpose(0, 1))
    assert sequence.flatten(0, 1).is_contiguous(memory_format=order)
    assert sequence.flatten(0, 1).data_ptr() == sequence.data_ptr()
