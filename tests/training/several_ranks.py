"""What test_distributed.py starts with torchrun: training runs and checks on every rank, whose results it saves.

Usage: several_ranks.py FOLDER [KERNELS]. FOLDER gets rank0.pt, rank1.pt and the run folders; KERNELS has the kernels
compiled for the CPU. One program for many tests, as importing everything in every process takes longer than all of it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from cuda_on_cpu.launcher import KernelsOnCpu
from torch import Tensor

from gac.checkpoint import read_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.errors import InputError
from gac.models import create_model
from gac.models.batch_norm import BatchNorm2d
from gac.ops import runtime
from gac.training import checkpoints, engine
from gac.training.distributed import Ranks, process_group
from gac.training.engine import Trainer, train
from gac.training.health import TrainingDiverged
from gac.training.report import evaluate_checkpoint
from gac.training.run_folder import RunFolder
from gac.training.signals import Interrupted, Interruption

# 43 images leave a batch of 3 at the end, and 10 test images one of 1: an uneven and an empty part.
SYNCHRONIZED = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=43, synthetic_classes=3, crop_padding=1),
    # Its threshold of 0.5 lets every layer of so small a network fire.
    model=ModelConfig(T=2, width=8, depth=[1, 1, 1], temporal_init="alive", neuron="imagenet"),
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
RATE = replace(
    PLAIN, model=replace(PLAIN.model, coding="rate"), train=replace(PLAIN.train, learning_rate=0.05, epochs=3)
)


def folder_config(root: Path) -> Config:
    """Return the configuration of a run on an image folder."""
    data = DataConfig(name="imagefolder", root=str(root), image_size=16, resize=18, workers=0)
    return replace(SYNCHRONIZED, data=data, train=replace(SYNCHRONIZED.train, epochs=1, eval_batch_size=25))


def frames(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def normalized(norm: BatchNorm2d, x: Tensor, repeats: int, images: slice) -> list[Tensor]:
    """Return what a BatchNorm makes of some images, and the gradients of all ranks' sum of it with random weights."""
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
        results[name] = normalized(norm, frames(shape), repeats, slice(0, 3) if ranks.first else slice(3, 8))
    return results


@contextmanager
def kernels_on_cpu(folder: Path) -> Iterator[list[str]]:
    """Let networks on the CPU run fused, and yield the names of the kernels launched."""
    launcher, launched = KernelsOnCpu(folder), []

    def launch(kernel: runtime.Kernel, *arguments: object) -> None:
        launched.append(kernel.instance.partition("<")[0])
        launcher(kernel, *arguments)

    available = mock.patch.object(runtime, "cupy_status", return_value=runtime.CupyStatus(True, "for the CPU"))
    with torch.library._scoped_library("gac", "FRAGMENT") as library, available:
        for name, implementation in runtime.OPERATORS.items():
            library.impl(name.removeprefix("gac::"), implementation, "CPU")
        runtime.set_cpu_launcher(launch)
        yield launched
        runtime.set_cpu_launcher(None)


