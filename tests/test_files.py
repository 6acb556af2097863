import os
import stat

import pytest

from gac.files import atomic_write


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
