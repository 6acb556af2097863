"""The configuration of a run: the fields below are its only source.

YAML files, command-line overrides, ``--help`` and the configuration stored in a checkpoint are all read off
them (:mod:`gac.options`): the text below a field is its help, its annotation says which values are allowed. Every
default that is not the authors' says so.

pydantic checks types, choices and ranges; a value that is not allowed raises FieldError as soon as it is given.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gac.coding import Coding
from gac.coding.gated import Gate, TemporalInit
from gac.errors import InputError, did_you_mean, quoted
from gac.models.registry import family_of, neuron_constants
from gac.models.relu import Activation
from gac.neuron import SURROGATE_SPELLINGS, Backend, Surrogate

PositiveInt = Annotated[int, Field(ge=1)]
# The time left to the end of a run has to be a time that can be written.
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Probability = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
# A network of more would be built for minutes.
_MOST_BLOCKS = 1000
# Python code may give a tuple, which becomes a list.
Integers = Annotated[list[int], Field(strict=False)]

# PyTorch computes with these numbers in float32, which holds no others.
_SMALLEST, _LARGEST = 1e-37, 1e38

# A whole number is not taken for a truth value or the other way round.
_SETTINGS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class FieldError(InputError):
    """A value that its field does not allow; ``field`` is the full name, ``allowed`` says what it takes."""

    def __init__(self, field: str, allowed: str, value: Any) -> None:
        super().__init__(f"{field} must be {allowed}; got {quoted(value)}")
        self.field = field
        self.allowed = allowed


def _configuration(prefix: str) -> Callable[[type], type]:
    """Make a class a dataclass whose fields pydantic checks; what it finds wrong is raised as a FieldError."""

    def decorate(cls: type) -> type:
        cls = dataclass(cls, config=_SETTINGS)
        check, signature = cls.__init__, inspect.signature(cls)

        @functools.wraps(check)
        def __init__(self: object, *values: Any, **named: Any) -> None:
            given = signature.bind(*values, **named).arguments
            try:
                check(self, **given)
            except ValidationError as error:
                raise _field_error(error, prefix, given) from None
            for name in given:
                value = getattr(self, name)
                if isinstance(value, float) and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
                    raise FieldError(f"{prefix}{name}", f"0 or between {_SMALLEST} and {_LARGEST} in size", value)

        cls.__init__ = __init__
        return cls

    return decorate


EVENT_SETS = ("cifar10dvs", "dvs128gesture", "ncaltech101")
"""The values of data.name that are sets of events of SpikingJelly."""


@_configuration("data.")
class DataConfig:
    """The data set and its augmentation."""

    name: Literal["digits", "cifar10", "cifar100", "npz", "imagefolder", "synthetic", *EVENT_SETS] = "cifar10"
    """Data set: digits (inside scikit-learn), cifar10 and cifar100 (torchvision), npz (arrays x_train, y_train, x_test,
    y_test of images, or of event frames for the model.T time steps), imagefolder (train/ and val/ with one folder per
    class), synthetic (random pixels), or cifar10dvs, dvs128gesture or ncaltech101 (events, which SpikingJelly counts
    into one frame for each of the model.T time steps)."""
    root: str = "data"
    """Folder of the data set; for npz the file itself. Not used by digits and synthetic."""
    download: bool = False
    """Let torchvision download CIFAR, or SpikingJelly CIFAR10-DVS, into root when it is not there."""
    crop_padding: NonNegativeInt = 4
    """All but imagefolder: pixels of black padding on each side of a training image before a random crop back
    to the image size; 0 turns the crop off."""
    horizontal_flip: bool = True
    """All data sets: flip each training image left to right with probability 1/2."""
    roll: NonNegativeInt = 0
    """All but imagefolder: shift each training image by up to so many pixels in both directions, after crop and flip;
    what leaves it on one side comes back on the other. Customary with events."""
    event_pool: PositiveInt = 1
    """Sets of events: add up the events of squares of so many pixels a side, which makes frames smaller; 1 keeps the
    sensor's pixels."""
    image_size: PositiveInt = 224
    """Side of the images in pixels that imagefolder crops to and synthetic makes."""
    resize: int = 256
    """imagefolder: length in pixels that the shorter side of a test image is resized to before the centre
    crop."""
    augment: Literal["off", "autoaugment_cifar10", "autoaugment_imagenet", "randaugment", "trivialaugment"] = "off"
    """All data sets: torchvision's policy of random operations on training images, after crop and flip."""
    augment_group: PositiveInt = 8
    """All but imagefolder: neighbours in a batch that share one draw of the policy's operations; 1 gives each image
    its own, at about six times the cost of 8. imagefolder draws for each image, in its workers."""
    cutout: NonNegativeInt = 0
    """All but imagefolder: fill a square of so many pixels a side, at a random place of each training image, with the
    data set's mean colour, after the policy (Cutout); 0 turns that off."""
    random_erasing: Probability = 0.0
    """All data sets: probability that a random rectangle of a training image is filled with the data set's mean
    colour, after everything else (torchvision's RandomErasing)."""
    workers: NonNegativeInt = 8
    """imagefolder: processes that decode images, 0 for none but the training process; batches do not depend on it."""
    synthetic_classes: Annotated[int, Field(ge=2)] = 10
    """synthetic: number of classes."""
    synthetic_images: Annotated[int, Field(ge=4)] = 512
    """synthetic: number of training images; the test set has a quarter of them."""

    def __post_init__(self) -> None:
        if self.name == "imagefolder" and self.resize < self.image_size:
            allowed = f"at least data.image_size ({self.image_size}), which is cropped from it"
            raise FieldError("data.resize", allowed, self.resize)
        if self.name == "imagefolder" and self.cutout:
            raise FieldError(
                "data.cutout", "0 with data.name imagefolder (data.random_erasing is for all)", self.cutout
            )

    @property
    def reads_root(self) -> bool:
        """Whether the data set lies in root."""
        return self.name not in ("digits", "synthetic")

    @property
    def writes_files(self) -> bool:
        """Whether opening the data set may write into root, which processes must do one after another."""
        return self.download or self.name in EVENT_SETS


