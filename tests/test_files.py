import errno
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gac import files
from gac.errors import InputError
from gac.files import atomic_folder, atomic_write, check_writable, remove_leftovers, user_path, writing


def test_the_file_appears_whole(tmp_path):
    target = tmp_path / "result"
    target.write_bytes(b"old")
    with atomic_write(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["result"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result"
    target.write_bytes(b"old")

    def write_half():
        with atomic_write(target) as file:
            file.write(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    with atomic_write(tmp_path / "result"):
        pass
    (tmp_path / "ordinary").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("result", "ordinary")]
    assert modes[0] == modes[1]


def test_what_was_there_can_be_kept_under_another_name(tmp_path):
    target, older = tmp_path / "result", tmp_path / "older"
    target.write_bytes(b"old")
    with atomic_write(target, before_replace=lambda: target.rename(older)) as file:
        file.write(b"new")
    assert (target.read_bytes(), older.read_bytes()) == (b"new", b"old")


def test_the_content_is_on_the_disk_before_it_has_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    target, calls = tmp_path / "result", []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        status = os.fstat(handle)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(handle)

    def record_replace(source, destination):
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_write(target, before_replace=lambda: calls.append("make way")) as file:
        file.write(b"new")
    assert calls == ["3 bytes", "make way", "replace", "folder"]


def test_only_the_leftovers_of_that_file_are_removed(tmp_path):
    for name in (".a[1].pt.x.tmp", ".a1.pt.x.tmp", ".b.pt.x.tmp", "a[1].pt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a[1].pt")
    assert sorted(os.listdir(tmp_path)) == [".a1.pt.x.tmp", ".b.pt.x.tmp", "a[1].pt"]


@pytest.mark.parametrize("text", ["~/a b/x", "~", f"~{pwd.getpwuid(os.getuid()).pw_name}/x", "a b/Ω", "./-x"])
def test_a_leading_tilde_is_a_home_directory_and_anything_else_is_as_it_was_written(text, monkeypatch):
    monkeypatch.setenv("HOME", "/some where")
    assert user_path(text, "--output") == Path(os.path.expanduser(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("~nosuchuser/x", "the home directory of ~nosuchuser is not known; write the path in full"),
        ("x" * 300, "the system allows no name as long as this; choose a shorter one"),
        ("x/" * 2500, "the system allows no name as long as this; choose a shorter one"),
        (os.fsdecode(b"caf\xe9"), "its name is not UTF-8; rename it"),
        ("a\0b", "a name has no null bytes"),
    ],
)
def test_a_path_that_cannot_be_is_refused_in_one_short_line(text, reason):
    with pytest.raises(InputError) as error:
        user_path(text, "--output")
    assert str(error.value).startswith("--output ")
    assert str(error.value).endswith(f": {reason}")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250


def test_an_unknown_home_directory_is_refused(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(InputError, match="the home directory of ~ is not known"):
        user_path("~/x", "data.root")


def test_files_are_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    def opening(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *rest, **more)

    # As on Windows.
    open_ = os.open
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.delattr(os, "fchmod")
    monkeypatch.setattr(files, "_OPEN_FOLDER", None)
    with atomic_write(tmp_path / "result") as file:
        file.write(b"new")
    assert (tmp_path / "result").read_bytes() == b"new"


def test_files_are_written_where_folders_cannot_be_synchronised(tmp_path, monkeypatch):
    fsync, error = os.fsync, errno.EINVAL

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(handle)

    def write(content):
        with atomic_write(tmp_path / "result") as file:
            file.write(content)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write(b"new")
    assert (tmp_path / "result").read_bytes() == b"new"
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write(b"newer")


def test_an_error_that_was_there_before_is_not_one_of_writing(tmp_path):
    def clean_up() -> None:
        with writing(tmp_path / "results"):
            raise RuntimeError("worker died")

    def fail() -> None:
        try:
            raise ConnectionResetError("another process is gone")
        finally:
            clean_up()

    with pytest.raises(RuntimeError, match=r"^worker died$"):
        fail()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    with atomic_folder(target) as made:
        (made / "one").write_text("1")
        assert os.listdir(target) == []
    assert os.listdir(target) == ["one"]

    def write_half():
        with atomic_folder(target, lambda path: True) as made:
            (made / "two").write_text("2")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    with pytest.raises(FileExistsError), atomic_folder(target):
        pass
    assert os.listdir(target) == ["one"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "file", lambda path: True):
        pass
    (tmp_path / "link").symlink_to(target)
    with atomic_folder(tmp_path / "link", lambda path: path == target) as made:
        (made / "three").write_text("3")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(target) == ["three"]
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "results"]


def test_devices_and_pipes_are_not_replaced_by_results(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("pipe")
    for path in (Path("/dev/null"), Path("/dev/stdout"), tmp_path / "pipe", tmp_path / "out"):
        with pytest.raises(InputError, match=rf"^--json {path}: expected a file, not a device or a pipe$"):
            check_writable(path, "--json")


def test_a_standard_output_that_goes_to_a_file_is_no_file_for_results(tmp_path):
    command = "from pathlib import Path; from gac.files import check_writable as check; check(Path('/dev/stdout'), 'x')"
    with open(tmp_path / "text", "wb") as text:
        ended = subprocess.run([sys.executable, "-c", command], stdout=text, stderr=subprocess.PIPE, text=True)
    assert "x /dev/stdout: expected a file, not a device or a pipe" in ended.stderr


def test_a_result_goes_to_where_a_link_leads(tmp_path):
    (tmp_path / "latest").symlink_to("today")
    with atomic_write(check_writable(tmp_path / "latest", "--json")) as file:
        file.write(b"new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "today").read_bytes() == b"new"
