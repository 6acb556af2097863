"""metrics.jsonl survives crashes and resuming."""

from pathlib import Path

import pytest

from gac.errors import InputError
from gac.training.metrics_file import append_metrics, drop_metrics_after, read_metrics


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_metrics(path, {"epoch": epoch, "train_loss": epoch / 7})
    return path


def test_lines_come_back_exactly(three_epochs: Path) -> None:
    assert read_metrics(three_epochs) == [{"epoch": n, "train_loss": n / 7} for n in (1, 2, 3)]
    assert three_epochs.read_text().count("\n") == 3


@pytest.mark.parametrize("complete", [0, 1, 2, 3])
def test_epochs_after_the_checkpoint_are_dropped(three_epochs: Path, complete: int) -> None:
    drop_metrics_after(three_epochs, complete)
    assert [line["epoch"] for line in read_metrics(three_epochs)] == list(range(1, complete + 1))


def test_half_a_last_line_is_dropped(three_epochs: Path) -> None:
    with three_epochs.open("a") as file:
        file.write('{"epoch": 4, "tra')
    drop_metrics_after(three_epochs, 4)
    append_metrics(three_epochs, {"epoch": 4, "train_loss": 0.0})
    assert [line["epoch"] for line in read_metrics(three_epochs)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", "3", '{"step": 1}'])
def test_a_line_of_something_else_is_named(three_epochs: Path, line: str) -> None:
    three_epochs.write_text(f'{{"epoch": 1}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object with an epoch"):
        drop_metrics_after(three_epochs, 1)


def test_no_file_is_nothing_to_drop(tmp_path: Path) -> None:
    drop_metrics_after(tmp_path / "metrics.jsonl", 0)
    assert list(tmp_path.iterdir()) == []
