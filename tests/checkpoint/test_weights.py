"""Released weights: what they score is what the registry says, and what is asked for beside them fits or is refused."""

import hashlib
from dataclasses import replace

import pytest
import torch

import gac
from gac.checkpoint import find_released, read_checkpoint, read_config
from gac.checkpoint.weights import FOLDER
from gac.data.digits import load_digits
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint
from gac.release import data_digest

DIGITS = find_released("digits")
NAME = DIGITS.card["config"]["model"]["name"]


@pytest.fixture(scope="module")
def payload():
    return read_checkpoint(DIGITS.file())


def test_they_score_what_their_card_says(payload):
    scores = evaluate_checkpoint(DIGITS.file(), payload, replace(read_config(payload), device="cpu")).scores
    said = DIGITS.card["scores"]["float16"]
    assert scores.images == said["images"]
    # Convolutions round differently on every kind of processor, and a digit may be a close call.
    assert abs(scores.correct - said["correct"]) <= 1
    # More are close calls at a single time step than at the last.
    assert scores.top1_by_time == pytest.approx(said["top1_by_time"], abs=1)
    assert scores.loss == pytest.approx(said["loss"], rel=0.05)


def test_half_precision_costs_nothing_and_little_space(payload):
    scores = payload["scores"]
    assert scores["float16"]["correct"] == scores["float32"]["correct"]
    assert DIGITS.size < 1_000_000
    assert {tensor.dtype for name, tensor in payload["model"].items() if "num_batches" not in name} == {torch.float16}


@pytest.mark.parametrize("name", gac.list_pretrained())
def test_every_entry_says_what_a_user_needs(name):
    released = find_released(name)
    assert released.name == name
    assert released.license == "Apache-2.0"
    assert all(url.startswith("https://") for url in released.urls)
    card = released.card
    read_config(card)
    assert len(card["data"]["mean"]) == len(card["data"]["std"]) == card["in_channels"]
    assert len(card["data"]["class_names"]) == card["num_classes"]
    # The log is that of the run which the weights are from.
    (line,) = [line for line in released.log if line["epoch"] == card["epoch"]]
    assert line["test_top1"] == card["scores"]["float32"]["top1"]
    assert line["test_loss"] == pytest.approx(card["scores"]["float32"]["loss"], rel=1e-6)
    assert len(released.log) == card["config"]["train"]["epochs"]
    assert f"--train.seed {card['seed']}" in card["command"]


def test_the_entry_of_a_file_in_the_package_is_what_the_file_says(payload):
    content = DIGITS.file().read_bytes()
    assert (DIGITS.size, DIGITS.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert DIGITS.card == {key: value for key, value in payload.items() if key not in ("model", "format")}
    assert (FOLDER / "digits.json").read_text() == DIGITS.to_json()
    assert DIGITS.card["data_sha256"] == data_digest(read_config(payload))


def test_network_and_transform_are_ready():
    network, transform, card = gac.load_pretrained("digits")
    test = load_digits().splits["test"]
    with torch.inference_mode():
        classes = network(transform(test.images[:100])).mean(0).argmax(-1)
    assert (classes == test.labels[:100]).sum() >= 97
    assert not network.training
    assert card == DIGITS.card


def test_a_file_of_the_package_that_is_another_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gac.checkpoint.weights.FOLDER", tmp_path)
    (tmp_path / "digits.json").write_text(DIGITS.to_json())
    for content in (None, b"", (FOLDER / "digits.safetensors").read_bytes()[:-1] + b"x"):
        if content is not None:
            (tmp_path / "digits.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="not the file that was released: install the package again"):
            gac.load_pretrained("digits")


def test_an_unknown_name_gets_the_known_ones():
    assert gac.list_pretrained() == ["digits"]
    for call in (gac.load_pretrained, lambda name: gac.create_model(NAME, weights=name)):
        with pytest.raises(InputError, match=r"'digit' \(did you mean digits\?\); there are: digits"):
            call("digit")
        with pytest.raises(InputError, match="no trained network is called True; there are: digits"):
            call(True)


def differing(network, tensors):
    """Return the names of a network's tensors that are not those."""
    state = network.state_dict()
    return {
        name
        for name, tensor in tensors.items()
        if state[name].shape != tensor.shape or not torch.equal(state[name], tensor.to(state[name].dtype))
    }


def test_a_new_network_begins_with_the_weights(payload):
    network = gac.create_model(NAME, weights="digits")
    assert network.training
    assert (network.num_classes, network.T) == (10, 4)
    assert differing(network, payload["model"]) == set()
    fresh = gac.create_model(NAME, 10, 4, width=16, depth=[1, 1, 1], in_channels=1)
    assert "stem.conv.weight" in differing(fresh, payload["model"])


def test_what_is_none_is_left_out(payload, caplog):
    left_out = dict.fromkeys(("num_classes", "T", "coding", "depth", "neuron", "tau", "surrogate", "detach_reset"))
    network = gac.create_model(NAME, weights="digits", **left_out)
    assert differing(network, payload["model"]) == set()
    assert caplog.messages == []


def test_what_begins_anew_is_said(payload, caplog):
    caplog.set_level("INFO", "gac")
    network = gac.create_model(NAME, 3, 2, weights="digits")
    assert "began with the weights digits; new: the head and the temporal attention" in caplog.messages
    anew = {name for name in payload["model"] if name.startswith(("head.", "coding.gate.temporal."))}
    assert differing(network, payload["model"]) == anew
    with torch.inference_mode():
        assert network.eval()(torch.rand(4, 1, 8, 8)).shape == (2, 4, 3)


def test_other_neurons_than_those_of_training_are_made_and_said(caplog):
    network = gac.create_model(NAME, weights="digits", neuron="imagenet")
    assert network.lif.v_threshold == 0.5
    assert caplog.messages == ["weights digits were trained with neuron cifar"]
    network = gac.create_model(NAME, weights="digits", v_threshold=0.8)
    assert (network.lif.v_threshold, network.lif.tau) == (0.8, 2.0)
    assert caplog.messages[1:] == ["weights digits were trained with v_threshold 1.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "digits", "width": 32}, "weights digits do not fit what was asked for: wrong shapes: "),
        ({"weights": "digits", "in_channels": 3}, r"wrong shapes: stem\.conv\.weight"),
        ({}, "num_classes is missing"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        gac.create_model(NAME, **arguments)


def test_weights_of_another_network_are_refused():
    with pytest.raises(InputError, match="weights digits are of gac_msresnet18_cifar, not of msresnet34"):
        gac.create_model("msresnet34", 10, weights="digits")
