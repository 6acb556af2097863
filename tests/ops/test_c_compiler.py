"""C sources are compiled once for a machine's CPU; whatever goes wrong leaves no library behind."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gac
from gac.ops import c_compiler, kernel_cache
from gac.ops.c_compiler import NotCompiled

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

SOURCE = "int answer(void) { return 42; }\n"
# What runs in a process of its own: compiles SOURCE, which is in the folder that the first argument names. The package
# is not imported as a whole, which takes seconds.
PROGRAM = """
import pathlib, sys, types
sys.modules["gac"] = types.ModuleType("gac")
sys.modules["gac"].__path__ = [sys.argv[2]]
from gac.ops import c_compiler
c_compiler.KERNEL_FOLDER = pathlib.Path(sys.argv[1])
print(c_compiler.load_library("answer.c").functions.answer())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a source of one function, and nothing loaded yet; return the cache's folder."""
    (tmp_path / "answer.c").write_text(SOURCE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(c_compiler, "KERNEL_FOLDER", tmp_path)
    monkeypatch.setattr(c_compiler, "_loaded", {})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("GAC_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's calls that make a library."""
    calls, run = [], c_compiler._run

    def counted(command: list[str]) -> bytes:
        if "-o" in command:
            calls.append(command)
        return run(command)

    monkeypatch.setattr(c_compiler, "_run", counted)
    return calls


def compiler(folder: Path, script: str) -> str:
    """Return the path of a program that stands in for the compiler; "$@" in ``script`` is what it is called with."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# The compiler is asked for its version and macros first.
WHEN_COMPILING = 'case "$*" in *" -o "*) {0} ;; *) exec cc "$@" ;; esac'


def answer() -> int:
    """Load the library as a new process would, and call it."""
    c_compiler._loaded.clear()
    return c_compiler.load_library("answer.c").functions.answer()


def test_compiled_once(cache: Path, compilations: list) -> None:
    assert [answer() for _ in range(3)] == [42] * 3
    assert len(compilations) == 1
    (kept,) = cache.iterdir()
    assert kernel_cache.load(kept.name) is not None
    assert not any((cache.parent / "temporary").iterdir())


def test_one_load_a_process(cache: Path) -> None:
    first = c_compiler.load_library("answer.c")
    assert c_compiler.load_library("answer.c") is first
    assert isinstance(first.functions, ctypes.CDLL)
    version = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout
    assert first.compiler in version


def test_threads_compile_once(cache: Path, compilations: list) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(c_compiler.load_library("answer.c").functions.answer()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4
    assert len(compilations) == 1


def test_source_and_flags_decide(cache: Path, compilations: list, monkeypatch: pytest.MonkeyPatch) -> None:
    answer()
    (cache.parent / "answer.c").write_text(SOURCE.replace("42", "ANSWER"))
    monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, "-DANSWER=43"))
    assert answer() == 43
    monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS[:-1], "-DANSWER=44"))
    assert answer() == 44
    assert len(compilations) == len(list(cache.iterdir())) == 3


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names features of x86 CPUs")
def test_a_library_for_another_cpu_is_not_loaded(
    cache: Path, compilations: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(cache.parent, 'cc "$@" $FEATURES'))
    for features in ("-msse4.2 -mno-avx", "-mno-sse4.2 -mno-avx", "-msse4.2 -mno-avx"):
        monkeypatch.setenv("FEATURES", features)
        assert answer() == 42
    assert len(compilations) == 2


def test_another_version_of_the_compiler_compiles_again(
    cache: Path, compilations: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(cache.parent, "cc \"$@\" -D__VERSION__='\"'$VERSION'\"' 2> /dev/null"))
    for version in ("12", "13", "12"):
        monkeypatch.setenv("VERSION", version)
        assert answer() == 42
    assert len(compilations) == 2


def test_a_damaged_library_is_compiled_again(cache: Path, compilations: list) -> None:
    answer()
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert answer() == 42
    assert len(compilations) == 2
    assert kernel_cache.load(kept.name) is not None


def test_a_library_that_does_not_load_here_is_compiled_again(cache: Path, compilations: list) -> None:
    answer()
    (kept,) = cache.iterdir()
    kernel_cache.store(kept.name, b"for another system")
    assert answer() == 42
    assert len(compilations) == 2


def test_without_a_cache(cache: Path, compilations: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAC_KERNEL_CACHE", "")
    assert [answer(), answer()] == [42, 42]
    assert len(compilations) == 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (WHEN_COMPILING.format("echo 'out of disk' >&2; exit 3"), "ended with status 3: out of disk; install gcc or"),
        (WHEN_COMPILING.format('cc -c "$@" && kill -9 $$'), "ended with status -9"),
        ("exit 1", "ended with status 1: no message; install gcc or clang, or set CC"),
    ],
    ids=["fails", "is killed", "does not start"],
)
def test_a_compiler_that_fails_leaves_nothing(
    cache: Path, script: str, message: str, compilations: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(cache.parent, script))
    for _ in range(2):
        with pytest.raises(NotCompiled) as error:
            c_compiler.load_library("answer.c")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert len(compilations) <= 1, "what failed is not tried at every call"
    assert not cache.exists()
    assert not any((cache.parent / "temporary").iterdir())


def test_errors_in_the_source_are_named(cache: Path) -> None:
    (cache.parent / "answer.c").write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(NotCompiled, match=r"error: .*forty_two.* undeclared"):
        answer()


def test_what_cannot_be_loaded_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = WHEN_COMPILING.format('while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    monkeypatch.setenv("CC", compiler(cache.parent, script))
    with pytest.raises(NotCompiled, match=r"answer\.c cannot be loaded: .*set TMPDIR"):
        answer()
    assert not cache.exists()


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCompiled, match=r"there is no C compiler \(cc, gcc, clang\): install gcc or clang"):
        answer()
    monkeypatch.setenv("CC", "icx -w")
    with pytest.raises(NotCompiled, match="CC names icx, which is not there: install gcc"):
        answer()


def start(cache: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(cache.parent), *gac.__path__]
    environment = {"TMPDIR": str(cache.parent / "temporary"), **environment}
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_at_once_and_one_that_is_killed(cache: Path, compilations: list) -> None:
    script = WHEN_COMPILING.format('cc "$@"; echo > "$STARTED"; sleep 60')
    started = cache.parent / "started"
    killed = start(cache, CC=compiler(cache.parent, script), STARTED=str(started))
    processes = [start(cache) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 2
    (kept,) = cache.iterdir()
    deadline = time.monotonic() + 60
    while not started.exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(cache.iterdir()) == [kept]
    assert answer() == 42
    assert not compilations
