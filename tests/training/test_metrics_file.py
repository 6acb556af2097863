"""metrics.jsonl survives crashes and resuming."""

from pathlib import Path

import pytest

from gac.training.metrics_file import append_metrics, read_metrics, write_metrics


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_metrics(path, {"epoch": epoch, "train_loss": epoch / 7})
    return path


def test_lines_come_back_exactly(three_epochs: Path) -> None:
    assert read_metrics(three_epochs) == [{"epoch": n, "train_loss": n / 7} for n in (1, 2, 3)]
    assert three_epochs.read_text().count("\n") == 3


def test_half_a_last_line_does_not_count(three_epochs: Path) -> None:
    with three_epochs.open("a") as file:
        file.write('{"epoch": 4, "tra')
    assert [line["epoch"] for line in read_metrics(three_epochs)] == [1, 2, 3]


@pytest.mark.parametrize("complete", [0, 1, 3])
def test_a_resumed_run_has_the_epochs_before_it_and_no_others(three_epochs: Path, complete: int) -> None:
    before = read_metrics(three_epochs)
    with three_epochs.open("a") as file:
        file.write('{"epoch": 4, "tra')
    write_metrics(three_epochs, before[:complete])
    append_metrics(three_epochs, {"epoch": complete + 1, "train_loss": 0.0})
    assert read_metrics(three_epochs) == [*before[:complete], {"epoch": complete + 1, "train_loss": 0.0}]
