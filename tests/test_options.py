"""What a value's text means, and where a refused one stands."""

import os
from pathlib import Path
from typing import Any

import pytest

from gac.errors import InputError
from gac.options import parse_train


@pytest.fixture
def parse(tmp_path: Path):
    """Return the value or error of a field's text, which must be the same for an option and in a file."""

    def parse(name: str, text: str) -> Any:
        section, _, key = name.partition(".")
        outcomes = []
        for content, options in (("{}", [f"--{name}={text}"]), (f"{section}:\n  {key}: {text}\n", [])):
            path = tmp_path / "run.yaml"
            path.write_text(content)
            try:
                outcomes.append(parse_train(["--config", str(path), *options]).config.flat()[name])
            except InputError as error:
                outcomes.append(str(error).removeprefix(f"{path} line 2: "))
        assert outcomes[0] == outcomes[1]
        assert type(outcomes[0]) is type(outcomes[1])
        return outcomes[0]

    return parse


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.cuda_graph", "auto", "auto"),
        ("train.cuda_graph", "true", True),
        ("train.cuda_graph", "on", True),
        ("train.cuda_graph", "off", False),
        ("train.epochs", "3", 3),
        ("train.epochs", "1_000", 1000),
        ("train.epochs", "100", 100),
        ("train.epochs", "010", 10),
        ("train.seed", "0042", 42),
        ("train.seed", "08", 8),
        ("train.seed", "0_10", 10),
        ("train.seed", "0x10", 16),
        ("train.learning_rate", "010", 10.0),
        ("train.learning_rate", "1e-05", 1e-5),
        ("train.learning_rate", "0.05", 0.05),
        ("train.learning_rate", "1.005", 1.005),
        ("train.stem_weight_decay", "0", 0.0),
        ("model.depth", "[010, 3, 2]", [10, 3, 2]),
        ("train.learning_rate", "1", 1.0),
        ("train.learning_rate", "1e-5", 1e-5),
        ("train.learning_rate", ".5", 0.5),
        ("train.nesterov", "true", True),
        ("train.nesterov", "True", True),
        ("train.nesterov", "off", False),
        ("train.cutmix", "off", "off"),
        ("data.root", "12", "12"),
        ("data.root", "1e3", "1e3"),
        ("data.root", "yes", "yes"),
        ("model.depth", "[3, 3, 2]", [3, 3, 2]),
        ("model.depth", "[3,3,2]", [3, 3, 2]),
        ("model.depth", "null", None),
        ("model.coding", "~", None),
        ("model.coding", "Null", None),
        ("train.stem_weight_decay", "null", None),
    ],
)
def test_a_text_means_the_same_on_the_command_line_and_in_a_file(name: str, text: str, value: Any, parse) -> None:
    assert parse(name, text) == value
    assert type(parse(name, text)) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("train.cuda_graph", "always", "one of auto, true, false"),
        ("train.cuda_graph", "1", "one of auto, true, false"),
        ("train.epochs", "1.0", "a whole number"),
        ("train.epochs", "1e3", "a whole number"),
        ("train.epochs", "true", "a whole number"),
        ("train.epochs", "1:30", "a whole number"),
        ("train.learning_rate", "0:30.5", "a number"),
        ("train.epochs", "2024-13-01", "a whole number"),
        ("train.epochs", "-1", "at least 1 and at most 1000000"),
        ("train.nesterov", "0", "true or false"),
        ("train.nesterov", "maybe", "true or false"),
        ("train.learning_rate", "true", "a number"),
        ("train.learning_rate", "nan", "a finite number"),
        ("train.learning_rate", ".inf", "a finite number"),
        ("train.learning_rate", "1e400", "a finite number"),
        ("train.stem_weight_decay", "-1", "at least 0 or null"),
        ("train.label_smoothing", "1", "at least 0 and below 1"),
        ("train.seed", "99999999999999999999999", "at least 0 and at most 4294967295"),
        ("train.warmup_epochs", "300", "below train.epochs (250)"),
        ("train.accumulate_steps", "65", "at most train.batch_size (64)"),
        ("model.depth", "[1.0]", "a list of whole numbers such as [3, 3, 2] or null"),
        ("model.depth", "[true]", "a list of whole numbers such as [3, 3, 2] or null"),
        (
            "model.depth",
            "[0]",
            "a list with at least one block in each stage and at most 1000 in all, for example [3, 3, 2]",
        ),
        ("model.neuron", "None", "one of cifar, imagenet or null"),
    ],
)
def test_a_refused_text_is_named_as_it_was_written(name: str, text: str, allowed: str, parse) -> None:
    assert parse(name, text) == f"{name} must be {allowed}; got {text}"