def fused_step(folder: Path, images: slice, synchronized: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return logits for some of four images, gradients of their part of the mean loss, and running statistics."""
    torch.manual_seed(0)
    network = create_model("gac_msresnet18_cifar", 5, 3, width=8, depth=[1, 1, 1], temporal_init="alive")
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.5)
            module.synchronized = synchronized
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))[images]
    with kernels_on_cpu(folder) as launched:
        logits = network(x)
        (F.cross_entropy(logits.mean(0), torch.arange(4)[images], reduction="sum") / 4).backward()
    assert {"gate_lif_forward", "norm_lif_backward_input", "residual_lif_backward_inputs"} <= set(launched)
    assert logits.detach().std() > 0.01
    return logits.detach(), [parameter.grad for parameter in network.parameters()], list(network.buffers())


def message_of(config: Config, folder: Path, ranks: Ranks, resume: str | None = None) -> object:
    """Return how training ends: a message, an exit status or an interruption's; None for the regular end."""
    try:
        train(config, folder, resume, ranks=ranks)
    except (InputError, TrainingDiverged) as error:
        return str(error)
    except SystemExit as error:
        return error.code
    except Interrupted as interrupted:
        return interrupted.exit_status
    return None


def stop_after(step: int, number: int, rank: int) -> None:
    """Let a rank send itself a signal after a step."""
    train_step = Trainer._train_step

    def step_and_signal(trainer: Trainer, *batch: Tensor) -> None:
        train_step(trainer, *batch)
        if trainer.position.step == step and trainer.ranks.rank == rank:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as torchrun may

    Trainer._train_step = step_and_signal


def break_loss_of_rank_1() -> None:
    """Let rank 1's outputs be infinite in the second step, and the totals be looked at after every step."""
    train_step = Trainer._train_step

    def step_with_infinities(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        broken = trainer.position.step == 1 and trainer.ranks.rank == 1
        hook = trainer.network.register_forward_hook(lambda *call: call[-1] * (torch.inf if broken else 1))
        train_step(trainer, images, labels)
        hook.remove()

    Trainer._train_step = step_with_infinities
    engine.EpochProgress.POLL_SECONDS = 0.0


def steps_saved(folder: Path, ranks: Ranks) -> list[int]:
    """Return the steps after which a run saves whose rank 0 finds that minutes have passed at its second and fifth."""
    saved = []
    save = Trainer._save

    def record(trainer: Trainer) -> None:
        saved.append(trainer.position.step)
        save(trainer)

    def due(cadence: checkpoints.Cadence, step: int) -> bool:
        return step in (2, 5) if ranks.first else step == 4

    kept = Trainer._save, checkpoints.Cadence.due
    Trainer._save, checkpoints.Cadence.due = record, due
    train(PLAIN, folder, ranks=ranks)
    Trainer._save, checkpoints.Cadence.due = kept
    return saved


def noise_and_coins(folder: Path, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return what rate coding would draw next, and the state of the generator that coins are tossed with."""
    with Interruption(ranks.largest) as interruption:
        trainer = Trainer(RATE, RunFolder(folder), None, interruption, ranks=ranks)
        trainer.run()
    with trainer._own_noise():
        noise = torch.rand(4)
    return noise, torch.get_rng_state()


def main(folder: Path, kernels: Path | None, ranks: Ranks) -> dict[str, object]:
    """Do everything; return what is not in files."""
    torch.set_num_threads(1)
    results: dict[str, object] = {"batch_norm": batch_norms(ranks)}
    if kernels is not None:
        results["fused"] = fused_step(kernels, slice(0, 3) if ranks.first else slice(3, 4), synchronized=True)
    for name, config in (("synchronized", SYNCHRONIZED), ("plain", PLAIN), ("accumulating", ACCUMULATING)):
        train(config, folder / name, ranks=ranks)
    train(folder_config(folder / "images"), folder / "folder", ranks=ranks)
    train(SYNCHRONIZED, folder / "one_then_two", "auto", ranks=ranks)
    results["noise"], results["coins"] = noise_and_coins(folder / "rate", ranks)

    data = build_data(SYNCHRONIZED.data, device="cpu", batch_size=16, eval_batch_size=3, seed=1, share=ranks.share)
    best = folder / "synchronized" / "best.pt"
    results["report"] = evaluate_checkpoint(best, read_checkpoint(best), SYNCHRONIZED, ranks=ranks)
    results["parts"] = [list(data.train.epoch(3)), list(data.test.epoch(0))]

    train_step = Trainer._train_step
    stop_after(BATCHES + 1, signal.SIGTERM, rank=1)
    results["sigterm"] = message_of(PLAIN, folder / "interrupted", ranks)
    Trainer._train_step = train_step
    train(PLAIN, folder / "interrupted", "auto", ranks=ranks)
    stop_after(BATCHES + 2, signal.SIGINT, rank=0)
    results["sigint"] = message_of(SYNCHRONIZED, folder / "two_then_one", ranks)
    Trainer._train_step = train_step

    results["saved"] = steps_saved(folder / "cadence", ranks)
    break_loss_of_rank_1()
    results["diverged"] = message_of(PLAIN, folder / "diverged", ranks)
    Trainer._train_step = train_step

    small = replace(PLAIN, data=replace(PLAIN.data, synthetic_images=17))
    refused = {
        "small": small,
        "device": replace(PLAIN, device="cuda:0"),
        "name": replace(PLAIN, model=replace(PLAIN.model, name="resnet")),
        "graph": replace(PLAIN, train=replace(PLAIN.train, cuda_graph=True)),
        "folder": replace(PLAIN, train=replace(PLAIN.train, epochs=9)),
    }
    for name, config in refused.items():
        output = folder / ("plain" if name == "folder" else "refused")
        results[f"refused {name}"] = message_of(config, output, ranks, "auto" if name == "folder" else None)
    results["refused on rank 1"] = error_of_rank_1(ranks)
    return results


def error_of_rank_1(ranks: Ranks) -> object:
    def fail_on_rank_1() -> None:
        if not ranks.first:
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
