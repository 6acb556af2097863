"""The configuration of a run: these dataclasses are its single source.

YAML files, command-line overrides, ``--help`` and the configuration stored in a checkpoint are all read off
them (:mod:`gac.cli`). Every default that is not the authors' says so.

A value outside its range raises InputError as soon as the dataclass is made.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gac.errors import InputError

Coding = Literal["gac", "direct", "rate", "latency", "phase"]


@dataclass
class DataConfig:
    """The data set and its augmentation."""

    name: Literal["digits", "cifar10", "cifar100", "npz", "imagefolder", "synthetic"] = "cifar10"
    """Data set: digits (inside scikit-learn), cifar10 and cifar100 (torchvision), npz (arrays x_train,
    y_train, x_test, y_test), imagefolder (train/ and val/ with one folder per class) or synthetic (random
    pixels)."""
    root: str = "data"
    """Folder of the data set; for npz the file itself. Not used by digits and synthetic."""
    download: bool = False
    """Let torchvision download CIFAR into root when it is not there."""
    crop_padding: int = 4
    """All but imagefolder: pixels of black padding on each side of a training image before a random crop back
    to the image size; 0 turns the crop off."""
    horizontal_flip: bool = True
    """All data sets: flip each training image left to right with probability 1/2."""
    image_size: int = 224
    """Side of the images in pixels that imagefolder crops to and synthetic makes."""
    resize: int = 256
    """imagefolder: length in pixels that the shorter side of a test image is resized to before the centre
    crop."""
    augment: Literal["off", "autoaugment_cifar10", "autoaugment_imagenet", "randaugment", "trivialaugment"] = "off"
    """All data sets: torchvision's policy of random operations on training images, after crop and flip."""
    augment_group: int = 8
    """All but imagefolder: neighbours in a batch that share one draw of the policy's operations; 1 gives each image
    its own, at about six times the cost of 8. imagefolder draws for each image, in its workers."""
    random_erasing: float = 0.0
    """All data sets: probability that a random rectangle of a training image is filled with the data set's mean
    colour, after everything else (torchvision's RandomErasing)."""
    workers: int = 8
    """imagefolder: processes that decode images, 0 for none but the training process; batches do not depend on it."""
    synthetic_classes: int = 10
    """synthetic: number of classes."""
    synthetic_images: int = 512
    """synthetic: number of training images; the test set has a quarter of them."""

    def __post_init__(self) -> None:
        _check_choices("data", self)
        _check_ranges(
            "data",
            self,
            crop_padding=(self.crop_padding >= 0, "at least 0"),
            augment_group=(self.augment_group >= 1, "at least 1"),
            random_erasing=(0 <= self.random_erasing <= 1, "in [0, 1]"),
            image_size=(self.image_size >= 1, "at least 1"),
            resize=(
                self.resize >= self.image_size or self.name != "imagefolder",
                f"at least data.image_size ({self.image_size}), which is cropped from it",
            ),
            workers=(self.workers >= 0, "at least 0"),
            synthetic_classes=(self.synthetic_classes >= 2, "at least 2"),
            synthetic_images=(self.synthetic_images >= 4, "at least 4"),
        )


@dataclass
class ModelConfig:
    """The network and how an image becomes spikes."""

    name: str = "gac_msresnet18_cifar"
    """Name of the network, one of gac.list_models()."""
    coding: Coding | None = None
    """How an image becomes spikes: gac (gated attention coding), direct, rate (Poisson), latency or phase
    (weighted phase). Default: gac for names that begin with gac_, direct for the others."""
    T: int = 6
    """Number of time steps."""
    width: int = 64
    """Channels of the stem; the stages have fixed multiples of it."""
    depth: list[int] | None = None
    """Blocks in each stage. Default: the network's own, for example [3, 3, 2] for gac_msresnet18_cifar."""
    neuron: Literal["cifar", "imagenet"] | None = None
    """LIF preset: cifar (decay 0.5, threshold 1, triangle) or imagenet (decay 0.25, threshold 0.5, rectangle,
    detached reset). Default: the one the authors use with this network."""
    kernel_size: int = 4
    """Gated attention: side of the spatial-channel convolutions in pixels."""
    reduction: int = 2
    """Gated attention: the temporal branch has max(1, T // reduction) hidden units."""
    temporal_init: Literal["default", "alive"] = "default"
    """Gated attention: initial weights of the temporal branch. default is the authors' (each hidden unit
    starts dead for static images with probability 1/2); alive flips the sign of the rows that would be dead."""
    backend: Literal["auto", "cupy", "torch"] = "auto"
    """What runs the neurons: cupy (CUDA kernels of this package), torch (on a CUDA device SpikingJelly's execution, or
    the reference loop where it has no fused one; on the CPU a loop in place) or auto (cupy on a CUDA device where CuPy
    works, else torch)."""

    def __post_init__(self) -> None:
        _check_choices("model", self)
        _check_ranges(
            "model",
            self,
            T=(self.T >= 1, "at least 1"),
            width=(self.width >= 1, "at least 1"),
            depth=(
                self.depth is None or (len(self.depth) > 0 and min(self.depth) >= 1),
                "a list with at least one block in each stage, for example [3, 3, 2]",
            ),
            kernel_size=(self.kernel_size >= 1, "at least 1"),
            reduction=(self.reduction >= 1, "at least 1"),
        )

    @property
    def takes_normalized_images(self) -> bool:
        """Whether the network wants images of mean 0 and standard deviation 1.

        Rate, latency and phase coding turn intensities in [0, 1] into spikes instead.
        """
        return self.coding in (None, "gac", "direct")


