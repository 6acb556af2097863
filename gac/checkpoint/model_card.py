"""The model card of trained weights: README.md of a release and of a repository on the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from gac.checkpoint.build import read_config
from gac.checkpoint.weights_file import SUFFIX
from gac.models.registry import resolve_coding

FILE = f"model{SUFFIX}"
"""What the Hub calls a network's weights."""
LIBRARY = "gac-snn"
TAGS = ["spiking-neural-network", "gated-attention-coding", "image-classification"]
LICENSE = "Apache-2.0"


def model_card(card: dict[str, Any], license: str = LICENSE) -> str:
    """Return the model card of weights as Markdown, with the header that the Hub reads.

    ``card`` is what :func:`gac.checkpoint.weights_file.card_of` returns, with "scores" where they were measured. Of
    what is not known nothing is said.
    """
    data, model, scores = card["data"], read_config(card).model, card.get("scores")
    name = f"{model.name} on {data['name']}"
    header: dict[str, Any] = {
        "license": license.lower(),
        "library_name": LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": TAGS,
    }
    top1 = card.get("metrics", {}).get("test_top1_ema" if card.get("weights") == "ema" else "test_top1")
    if scores is not None:
        # Of the weights as the file has them.
        top1 = scores.get("float16", scores["float32"])["top1"]
    if top1 is not None:
        metric = {"type": "accuracy", "value": top1 / 100, "name": "top-1"}
        dataset = {"type": data["name"], "name": data["name"], "split": "test"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        header["model-index"] = [{"name": name, "results": [result]}]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("model_card.md.jinja").render(
        header=yaml.safe_dump(header, sort_keys=False),
        name=name,
        coding=resolve_coding(model.name, model.coding),
        steps=range(1, model.T + 1),
        library=LIBRARY,
        file=FILE,
        top1=top1,
        images=data["test_size"],
        card=card,
        data=data,
        model=model,
    )
