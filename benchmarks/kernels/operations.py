"""The fused operations: where in the network each runs, what it computes and how many bytes it has to move.

An operation is one entry of ``OPERATIONS``. Its bytes are those of everything that has to be read or written by passes
whose intermediate results stay in registers; vectors of one value for each channel or image do not count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks.comparison import Operation
from gac.models.batch_norm import BatchNorm2d
from gac.models.ms_resnet import MSBlock, MSResNet
from gac.neuron import PRESETS
from gac.ops import batch_norm, gate_lif, lif, lif_pool, norm_lif, residual_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An operation on tensors of one layer.

    Args:
        inputs: By name; those that are differentiated require gradients.
        ours: The operation.
        reference: Its specification, for float64 too.
        peer: The same from SpikingJelly's functions and torch's.
        forward_bytes: What the forward pass has to move.
        backward_bytes: What the backward pass has to move, 0 where there is none.
    """

    inputs: Mapping[str, Tensor]
    ours: Operation
    reference: Operation
    peer: Operation
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Setting:
    """The layer that a case is made for.

    Args:
        shape: Its activations, [T, B, C, H, W].
        dtype: Their type.
        preset: The neuron, a name in ``gac.neuron.PRESETS``.
        device: Where its tensors are.
        kernels: Ours are the CUDA kernels; else their references in torch, which the operations are on a CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    preset: str
    device: torch.device
    kernels: bool

    @property
    def neuron(self) -> LIFParameters:
        """The neuron as the operations take it."""
        return PRESETS[self.preset]

    def spikingjelly(self, x: Tensor) -> Tensor:
        """Return the spikes of SpikingJelly's fastest execution: its state in float32, which its kernels need."""
        preset = PRESETS[self.preset]
        v = torch.zeros_like(x[0], dtype=torch.float32, requires_grad=False)
        constants = (preset.tau, False, preset.v_threshold, 0.0, preset.surrogate, preset.detach_reset)
        return functional.lif_multi_step(x, v, *constants)[0]

    def sequence(self) -> Tensor:
        """Return noise [T, B, C, H, W] whose frames are channels_last."""
        return self._noise(self.shape[0] * self.shape[1]).unflatten(0, self.shape[:2]).detach().requires_grad_()

    def frame(self) -> Tensor:
        """Return noise [B, C, H, W] in channels_last."""
        return self._noise(self.shape[1]).requires_grad_()

    def _noise(self, frames: int) -> Tensor:
        noise = torch.randn(frames, *self.shape[2:], device=self.device)
        return noise.to(self.dtype, memory_format=torch.channels_last)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a BatchNorm, [C]."""
        weight, bias = 0.2 * torch.randn(2, self.shape[2], device=self.device)
        return (1 + weight).requires_grad_(), bias.detach().requires_grad_()

    def normalization(self, y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
        """Return the BatchNorm of ``y`` as the operations take it."""
        if not self.kernels:
            return self.reference_normalization(y, weight, bias)
        statistics = batch_norm.statistics(batch_norm.batch_moments(y.detach()), EPS)
        return BatchNormTransform(weight, bias, *statistics, from_batch=True)

    def reference_normalization(self, y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
        """Return the BatchNorm of ``y``, differentiable through its statistics."""
        mean, variance, _ = batch_norm.reference_moments(y)
        return BatchNormTransform(weight, bias, mean, (variance + EPS).rsqrt(), from_batch=True)

    def rounded(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the dtype as the operations store it; the gradient passes as it is."""
        return x + (x.to(self.dtype).to(x.dtype) - x).detach()


def _torch_batch_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    frames = y.flatten(0, 1)
    return F.batch_norm(frames, None, None, weight, bias, training=True, eps=EPS).unflatten(0, y.shape[:2])


def _lif(setting: Setting) -> Case:
    run = lif.lif if setting.kernels else lif.reference
    x = setting.sequence()
    return Case(
        {"x": x},
        ours=lambda x: {"spikes": run(x, 0.0, setting.neuron)[0]},
        reference=lambda x: {"spikes": lif.reference(x, 0.0, setting.neuron)[0]},
        peer=lambda x: {"spikes": setting.spikingjelly(x)},
        # Read x; write spikes and the last membrane potential, float32.
        forward_bytes=2 * x.nbytes + 4 * x[0].numel(),
        # Read x and the gradient of the spikes; write that of x.
        backward_bytes=3 * x.nbytes,
    )


