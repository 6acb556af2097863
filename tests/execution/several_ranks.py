"""The program that test_distributed.py starts with torchrun: it trains and checks on every rank and saves the results.

Usage: several_ranks.py FOLDER [KERNELS]. FOLDER gets rank0.pt, rank1.pt and the run folders; KERNELS has the kernels
compiled for the CPU. It is one program for many tests, as importing everything takes longer than all of them.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_on_cpu.launcher import KernelsOnCpu
from gac.checkpoint import read_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation
from gac.evaluation.report import evaluate_checkpoint
from gac.execution.distributed import SINGLE_PROCESS, Ranks, process_group
from gac.models import create_model
from gac.models.batch_norm import BatchNorm2d
from gac.ops import backend, c_kernels
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel
from gac.training import checkpoints, engine
from gac.training.ema import MovingAverage
from gac.training.engine import Trainer, train
from gac.training.mixing import Mixing
from gac.training.optim import make_optimizer, parameter_groups
from gac.training.run_folder import RunFolder
from gac.training.signals import Interrupted, Interruption
from gac.training.step import TrainingStep
from gac.training.totals import Readback, Totals, TrainingDiverged
from run_results import stop_at

# 43 images leave a batch of 3 at the end, and 10 test images one of 1: an uneven and an empty part.
SYNCHRONIZED = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=43, synthetic_classes=3, crop_padding=1),
    # Its threshold of 0.5 lets every layer of so small a network fire. In torch rounding decides no spike here.
    model=ModelConfig(T=2, width=8, depth=[1, 1, 1], temporal_init="alive", neuron="imagenet", backend="torch"),
    train=TrainConfig(
        epochs=2,
        batch_size=8,
        learning_rate=0.05,
        cutmix="batch",
        mixup_alpha=0.2,
        ema_decay=0.9,
        eval_batch_size=3,
        sync_batch_norm=True,
    ),
    device="cpu",
)
BATCHES = 6
PLAIN = replace(SYNCHRONIZED, train=replace(SYNCHRONIZED.train, sync_batch_norm=False))
# 48 images: all parts and their micro-batches are even.
EVEN = replace(PLAIN.data, synthetic_images=48)
ACCUMULATING = replace(PLAIN, data=EVEN, train=replace(PLAIN.train, accumulate_steps=2))
# Checkpoints within the epochs too.
RESTARTED = replace(PLAIN, train=replace(PLAIN.train, epochs=5, checkpoint_steps=4))
RATE = replace(
    PLAIN, model=replace(PLAIN.model, coding="rate"), train=replace(PLAIN.train, learning_rate=0.05, epochs=3)
)


def folder_config(root: Path) -> Config:
    """Return the configuration of a run on an image folder."""
    data = DataConfig(name="imagefolder", root=str(root), image_size=16, resize=18, workers=0)
    return replace(SYNCHRONIZED, data=data, train=replace(SYNCHRONIZED.train, epochs=1, eval_batch_size=25))


ALL_AT_ONCE = {
    "learning_rate": 0.5,
    "gradient_clip_norm": 0.2,
    "ema_decay": 0.9,
    "loss": "tet",
    "label_smoothing": 0.1,
    "cutmix": "batch",
    "cutmix_probability": 1.0,
    "mixup_alpha": 0.5,
    "weight_decay": 0.01,
}
# Whether BatchNorm is synchronised, and what else differs from ALL_AT_ONCE.
EXACT_CASES: dict[str, tuple[bool, dict[str, object]]] = {
    "all at once": (True, {}),
    "nothing mixed": (True, {"cutmix": "off", "mixup_alpha": 0.0, "loss": "mean"}),
    "accumulating": (True, {"accumulate_steps": 2}),
    "recomputed": (True, {"checkpoint_activations": True}),
    "accumulating and recomputed": (True, {"accumulate_steps": 2, "checkpoint_activations": True}),
    "channels last": (True, {"channels_last": True}),
    "own statistics": (False, {}),
    "own statistics, accumulating and recomputed": (False, {"accumulate_steps": 2, "checkpoint_activations": True}),
}
# The last batch of an epoch is uneven.
EXACT_BATCHES = (8, 8, 7)


def exact_config(case: str) -> Config:
    synchronized, options = EXACT_CASES[case]
    options = {"sync_batch_norm": synchronized, **ALL_AT_ONCE, **options}
    return replace(SYNCHRONIZED, train=replace(SYNCHRONIZED.train, **options))


def exact_steps(
    config: Config, ranks: Ranks = SINGLE_PROCESS, order: Callable[[int], Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Totals]:
    """Train a few steps in float64; return the state dicts of the network and of its average, and the totals.

    ``order`` gives the order in which a batch of a number of images, once mixed, is trained on.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    network = create_model(num_classes=3, in_channels=3, **asdict(config.model)).double().to(memory_format=layout)
    network.set_checkpoint_activations(config.train.checkpoint_activations)
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.synchronized = config.train.sync_batch_norm and ranks.size > 1
    device = torch.device("cpu")
    average = MovingAverage(network, config.train.ema_decay)
    optimizer = make_optimizer(parameter_groups(network, config.train), config.train, device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = TrainingStep(network, optimizer, scaler, config.train, device, average, ranks)
    mixing = Mixing(config.train, 3, ranks)
    generator = torch.Generator().manual_seed(1)
    for size in EXACT_BATCHES:
        images = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        labels = torch.randint(3, (size,), generator=generator)
        images, labels = images[ranks.shard.of(size)], labels[ranks.shard.of(size)]
        mixed, targets = mixing(images, labels, 0, None)
        if order is not None:
            mixed, targets, labels = (each[order(size)] for each in (mixed, targets, labels))
        step.batch_images = size if ranks.size > 1 else None
        step(mixed.contiguous(memory_format=layout), targets, labels)
    return network.state_dict(), average.network.state_dict(), step.totals.read()


def frames(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def normalized(norm: BatchNorm2d, x: Tensor, repeats: int, images: slice) -> list[Tensor]:
    """Return a BatchNorm's output for some images, the gradients of its weighted sum over all ranks, and statistics."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    mine = x.unflatten(0, (-1, 8))[:, images].flatten(0, 1).requires_grad_()
    y = norm(mine, repeats)
    (y * weights.unflatten(0, (-1, 8))[:, images].flatten(0, 1)).sum().backward()
    return [y.detach(), mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


BATCH_NORM_CASES = {"images": ((8,), 1), "static frames": ((8,), 6), "time and batch": ((16,), 1)}


def make_norm() -> BatchNorm2d:
    norm = BatchNorm2d(4).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    torch.nn.init.uniform_(norm.bias, -1, 1, generator=torch.Generator().manual_seed(3))
    return norm


def batch_norms(ranks: Ranks) -> dict[str, list[Tensor]]:
    """Return the results of each case for three of the eight images on rank 0 and five on rank 1."""
    results = {}
    for name, (shape, repeats) in BATCH_NORM_CASES.items():
        norm = make_norm()
        norm.synchronized = True
        results[name] = normalized(norm, frames(shape), repeats, slice(0, 3) if ranks.is_main else slice(3, 8))
    return results


@contextmanager
def kernels_on_cpu(folder: Path) -> Iterator[list[str]]:
    """Let networks on the CPU run fused, and yield the names of the kernels launched."""
    launcher, launched = KernelsOnCpu(folder), []

    def record(kernel: Kernel, *arguments: object) -> None:
        launched.append(kernel.instance.partition("<")[0])
        launcher(kernel, *arguments)

    available = mock.patch.object(backend, "cupy_status", return_value=backend.Status(True, "for the CPU"))
    with available:
        launch.set_cpu_launcher(record)
        yield launched
        launch.set_cpu_launcher(None)


@contextmanager
def kernels_in_c() -> Iterator[list[str]]:
    """Let networks on the CPU run fused, and yield the names of the C kernels that ran."""
    launched, run = [], launch.launch

    def record(kernel: Kernel, *arguments: object) -> None:
        launched.append(kernel.instance.partition("<")[0])
        run(kernel, *arguments)

    with mock.patch.object(launch, "launch", record):
        yield launched


def fused_step(
    kernels: AbstractContextManager[list[str]], images: slice, synchronized: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return logits for some of four images, gradients of their part of the mean loss, and running statistics."""
    torch.manual_seed(0)
    network = create_model("gac_msresnet18_cifar", 5, 3, width=8, depth=[1, 1, 1], temporal_init="alive")
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.5)
            module.synchronized = synchronized
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))[images]
    with kernels as launched:
        logits = network(x)
        (F.cross_entropy(logits.mean(0), torch.arange(4)[images], reduction="sum") / 4).backward()
    assert {"gate_lif_forward", "norm_lif_backward_input", "residual_lif_backward_inputs"} <= set(launched)
    assert logits.detach().std() > 0.01
    return logits.detach(), [parameter.grad for parameter in network.parameters()], list(network.buffers())


