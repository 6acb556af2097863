"""Command lines: what they mean, and one clear line for what they cannot mean."""

import ast
import io
import os
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from gac import cli
from gac.cli import eval_main, train_main
from gac.config import FIELDS, SECTIONS, Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.models import list_models
from gac.options import evaluation, parse_eval, parse_train

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def error_of(*arguments: str) -> str:
    with pytest.raises(InputError) as error:
        parse_train(arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    parsed = parse_train(["--config", str(path)])
    assert parsed.config.model.name in list_models()
    assert parsed.output == Path("runs") / path.stem
    assert parsed.resume is None


def test_cifar10_is_the_authors_recipe() -> None:
    assert parse_train(["--config", str(ROOT / "configs/cifar10.yaml")]).config == Config(
        data=DataConfig(), model=ModelConfig(neuron="cifar"), train=TrainConfig()
    )


def test_a_file_and_the_options_above_it(yaml_file) -> None:
    path = yaml_file("train: {epochs: 3, learning_rate: 1e-3, amp: off, cutmix: off}\nmodel:\n  depth: [1, 2]\n")
    parsed = parse_train(
        ["--train.epochs=5", "--config", path, "--model.width", "8", "--output", "out", "--resume", "auto"]
    )
    assert parsed.config == Config(
        model=ModelConfig(depth=[1, 2], width=8),
        train=TrainConfig(epochs=5, learning_rate=1e-3, cutmix="off"),
    )
    assert (parsed.output, parsed.resume) == (Path("out"), "auto")


def test_every_field_means_the_same_in_a_file_and_on_the_command_line(yaml_file) -> None:
    config = Config(
        data=DataConfig(
            name="npz", root="12", download=True, crop_padding=1, horizontal_flip=False, image_size=32, resize=40,
            roll=2, event_pool=4, augment="randaugment", augment_group=3, cutout=2, random_erasing=0.5,
            workers=0, synthetic_classes=3, synthetic_images=9,
        ),
        model=ModelConfig(
            "msresnet18", "rate", 3, 8, [2, 1], "cifar", 2, 1, "alive", "temporal", "torch", 1.5, 0.25, "super_spike",
            True,
        ),
        train=TrainConfig(
            epochs=7, batch_size=3, learning_rate=1e-5, momentum=0.5, nesterov=True, weight_decay=0.0,
            weight_decay_on="weights", stem_weight_decay=1e-3, gradient_clip_norm=2.0, schedule_step="batch",
            warmup_epochs=1.5, loss="tet", label_smoothing=0.1, cutmix="off", cutmix_probability=0.25, cutmix_beta=2.0,
            mixup_alpha=0.5, mix_off_epochs=2, ema_decay=0.9, amp="bf16", accumulate_steps=2, sync_batch_norm=True,
            cuda_graph=True, overlap_weight_gradients=True, channels_last=False, checkpoint_activations=True, seed=0,
            eval_batch_size=9, checkpoint_minutes=0.5, checkpoint_steps=4, keep_checkpoints=1, init="a b.pt",
            freeze="stem.*, head.*", freeze_batch_norm=True, self_distillation=0.5, teacher="c d.pt",
            teacher_weight=0.25, distillation_temperature=4.0,
        ),
        device="cuda:1",
    )  # fmt: skip
    changed = [name for name, value in config.flat().items() if value != Config().flat()[name]]
    # AdamW has no Nesterov momentum, ReLU no constants of neurons.
    assert set(changed) == set(FIELDS) - {"train.optimizer", "model.activation"}
    from_file = parse_train(["--config", yaml_file(yaml.safe_dump(config.to_dict()))])
    assert from_file.config == config
    options = [f"--{name}={value}" for name, value in config.flat().items()]
    assert parse_train(["--config", yaml_file("{}"), *options]).config == config


def test_null_is_a_value_of_optional_fields_only(yaml_file) -> None:
    path = yaml_file("model: {depth: null, coding: ~, neuron: }")
    assert parse_train(["--config", path]).config == Config()
    assert error_of("--config", yaml_file("train:\n  epochs:\n")).endswith(
        "run.yaml line 2: train.epochs must be a whole number; got null"
    )
    assert "data.root must be a text" in error_of("--config", yaml_file("data: {root: null}"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_fast_recipe_is_the_prototypes_with_augmentation_and_averaged_weights(name: str) -> None:
    assert parse_train(["--config", str(ROOT / f"configs/{name}_fast.yaml")]).config == Config(
        data=DataConfig(name=name, augment="trivialaugment"),
        train=TrainConfig(
            epochs=60, batch_size=256, learning_rate=0.2, nesterov=True, weight_decay=5e-4, weight_decay_on="weights",
            warmup_epochs=2.0, schedule_step="batch", label_smoothing=0.1, cutmix="batch", mix_off_epochs=8,
            ema_decay=0.999, amp="fp16",
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "batch", "alpha", "off"), [("cifar10", 128, 0.5, 200), ("cifar100", 64, 0.75, 150)])
def test_the_recipe_of_max_resnet_is_for_both_networks(name: str, batch: int, alpha: float, off: int) -> None:
    options = ["--config", str(ROOT / f"configs/{name}_maxresnet.yaml")]
    with_gate, plain = (parse_train([*options, *more]).config for more in ([], ["--model.name", "msresnet18_cifar"]))
    assert with_gate == Config(
        data=DataConfig(name=name, crop_padding=0, augment="randaugment", augment_group=1, random_erasing=0.25),
        model=ModelConfig(T=4),
        train=TrainConfig(
            epochs=400, batch_size=batch, optimizer="adamw", learning_rate=1.5e-3, weight_decay=0.06,
            weight_decay_on="weights", warmup_epochs=20.0, label_smoothing=0.1, mixup_alpha=alpha, cutmix="batch",
            cutmix_probability=1.0, cutmix_beta=0.5, mix_off_epochs=off, amp="fp16",
        ),
    )  # fmt: skip
    assert (plain.data, plain.train) == (with_gate.data, with_gate.train)


def test_a_run_or_a_trial_but_not_both(yaml_file) -> None:
    path = yaml_file("{}")
    parsed = parse_train(["--config", path])
    assert (parsed.dry_run, parsed.overfit_one_batch) == (False, False)
    assert parse_train(["--dry-run", "--config", path]).dry_run is True
    assert parse_train(["--config", path, "--overfit-one-batch"]).overfit_one_batch is True
    assert error_of("--config", path, "--dry-run", "--resume=auto").startswith("--resume and --dry-run exclude each")
    assert error_of("--config", path, "--overfit-one-batch", "--dry-run").startswith("--dry-run and --overfit-one")


def test_config_is_required() -> None:
    assert error_of("--train.epochs", "3").startswith("--config is required: name a YAML file")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.epoch=3", "unknown option --train.epoch; did you mean --train.epochs?"),
        ("--epochs=3", "unknown option --epochs; did you mean --train.epochs?"),
        ("--batch_size=3", "unknown option --batch_size; did you mean --train.batch_size?"),
        ("--outputs=3", "unknown option --outputs; did you mean --output?"),
        ("--lr=3", "unknown option --lr; did you mean --train.learning_rate?"),
        ("--train.lr=3", "unknown option --train.lr; did you mean --train.learning_rate?"),
        ("--train.wd=3", "unknown option --train.wd; did you mean --train.weight_decay?"),
        ("--train.learn=3", "unknown option --train.learn; did you mean --train.learning_rate?"),
        ("--zzz=3", "unknown option --zzz; --help lists all of them"),
        ("--data={}", "unknown option --data; "),
        ("--train.epochs=1.5", "train.epochs must be a whole number; got 1.5"),
        ("--train.epochs=many", "train.epochs must be a whole number; got many"),
        ("--train.epochs=null", "train.epochs must be a whole number; got null"),
        ("--train.learning_rate=fast", "train.learning_rate must be a number; got fast"),
        ("--train.nesterov=1", "train.nesterov must be true or false; got 1"),
        ("--train.amp=fp8", "train.amp must be one of off, fp16, bf16; got fp8"),
        ("--model.coding=tempo", "model.coding must be one of gac, direct, rate, latency, phase or null; got tempo"),
        ("--model.depth=3", "model.depth must be a list of whole numbers such as [3, 3, 2] or null; got 3"),
        ("--model.depth=[1.5]", "model.depth must be a list of whole numbers such as [3, 3, 2] or null; got [1.5]"),
        ("--model.depth=[]", "model.depth must be a list with at least one block in each stage"),
        ("--train.epochs=0", "train.epochs must be at least 1 and at most 1000000; got 0"),
        ("--config=other.yaml", "--config was given twice"),
        ("--train.epochs", "argument --train.epochs: expected one argument"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_option_is_one_line(option: str, message: str, yaml_file) -> None:
    assert message in error_of("--config", yaml_file("{}"), option)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochz: 3\n", "run.yaml line 2: unknown field train.epochz; did you mean train.epochs?"),
        ("trian:\n  epochs: 3\n", "run.yaml line 1: unknown field trian; did you mean train?"),
        ("epochs: 3\n", "run.yaml line 1: unknown field epochs; did you mean train.epochs?"),
        ("train:\n\n  epochs: x\n", "run.yaml line 3: train.epochs must be a whole number; got x"),
        ("train:\n  epochs: [3]\n", "run.yaml line 2: train.epochs must be a whole number"),
        ("train:\n  epochs: {a: 3}\n", "run.yaml line 2: train.epochs must be a whole number"),
        ("train:\n  epochs: 3\ntrain:\n  seed: 1\n", "run.yaml line 3: train is there twice"),
        ("train:\n  seed: 3\n  seed: 1\n", "run.yaml line 3: seed is there twice"),
        ("train: 3\n", "run.yaml line 1: train is a section"),
        ("train:\n", "run.yaml line 1: train is a section"),
        ("train:\n  epochs: 1\n   seed: 3\n", "run.yaml line 3 is not YAML: mapping values are not allowed here"),
        ("- a\n", "run.yaml must hold the sections data, model, train"),
        ("", "run.yaml must hold the sections data, model, train"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(text: str, message: str, yaml_file) -> None:
    assert message in error_of("--config", yaml_file(text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "missing.yaml: No such file" in error_of("--config", str(tmp_path / "missing.yaml"))
    assert "Is a directory" in error_of("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not a text file" in error_of("--config", str(tmp_path / "binary.yaml"))


def test_a_place_is_not_blamed_for_an_override(yaml_file) -> None:
    path = yaml_file("train:\n  epochs: 3\n")
    assert error_of("--config", path, "--train.epochs=x") == "train.epochs must be a whole number; got x"


@pytest.mark.parametrize("main", [train_main, eval_main])
def test_bad_input_is_one_line_on_stderr_and_status_2(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nonsense", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: unknown option --nonsense")


def test_help_explains_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train_main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in FIELDS:
        assert f"--{name} " in text
    assert "SGD learning rate at the start; a cosine takes it to 0 over the epochs. (type: float, default: 0.1)" in text
    assert "Path to a configuration file" not in text


def test_every_field_is_documented() -> None:
    tree = ast.parse((ROOT / "gac/config.py").read_text())
    sections = {section.__name__ for section in (Config, *SECTIONS.values())}
    documented = set()
    for section in tree.body:
        if isinstance(section, ast.ClassDef) and section.name in sections:
            for field, text in pairwise(section.body):
                if isinstance(field, ast.AnnAssign):
                    where = f"{section.name}.{field.target.id}"
                    assert isinstance(text, ast.Expr), where
                    assert isinstance(text.value, ast.Constant), where
                    assert isinstance(text.value.value, str), where
                    documented.add(where)
    assert documented == {f"{kind.__name__}.{f.name}" for kind in (Config, *SECTIONS.values()) for f in fields(kind)}


def test_running_out_of_memory_names_what_to_lower(
    yaml_file, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.5 GiB.\nSee docs")

    monkeypatch.setattr(cli, "train", run_out)
    assert train_main(["--config", yaml_file("{}")]) == 1
    assert capsys.readouterr().err == (
        "error: CUDA out of memory; lower train.batch_size or train.eval_batch_size, or raise train.accumulate_steps\n"
    )


@pytest.mark.parametrize("closed", [None, io.StringIO()], ids=["closed", "notebook"])
def test_a_program_needs_no_standard_streams(closed: io.StringIO | None, yaml_file, tmp_path: Path) -> None:
    text = "data: {name: synthetic, image_size: 8, synthetic_images: 8}\nmodel: {T: 1, width: 2, depth: [1, 1, 1]}\n"
    path = yaml_file(f"{text}train: {{epochs: 1, batch_size: 8}}\ndevice: cpu\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "stderr", closed)
        assert train_main(["--config", path, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_standard_output_that_is_full_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], yaml_file
) -> None:
    monkeypatch.setattr(cli, "dry_run", lambda *arguments: "dry run of a network: trained 2 steps")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert train_main(["--config", yaml_file("{}"), "--dry-run"]) == 1
    assert capsys.readouterr().err == "error: cannot write to the standard output: No space left on device\n"


@pytest.mark.parametrize("size", [0, 3000])
def test_results_that_cannot_be_written_are_one_line(size: int, yaml_file, tmp_path: Path) -> None:
    # A limit on the size of files fails as a full disk does, and for the superuser as well.
    text = "data: {name: synthetic, image_size: 8, synthetic_images: 8}\nmodel: {T: 1, width: 4, depth: [1, 1, 1]}\n"
    path = yaml_file(f"{text}train: {{epochs: 1, batch_size: 8}}\ndevice: cpu\n")
    program = f"""
import resource, sys
from gac.cli import train_main
from gac.training import engine
evaluate = engine.evaluate
def limit_and_evaluate(*arguments):
    scores = evaluate(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    return scores
engine.evaluate = limit_and_evaluate
sys.exit(train_main(["--config", {path!r}, "--output", {str(tmp_path / "run")!r}]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    name = "metrics.jsonl" if size == 0 else "best.pt"
    assert run.stderr.splitlines()[-1] == f"error: cannot write {tmp_path / 'run' / name}: File too large"


def test_a_report_that_cannot_be_written_fails_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "read_checkpoint", lambda path, digest: {"stem": torch.zeros(1)})
    arguments = ["--checkpoint", "x.pt", "--data.name", "digits", "--json"]
    assert parse_eval([*arguments, str(tmp_path / "report.json")]).json == tmp_path / "report.json"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"--json /proc/report\.json: its folder cannot be written: \w"):
        parse_eval([*arguments, "/proc/report.json"])


def test_eval_help_lists_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_main(["--help"])
    text = capsys.readouterr().out
    assert "--model.backend" in text
    assert "--train.eval_batch_size" in text
    assert "--train.epochs" not in text


def test_eval_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--checkpoint is required"):
        parse_eval([])
    with pytest.raises(InputError, match="no such file"):
        parse_eval(["--checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(InputError, match=r"--train.epochs is fixed by the checkpoint"):
        parse_eval(["--checkpoint", "x.pt", "--train.epochs", "3"])


def test_replace_keeps_the_checks() -> None:
    with pytest.raises(InputError):
        replace(TrainConfig(), epochs=0)