@pytest.mark.parametrize("name", ["train.epochs", "train.stem_weight_decay", "model.neuron"])
def test_an_empty_option_is_nothing_and_not_null(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(InputError, match=rf"^{name} must be .*; got nothing$"):
        parse_train(["--config", str(tmp_path / "run.yaml"), f"--{name}="])


def test_a_rule_between_fields_names_the_line_of_the_field_that_breaks_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  epochs: 2\n  warmup_epochs: 5\n")
    with pytest.raises(InputError) as error:
        parse_train(["--config", str(path)])
    assert str(error.value) == f"{path} line 3: train.warmup_epochs must be below train.epochs (2); got 5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 3\ntrain.epochs: 5\n", r"line 3: train\.epochs is there twice; keep one"),
        ("train.epochs: 5\ntrain:\n  epochs: 3\n", "line 3: epochs is there twice; keep one"),
        ("data:\n  root: [a, b]\n", r"line 2: data\.root must be a text$"),
        ("train:\n  freeze: [stem.*]\n", r"line 2: train\.freeze must be a text$"),
        ("train:\n  epochs: [3]\n", r"line 2: train\.epochs must be a whole number; got \[3\]"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse_train(["--config", str(tmp_path / "run.yaml")])


def test_a_trial_is_for_one_process(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--dry-run"]
    assert parse_train(arguments).dry_run
    with pytest.raises(InputError, match="are for a single process"):
        parse_train(arguments, processes=2)


def test_an_empty_path_is_no_path() -> None:
    with pytest.raises(InputError, match=r"^--config is required"):
        parse_train(["--config="])


@pytest.mark.parametrize("option", ["--config", "--output", "--resume"])
@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 5000, os.fsdecode(b"caf\xe9")])
def test_every_option_refuses_a_path_that_cannot_be(option: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(InputError, match=rf"^{option} .*: (the home directory|the system allows|its name)"):
        parse_train([*(["--config", str(tmp_path / "run.yaml")] if option != "--config" else []), option, path])


def test_every_option_knows_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a run.yaml").write_text("{}")
    parsed = parse_train(["--config=~/a run.yaml", "--output=~/a b", "--resume=~/last.pt"])
    assert (parsed.output, parsed.resume) == (tmp_path / "a b", str(tmp_path / "last.pt"))
    assert parse_train(["--config=~/a run.yaml", "--resume", "auto"]).resume == "auto"


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("train.cutmix_beta", "1e-300", "0 or between 1e-37 and 1e+38 in size"),
        ("train.mixup_alpha", "1e-300", "0 or between 1e-37 and 1e+38 in size"),
        ("train.weight_decay", "1e308", "0 or between 1e-37 and 1e+38 in size"),
        ("train.learning_rate", "1e39", "0 or between 1e-37 and 1e+38 in size"),
        ("train.epochs", "1000000000", "at least 1 and at most 1000000"),
    ],
)
def test_a_number_that_no_run_can_compute_with_is_refused(name: str, text: str, allowed: str, parse) -> None:
    assert parse(name, text) == f"{name} must be {allowed}; got {text}"


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 10_000])
def test_a_file_that_is_nested_too_deeply_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match="is nested too deeply"):
        parse_train(["--config", str(tmp_path / "run.yaml")])


def test_a_value_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(InputError, match=r"^model\.depth must be a list .*; got \[{120}\.\.\.$"):
        parse_train(["--config", str(tmp_path / "run.yaml"), f"--model.depth={'[' * 10_000}"])


def test_a_message_is_one_line_whatever_it_quotes(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('model:\n  neuron: "a\\nb\\e[31m"\n')
    with pytest.raises(InputError, match=r"got a\\nb\\x1b\[31m$"):
        parse_train(["--config", str(tmp_path / "run.yaml")])


def test_the_option_of_the_older_launcher_names_torchrun(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(InputError, match="start the processes with torchrun"):
        parse_train(["--local-rank=0", "--config", str(tmp_path / "run.yaml")])
