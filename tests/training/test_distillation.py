"""What outputs add to the loss: self-distillation between time steps, and a trained teacher."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gac
from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import DataInfo
from gac.errors import InputError
from gac.models.ms_resnet import MSResNet
from gac.training.distillation import Distillation, Teacher, make_distillation
from gac.training.engine import train
from gac.training.signals import Interrupted
from run_results import assert_same, result_of, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=40, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=2, batch_size=16, learning_rate=0.05),
    device="cpu",
)
CPU, CONTIGUOUS = torch.device("cpu"), torch.contiguous_format


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another network on the same data: a ReLU twin, wider, without attention and time."""
    folder = tmp_path_factory.mktemp("teacher")
    model = replace(TINY.model, name="msresnet18_cifar", T=1, width=8, activation="relu")
    train(replace(TINY, model=model, train=replace(TINY.train, epochs=1)), folder / "run")
    return folder / "run" / "last.pt"


@pytest.fixture
def info(teacher_file: Path) -> DataInfo:
    return DataInfo.from_dict(read_checkpoint(teacher_file)["data"])


def small_network(T: int) -> MSResNet:
    torch.manual_seed(1)
    return gac.create_model("msresnet18_cifar", 3, T, width=4, depth=[1, 1, 1]).eval()


def divergence(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 x the mean of sum p log(p / q), written out."""
    p, q = (target / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_self_distillation_is_the_divergence_from_the_mean_over_time() -> None:
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    config = TrainConfig(self_distillation=0.5, distillation_temperature=3.0)
    added = Distillation(config)(logits, torch.empty(0))
    expected = 0.5 * divergence(logits, logits.mean(0).detach(), 3.0)
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(gradient(added, logits), gradient(expected, logits))
    assert gradient(added, logits).abs().max() > 0.01
    equal = logits[:1].expand(4, -1, -1)
    torch.testing.assert_close(Distillation(config)(equal, torch.empty(0)), torch.zeros(()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["mean", "tet"])
def test_a_teacher_is_learnt_from_as_the_labels_are(loss: str) -> None:
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = small_network(T=2)
    config = TrainConfig(loss=loss, teacher="a.pt", teacher_weight=0.25, distillation_temperature=1.5)
    added = Distillation(config, Teacher(teacher, ""))(logits, images)
    with torch.no_grad():
        target = teacher(images).mean(0)
    expected = 0.25 * divergence(logits if loss == "tet" else logits.mean(0), target, 1.5)
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(gradient(added, logits), gradient(expected, logits))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nothing_is_added_unless_it_is_asked_for(info: DataInfo) -> None:
    assert make_distillation(TrainConfig(), info, CPU, CONTIGUOUS) is None


def test_the_teacher_is_read_and_stays_as_it_is(teacher_file: Path, info: DataInfo, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    config = replace(TINY, train=replace(TINY.train, teacher=str(teacher_file), teacher_weight=10.0, epochs=1))
    distillation = make_distillation(config.train, info, CPU, CONTIGUOUS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not distillation.teacher.network.training
    assert distillation.teacher.sha256 == hashlib.sha256(teacher_file.read_bytes()).hexdigest()
    expected = read_checkpoint(teacher_file)["model"]

    def unchanged(trainer) -> None:
        assert_same(dict(trainer.distillation.teacher.network.state_dict()), expected)

    train(config, tmp_path / "run", after_step=unchanged)


def test_a_student_comes_closer_to_its_teacher(teacher_file: Path, info: DataInfo) -> None:
    config = TrainConfig(teacher=str(teacher_file))
    distillation = make_distillation(config, info, CPU, CONTIGUOUS)
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    student = small_network(T=2).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = distillation(student(images), images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def distilled(teacher_file: Path, **options: object) -> Config:
    options = {"teacher": str(teacher_file), "self_distillation": 0.5, "cutmix": "batch", **options}
    return replace(TINY, train=replace(TINY.train, **options))


@pytest.mark.parametrize(("loss", "stop_after"), [("mean", 3), ("tet", 1), ("tet", 5)])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    teacher_file: Path, tmp_path: Path, loss: str, stop_after: int
) -> None:
    config = distilled(teacher_file, loss=loss, accumulate_steps=2)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", after_step=stop_at(stop_after))
    train(config, tmp_path / "parts", resume="auto")
    assert_same(result_of(tmp_path / "parts"), result_of(tmp_path / "whole"))
    train(replace(config, train=replace(config.train, teacher=None)), tmp_path / "alone")
    assert result_of(tmp_path / "alone")[1] != result_of(tmp_path / "whole")[1]


def test_a_run_does_not_go_on_with_another_teacher(teacher_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "teacher.pt"
    file.write_bytes(teacher_file.read_bytes())
    config = distilled(file)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", after_step=stop_at(1))
    with pytest.raises(InputError, match=r"another configuration \(train\.teacher .*teacher\.pt -> None\)"):
        train(replace(config, train=replace(config.train, teacher=None)), tmp_path / "run", resume="auto")
    payload = read_checkpoint(file)
    payload["model"]["head.bias"] += 1
    write_checkpoint(file, payload)
    with pytest.raises(
        InputError, match=r"teacher\.pt is not the file that the run began with \(sha256 [0-9a-f]{64}\)"
    ):
        train(config, tmp_path / "run", resume="auto")
    # The same file in another place is the same teacher.
    train(distilled(teacher_file), tmp_path / "run", resume="auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, r"normalised with mean \[0\.1, 0\.2, 0\.3\]"),
        ({"num_classes": 4}, "3 classes"),
        ({"frames": 2}, "2 frames of 8 x 8 with 3 channels"),
        ({"std": None}, r"its entry data\.std is damaged"),
    ],
)
def test_a_teacher_of_other_images_is_refused(
    teacher_file: Path, info: DataInfo, tmp_path: Path, changes: dict, message: str
) -> None:
    payload = read_checkpoint(teacher_file)
    payload["data"] |= changes
    write_checkpoint(tmp_path / "other.pt", payload)
    with pytest.raises(InputError, match=rf"train\.teacher .*other\.pt: .*{message}"):
        make_distillation(TrainConfig(teacher=str(tmp_path / "other.pt")), info, CPU, CONTIGUOUS)


def test_a_file_that_is_no_teacher_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    torch.save(small_network(1).state_dict(), tmp_path / "bare.pt")
    for name, message in (("bare.pt", "does not say what it was trained on"), ("none.pt", "no such file")):
        with pytest.raises(InputError, match=message):
            train(distilled(tmp_path / name), tmp_path / "run")
    assert not (tmp_path / "run").exists()
