"""Show what a step costs the host beside torch's own work: python -m benchmarks.host (--help lists all options).

The kernels are replaced by a function that does nothing, so what a step takes is torch's work and what this package's
Python does around it. Torch's is measured on its own: the same convolutions, attention, head, loss and optimiser without
anything between them. Times are the thread's own CPU time, in one thread, of small tensors; results mean nothing.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.candidates import IMPLEMENTATIONS, Candidate, Setting
from benchmarks.common import NetworkSize, Table
from gac.command_line import at_least
from gac.errors import InputError
from gac.models import fused
from gac.models.ms_resnet import MSResNet
from gac.ops import c_kernels
from gac.ops.cuda import launch

TABLE = Table(("step", 12), ("whole, us", 10), ("torch, us", 10), ("ours, us", 10), ("launches", 9))
OURS = IMPLEMENTATIONS["ours-c"]


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
    """Return the milliseconds of CPU time that each call took this thread."""
    moments = [time.thread_time()]
    for _ in range(repeats):
        call()
        moments.append(time.thread_time())
    return [1000 * (after - before) for before, after in zip(moments, moments[1:], strict=False)]


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    if not (status := c_kernels.status()).ok:
        raise InputError(f"the kernels cannot be replaced: {status.reason}")
    size = NetworkSize.from_options(options)
    if not size.network.startswith("gac_"):
        raise InputError(f"{size.network} has no gated attention coding")
    setting = Setting(size, options.time_steps, options.batch, "fp32", "NHWC", torch.device("cpu"))
    report.begin(network=str(size), T=setting.T, batch=setting.batch, steps=[])
    report.line("network", f"{size}; T={setting.T}, batch {setting.batch}")
    launched = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    launch.set_cpu_launcher(lambda *_: launched.append(1))
    try:
        whole = Candidate(OURS, setting, setting.weights())
        only_torch = replace(OURS, build=lambda size, T: OnlyTorch(OURS.build(size, T)))
        floor = Candidate(only_torch, setting, setting.weights())
        TABLE.header()
        for step in ("training", "evaluation"):
            found = _compare(whole, floor, step, options, launched)
            ours = found["whole"]["median_ms"] - found["torch"]["median_ms"]
            times = (found["whole"]["median_ms"], found["torch"]["median_ms"], ours)
            TABLE.row(step, *(f"{1000 * ms:,.0f}" for ms in times), found["launches"])
            report.add("steps", [found | {"step": step, "ours_ms": ours}])
    finally:
        launch.set_cpu_launcher(None)
        torch.set_num_threads(threads)


def _compare(whole: Candidate, floor: Candidate, step: str, options: Namespace, launched: list) -> dict[str, Any]:
    calls = {}
    for name, candidate in (("whole", whole), ("torch", floor)):
        candidate.network.train(step == "training")
        calls[name] = candidate.train_step if step == "training" else candidate.eval_step
        for _ in range(options.warmup):
            calls[name]()
    launched.clear()
    calls["whole"]()
    launches = len(launched)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            samples[name] += thread_times(call, options.steps)
    return {name: common.timing(taken) for name, taken in samples.items()} | {"launches": launches}


PARSER = common.make_parser("benchmarks.host", __doc__, "everything")
NetworkSize.add_options(PARSER, T=6, batch=2)
PARSER.add("--warmup", "untimed steps before", type=at_least(1), default=5)
PARSER.add("--rounds", "turns of each, one after the other", type=at_least(1), default=10)
PARSER.add("--steps", "timed steps in a turn", type=at_least(1), default=10)
PARSER.set_defaults(width=8, image_size=8)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