def _batch_statistics(setting: Setting) -> Case:
    run = batch_norm.batch_moments if setting.kernels else batch_norm.reference_moments
    y = setting.sequence().detach()

    def torch_moments(y: Tensor) -> dict[str, Tensor]:
        variance, mean = torch.var_mean(y.float(), (0, 1, 3, 4), correction=0)
        count = y.numel() // y.shape[2]
        return {"moments": torch.stack((mean, variance, variance * (count / (count - 1))))}

    return Case(
        {"y": y},
        ours=lambda y: {"moments": run(y)},
        reference=lambda y: {"moments": batch_norm.reference_moments(y)},
        peer=torch_moments,
        forward_bytes=y.nbytes,
        # Part of the operation that normalises.
        backward_bytes=0,
    )


def _norm_lif(setting: Setting) -> Case:
    run = norm_lif.norm_lif if setting.kernels else norm_lif.reference
    y = setting.sequence()
    weight, bias = setting.affine()

    def ours(y: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"spikes": run(y, setting.normalization(y, weight, bias), setting.neuron)}

    def reference(y: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"spikes": norm_lif.reference(y, setting.reference_normalization(y, weight, bias), setting.neuron)}

    return Case(
        {"y": y, "weight": weight, "bias": bias},
        ours,
        reference,
        peer=lambda y, weight, bias: {"spikes": setting.spikingjelly(_torch_batch_norm(y, weight, bias))},
        # Statistics: read y. Read y; write spikes.
        forward_bytes=3 * y.nbytes,
        # Sums: read y and the gradient of the spikes. Read both; write the gradient of y.
        backward_bytes=5 * y.nbytes,
    )


def _residual_lif(setting: Setting, shortcut_norm: bool, spiking: bool) -> Case:
    run = residual_lif.residual_lif if setting.kernels else residual_lif.reference
    y, shortcut = setting.sequence(), setting.sequence()
    names = ("y", "weight", "bias", "shortcut", "shortcut weight", "shortcut bias")[: 6 if shortcut_norm else 4]
    inputs = (y, *setting.affine(), shortcut, *(setting.affine() if shortcut_norm else ()))

    def named(membrane: Tensor, spikes: Tensor | None) -> dict[str, Tensor]:
        return {"membrane stream": membrane} | ({} if spikes is None else {"spikes": spikes})

    def ours(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor) -> dict[str, Tensor]:
        norm = setting.normalization(y, weight, bias)
        norm_of_shortcut = setting.normalization(shortcut, *affine) if affine else None
        return named(*run(y, norm, shortcut, norm_of_shortcut, setting.neuron if spiking else None))

    def reference(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor) -> dict[str, Tensor]:
        norm = setting.reference_normalization(y, weight, bias)
        norm_of_shortcut = setting.reference_normalization(shortcut, *affine) if affine else None
        membrane, _ = residual_lif.reference(y, norm, shortcut, norm_of_shortcut, None)
        membrane = setting.rounded(membrane)
        return named(membrane, lif.reference(membrane, 0.0, setting.neuron)[0] if spiking else None)

    def peer(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor) -> dict[str, Tensor]:
        added = _torch_batch_norm(shortcut, *affine) if affine else shortcut
        membrane = _torch_batch_norm(y, weight, bias) + added
        return named(membrane, setting.spikingjelly(membrane) if spiking else None)

    # Forward: read y for its statistics, and a normalised shortcut for its own; read both, write the membrane stream
    # and the spikes.
    forward = 4 + shortcut_norm + spiking
    # Backward sums: read y, the gradient of the membrane stream, and a normalised shortcut; with spikes the membrane
    # stream and the gradient of the spikes too, which makes another total gradient to write.
    sums = 2 + shortcut_norm + 3 * spiking
    # Read the total gradient and y (and the shortcut); write the gradient of y (and of the shortcut).
    gradients = 3 + 2 * shortcut_norm
    return Case(
        dict(zip(names, inputs, strict=True)),
        ours,
        reference,
        peer,
        forward_bytes=forward * y.nbytes,
        backward_bytes=(sums + gradients) * y.nbytes,
    )


