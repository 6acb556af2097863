import pytest
import torch

from gac.training.precision import autocast, check_precision, describe_precision

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
