"""The checkpoint file: whatever is wrong with its bytes, reading it gives one line and runs no code."""

import os
import pickle
import random

import pytest
import torch

import gac
from checkpoint_files import CASES, authors_file, our_file
from gac import checkpoint
from gac.errors import InputError
from gac.models import create_model


def test_a_failing_write_keeps_the_previous_checkpoint(tmp_path):
    path, net = our_file(tmp_path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.write_checkpoint(path, {"model": net.state_dict(), "config": lambda: None})
    assert os.listdir(tmp_path) == ["best.pt"]
    assert gac.load_checkpoint(path).T == 3


def test_a_format_of_the_future_is_refused(tmp_path):
    path, _ = our_file(tmp_path, format="gac-checkpoint-9")
    with pytest.raises(ValueError, match="format 'gac-checkpoint-9' is not known"):
        gac.load_checkpoint(path)


def test_a_file_from_before_archives_has_no_checksums_and_loads(tmp_path):
    net = create_model("gac_msresnet18_cifar", 4, 2, width=4)
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert gac.load_checkpoint(tmp_path / "old.pth", neuron="cifar").T == 2


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_file_with_code_does_not_run(tmp_path, save):
    victim, path = tmp_path / "ran", tmp_path / "evil.pt"
    save({"model": Malicious(str(victim))}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: .*(could run code|damaged or not a PyTorch or safetensors file)"):
        gac.load_checkpoint(path)
    assert not victim.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert victim.exists(), "the file would have done harm"


def test_foreign_content_is_one_clear_line(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    expected = {
        "absent.pt": "no such file",
        ".": "is a folder",
        "image.png": "damaged or not a PyTorch or safetensors file",
        "tensor.pt": "holds a Tensor, expected a dict",
        "empty.pt": "holds nothing",
        "other.pt": "got other entries: epoch",
        "foreign.pt": "unknown keys: weight",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            gac.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_line(tmp_path, kept):
    path, _ = our_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"best\.pt: damaged or not a PyTorch or safetensors file") as raised:
        gac.load_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_flipped_bytes_never_give_anything_but_one_clear_line(tmp_path):
    path, _ = our_file(tmp_path)
    content = bytearray(path.read_bytes())
    generator = random.Random(0)
    messages = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[generator.randrange(2000)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            gac.load_checkpoint(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("kind", ["flipped bit", "zeros to the end", "cut short"])
def test_no_damage_anywhere_goes_unnoticed(tmp_path, kind):
    # Tensors included, which torch.load by itself would return changed.
    payload = {"model": {"weight": torch.arange(600.0)}, "step": 3}
    path = tmp_path / "last.pt"
    checkpoint.write_checkpoint(path, payload)
    content, whole = path.read_bytes(), checkpoint.read_checkpoint(path)
    generator = random.Random(0)
    noticed = 0
    positions = generator.sample(range(len(content)), 400)
    for position in positions:
        damaged = bytearray(content)
        if kind == "flipped bit":
            damaged[position] ^= 1 << generator.randrange(8)
        else:
            damaged[position:] = bytes(len(content) - position) if kind == "zeros to the end" else b""
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.read_checkpoint(path)
        except checkpoint.DamagedCheckpoint:
            noticed += 1
        else:
            # The padding between the records means nothing.
            assert kind == "flipped bit"
            assert same(loaded, whole), position
    assert noticed > (200 if kind == "flipped bit" else 399)


def test_a_flipped_bit_in_a_tensor_of_the_authors_file_is_noticed(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T2"])
    content = bytearray(path.read_bytes())
    weight = max(torch.load(path, weights_only=True).values(), key=torch.numel)
    position = content.find(weight.numpy().tobytes())
    assert position > 0
    content[position + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        gac.load_checkpoint(path)
