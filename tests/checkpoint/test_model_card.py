"""The model card: what is known is said, and nothing else."""

import pytest
import yaml

from gac.checkpoint import find_released
from gac.checkpoint.model_card import model_card
from gac.errors import InputError

CARD = find_released("digits").card


def parts(card, **options):
    empty, header, text = model_card(card, **options).split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(header), text


def test_what_was_measured_stands_in_header_and_text():
    header, text = parts(CARD)
    score = CARD["scores"]["float16"]
    assert header["license"] == "apache-2.0"
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": pytest.approx(score["correct"] / 360), "name": "top-1"}]
    assert f"Top-1 {score['top1']:.2f} % on the 360 test images of digits." in text
    for row in (
        "| seed | 1001 |",
        "| mean, std | 0.305434; 0.375957 |",
        "| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
    ):
        assert row in text
    assert "trained with" not in text
    trained = parts(CARD | {"backend": "cupy", "backend_reason": "CuPy 14.2"})[1]
    assert "| trained with | backend cupy (CuPy 14.2) |" in trained
    assert f"python {CARD['command']}" in text
    rows = [line for line in text.splitlines() if line.startswith("| float")]
    assert [row.count("%") for row in rows] == [4, 4]
    assert parts(CARD, license="CC-BY-4.0")[0]["license"] == "cc-by-4.0"


@pytest.mark.parametrize(("weights", "top1"), [("raw", "91.00"), ("ema", "92.00")])
def test_without_scores_it_is_the_runs_own_accuracy_of_these_weights(weights, top1):
    card = {key: value for key, value in CARD.items() if key != "scores"}
    header, text = parts(card | {"weights": weights, "metrics": {"test_top1": 91.0, "test_top1_ema": 92.0}})
    assert f"Top-1 {top1} %" in text
    assert "model-index" in header
    assert "| float" not in text


def test_what_is_not_known_is_left_out():
    known = ("config", "data", "num_classes", "in_channels")
    header, text = parts({key: CARD[key] for key in known})
    assert "model-index" not in header
    for word in ("Top-1", "seed", "epoch", "Training", "versions", "trained with", "None", "Undefined"):
        assert word not in text


def test_other_codings_and_names_that_markdown_could_misread():
    card = CARD | {"data": CARD["data"] | {"class_names": ["a|b", *"123456789"], "frames": 4}}
    assert "a\\|b, 1" in parts(card)[1]
    assert "| images | 4 event frames of 1 x 8 x 8" in parts(card)[1]
    card["config"] = card["config"] | {"model": card["config"]["model"] | {"coding": "rate"}}
    assert "A spiking neural network (SNN) with rate coding" in parts(card)[1]
    twin = {"activation": "relu", "coding": "direct"} | dict.fromkeys(
        ("neuron", "tau", "v_threshold", "surrogate", "detach_reset")
    )
    card["config"] = card["config"] | {"model": card["config"]["model"] | twin}
    assert "An artificial network with ReLUs, the twin of a spiking one, with direct coding" in parts(card)[1]
    with pytest.raises(InputError, match="its entry config is missing"):
        model_card({"data": CARD["data"]})
