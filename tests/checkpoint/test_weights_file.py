"""Safetensors files: what was written is read, by this package and by others, and damage is found."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import gac
from checkpoint_files import CASES, authors_file, our_file
from gac.checkpoint import DamagedCheckpoint, is_ours, read_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.checkpoint.weights_file import write_weights
from gac.errors import InputError

DIGITS = FOLDER / "digits.safetensors"


def written(path, tensors, card):
    with path.open("wb") as file:
        write_weights(file, tensors, card)
    return path


def test_every_byte_counts(tmp_path):
    content = DIGITS.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [0, 8, 20, header, (header + len(content)) // 2, len(content) - 1]
    for word in (b"format", b"gac-weights", b"sha256", b"data_sha256"):
        places += [content.index(word), content.index(word) + 2]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match=r"^checkpoint .*damaged\.safetensors: "):
            read_checkpoint(tmp_path / "damaged.safetensors")


def test_what_was_written_is_read(tmp_path):
    # Not contiguous, as the weights of a network in channels_last are.
    tensors = {
        "a": torch.randn(3, 4).t(),
        "b": torch.tensor(7),
        "c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    path = written(tmp_path / "w.safetensors", tensors, {"config": {"depth": (1, 2)}, "command": "x"})
    read = read_checkpoint(path)
    assert is_ours(read)
    assert all(torch.equal(read["model"][name], tensor) for name, tensor in tensors.items())
    assert (read["config"], read["command"]) == ({"depth": [1, 2]}, "x")
    others = load_file(path)
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["command"]) == "x"


def test_a_network_comes_back(tmp_path):
    path, network = our_file(tmp_path)
    payload = read_checkpoint(path)
    card = {key: value for key, value in payload.items() if key not in ("model", "format")}
    again = gac.load_checkpoint(written(tmp_path / "w.safetensors", payload["model"], card))
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "title": "not JSON"}])
def test_files_of_other_programs_are_bare_state_dicts(tmp_path, metadata):
    _, network = our_file(tmp_path)
    save_file(network.state_dict(), tmp_path / "bare.safetensors", metadata)
    with pytest.raises(InputError, match="its weights do not show its neurons"):
        gac.load_checkpoint(tmp_path / "bare.safetensors")
    again = gac.load_checkpoint(tmp_path / "bare.safetensors", neuron="cifar")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_the_authors_names_are_known_in_safetensors_files_too(tmp_path):
    theirs, images = authors_file(tmp_path, CASES["quiet_gac_T2"])
    state = {name: tensor.clone() for name, tensor in torch.load(theirs, weights_only=True).items()}
    save_file(state, tmp_path / "authors.safetensors")
    networks = [gac.load_checkpoint(each) for each in (theirs, tmp_path / "authors.safetensors")]
    with torch.inference_mode():
        assert torch.equal(*(network(images) for network in networks))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a PyTorch or safetensors file"),
        (b"no weights", "damaged or not a PyTorch or safetensors file"),
        (b"12345678{}", "damaged or no safetensors file"),
        (DIGITS.read_bytes()[:-1], "damaged or no safetensors file"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "damaged or no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "holds nothing"),
        (save({"weight": torch.zeros(2)}, {"format": '"gac-weights-1"'}), "its metadata have no sha256"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"^checkpoint .*x\.safetensors: {message}"):
        gac.load_checkpoint(tmp_path / "x.safetensors")


def test_metadata_that_are_nested_too_deeply_are_one_line(tmp_path):
    metadata = {"format": json.dumps("gac-weights-1"), "sha256": json.dumps("0"), "a": 100_000 * "[" + 100_000 * "]"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(DamagedCheckpoint, match="recursion"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_another_version_is_named(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors", {"format": json.dumps("gac-weights-9")})
    with pytest.raises(InputError, match="format 'gac-weights-9' is not known to this version") as refused:
        read_checkpoint(tmp_path / "x.safetensors")
    assert not isinstance(refused.value, DamagedCheckpoint)


def test_metadata_cannot_stand_in_for_the_tensors(tmp_path):
    tensors = {"a": torch.zeros(2)}
    read = read_checkpoint(written(tmp_path / "w.safetensors", tensors, {"model": {"a": 1}, "training": 3}))
    assert torch.equal(read["model"]["a"], tensors["a"])
