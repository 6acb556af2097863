"""A network of all fused operations, and what it gives."""

import torch
from torch import Tensor

from gac.ops import batch_norm, gate_lif, norm_lif, residual_lif, residual_lif_pool
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR


def leaves_of_network(device: str, T: int = 6, B: int = 2, C: int = 8, dtype: torch.dtype = torch.float32) -> list:
    """Return features, temporal and spatial attention, and weight and bias of three BatchNorms."""
    frame = (B, C, 4, 3)
    x, spatial = (
        fused.laid_out(fused.normal(frame, seed, 1.0, 2.0).to(device, dtype), "channels_last") for seed in (0, 1)
    )
    parameters = [parameter for seed in range(3) for parameter in fused.parameters_of_norm(C, device, seed)]
    return [x, fused.normal((T, B), 2, 1.0).to(device), spatial, *parameters]


def network(
    x: Tensor,
    temporal: Tensor,
    spatial: Tensor,
    *parameters: Tensor,
    neuron: LIFParameters = CIFAR,
    synchronized: bool = False,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return firing rates and membrane stream after the gate and two residual blocks; scaling stands for convolution.

    The second block has a normalised shortcut, and a sum without a neuron is behind it. The rates are the average of
    those behind a last block with a plain shortcut and of one with a normalised shortcut.
    """

    def normalize(y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
        with torch.no_grad():
            if synchronized:
                moments = batch_norm.over_all_ranks(batch_norm.batch_moments(y), y.numel() // y.shape[2])
                mean, inverse_std = batch_norm.reference_statistics(moments, fused.EPS, 0.1, *running)
            else:
                mean, inverse_std = batch_norm.batch_statistics(y, fused.EPS, 0.1, *running)
        return BatchNormTransform(weight, bias, mean, inverse_std, True, synchronized)

    first, second, third = zip(parameters[::2], parameters[1::2], strict=True)
    membrane, spikes = gate_lif.gate_lif(x, temporal, spatial, neuron)
    y = 2 * spikes - membrane
    inner = norm_lif.norm_lif(y, normalize(y, *first), neuron)
    y = inner + 0.5 * spikes
    membrane, spikes = residual_lif.residual_lif(y, normalize(y, *second), membrane, None, neuron)
    y, shortcut = inner - 0.5 * spikes, 0.5 * membrane
    membrane, spikes = residual_lif.residual_lif(
        y, normalize(y, *second), shortcut, normalize(shortcut, *third), neuron
    )
    y = membrane + spikes
    membrane, _ = residual_lif.residual_lif(y, normalize(y, *third), membrane, None, None)
    y, shortcut = spikes - membrane, 0.5 * membrane
    of_shortcut = None, normalize(shortcut, *third)
    plain, normalized = (
        residual_lif_pool.residual_lif_pool(y, normalize(y, *first), shortcut, each, neuron) for each in of_shortcut
    )
    return 0.5 * (plain + normalized), membrane


def gradients_of_network(x: Tensor, temporal: Tensor, *_: Tensor) -> list[Tensor]:
    """Return incoming gradients of both outputs."""
    rates = len(temporal), *x.shape[:2]
    return [fused.normal(shape, 7).to(x) for shape in (rates, (*rates, *x.shape[2:]))]


def run_network(
    leaves: list,
    function=network,
    images: slice = slice(None),
    gradients: list[Tensor] | None = None,
    **options: object,
) -> list[Tensor]:
    """Return outputs for some images of the batch, and the gradients of all leaves."""
    (x, temporal, spatial), parameters = leaves[:3], leaves[3:]
    gradients = [each[:, images] for each in gradients or gradients_of_network(*leaves)]
    chosen = [x[images], temporal[:, images], spatial[images], *parameters]
    outputs, found = fused.run(lambda *leaves: function(*leaves, **options), chosen, gradients)
    return [*outputs, *found]
