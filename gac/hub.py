"""Trained networks from and to the Hugging Face Hub, or a folder as it would be there; needs the extra ``hub``."""

import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gac.checkpoint import FORMAT, find_released, is_ours, read_checkpoint
from gac.checkpoint.model_card import FILE, LIBRARY, LICENSE, TAGS, model_card
from gac.checkpoint.weights import pretrained
from gac.checkpoint.weights_file import card_of, digest_of, write_weights
from gac.errors import InputError
from gac.export.packages import require
from gac.files import atomic_write

(hub,) = require("hub", "huggingface_hub")
logger = logging.getLogger("gac")

# What a card says of the network and its data set; the rest is about these very weights.
_OF_ANY_WEIGHTS = ("config", "data", "num_classes", "in_channels")


class HubNetwork(nn.Module, hub.PyTorchModelHubMixin, library_name=LIBRARY, license=LICENSE.lower(), tags=TAGS):
    """A trained network that knows how it was made, in evaluation mode on the CPU.

    ``HubNetwork.from_pretrained("owner/name")`` downloads one, ``push_to_hub("owner/name")`` uploads it;
    ``save_pretrained`` and ``from_pretrained`` do the same with a folder, without a network connection. The weights,
    model.safetensors, are a checkpoint like any other: eval.py and ``gac.load_checkpoint`` read them.

    Args:
        card: How the weights were made, as :func:`gac.checkpoint.weights_file.card_of` returns it.
        tensors: The weights, in this package's names.

    Attributes:
        network: The network; calling the module calls it: [B, C, H, W] -> logits [T, B, K].
        transform: Turns bytes, uint8 [B, C, H, W], into what the network takes, float32.
        card: As given.

    Raises:
        InputError: If they do not fit each other.
    """

    def __init__(self, card: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.network, self.transform, self.card = pretrained({**card, "format": FORMAT, "model": tensors})
        self._digest = self._digest_now()
        self.eval()

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "HubNetwork":
        """Return the network of a file of train.py or of released weights. Raises InputError for any other."""
        payload = read_checkpoint(path)
        if not is_ours(payload) or "data" not in payload:
            raise InputError(f"checkpoint {path}: expected one that says its configuration and data set")
        try:
            return cls(card_of(payload), payload["model"])
        except InputError as error:
            raise InputError(f"checkpoint {path}: {error}") from error

    @classmethod
    def from_released(cls, name: str) -> "HubNetwork":
        """Return released weights (``gac.list_pretrained()``). Raises InputError as ``gac.load_pretrained`` does."""
        return cls.from_checkpoint(find_released(name).file())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def generate_model_card(self, license: str = LICENSE) -> hub.ModelCard:
        """Return the model card, made from the card of the weights, whose licence is named by its SPDX identifier.

        ``save_pretrained`` and ``push_to_hub`` pass it on: ``model_card_kwargs={"license": "MIT"}``.
        """
        return hub.ModelCard(model_card(self._card_now(), license))

    def _save_pretrained(self, save_directory: Path) -> None:
        card = self._card_now()
        if card is not self.card:
            logger.warning("the weights are not those that the card is of: scores, command and seed are left out")
        with atomic_write(save_directory / FILE) as file:
            write_weights(file, self.network.state_dict(), card)
        # In place of what the mixin would write, which is the card that came.
        with atomic_write(save_directory / "config.json") as file:
            file.write(f"{json.dumps({'card': card}, indent=2, sort_keys=True)}\n".encode())

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, card: dict[str, Any] | None = None, map_location: str = "cpu", **options: Any
    ) -> "HubNetwork":
        # In a folder they would be ignored.
        if unknown := sorted(options.keys() - inspect.signature(hub.hf_hub_download).parameters.keys()):
            raise InputError(f"{model_id}: {', '.join(unknown)} cannot be chosen: a network is as it was trained")
        file = Path(model_id, FILE) if Path(model_id).is_dir() else hub.hf_hub_download(model_id, FILE, **options)
        instance = cls.from_checkpoint(file)
        if card not in (None, instance.card):
            raise InputError(f"{model_id}: config.json says something else than {FILE}: save the network again")
        return instance.to(map_location)

    def _card_now(self) -> dict[str, Any]:
        """Return the card, or what is left of it if the weights have changed since."""
        if self._digest_now() == self._digest:
            return self.card
        return {name: self.card[name] for name in _OF_ANY_WEIGHTS}

    def _digest_now(self) -> str:
        return digest_of(self.network.state_dict(), {})