def nothing(trainer: Trainer) -> None:
    """Do nothing after a step."""


def twice(action: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
    """Return an ``after_step`` that does something twice, as torchrun may send a signal twice."""
    return lambda trainer: (action(trainer), action(trainer))


def message_of(
    config: Config,
    folder: Path,
    ranks: Ranks,
    resume: str | None = None,
    after_step: Callable[[Trainer], None] = nothing,
) -> object:
    """Return how training ends: a message, an exit status or that of an interruption; None for the regular end."""
    try:
        train(config, folder, resume, ranks=ranks, after_step=after_step)
    except (InputError, TrainingDiverged) as error:
        return str(error)
    except SystemExit as error:
        return error.code
    except Interrupted as interrupted:
        return interrupted.exit_status
    return None


@contextmanager
def stop_in_evaluation(number: int, rank: int) -> Iterator[None]:
    """Let a rank send itself a signal before its second evaluation, which is the first of the averaged weights."""
    evaluate, calls = engine.evaluate, itertools.count(1)

    def signal_and_evaluate(*arguments: object) -> Evaluation:
        ranks = arguments[-1]
        if next(calls) == 2 and ranks.rank == rank:
            os.kill(os.getpid(), number)
        return evaluate(*arguments)

    with mock.patch.object(engine, "evaluate", signal_and_evaluate):
        yield


def make_outputs_infinite(trainer: Trainer) -> None:
    """Let the outputs of the network be infinite after the first step of the run."""
    if trainer.position.step == 1:
        trainer.network.register_forward_hook(lambda *call: call[-1] * torch.inf)


def steps_saved(folder: Path, ranks: Ranks) -> list[int]:
    """Return the steps after which a run saves if a checkpoint is due after other steps on rank 0 than on rank 1."""
    steps, saved = [], []

    def due(interval: checkpoints.CheckpointInterval, step: int) -> bool:
        return step in (2, 5) if ranks.is_main else step == 4

    def restart(interval: checkpoints.CheckpointInterval) -> None:
        saved.extend(steps[-1:])

    with mock.patch.multiple(checkpoints.CheckpointInterval, due=due, restart=restart):
        train(PLAIN, folder, ranks=ranks, after_step=lambda trainer: steps.append(trainer.position.step))
    return saved


def noise_and_generator(folder: Path, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return what rate coding would draw next, and the state of the generator that CutMix draws from."""
    with Interruption(ranks.largest) as interruption:
        trainer = Trainer(RATE, RunFolder(folder), None, interruption, ranks=ranks)
        trainer.run()
    with trainer.own_noise():
        noise = torch.rand(4)
    return noise, torch.get_rng_state()


def main(folder: Path, kernels: Path | None, ranks: Ranks) -> dict[str, object]:
    """Run everything; return the results that are not in files."""
    torch.set_num_threads(1)
    results: dict[str, object] = {"batch_norm": batch_norms(ranks)}
    images = slice(0, 3) if ranks.is_main else slice(3, 4)
    if c_kernels.status().ok:
        results["fused in c"] = fused_step(kernels_in_c(), images, synchronized=True)
    if kernels is not None:
        results["fused"] = fused_step(kernels_on_cpu(kernels), images, synchronized=True)
    results["exact"] = {case: exact_steps(exact_config(case), ranks) for case in EXACT_CASES}
    runs = {"synchronized": SYNCHRONIZED, "plain": PLAIN, "accumulating": ACCUMULATING, "never restarted": RESTARTED}
    for name, config in runs.items():
        train(config, folder / name, ranks=ranks)
    train(folder_config(folder / "images"), folder / "folder", ranks=ranks)
    for split in ("train", "val"):
        config = folder_config(folder / f"broken {split}")
        results[f"broken {split}"] = message_of(config, folder / f"run of broken {split}", ranks)
    train(SYNCHRONIZED, folder / "one_then_two", "auto", ranks=ranks)
    results["noise"], results["generator"] = noise_and_generator(folder / "rate", ranks)

    data = build_data(SYNCHRONIZED.data, device="cpu", batch_size=16, eval_batch_size=3, seed=1, shard=ranks.shard)
    best = folder / "synchronized" / "best.pt"
    results["report"] = evaluate_checkpoint(best, read_checkpoint(best), SYNCHRONIZED, ranks=ranks)
    best = folder / "folder" / "best.pt"
    config = folder_config(folder / "images")
    results["report of folder"] = evaluate_checkpoint(best, read_checkpoint(best), config, ranks=ranks)
    results["parts"] = [list(data.train.epoch(3)), list(data.test.epoch(0))]

    stop = nothing if ranks.is_main else twice(stop_at(BATCHES + 1))
    results["sigterm"] = message_of(PLAIN, folder / "interrupted", ranks, after_step=stop)
    train(PLAIN, folder / "interrupted", "auto", ranks=ranks)
    with stop_in_evaluation(signal.SIGTERM, rank=1):
        results["in evaluation"] = message_of(PLAIN, folder / "in evaluation", ranks)
    results["stopped in evaluation at"] = read_checkpoint(folder / "in evaluation" / "last.pt")["training"]["position"]
    train(PLAIN, folder / "in evaluation", "auto", ranks=ranks)
    stop = twice(stop_at(BATCHES + 2, signal.SIGINT)) if ranks.is_main else nothing
    results["sigint"] = message_of(SYNCHRONIZED, folder / "two_then_one", ranks, after_step=stop)

    results["saved"] = steps_saved(folder / "interval", ranks)
    with mock.patch.object(Readback, "SECONDS", 0.0):
        diverge = nothing if ranks.is_main else make_outputs_infinite
        results["diverged"] = message_of(PLAIN, folder / "diverged", ranks, after_step=diverge)

    small = replace(PLAIN, data=replace(PLAIN.data, synthetic_images=17))
    refused = {
        "small": small,
        "device": replace(PLAIN, device="cuda:0"),
        "name": replace(PLAIN, model=replace(PLAIN.model, name="resnet")),
        "graph": replace(PLAIN, train=replace(PLAIN.train, cuda_graph=True)),
        "folder": replace(PLAIN, train=replace(PLAIN.train, epochs=1)),
        "options": replace(PLAIN, train=replace(PLAIN.train, seed=10 + ranks.rank)),
        # As where one machine has an older copy of the data.
        "data": replace(PLAIN, data=replace(PLAIN.data, name="npz", root=str(folder / f"of_rank_{ranks.rank}.npz"))),
    }
    for name, config in refused.items():
        output = folder / ("plain" if name == "folder" else "refused")
        results[f"refused {name}"] = message_of(config, output, ranks, "auto" if name == "folder" else None)
    results["refused on rank 1"] = error_of_rank_1(ranks)
    return results


def error_of_rank_1(ranks: Ranks) -> object:
    def fail_on_rank_1() -> None:
        if not ranks.is_main:
            raise InputError("there is no folder")

    try:
        ranks.together(fail_on_rank_1)
    except InputError as error:
        return str(error)
    except SystemExit as error:
        return error.code


if __name__ == "__main__":
    with process_group() as ranks:
        folder, *kernels = map(Path, sys.argv[1:])
        torch.save(main(folder, kernels[0] if kernels else None, ranks), folder / f"rank{ranks.rank}.pt")
