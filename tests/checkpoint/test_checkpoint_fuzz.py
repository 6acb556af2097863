"""Whatever a checkpoint holds, and whatever its bytes are, the answer is a network or one printable line."""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

import gac
from checkpoint_files import CASES, authors_file, our_file
from gac.errors import InputError
from hostile import LONG, Edited, assert_one_line, damaged, edited, fuzz, saved, with_checksums

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def load(file: bytes) -> None:
    try:
        net = gac.load_checkpoint(io.BytesIO(file))
    except InputError as error:
        assert_one_line(error)
    else:
        with torch.no_grad():
            net(torch.rand(1, net.in_channels, 8, 8))


def load_edited(edited: Edited) -> None:
    if (file := saved(edited.content)) is not None:
        load(file)


@pytest.mark.parametrize("seconds", [0, LONG])
@pytest.mark.parametrize("kind", ["ours", "bare", "trainer's", "authors'"])
def test_content(kind: str, seconds: float, tmp_path: Path) -> None:
    content = torch.load(our_file(tmp_path)[0], weights_only=True)
    if kind == "authors'":
        content = torch.load(authors_file(tmp_path, CASES["quiet_gac_T2"])[0], weights_only=True)
    elif kind != "ours":
        content = {"bare": content["model"], "trainer's": {"epoch": 3, "state_dict": content["model"]}}[kind]
    fuzz(load_edited, edited(content), examples=3 if kind == "authors'" else 40, seconds=seconds)


@pytest.mark.parametrize("seconds", [0, LONG])
@pytest.mark.parametrize("kind", ["archive", "pickle with its checksum", "without checksums", "safetensors"])
def test_bytes(kind: str, seconds: float, tmp_path: Path) -> None:
    path, _ = our_file(tmp_path)
    content = path.read_bytes()
    if kind == "safetensors":
        weights = torch.load(path, weights_only=True)["model"]
        fuzz(load, damaged(safetensors.torch.save(weights)), examples=80, seconds=seconds)
    elif kind == "archive":
        fuzz(load, damaged(content), examples=80, seconds=seconds)
    elif kind == "without checksums":
        older = saved(torch.load(path, weights_only=True), _use_new_zipfile_serialization=False)
        fuzz(load, damaged(older), examples=80, seconds=seconds)
    else:
        with zipfile.ZipFile(path) as archive:
            name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
            pickled = archive.read(name)
        fuzz(lambda new: load(with_checksums(content, {name: new})), damaged(pickled), examples=80, seconds=seconds)


def test_records_that_overlap_are_refused_at_once() -> None:
    """Ten thousand records that are the same 10 MB: a file of 11 MB whose checksums would take half a minute."""
    name, data = b"archive/data/0", bytes(10_000_000)
    facts = struct.pack("<3LHH", zlib.crc32(data), len(data), len(data), len(name), 0)
    record = struct.pack("<4s5H", b"PK\3\4", 20, 0, 0, 0, 0) + facts + name + data
    listed = struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 0, 0, 0) + facts + struct.pack("<3H2L", 0, 0, 0, 0, 0) + name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 10_000, 10_000, 10_000 * len(listed), len(record), 0)
    file = record + 10_000 * listed + end
    assert len(zipfile.ZipFile(io.BytesIO(file)).infolist()) == 10_000
    with pytest.raises(InputError, match="damaged or not a PyTorch or safetensors file"):
        gac.load_checkpoint(io.BytesIO(file))


class Bytes:
    """Pickled as a call that makes so many bytes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return bytearray, (self.number,)


@pytest.mark.parametrize("archive", [True, False])
def test_bytes_that_a_file_only_claims_are_not_made(archive: bool) -> None:
    options = {"_use_new_zipfile_serialization": archive}
    small = torch.load(io.BytesIO(saved({"a": Bytes(5)}, **options)), weights_only=True)
    assert small == {"a": bytearray(5)}
    # More than any machine has: had it been tried, MemoryError would have said so.
    with pytest.raises(InputError, match="Python objects other than tensors") as refused:
        gac.load_checkpoint(io.BytesIO(saved({"a": Bytes(2**62)}, **options)))
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)


@pytest.mark.parametrize("archive", [True, False])
def test_what_contains_itself_too_often_is_refused_at_once(archive: bool) -> None:
    """A few hundred bytes; to look at all of it takes years, and if it is a dictionary's key, torch.load does."""

    def nested(depth: int) -> bytes:
        value: tuple = ()
        for _ in range(depth):
            value = (value, value)
        return saved({"a": value}, _use_new_zipfile_serialization=archive)

    assert torch.load(io.BytesIO(nested(5)), weights_only=True)
    with pytest.raises(InputError, match="damaged or not a PyTorch or safetensors file") as refused:
        gac.load_checkpoint(io.BytesIO(nested(64)))
    assert "more often than a checkpoint can" in str(refused.value.__cause__)
