"""What a checkpoint to resume from may hold: it is input, as a configuration file is."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from gac.checkpoint import is_plain
from gac.errors import InputError
from gac.ops.backend import Choice

_Finite = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
_Word = Annotated[int, Field(ge=0, lt=2**32)]
# Both generators are a Mersenne Twister: 624 words and the place of the next one; Python has the place among the words.
_WORDS = 624
_Place = Annotated[int, Field(ge=0, le=_WORDS)]


class Entry(BaseModel):
    """An entry whose values have these types, exactly, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class PositionEntry(Entry):
    """How far the run had come (:class:`gac.training.position.Position`)."""

    epoch: NonNegativeInt
    batch: NonNegativeInt
    step: NonNegativeInt
    seconds: _Finite
    skipped_images: NonNegativeInt
    mix_epoch: bool | None
    best_top1: Annotated[float, Field(le=100, allow_inf_nan=True)]


class RandomStateEntry(Entry):
    """The generators (:func:`gac.execution.random_state.capture`)."""

    python: tuple[int, Annotated[tuple[_Word, ...], Field(min_length=_WORDS + 1, max_length=_WORDS + 1)], float | None]
    numpy: tuple[str, Annotated[list[_Word], Field(min_length=_WORDS, max_length=_WORDS)], _Place, Literal[0, 1], float]
    torch: Tensor
    cuda: Annotated[list[Tensor], Field(max_length=1)]


class ScalerEntry(Entry):
    """The loss scaler, torch.amp.GradScaler."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    growth_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: PositiveInt
    growth_tracker: Annotated[NonNegativeInt, Field(alias="_growth_tracker")]


class OptimizerEntry(Entry):
    """The optimiser's state dict; its groups repeat the configuration and are not read."""

    state: dict[NonNegativeInt, dict[str, Tensor | float | None]]
    param_groups: list[dict[str, Any]]


class AverageEntry(Entry):
    """The moving average of the weights (:class:`gac.training.ema.MovingAverage`)."""

    model: dict[str, Tensor]
    updates: Tensor


class DistillationEntry(Entry):
    """The sha256 of the teacher's file (:class:`gac.training.distillation.Distillation`)."""

    teacher: str | None


_History = list[dict[str, int | float | bool | Choice]]


def check_state(name: str, state: object, fresh: Callable[[], Any]) -> None:
    """Raise InputError, which names the entry, unless ``state`` can be what a run saved under ``name``.

    Args:
        name: The entry's name in the checkpoint's "training".
        state: What it holds.
        fresh: Returns what a run that has just begun with the same configuration would save there. Called only for
            what no other rank has a part in.
    """
    if not all(map(is_plain, _tensors(state))):
        raise _damaged(name, "it holds a tensor that is not plain")
    if name == "history":
        _validate(name, _History, state)
        # pydantic takes a tensor of one value for a number; JSON does not.
        if not all(isinstance(value, int | float | str) for line in state for value in line.values()):
            raise _damaged(name, "expected numbers")
    elif name == "totals":
        _check_totals(state)
    elif name == "scaler":
        # Without loss scaling it saves nothing.
        _validate(name, ScalerEntry if fresh() else Annotated[dict, Field(max_length=0)], state)
    else:
        _validate(name, _ENTRIES[name], state)
    if name == "random_state":
        new = fresh()
        _check_tensor(f"{name}.torch", state["torch"], new["torch"])
        if state["python"][0] != 3 or state["python"][1][-1] > _WORDS or state["numpy"][0] != "MT19937":
            raise _damaged(name, "it is the state of other generators")
        for tensor, expected in zip(state["cuda"], new["cuda"], strict=False):
            _check_tensor(f"{name}.cuda", tensor, expected)
        try:
            torch.Generator().set_state(state["torch"])
        except RuntimeError as error:
            raise _damaged(f"{name}.torch", "it is no state of PyTorch's generator") from error
    elif name == "average":
        _check_tensor(f"{name}.updates", state["updates"], fresh()["updates"])


_ENTRIES: dict[str, type] = {
    "position": PositionEntry,
    "random_state": RandomStateEntry,
    "optimizer": OptimizerEntry,
    "average": AverageEntry,
    "distillation": DistillationEntry,
    "ranks": PositiveInt,
}


def check_progress(position: Mapping[str, Any], history: list, epochs: int, batches: int) -> None:
    """Raise InputError unless a run of so many epochs of so many batches can have come to this position."""
    epoch, batch = position["epoch"], position["batch"]
    if epoch > epochs or batch > batches or position["step"] != epoch * batches + batch:
        raise _damaged(
            "position",
            f"epoch {epoch}, batch {batch} and step {position['step']} of {epochs} epochs of {batches} batches",
        )
    if len(history) != epoch:
        raise _damaged("history", f"{len(history)} lines after {epoch} epochs")


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries, however deep; each of these is entered once."""
    seen, waiting = set(), [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def check_optimizer_state(state: Mapping[int, Mapping[str, Any]], shapes: list[torch.Size], names: list[str]) -> None:
    """Raise InputError unless an optimiser's state is empty or has these buffers for parameters of these shapes."""
    if state and sorted(state) != list(range(len(shapes))):
        raise _damaged("optimizer", f"it has the state of {len(state)} parameters, and there are {len(shapes)}")
    for index, values in state.items():
        if sorted(values) != sorted(names):
            raise _damaged("optimizer", f"parameter {index} has {sorted(values)} in place of {sorted(names)}")
        for name, value in values.items():
            wanted = torch.Size() if name == "step" else shapes[index]
            if not isinstance(value, Tensor) or value.shape != wanted or not value.is_floating_point():
                raise _damaged("optimizer", f"{name} of parameter {index} is no float tensor {list(wanted)}")
            if not value.isfinite().all() or (name in ("step", "exp_avg_sq") and (value < 0).any()):
                raise _damaged("optimizer", f"{name} of parameter {index} holds values that no run leaves behind")


def _check_totals(state: object) -> None:
    if not isinstance(state, Tensor) or state.dtype != torch.float64 or state.shape != (8,):
        raise _damaged("totals", "expected 8 numbers in a float64 tensor")
    *sums, bad_loss, bad_gradient, bad_scale = state.tolist()
    # A run that is not healthy is not saved.
    if (
        not all(math.isfinite(each) for each in sums)
        or min(sums) < 0
        or {bad_loss, bad_gradient, bad_scale} != {math.inf}
    ):
        raise _damaged("totals", f"got {state.tolist()}")


def _check_tensor(name: str, value: Tensor, fresh: Tensor) -> None:
    if value.dtype != fresh.dtype or value.shape != fresh.shape:
        got = f"{value.dtype} {list(value.shape)}"
        raise _damaged(name, f"expected {fresh.dtype} {list(fresh.shape)}, got {got}")
    if value.is_floating_point() and not (value.isfinite().all() and (value >= 0).all()):
        raise _damaged(name, f"got {value.tolist()}")


def _validate(name: str, kind: Any, value: object) -> None:
    try:
        TypeAdapter(kind, config=None if _is_model(kind) else ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(".".join(map(str, (name, *first["loc"]))), first["msg"]) from None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _damaged(name: str, why: str) -> InputError:
    return InputError(f"its entry training.{name} is damaged: {why}")
