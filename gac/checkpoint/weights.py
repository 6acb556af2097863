"""Released weights: trained networks by name, which travel in the package or are downloaded, and are checked when read.

The registry is the folder ``gac/weights``. NAME.json there has the fields of :class:`Released`, NAME.jsonl the log of
the training run; weights that travel in the package are NAME.safetensors. ``python -m gac.release`` makes all of them.
"""

import json
import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gac import models
from gac.checkpoint.build import build_network, initialise, trained_parts
from gac.checkpoint.download import cache_folder, download, matches
from gac.checkpoint.format import read_checkpoint
from gac.checkpoint.weights_file import SUFFIX, card_of
from gac.data import DataInfo
from gac.data.normalization import Normalization
from gac.errors import InputError, did_you_mean, quoted
from gac.models.ms_resnet import MSResNet

logger = logging.getLogger("gac")

FOLDER = Path(__file__).parents[1] / "weights"
# What a preset of the neurons decides.
_CONSTANTS = ("tau", "v_threshold", "surrogate", "detach_reset")


@dataclass(frozen=True)
class Released:
    """An entry of the registry.

    Attributes:
        name: What :func:`load_pretrained` and :func:`create_model` take.
        sha256: Digest of the file.
        size: Of the file, in bytes.
        license: Of the weights, by its SPDX identifier.
        urls: Where the file is, in the order in which they are tried; none for a file that travels in the package.
        card: How the weights were made and what they score, as the file itself says it: "config", "data" (mean, std
            and classes among others), "command", "scores", "versions" and others.
    """

    name: str
    sha256: str
    size: int
    license: str
    urls: tuple[str, ...]
    card: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", tuple(self.urls))

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The metrics of each epoch of the training run, its metrics.jsonl."""
        return [json.loads(line) for line in (FOLDER / f"{self.name}.jsonl").read_text().splitlines()]

    def file(self) -> Path:
        """Return the file, downloaded if it neither travels in the package nor has been downloaded before.

        Raises:
            InputError: For a file of the package that is not, byte for byte, the one that was released, and for one
                that cannot be downloaded.
        """
        if not self.urls:
            path = FOLDER / f"{self.name}{SUFFIX}"
            if not matches(path, self.sha256):
                raise InputError(f"weights {path}: not the file that was released: install the package again")
            return path
        path = cache_folder() / f"{self.name}-{self.sha256[:8]}{SUFFIX}"
        if path.exists() and not matches(path, self.sha256):
            logger.warning("%s is damaged: downloading it again", path)
        # Does nothing for a file that is there.
        download(self.urls, path, self.sha256, self.size)
        return path

    def to_json(self) -> str:
        """Return the entry as the registry has it."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Pretrained(NamedTuple):
    """A trained network, in evaluation mode on the CPU, and what it needs to see images.

    ``transform`` turns bytes, uint8 [..., C, H, W], into what the network takes, float32 of the same shape. ``card``
    says how the weights were made and what they score: that of :class:`Released`.
    """

    network: MSResNet
    transform: Normalization
    card: dict[str, Any]


def list_pretrained() -> list[str]:
    """Return the names that :func:`load_pretrained` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_released(name: str) -> Released:
    """Return an entry of the registry. Raises InputError for an unknown name."""
    names = list_pretrained()
    if name not in names:
        close = did_you_mean(str(name), {each: each for each in names})
        raise InputError(f"no trained network is called {quoted(name)}{close}; there are: {', '.join(names)}")
    return Released(**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def load_pretrained(name: str) -> Pretrained:
    """Return a trained network with the normalisation of its images; it is downloaded where it has to be, once.

    Raises:
        InputError: For an unknown name, for a file that is not, byte for byte, the one that was released, and for one
            that cannot be downloaded.
    """
    return pretrained(read_checkpoint(find_released(name).file()))


def pretrained(payload: dict[str, Any]) -> Pretrained:
    """Return the network and the normalisation of a checkpoint's content in our format.

    Raises InputError if something is missing or damaged.
    """
    network = build_network(payload).eval()
    info = DataInfo.from_dict(payload.get("data"))
    return Pretrained(network, Normalization(info.mean, info.std, "cpu"), card_of(payload))


def create_model(
    name: str, num_classes: int | None = None, T: int | None = None, *, weights: str | None = None, **options: Any
) -> MSResNet:
    """Return a new network, with freshly initialised or with released weights, in training mode.

    Args:
        name: One of :func:`gac.list_models`.
        num_classes: Number of classes K; may be left out with ``weights``.
        T: Number of time steps, by default 6.
        weights: One of :func:`gac.list_pretrained`. What the other arguments leave out is then as in training. For
            other classes the head begins anew, for another T the temporal attention, which is logged; everything else
            has to fit.
        **options: Those of :func:`gac.models.registry.create_model`.

    Raises:
        InputError: As that function does; for weights that do not fit, and as :func:`load_pretrained` does.
    """
    given = options | {"num_classes": num_classes, "T": T}
    asked = {key: value for key, value in given.items() if value is not None}
    if weights is None:
        if num_classes is None:
            raise InputError("num_classes is missing: give the number of classes, or weights that say it")
        return models.create_model(name, **asked)
    released = find_released(weights)
    if (trained_as := released.card["config"]["model"]["name"]) != name:
        raise InputError(f"weights {weights} are of {trained_as}, not of {name}")
    payload = read_checkpoint(released.file())
    _, trained = trained_parts(payload)
    kept = trained.keys() - (_CONSTANTS if "neuron" in asked else ())
    network = models.create_model(**{key: trained[key] for key in kept} | {"backend": "auto"} | asked)
    try:
        anew = initialise(network, payload)
    except InputError as error:
        raise InputError(f"weights {weights} do not fit what was asked for: {error}") from error
    if anew:
        logger.info("began with the weights %s; new: %s", weights, " and ".join(anew))
    others = [
        key for key in ("coding", "activation", "neuron", *_CONSTANTS) if asked.get(key, trained[key]) != trained[key]
    ]
    if others:
        logger.warning("weights %s were trained with %s", weights, ", ".join(f"{key} {trained[key]}" for key in others))
    return network