@dataclass
class TrainConfig:
    """Optimiser, schedule, loss and numerics."""

    epochs: int = 250
    """Number of passes over the training set."""
    batch_size: int = 64
    """Images per optimiser step."""
    learning_rate: float = 0.1
    """SGD learning rate at the start; a cosine takes it to 0 over the epochs."""
    momentum: float = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """Use Nesterov momentum (the authors do not)."""
    weight_decay: float = 5e-5
    """L2 penalty on the parameters that train.weight_decay_on names."""
    weight_decay_on: Literal["all", "weights"] = "all"
    """all parameters alike, as the authors' code has it, or the weights of convolutions and linear layers alone: not
    biases and BatchNorm's parameters."""
    stem_weight_decay: float | None = None
    """L2 penalty of the stem's parameters, whose channels a strong one can switch off. Default: train.weight_decay."""
    gradient_clip_norm: float = 0.0
    """Scale the gradient of all parameters down to this norm when it is larger; 0 turns that off."""
    schedule_step: Literal["epoch", "batch"] = "epoch"
    """Lower the learning rate after every epoch, as the authors do, or after every batch."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly to its full value (the authors have none)."""
    loss: Literal["mean", "tet"] = "mean"
    """Cross entropy of the outputs' mean over time, or TET: the mean over time of the cross entropies."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    cutmix: Literal["off", "epoch", "batch"] = "epoch"
    """CutMix: decide once per epoch whether all its batches are mixed, as the authors' code does, or once per
    batch, as CutMix is usually applied."""
    cutmix_probability: float = 0.5
    """Probability that the decision says yes."""
    cutmix_beta: float = 1.0
    """Parameter of the Beta(beta, beta) distribution that CutMix's mixing ratio is drawn from."""
    mixup_alpha: float = 0.0
    """mixup: parameter of the Beta(alpha, alpha) distribution that a batch's mixing ratio is drawn from; 0 turns
    mixup off. With CutMix on as well each batch is left to one of the two, with equal probability."""
    mix_off_epochs: int = 0
    """Epochs at the end of the run that have neither CutMix nor mixup."""
    ema_decay: float = 0.0
    """Keep a moving average of the weights, of which every step keeps this share (less in the first steps), evaluate
    it beside the weights and put the better of the two in best.pt; 0 turns that off."""
    amp: Literal["off", "fp16", "bf16"] = "off"
    """Automatic mixed precision: fp16 (with loss scaling), bf16 or off (float32; convolutions in TF32 on a GPU that
    has it, as PyTorch does by default)."""
    accumulate_steps: int = 1
    """Run each batch in so many micro-batches, one after another, to need less memory; the gradients are those of the
    whole, but BatchNorm normalises each micro-batch by itself."""
    sync_batch_norm: bool = False
    """With several processes: let BatchNorm take its statistics over the images of all of them, not of each alone."""
    cuda_graph: bool = False
    """Replay each step of training and of evaluation on a CUDA device as one captured graph, which takes the host's
    time per step away; training in one process alone, and not with rate, latency and phase coding. Off by default, as
    it has not run on a GPU yet."""
    channels_last: bool = True
    """Keep activations in channels_last memory order, which convolutions and the CUDA kernels run fastest with; on the
    CPU in evaluation alone."""
    checkpoint_activations: bool = False
    """Keep the inputs of the blocks alone for the backward pass and compute the rest again: less memory, more time,
    the same result."""
    seed: int = 1000
    """Seed of the initial weights, data order, augmentation, CutMix and mixup; 1000 is the authors'."""
    eval_batch_size: int = 256
    """Images per batch in evaluation."""
    checkpoint_minutes: float = 10.0
    """Write last.pt within an epoch too when the one before is this many minutes old; 0 turns that off."""
    checkpoint_steps: int = 0
    """Write last.pt within an epoch too after every so many steps; 0 turns that off."""
    keep_checkpoints: int = 2
    """How many checkpoints to resume from are kept: last.pt, last-1.pt before it and so on; best.pt is extra."""

    def __post_init__(self) -> None:
        _check_choices("train", self)
        _check_ranges(
            "train",
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            accumulate_steps=(
                1 <= self.accumulate_steps <= self.batch_size,
                f"from 1 to train.batch_size ({self.batch_size})",
            ),
            learning_rate=(0 < self.learning_rate < math.inf, "greater than 0"),
            momentum=(
                self.momentum < 1 and (self.momentum > 0 or (self.momentum == 0 and not self.nesterov)),
                "in [0, 1), and not 0 with train.nesterov",
            ),
            weight_decay=(0 <= self.weight_decay < math.inf, "at least 0"),
            stem_weight_decay=(
                self.stem_weight_decay is None or 0 <= self.stem_weight_decay < math.inf,
                "at least 0, or null for train.weight_decay",
            ),
            gradient_clip_norm=(0 <= self.gradient_clip_norm < math.inf, "at least 0"),
            warmup_epochs=(
                0 <= self.warmup_epochs < self.epochs,
                f"at least 0 and below train.epochs ({self.epochs})",
            ),
            label_smoothing=(0 <= self.label_smoothing < 1, "in [0, 1)"),
            cutmix_probability=(0 <= self.cutmix_probability <= 1, "in [0, 1]"),
            cutmix_beta=(0 < self.cutmix_beta < math.inf, "greater than 0"),
            mixup_alpha=(0 <= self.mixup_alpha < math.inf, "at least 0"),
            mix_off_epochs=(
                0 <= self.mix_off_epochs <= self.epochs,
                f"from 0 to train.epochs ({self.epochs})",
            ),
            ema_decay=(0 <= self.ema_decay < 1, "in [0, 1)"),
            seed=(0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
            eval_batch_size=(self.eval_batch_size >= 1, "at least 1"),
            checkpoint_minutes=(0 <= self.checkpoint_minutes < math.inf, "at least 0"),
            checkpoint_steps=(self.checkpoint_steps >= 0, "at least 0"),
            keep_checkpoints=(self.keep_checkpoints >= 1, "at least 1"),
        )


@dataclass
class Config:
    """Everything that decides the result of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set and its augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and how an image becomes spikes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimiser, schedule, loss and numerics."""
    device: str = "auto"
    """Device to run on: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N."""

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries of plain values, as in YAML and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Return the configuration that :meth:`to_dict` gave.

        A field that is absent has its default. Raises InputError for a field that does not exist.
        """
        known = _known_fields(cls, values, "")
        sections = {
            name: section(**_known_fields(section, known[name], f"{name}."))
            for name, section in SECTIONS.items()
            if name in known
        }
        return cls(**{**known, **sections})

    def flat(self) -> dict[str, Any]:
        """Return every value under its full name, such as "train.epochs"."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in SECTIONS:
                values |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                values[name] = value
        return values


SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}


def _known_fields(section: type, values: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return ``values`` if each of them is a field of ``section``."""
    if unknown := sorted(set(values) - {f.name for f in fields(section)}):
        raise InputError(
            f"unknown configuration field {prefix}{unknown[0]}: "
            "it was written by another version of gac, which can read it"
        )
    return values


def _check_choices(prefix: str, section: object) -> None:
    """Raise InputError if a field that allows only a few values has another one."""
    for name, hint in get_type_hints(type(section)).items():
        alternatives = [hint, *get_args(hint)]
        choices = [choice for part in alternatives if get_origin(part) is Literal for choice in get_args(part)]
        value = getattr(section, name)
        if choices and value not in choices and not (value is None and type(None) in alternatives):
            raise InputError(f"{prefix}.{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_ranges(prefix: str, section: object, **rules: tuple[bool, str]) -> None:
    """Raise InputError for the first field whose rule (whether it holds, what is allowed) is broken."""
    for name, (holds, allowed) in rules.items():
        if not holds:
            raise InputError(f"{prefix}.{name} must be {allowed}; got {getattr(section, name)!r}")
