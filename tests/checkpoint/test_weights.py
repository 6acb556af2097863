"""The weights that travel in the package: what they score is what they say, and damage is found."""

import json
from dataclasses import replace

import pytest
import torch

import gac
from gac.checkpoint import read_config
from gac.checkpoint.weights import FOLDER, read_weights, write_weights
from gac.data.digits import load_digits
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint
from gac.release import data_digest

DIGITS = FOLDER / "digits.safetensors"


@pytest.fixture(scope="module")
def payload():
    return read_weights(DIGITS)


def test_they_score_what_their_card_says(payload):
    scores = evaluate_checkpoint(DIGITS, payload, replace(read_config(payload), device="cpu")).scores
    said = payload["scores"]["float16"]
    assert scores.images == said["images"]
    # Convolutions round differently on every kind of processor, and a digit may be a close call.
    assert abs(scores.correct - said["correct"]) <= 1
    # More are close calls at a single time step than at the last.
    assert scores.top1_by_time == pytest.approx(said["top1_by_time"], abs=1)
    assert scores.loss == pytest.approx(said["loss"], rel=0.05)


def test_half_precision_costs_nothing_and_little_space(payload):
    scores = payload["scores"]
    assert scores["float16"]["correct"] == scores["float32"]["correct"]
    assert DIGITS.stat().st_size < 1_000_000
    assert {tensor.dtype for name, tensor in payload["model"].items() if "num_batches" not in name} == {torch.float16}


def test_the_card_names_the_data_it_was_trained_on(payload):
    assert payload["data_sha256"] == data_digest(read_config(payload))


def test_network_and_transform_are_ready():
    network, transform, card = gac.load_pretrained("digits")
    test = load_digits().splits["test"]
    with torch.inference_mode():
        classes = network(transform(test.images[:100])).mean(0).argmax(-1)
    assert (classes == test.labels[:100]).sum() >= 97
    assert not network.training
    assert card["seed"] == card["config"]["train"]["seed"]
    assert f"--train.seed {card['seed']}" in card["command"]


def test_every_byte_counts(tmp_path):
    content = DIGITS.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in (0, 20, content.index(b"data_sha256") + 20, header, (header + len(content)) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match=r"^weights .*damaged\.safetensors: "):
            read_weights(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights", DIGITS.read_bytes()[:-1]])
def test_what_is_no_such_file_is_one_line(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors: damaged or no safetensors file of this package"):
        read_weights(tmp_path / "x.safetensors")


def test_files_that_are_missing_or_not_of_this_package_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors: cannot be read"):
        read_weights(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    for metadata, message in (
        (None, "format None is not known"),
        ({"format": "pt"}, "no safetensors file of this package"),
        ({"format": json.dumps("gac-weights-9")}, "format 'gac-weights-9' is not known to this version"),
    ):
        save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata)
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / "other.safetensors")


def test_what_was_written_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7)}
    card = {"config": {"depth": (1, 2)}, "command": "x"}
    with (tmp_path / "w.safetensors").open("wb") as file:
        write_weights(file, {name: tensor.contiguous() for name, tensor in tensors.items()}, card)
    read = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(read["model"][name], tensor) for name, tensor in tensors.items())
    assert read["config"] == {"depth": [1, 2]}


def test_an_unknown_name_gets_the_known_ones():
    assert gac.list_pretrained() == ["digits"]
    with pytest.raises(InputError, match=r"'digit' \(did you mean digits\?\); there are: digits"):
        gac.load_pretrained("digit")