@_configuration("model.")
class ModelConfig:
    """The network and how an image becomes spikes."""

    name: str = "gac_msresnet18_cifar"
    """Name of the network, one of gac.list_models()."""
    coding: Coding | None = None
    """How an image becomes spikes: gac (gated attention coding), direct, rate (Poisson), latency or phase
    (weighted phase). Default: gac for names that begin with gac_, direct for the others."""
    T: Annotated[int, Field(ge=1, le=10_000)] = 6
    """Number of time steps."""
    width: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Channels of the stem; the stages have fixed multiples of it."""
    depth: Integers | None = None
    """Blocks in each stage. Default: the network's own, for example [3, 3, 2] for gac_msresnet18_cifar."""
    neuron: Literal["cifar", "imagenet"] | None = None
    """LIF preset: cifar (decay 0.5, threshold 1, triangle) or imagenet (decay 0.25, threshold 0.5, rectangle,
    detached reset). Default: the one the authors use with this network; maxresnet18_cifar has neurons that are neither
    (decay 0.5, the input halved, threshold 1, sigmoid, detached reset)."""
    kernel_size: Annotated[int, Field(ge=1, le=1024)] = 4
    """Gated attention: side of the spatial-channel convolutions in pixels."""
    reduction: PositiveInt = 2
    """Gated attention: the temporal branch has max(1, T // reduction) hidden units."""
    temporal_init: TemporalInit = "default"
    """Gated attention: initial weights of the temporal branch. default is the authors' (each hidden unit
    starts dead for static images with probability 1/2); alive flips the sign of the rows that would be dead."""
    gate: Gate = "both"
    """Gated attention: both attentions, as published, or for ablations only one of them, temporal or spatial_channel,
    with 1 in place of the other."""
    backend: Backend = "auto"
    """What runs the network: cupy (CUDA kernels of this package), c (their C versions on the CPU, and convolutions by
    events), torch (on a CUDA device SpikingJelly's execution of the neurons, or the reference loop where it has no
    fused one; on the CPU a loop in place) or auto (the kernels where they work: with CuPy on a CUDA device, with a C
    compiler on the CPU; else torch)."""
    tau: float | None = None
    """LIF: membrane time constant in time steps as SpikingJelly has it, greater than 1: the potential keeps 1 - 1/tau
    of itself in each step; the input is divided by it in maxresnet18_cifar's own neurons only. This is not the decay of
    the authors' code: a decay d is tau = 1 / (1 - d). Default: the preset's, 2 for cifar (decay 0.5) and 4/3 for
    imagenet (decay 0.25)."""
    v_threshold: PositiveFloat | None = None
    """LIF: the neuron spikes where its potential is above this. Default: the preset's, 1 for cifar and 0.5 for
    imagenet."""
    surrogate: Surrogate | None = None
    """LIF: what stands for the derivative of the step in the backward pass, of SpikingJelly's with their default alpha:
    triangle (PiecewiseQuadratic), rectangle (Rect), sigmoid, atan; or, which the CUDA kernels do not have,
    piecewise_exp, soft_sign, super_spike, erf. Default: the preset's, triangle for cifar and rectangle for imagenet."""
    detach_reset: bool | None = None
    """LIF: treat the reset after a spike as constant in the backward pass. Default: the preset's, false for cifar and
    true for imagenet."""
    activation: Activation = "lif"
    """lif, or relu for ReLUs in place of the neurons: an artificial network of the same shape, to train as a
    train.teacher. It takes direct coding; model.T 1 is enough for images, as nothing changes with time."""

    def __post_init__(self) -> None:
        if self.depth is not None and not 1 <= min(self.depth, default=0) <= sum(self.depth) <= _MOST_BLOCKS:
            allowed = (
                f"a list with at least one block in each stage and at most {_MOST_BLOCKS} in all, for example [3, 3, 2]"
            )
            raise FieldError("model.depth", allowed, self.depth)
        if self.activation == "relu":
            for name in ("neuron", "tau", "v_threshold", "surrogate", "detach_reset"):
                if (value := getattr(self, name)) is not None:
                    raise FieldError(f"model.{name}", "null with model.activation relu, which has no neurons", value)
        if self.tau is not None and self.tau <= 1:
            allowed = "greater than 1 or null (a decay d of the potential is tau = 1 / (1 - d))"
            raise FieldError("model.tau", allowed, self.tau)

    @property
    def takes_normalized_images(self) -> bool:
        """Whether the network wants images of mean 0 and standard deviation 1.

        Rate, latency and phase coding turn intensities in [0, 1] into spikes instead.
        """
        return self.coding in (None, "gac", "direct")