def _gate_lif(setting: Setting) -> Case:
    run = gate_lif.gate_lif if setting.kernels else gate_lif.reference
    x, spatial = setting.frame(), setting.frame()
    temporal = torch.randn(setting.shape[:2], device=setting.device).requires_grad_()

    def ours(x: Tensor, temporal: Tensor, spatial: Tensor) -> dict[str, Tensor]:
        membrane, spikes = run(x, temporal, spatial, setting.neuron)
        return {"membrane stream": membrane, "spikes": spikes}

    def gated(encode: Callable[[Tensor], Tensor], x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
        encoded = encode(x.expand(len(temporal), *x.shape))
        return torch.sigmoid(temporal[:, :, None, None, None] * spatial) * encoded

    def reference(x: Tensor, temporal: Tensor, spatial: Tensor) -> dict[str, Tensor]:
        def encode(sequence: Tensor) -> Tensor:
            return lif.reference(sequence, 0.0, setting.neuron)[0]

        membrane = setting.rounded(gated(encode, x, temporal, spatial))
        return {"membrane stream": membrane, "spikes": encode(membrane)}

    def peer(x: Tensor, temporal: Tensor, spatial: Tensor) -> dict[str, Tensor]:
        membrane = gated(setting.spikingjelly, x, temporal.to(x.dtype), spatial)
        return {"membrane stream": membrane, "spikes": setting.spikingjelly(membrane)}

    sequence = len(temporal) * x.nbytes
    return Case(
        {"x": x, "temporal": temporal, "spatial": spatial},
        ours,
        reference,
        peer,
        # Read a frame of x and of spatial; write the membrane stream and the spikes.
        forward_bytes=2 * x.nbytes + 2 * sequence,
        # Read both frames and the gradients of the membrane stream and the spikes; write the gradients of both frames.
        backward_bytes=4 * x.nbytes + 2 * sequence,
    )


def _lif_pool(setting: Setting) -> Case:
    run = lif_pool.lif_pool if setting.kernels else lif_pool.reference
    x = setting.sequence()
    return Case(
        {"x": x},
        ours=lambda x: {"firing rates": run(x, setting.neuron)},
        reference=lambda x: {"firing rates": lif_pool.reference(x, setting.neuron)},
        peer=lambda x: {"firing rates": setting.spikingjelly(x).mean((-2, -1))},
        # Read x.
        forward_bytes=x.nbytes,
        # Read x; write its gradient.
        backward_bytes=2 * x.nbytes,
    )


@dataclass(frozen=True)
class FusedOperation:
    """A fused operation.

    Args:
        name: Its name.
        summary: What it does, in a few words.
        layers: The modules of the network whose input has the shape of its activations.
        make_case: Makes its tensors and functions for one layer.
    """

    name: str
    summary: str
    layers: Callable[[MSResNet], Sequence[nn.Module]]
    make_case: Callable[[Setting], Case]


def _blocks(network: MSResNet) -> list[MSBlock]:
    return [block for stage in network.stages for block in stage]


def _norms(network: MSResNet) -> list[nn.Module]:
    return [module for module in network.stages.modules() if isinstance(module, BatchNorm2d)]


def _norms_before_next_block(network: MSResNet, shortcut_norm: bool) -> list[nn.Module]:
    inner = _blocks(network)[:-1]
    return [block.conv2.norm for block in inner if isinstance(block.shortcut, nn.Identity) != shortcut_norm]


OPERATIONS = {
    operation.name: operation
    for operation in (
        FusedOperation(
            "lif",
            "LIF neuron",
            lambda network: [
                network.coding.lif,
                *(neuron for block in _blocks(network) for neuron in (block.lif1, block.lif2)),
                network.lif,
            ],
            _lif,
        ),
        FusedOperation("batch_statistics", "mean and variance of each channel", _norms, _batch_statistics),
        FusedOperation(
            "norm_lif",
            "BatchNorm with its statistics, LIF neuron",
            lambda network: [block.lif2 for block in _blocks(network)],
            _norm_lif,
        ),
        FusedOperation(
            "residual_lif",
            "BatchNorm with its statistics, residual sum, the next block's LIF neuron",
            partial(_norms_before_next_block, shortcut_norm=False),
            partial(_residual_lif, shortcut_norm=False, spiking=True),
        ),
        FusedOperation(
            "residual_norm_lif",
            "the same with a shortcut that has a BatchNorm too",
            partial(_norms_before_next_block, shortcut_norm=True),
            partial(_residual_lif, shortcut_norm=True, spiking=True),
        ),
        FusedOperation(
            "residual",
            "BatchNorm with its statistics and residual sum of the last block",
            lambda network: [_blocks(network)[-1].conv2.norm],
            partial(_residual_lif, shortcut_norm=False, spiking=False),
        ),
        FusedOperation(
            "gate_lif",
            "LIF neuron of the coding, gate, LIF neuron of the first block",
            lambda network: [_blocks(network)[0].lif1],
            _gate_lif,
        ),
        FusedOperation("lif_pool", "last LIF neuron, average over pixels", lambda network: [network.lif], _lif_pool),
    )
}
