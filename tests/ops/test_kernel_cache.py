"""Compiled kernels are compiled once a machine, and a bad cache never matters."""

import logging
import pwd
from pathlib import Path

import pytest

from gac.ops import kernel_cache
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import Kernel

KERNEL = Kernel("probe.cu", "probe", ("float*",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAC_KERNEL_CACHE", str(tmp_path / "cache"))
    kernel_cache._log_unwritable.cache_clear()
    return tmp_path / "cache"


def test_what_is_stored_is_loaded(folder: Path) -> None:
    key = kernel_cache.key_of("source", 90)
    assert kernel_cache.load(key) is None
    kernel_cache.store(key, b"binary\n\0")
    assert kernel_cache.load(key) == b"binary\n\0"
    assert [path.name for path in folder.iterdir()] == [key]
    assert kernel_cache.load(kernel_cache.key_of("source", 80)) is None


@pytest.mark.parametrize("damage", [lambda stored: stored[:-1], lambda stored: stored[:-1] + b"?", lambda _: b""])
def test_a_damaged_file_is_not_used(damage, folder: Path) -> None:
    kernel_cache.store("key", b"binary")
    (folder / "key").write_bytes(damage((folder / "key").read_bytes()))
    assert kernel_cache.load("key") is None


def test_an_unwritable_folder_is_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "gac"):
        for _ in range(2):
            kernel_cache.store("key", b"binary")
    assert kernel_cache.load("key") is None
    (record,) = caplog.records
    assert "GAC_KERNEL_CACHE names another folder" in record.getMessage()


def test_an_empty_variable_turns_it_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAC_KERNEL_CACHE", "")
    kernel_cache.store("key", b"binary")
    assert kernel_cache.load("key") is None
    assert not folder.exists()


@pytest.mark.parametrize(
    ("variable", "folder_below"), [("GAC_KERNEL_CACHE", "own"), ("XDG_CACHE_HOME", "own/gac/kernels")]
)
def test_a_tilde_is_the_home_directory(
    variable: str, folder_below: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GAC_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/own")
    kernel_cache.store("key", b"binary")
    assert (tmp_path / folder_below / "key").exists()


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GAC_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_cache.store("key", b"binary")
    assert (tmp_path / "gac" / "kernels" / "key").exists()


def test_a_kernel_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    compiled = compiler.compile_kernel(KERNEL, 90)
    assert compiler.compile_once(KERNEL, 90) == (compiled.binary, compiled.name)
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "compile_kernel", lambda *_: pytest.fail("compiled again"))
        assert compiler.compile_once(KERNEL, 90) == (compiled.binary, compiled.name)
    other = compiler.compile_once(KERNEL, 80)
    assert other[0] != compiled.binary
    monkeypatch.setattr(compiler, "source_text", lambda file: "extern __global__ void probe(float*) {}\n")
    assert compiler.compile_once(KERNEL, 90)[0] != compiled.binary
    assert len(list(folder.iterdir())) == 3


def test_without_a_home_directory_kernels_are_not_kept_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("GAC_KERNEL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    kernel_cache._log_unwritable.cache_clear()
    for _ in range(2):
        kernel_cache.store("key", b"content")
        assert kernel_cache.load("key") is None
    (message,) = caplog.messages
    assert "the home directory is not known" in message