@_configuration("train.")
class TrainConfig:
    """Optimiser, schedule, loss and numerics."""

    epochs: Epochs = 250
    """Number of passes over the training set."""
    batch_size: PositiveInt = 64
    """Images per optimiser step."""
    learning_rate: PositiveFloat = 0.1
    """SGD learning rate at the start; a cosine takes it to 0 over the epochs."""
    momentum: FractionBelowOne = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """Use Nesterov momentum (the authors do not)."""
    weight_decay: NonNegativeFloat = 5e-5
    """L2 penalty on the parameters that train.weight_decay_on names."""
    weight_decay_on: Literal["all", "weights"] = "all"
    """all parameters alike, as the authors' code has it, or the weights of convolutions and linear layers only: not
    biases and BatchNorm's parameters."""
    stem_weight_decay: NonNegativeFloat | None = None
    """L2 penalty of the stem's parameters, whose channels a strong one can switch off. Default: train.weight_decay."""
    gradient_clip_norm: NonNegativeFloat = 0.0
    """Scale the gradient of all parameters down to this norm when it is larger; 0 turns that off."""
    schedule_step: Literal["epoch", "batch"] = "epoch"
    """Lower the learning rate after every epoch, as the authors do, or after every batch."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises linearly to its full value (the authors have none)."""
    loss: Literal["mean", "tet"] = "mean"
    """Cross entropy of the outputs' mean over time, or TET: the mean over time of the cross entropies."""
    label_smoothing: FractionBelowOne = 0.0
    """Share of the target spread evenly over all classes."""
    cutmix: Literal["off", "epoch", "batch"] = "epoch"
    """CutMix: decide once per epoch whether all its batches are mixed, as the authors' code does, or once per
    batch, as CutMix is usually applied."""
    cutmix_probability: Probability = 0.5
    """Probability that the decision says yes."""
    cutmix_beta: PositiveFloat = 1.0
    """Parameter of the Beta(beta, beta) distribution that CutMix's mixing ratio is drawn from."""
    mixup_alpha: NonNegativeFloat = 0.0
    """mixup: parameter of the Beta(alpha, alpha) distribution that a batch's mixing ratio is drawn from; 0 turns
    mixup off. With CutMix on as well each batch is left to one of the two, with equal probability."""
    mix_off_epochs: NonNegativeInt = 0
    """Epochs at the end of the run that have neither CutMix nor mixup."""
    ema_decay: FractionBelowOne = 0.0
    """Keep a moving average of the weights, of which every step keeps this share (less in the first steps), evaluate
    it beside the weights and put the better of the two in best.pt; 0 turns that off."""
    amp: Literal["off", "fp16", "bf16"] = "off"
    """Automatic mixed precision: fp16 (with loss scaling), bf16 or off (float32; convolutions in TF32 on a GPU that
    has it, as PyTorch does by default)."""
    accumulate_steps: PositiveInt = 1
    """Run each batch in so many micro-batches, one after another, to need less memory; the gradients are those of the
    whole, but BatchNorm normalises each micro-batch by itself."""
    sync_batch_norm: bool = False
    """With several processes: let BatchNorm take its statistics over the images of all of them, not of each one."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay each step of training and of evaluation on a CUDA device as one captured graph, which saves the host's
    time for each step; for training in one process, and not for rate, latency and phase coding. auto: in training
    with this package's kernels, once replays on a copy of the network have turned out to do what the steps do; true
    demands it, with other kernels and in eval.py too."""
    channels_last: bool = True
    """Keep activations in channels_last memory order, which convolutions and the CUDA kernels run fastest with; on the
    CPU in evaluation only."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory, more time,
    the same result."""
    overlap_weight_gradients: bool = False
    """Compute the weight gradients of the blocks' convolutions on a second stream of a CUDA device, beside the next
    kernels of the backward pass; in one process only. Worth about 2 % of a step at large batches on an H200."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1000
    """Seed of the initial weights, data order, augmentation, CutMix and mixup; 1000 is the authors'."""
    eval_batch_size: PositiveInt = 256
    """Images per batch in evaluation."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Write last.pt within an epoch too when the one before is this many minutes old; 0 turns that off."""
    checkpoint_steps: NonNegativeInt = 0
    """Write last.pt within an epoch too after every so many steps; 0 turns that off."""
    keep_checkpoints: PositiveInt = 2
    """How many checkpoints to resume from are kept: last.pt, last-1.pt before it and so on; best.pt is extra."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: SGD as the authors, or AdamW (with train.momentum as its first beta, 0.999 as its second, and a weight
    decay that is decoupled: try 0.05 with a learning rate of 1e-3)."""
    init: str | None = None
    """Checkpoint whose weights the run begins with (also spelled --init): ours, the authors' or a state dict. The head
    for another number of classes and the temporal attention for another T begin anew. Resuming does not read it."""
    freeze: str = ""
    """Parameters that stay as they are: patterns such as stem.* or stages.0.*, separated by commas or spaces."""
    freeze_batch_norm: bool = False
    """Leave BatchNorm's running statistics, weights and biases as they are."""
    self_distillation: NonNegativeFloat = 0.0
    """Self-distillation between time steps: weight of a loss by which the output of each time step learns from the mean
    over all of them; 0 turns that off."""
    teacher: str | None = None
    """Checkpoint of train.py of a trained network from whose mean output over time this one learns beside the labels;
    it must have been trained on the same classes and with the same normalisation. Default: none."""
    teacher_weight: PositiveFloat = 1.0
    """train.teacher: weight of that loss; the labels' is 1."""
    distillation_temperature: PositiveFloat = 2.0
    """train.self_distillation and train.teacher: what logits are divided by before the softmax."""

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("momentum", self.momentum > 0 or not self.nesterov, "greater than 0 with train.nesterov"),
            ("nesterov", self.optimizer == "sgd" or not self.nesterov, "false with train.optimizer adamw"),
            (
                "accumulate_steps",
                self.accumulate_steps <= self.batch_size,
                f"at most train.batch_size ({self.batch_size})",
            ),
            ("warmup_epochs", self.warmup_epochs < self.epochs, f"below train.epochs ({self.epochs})"),
            ("mix_off_epochs", self.mix_off_epochs <= self.epochs, f"at most train.epochs ({self.epochs})"),
        ):
            if not holds:
                raise FieldError(f"train.{name}", allowed, getattr(self, name))


