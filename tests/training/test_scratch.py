"""A folder that goes away."""

from pathlib import Path

import pytest

from gac.errors import InputError
from gac.training.scratch import scratch_folder


def test_it_is_next_to_the_output_and_goes_whatever_happens(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "mine"
    with scratch_folder(output) as folder:
        assert folder.parent == output.parent
        (folder / "file").write_text("")
    assert list(output.parent.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), scratch_folder(output) as folder:
        raise KeyboardInterrupt
    assert list(output.parent.iterdir()) == []


def test_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write next to .*file/run: .*; choose another --output"),
        scratch_folder(tmp_path / "file" / "run"),
    ):
        pass
