"""Which runs a folder accepts."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.training.run_folder import FREE_WHEN_RESUMING, RunFolder, check_same_run


@pytest.fixture
def used(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "used")
    folder.path.mkdir()
    folder.last.touch()
    return folder


def test_a_run_is_not_overwritten(used: RunFolder, tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "other" / "last.pt")):
        with pytest.raises(InputError, match="--resume auto or choose another --output"):
            used.checkpoint_to_resume(resume)


def test_a_run_is_continued_by_auto_or_by_name(used: RunFolder) -> None:
    assert used.checkpoint_to_resume("auto") == used.last
    assert used.checkpoint_to_resume(str(used.last)) == used.last


def test_a_fresh_folder_accepts_everything(tmp_path: Path) -> None:
    fresh = RunFolder(tmp_path / "fresh")
    assert fresh.checkpoint_to_resume(None) is None
    assert fresh.checkpoint_to_resume("auto") is None
    assert fresh.checkpoint_to_resume("elsewhere/last.pt") == Path("elsewhere/last.pt")


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl"])
@pytest.mark.parametrize("resume", [None, "auto", "elsewhere/last.pt"])
def test_results_without_their_last_pt_are_not_overwritten(name: str, resume: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}\n{}\n")
    with pytest.raises(InputError, match=f"holds the {name} of a run that cannot be continued") as error:
        RunFolder(tmp_path).checkpoint_to_resume(resume)
    assert "\n" not in str(error.value)


def test_what_a_crash_in_the_first_epoch_left_does_not_stop_resume_auto(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None
    (tmp_path / "best.pt").touch()
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None
    with pytest.raises(InputError, match="cannot be continued"):
        RunFolder(tmp_path).checkpoint_to_resume(None)


def test_empty_metrics_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None


def test_a_checkpoint_under_another_name_is_continued_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_text("{}")
    assert RunFolder(tmp_path).checkpoint_to_resume(str(tmp_path / "kept.pt")) == tmp_path / "kept.pt"


def test_create_writes_the_whole_configuration(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(learning_rate=1e-5, amp="off"), model=ModelConfig(depth=[1, 2, 3]))
    folder = RunFolder(tmp_path / "a" / "b")
    folder.create(config)
    assert Config.from_dict(yaml.safe_load(folder.config.read_text())) == config


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the run folder"):
        RunFolder(tmp_path / "file").create(Config())


def test_every_difference_that_changes_the_result_is_listed() -> None:
    stored = Config()
    now = Config(
        data=DataConfig(name="digits"),
        train=TrainConfig(epochs=3, eval_batch_size=7),
        model=ModelConfig(backend="torch"),
        device="cpu",
    )
    with pytest.raises(InputError) as error:
        check_same_run(stored, now, Path("last.pt"))
    message = str(error.value)
    assert "(data.name cifar10 -> digits, train.epochs 250 -> 3)" in message
    assert "\n" not in message


def test_where_and_how_fast_it_runs_may_change() -> None:
    stored = Config()
    now = Config(
        data=DataConfig(root="elsewhere", download=True, workers=1),
        model=replace(stored.model, backend="torch"),
        train=replace(stored.train, eval_batch_size=1),
        device="cpu",
    )
    check_same_run(stored, now, Path("last.pt"))
    before, after = stored.flat(), now.flat()
    assert {name for name in before if before[name] != after[name]} == FREE_WHEN_RESUMING