@_configuration("")
class Config:
    """Everything that decides the result of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set and its augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and how an image becomes spikes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimiser, schedule, loss and numerics."""
    device: str = "auto"
    """Device to run on: auto (the first CUDA device, else the CPU), cpu, cuda, cuda:N or another accelerator of PyTorch
    such as mps or xpu, on which nothing has been tried."""

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

    def with_neuron(self) -> "Config":
        """Return the same with the neuron's preset, if the network has one, and its constants in place of None.

        Raises InputError for an unknown network.
        """
        if self.model.activation == "relu":
            return self
        preset = self.model.neuron or family_of(self.model.name).neuron
        constants = neuron_constants(self.model.name, self.model.neuron)
        given = {name: getattr(self.model, name) for name in constants if getattr(self.model, name) is not None}
        # Neurons that are no preset's are the network's own.
        named = preset if isinstance(preset, str) else None
        return replace(self, model=replace(self.model, neuron=named, **(constants | given)))

    def flat(self) -> dict[str, Any]:
        """Return every value under its full name, such as "train.epochs"."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in SECTIONS:
                values |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                values[name] = value
        return values

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """Return the configuration that :meth:`flat` gave. Raises InputError as :meth:`from_dict` does."""
        nested: dict[str, Any] = {}
        for name, value in values.items():
            section, _, key = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[key] = value
        return cls.from_dict(nested)


SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}


_LEADING_ZEROS = re.compile(r"(?<![\w.])0[0_]*(?=\d)")


class FieldDescription(NamedTuple):
    """What ``--help`` and error messages say about a field, and how its value is written.

    ``kind`` is its type in words, such as "a whole number", and ``range`` its limits, such as "at least 1".
    """

    help: str
    metavar: str
    kind: str
    range: str
    choices: list[str]
    is_text: bool
    is_optional: bool

    def parse(self, text: str | None) -> Any:
        """Return what a text spells in YAML, a number, truth value, list or null, or the text if the field takes one.

        Text that spells nothing of the kind is returned as it is, for the configuration to refuse.
        """
        # YAML 1.1 takes 1:30 for the number 90, 010 for an octal one, and 1e-5 for a text.
        is_null = self.is_optional and text in ("null", "Null", "NULL", "~")
        if not text or ":" in text or (self.is_text and not is_null):
            return text
        decimal = _LEADING_ZEROS.sub("", text)
        try:
            value = yaml.safe_load(decimal)
            return float(value) if value == decimal else value
        except (yaml.YAMLError, ValueError, RecursionError):
            return text


# JSON Schema's names for types: Python's and ours.
_TYPES = {
    "integer": ("int", "a whole number"),
    "number": ("float", "a number"),
    "boolean": ("bool", "true or false"),
    "string": ("str", "a text"),
    "array": ("list[int]", "a list of whole numbers such as [3, 3, 2]"),
}
_LIMITS = {"exclusiveMinimum": "greater than", "minimum": "at least", "maximum": "at most", "exclusiveMaximum": "below"}


def _describe(name: str, schema: Mapping[str, Any]) -> FieldDescription:
    """Return the description of a field from the JSON Schema that pydantic derives from its annotation."""
    kinds = schema.get("anyOf", [schema])
    is_optional = any(each["type"] == "null" for each in kinds)
    or_null = " or null" * is_optional
    value = kinds[0]
    type_, kind = _TYPES[value["type"]]
    # A truth value that may be one of some words too.
    words = [each["const"] for each in kinds if "const" in each]
    choices = [*words, "true", "false"] if words else value.get("enum", [])
    shown = [*(choices or ["true", "false"] * (type_ == "bool")), *["null"] * is_optional]
    default = schema["default"] if isinstance(schema["default"], str) else json.dumps(schema["default"])
    about = f"default: {default}" if choices else f"type: {type_}{or_null}, default: {default}"
    limits = [f"{words} {value[key]}" for key, words in _LIMITS.items() if key in value]
    return FieldDescription(
        help=f"{' '.join(schema['description'].split())} ({about})",
        metavar=f"{{{','.join(shown)}}}" if len(shown) > 1 else name.upper(),
        kind=(f"one of {', '.join(choices)}" if choices else kind) + or_null,
        range=" and ".join(limits) + or_null,
        choices=choices,
        is_text=type_ == "str",
        is_optional=is_optional,
    )


def _schemas(cls: type) -> dict[str, Any]:
    return TypeAdapter(cls).json_schema()["properties"]


# Every field by its full name.
FIELDS: dict[str, FieldDescription] = {
    "device": _describe("device", _schemas(Config)["device"]),
    **{
        f"{section}.{name}": _describe(name, schema)
        for section, cls in SECTIONS.items()
        for name, schema in _schemas(cls).items()
    },
}

# What may differ from the training run when its network is evaluated.
_EXECUTION = (
    *("device", "train.eval_batch_size", "train.amp", "train.cuda_graph", "train.channels_last"),
    "model.backend",
)
_OF_STATE_DICTS = (
    *("model.T", "model.coding", "model.neuron"),
    *("model.tau", "model.v_threshold", "model.surrogate", "model.detach_reset"),
)
EVALUATION_FIELDS = [*(name for name in FIELDS if name.startswith("data.")), *_EXECUTION, *_OF_STATE_DICTS]


def _known_fields(section: type, values: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return ``values`` if each of them is a field of ``section``."""
    if not isinstance(values, Mapping):
        raise FieldError(prefix.removesuffix(".") or "it", "a section with its fields", values)
    known = {f.name for f in fields(section)}
    if unknown := [key if isinstance(key, str) else quoted(key) for key in values if key not in known]:
        raise InputError(
            f"unknown configuration field {prefix}{unknown[0]}: "
            "it was written by another version of gac, which can read it"
        )
    return values


def _field_error(error: ValidationError, prefix: str, given: Mapping[str, Any]) -> InputError:
    """Return the first thing that pydantic found wrong with the values ``given``."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        # From __post_init__.
        return first["ctx"]["error"]
    key = first["loc"][0]
    name = f"{prefix}{key}"
    if name in SECTIONS:
        return FieldError(name, f"a {SECTIONS[name].__name__}", given[key])
    is_out_of_range = first["type"].startswith(("greater_than", "less_than"))
    allowed = FIELDS[name].range if is_out_of_range else FIELDS[name].kind
    if first["type"] == "literal_error" and isinstance(given[key], str):
        spellings = (
            SURROGATE_SPELLINGS if name == "model.surrogate" else {choice: choice for choice in FIELDS[name].choices}
        )
        allowed += did_you_mean(given[key], spellings)
    return FieldError(name, "a finite number" if first["type"] == "finite_number" else allowed, given[key])
