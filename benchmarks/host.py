"""Show what a step costs the host beside torch's own work: python -m benchmarks.host (--help lists all options).

The kernels are replaced by a function that does nothing, so what a step takes is torch's work and what this package's
Python does around it. Torch's is measured on its own: the same convolutions, attention, head and loss without anything
between them. Times are the thread's own CPU time, in one thread, of small tensors; the networks' outputs mean nothing.
"""

import gc
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.candidates import IMPLEMENTATIONS
from benchmarks.common import NetworkSize, Table
from gac.command_line import at_least
from gac.errors import InputError
from gac.models import fused
from gac.models.ms_resnet import MSResNet
from gac.ops import c_kernels
from gac.ops.cuda import launch

TABLE = Table(("step", 12), ("whole, us", 10), ("torch, us", 10), ("ours, us", 10), ("launches", 9))
OURS = IMPLEMENTATIONS["ours-c"]


class Steps:
    """Training and evaluation of a network on random images; training without the optimiser, which has its own cost."""

    def __init__(self, network: nn.Module, size: NetworkSize, batch: int) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        images = torch.randn(batch, 3, size.image_size, size.image_size)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(size.num_classes, (batch,))

    def training(self) -> None:
        """Compute the gradients of all parameters."""
        self.network.train().zero_grad()
        F.cross_entropy(self.network(self.images).mean(0), self.labels).backward()

    @torch.inference_mode()
    def evaluation(self) -> None:
        """Compute the logits."""
        self.network.eval()(self.images)


class OnlyTorch(nn.Module):
    """What torch does in a fused network's step: everything but the fused operations and what leads to them."""

    def __init__(self, net: MSResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net, gate = self.net, self.net.coding.gate
        frame = net.stem(x, repeats=net.T)
        spatial = gate.spatial_channel(frame) + gate.temporal(frame)[0, :, None, None, None]
        membrane = torch.cat([spatial] * net.T).unflatten(0, (net.T, -1))
        for stage in net.stages:
            for block in stage:
                y = fused._convolve(fused._convolve(membrane, block.conv1.conv), block.conv2.conv)
                if not isinstance(block.shortcut, nn.Identity):
                    y = y + fused._convolve_shortcut(membrane, block.shortcut.conv)
                membrane = y
        return net.head(membrane[..., 0, 0])


def thread_times(call: Callable[[], object], repeats: int) -> list[float]:
    """Return the milliseconds of CPU time that each call took this thread, without the garbage collector."""
    # A collection takes as long as the process has objects, and meets whoever made the last one.
    gc.collect()
    gc.disable()
    try:
        moments = [time.thread_time()]
        for _ in range(repeats):
            call()
            moments.append(time.thread_time())
    finally:
        gc.enable()
    return [1000 * (after - before) for before, after in pairwise(moments)]


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    if report.device.type != "cpu":
        raise InputError(
            f"a step's time on the host is measured on the CPU, not on {report.device}: leave out --device"
        )
    if not (status := c_kernels.status()).ok:
        raise InputError(f"the kernels cannot be replaced: {status.reason}")
    size, T = NetworkSize.from_options(options), options.time_steps
    report.begin(network=str(size), T=T, batch=options.batch, steps=[])
    report.line("network", f"{size}; T={T}, batch {options.batch}")
    launched: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What no kernel has written is any number.
    torch.set_flush_denormal(True)
    launch.set_cpu_launcher(lambda *_: launched.append(1))
    try:
        networks = {"whole": OURS.build(size, T), "torch": OnlyTorch(OURS.build(size, T))}
        steps = {name: Steps(network, size, options.batch) for name, network in networks.items()}
        TABLE.header()
        for step in ("training", "evaluation"):
            calls = {name: getattr(each, step) for name, each in steps.items()}
            for call in list(calls.values()) * options.warmup:
                call()
            launched.clear()
            calls["whole"]()
            launches = len(launched)
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for name in list(calls) * options.rounds:
                samples[name] += thread_times(calls[name], options.steps)
            found: dict[str, Any] = {name: common.timing(taken) for name, taken in samples.items()}
            medians = [found[name]["median_ms"] for name in calls]
            found |= {"step": step, "launches": launches, "ours_ms": medians[0] - medians[1]}
            TABLE.row(step, *(f"{1000 * ms:,.0f}" for ms in (*medians, found["ours_ms"])), launches)
            report.add("steps", [found])
    finally:
        launch.set_cpu_launcher(None)
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


PARSER = common.make_parser("benchmarks.host", __doc__, "everything")
NetworkSize.add_options(PARSER, T=6, batch=2)
PARSER.add("--warmup", "untimed steps before", type=at_least(1), default=5)
PARSER.add("--rounds", "turns of each, one after the other", type=at_least(1), default=10)
PARSER.add("--steps", "timed steps in a turn", type=at_least(1), default=10)
PARSER.set_defaults(device="cpu", width=8, image_size=8)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
