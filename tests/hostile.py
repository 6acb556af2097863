"""Content that nobody wrote on purpose, as Hypothesis makes it: edited values, tensors of every kind, damaged bytes."""

import copy
import io
import itertools
import resource
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gac.errors import InputError

LONG = pytest.param(60, marks=pytest.mark.slow)
"""Seconds of the test that looks for more: the value of a parameter."""

_SETTINGS = {
    "deadline": timedelta(seconds=10),
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
_BOUND = 2**20  # KiB


def fuzz(check: Callable[[Any], None], drawn: st.SearchStrategy, examples: int, seconds: float = 0) -> None:
    """Call ``check`` with so many examples of what is drawn, always the same ones, or with others for so many seconds.

    An example may take 10 s, and all of them 1 GiB of memory more than what the process had before.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    for number in itertools.count():
        fixed = settings(max_examples=examples, derandomize=not seconds, print_blob=bool(seconds), **_SETTINGS)
        test = fixed(given(drawn)(lambda value: check(value)))
        (seed(number)(test) if seconds else test)()
        if time.monotonic() >= end:
            break
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _BOUND


_DTYPES = sorted((each for each in vars(torch).values() if isinstance(each, torch.dtype)), key=str)
_NUMBERS = (0, 1, -1, 3, 2**31, 2**40, 2**63, 2**64, 10**400, -(2**63) - 1)


@st.composite
def tensors(draw: st.DrawFn, like: Tensor | None = None) -> Tensor:
    """Draw a tensor, of any type, shape and layout or one step away from one that is given."""
    if like is None:
        like = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=4)))
    change = draw(
        st.sampled_from(
            ("dtype", "value", "shape", "expand", "slice", "sparse", "meta", "quantize", "flip", "nested", "parameter")
        )
    )
    try:
        match change:
            case "dtype":
                return like.to(draw(st.sampled_from(_DTYPES)))
            case "value":
                value = draw(st.sampled_from((torch.nan, torch.inf, -1.0, 1e38, -0.0, 1e-40, 2.0**40)))
                changed = like.clone()
                changed.view(-1)[draw(st.integers(0, max(0, like.numel() - 1)))] = value
                return changed
            case "shape":
                return like.reshape(draw(st.permutations([*like.shape, 1, -1]))[: like.dim()])
            case "expand":
                return torch.zeros(1, dtype=like.dtype).expand([draw(st.sampled_from((0, 1, 3, 2**20, 2**40)))] * 2)
            case "slice":
                return like[draw(st.integers(0, 3)) :].mT
            case "sparse":
                return draw(st.sampled_from((Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn)))(like)
            case "meta":
                return like.to("meta")
            case "quantize":
                return torch.quantize_per_tensor(like.float(), 0.1, 0, torch.quint8)
            case "flip":
                return torch._neg_view(like) if draw(st.booleans()) else like.to(torch.cfloat).conj()
            case "nested":
                return torch.nested.nested_tensor([like.float(), like.float()])
            case _:
                return torch.nn.Parameter(like.float())
    except (RuntimeError, NotImplementedError, IndexError):
        # PyTorch does not have this one.
        return like


_keys = (
    st.text(max_size=8) | st.sampled_from(("", "a.b", "model", "state_dict", "module.", "\n")) | st.integers(-2, 700)
)
_plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from((*_NUMBERS, "x" * 5000, 2j, b"bytes", {1}, torch.Size([2]), torch.float32, torch.device("meta")))
)


def _containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    lists = st.lists(inner, max_size=3)
    dicts = st.dictionaries(_keys, inner, max_size=3)
    return lists | lists.map(tuple) | dicts | dicts.map(OrderedDict) | st.integers(2, 5000).map(_deep) | st.builds(wide)


def _deep(levels: int) -> list:
    nested: list = []
    for _ in range(levels):
        nested = [nested]
    return nested


def wide() -> list:
    """Return a value of a hundred lists whose text would be 2^100 characters long."""
    nested: list = []
    for _ in range(100):
        nested = [nested, nested]
    return nested


values: st.SearchStrategy = st.recursive(_plain | tensors(), _containers, max_leaves=4)


@dataclass
class Edited:
    """Content with edits, which alone are shown when a test fails: the content may be too large for that."""

    content: dict[str, Any]
    edits: list[str]

    def __repr__(self) -> str:
        return "; ".join(self.edits)


@st.composite
def edited(draw: st.DrawFn, content: dict[str, Any], most: int = 2) -> Edited:
    """Draw a copy of nested dictionaries and lists with a few entries replaced, taken out, added or moved."""
    content = copy.deepcopy(content)
    edits = []
    for _ in range(draw(st.integers(1, most))):
        # Every level is as likely as the next, or all would happen among the many tensors.
        place: Any = content
        path = []
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not (isinstance(place[key], dict | list) and place[key]) or draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
            path.append(key)
        if not keys:
            continue
        kind = draw(st.sampled_from(("replace", "alter", "alter", "remove", "add", "copy")))
        if kind == "alter":
            place[key] = draw(_altered(place[key]))
        elif kind == "replace":
            place[key] = draw(values)
        elif kind == "remove":
            del place[key]
        elif isinstance(place, list):
            place.insert(key, draw(values) if kind == "add" else _copied(place[key]))
        else:
            other = draw(st.sampled_from(keys) | _keys)
            place[other] = draw(values) if kind == "add" else _copied(place[key])
        now = place.get(key) if isinstance(place, dict) else place
        shown = type(now).__name__ if isinstance(now, dict | list | tuple) else f"{now!r:.60}"
        edits.append(f"{kind} {'.'.join(map(str, (*path, key)))}, now {shown}")
    return Edited(content, edits)


def _copied(value: object) -> object:
    return copy.copy(value) if isinstance(value, dict | list) else value


def _altered(value: object) -> st.SearchStrategy:
    """Return what is one step away from a value."""
    if isinstance(value, Tensor):
        return tensors(value)
    if isinstance(value, bool | None):
        return st.sampled_from((True, False, None, 0, 1))
    if isinstance(value, int):
        return st.sampled_from((value + 1, value - 1, -value, str(value), 0.5, 0, *_NUMBERS))
    if isinstance(value, float):
        return st.floats() | st.sampled_from((-value, torch.tensor(value)))
    if isinstance(value, str):
        return st.sampled_from(("", value.upper(), f"{value}\n", f"/{value}" * 2000)) | st.text(max_size=8)
    return values


_PIECES = (
    b"\0" * 4,
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"PK\x03\x04",
    b"PK\x05\x06",
    (2**40).to_bytes(8, "little"),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 6) -> bytes:
    """Draw bytes that differ from the given ones in a few places: overwritten, cut out, inserted, repeated, cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        piece = draw(st.binary(min_size=1, max_size=2) | st.sampled_from(_PIECES))
        match draw(st.sampled_from(("write", "write", "insert", "delete", "repeat", "cut"))):
            case "write":
                changed[at : at + len(piece)] = piece
            case "insert":
                changed[at:at] = piece
            case "delete":
                del changed[at : at + draw(st.integers(1, 30))]
            case "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(1, 60))]
            case "cut":
                del changed[at:]
    return bytes(changed)


def with_checksums(content: bytes, changed: dict[str, bytes]) -> bytes:
    """Return an archive with some of its records changed, by their names, and checksums that hide it."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w") as archive:
        for record in old.infolist():
            archive.writestr(record.filename, changed.get(record.filename, old.read(record)))
    return new.getvalue()


def saved(content: object, **options: Any) -> bytes | None:
    """Return the bytes of a file of torch.save, or None for what it cannot write."""
    file = io.BytesIO()
    try:
        torch.save(content, file, **options)
    except (RuntimeError, NotImplementedError, RecursionError, AttributeError, KeyError):
        return None
    return file.getvalue()


def assert_one_line(error: InputError) -> None:
    """Check what a user would read."""
    message = str(error)
    assert message.isprintable(), message
    # Some characters are escaped, in up to ten.
    assert 0 < len(message) < 20_100
