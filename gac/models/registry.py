"""The networks by name."""

from collections.abc import Sequence
from typing import Literal, get_args

from gac.coding import Coding
from gac.coding.gated import GatedAttentionCoding, TemporalAttention
from gac.errors import InputError
from gac.models.ms_resnet import CIFAR, IMAGENET, IMAGENET_104, MAX_CIFAR, Family, MSResNet
from gac.models.relu import Activation, replace_neurons_by_relu
from gac.neuron import Surrogate, make_parameters
from gac.ops.neuron import SURROGATES, LIFParameters

_NETWORKS: dict[str, tuple[Family, tuple[int, ...]]] = {
    "msresnet18_cifar": (CIFAR, (3, 3, 2)),
    "msresnet18": (IMAGENET, (2, 2, 2, 2)),
    "msresnet34": (IMAGENET, (3, 4, 6, 3)),
    # Not in GAC's paper:
    "msresnet104": (IMAGENET_104, (3, 8, 32, 8)),
    "maxresnet18_cifar": (MAX_CIFAR, (3, 3, 2)),
}
_GAC_PREFIX = "gac_"


def list_models() -> list[str]:
    """Return the names that :func:`create_model` takes."""
    return [prefix + name for prefix in (_GAC_PREFIX, "") for name in _NETWORKS]


def resolve_coding(name: str, coding: Coding | None) -> Coding:
    """Return ``coding`` or, if it is None, the coding that the network's name implies; raise InputError if unknown."""
    if coding is None:
        return "gac" if name.startswith(_GAC_PREFIX) else "direct"
    if coding not in get_args(Coding):
        raise InputError(f"coding must be one of {', '.join(get_args(Coding))}, got {coding!r}")
    return coding


def create_model(
    name: str,
    num_classes: int,
    T: int = 6,
    *,
    coding: Coding | None = None,
    depth: Sequence[int] | None = None,
    neuron: Literal["cifar", "imagenet"] | LIFParameters | None = None,
    tau: float | None = None,
    v_threshold: float | None = None,
    surrogate: Surrogate | None = None,
    detach_reset: bool | None = None,
    activation: Activation = "lif",
    **options: object,
) -> MSResNet:
    """Return a new network with freshly initialised weights.

    Args:
        name: One of :func:`list_models`.
        num_classes: Number of classes K.
        T: Number of time steps.
        coding: gac, direct, rate, latency or phase; by default gac for names that begin with gac_, else direct.
        depth: Blocks in each stage; by default the published network's.
        neuron: LIF preset cifar or imagenet, or all constants; by default those that the authors use with this network.
        tau: Of the neurons, in place of the preset's: membrane time constant in time steps as SpikingJelly's, > 1. The
            potential keeps 1 - 1/tau of itself in each step. Only Max-ResNet's own neurons divide the input by it too.
        v_threshold: The same for the threshold of the membrane potential, > 0.
        surrogate: The same for the surrogate gradient: one of ``gac.neuron.SURROGATES``, with SpikingJelly's default
            alpha.
        detach_reset: The same for whether the reset is constant in the backward pass.
        activation: "lif", or "relu" for the artificial network with ReLUs in place of the neurons, a ReLU twin.
        **options: in_channels, width, kernel_size, reduction, temporal_init, gate and backend of
            :class:`~gac.models.ms_resnet.MSResNet`.

    Raises:
        InputError: For an unknown name or coding, for sizes that make no network and constants that make no neuron, or
            of neurons where there are none.
    """
    family, published_depth = _lookup(name)
    if activation not in get_args(Activation):
        raise InputError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    constants = {"tau": tau, "v_threshold": v_threshold, "surrogate": surrogate, "detach_reset": detach_reset}
    given = [key for key, value in {"neuron": neuron, **constants}.items() if value is not None]
    if activation == "relu" and given:
        raise InputError(f"activation is 'relu', which has no neurons: leave out {', '.join(given)}")
    network = MSResNet(
        family,
        num_classes,
        T,
        coding=resolve_coding(name, coding),
        depth=published_depth if depth is None else depth,
        neuron=make_parameters(family.neuron if neuron is None else neuron, **constants),
        **options,
    )
    if activation == "relu":
        replace_neurons_by_relu(network)
    return network


def family_of(name: str) -> Family:
    """Return how a network's CIFAR or ImageNet code differs. Raises InputError for an unknown name."""
    return _lookup(name)[0]


def neuron_constants(name: str, neuron: str | None = None) -> dict[str, float | bool | str]:
    """Return what :func:`create_model` takes for tau, v_threshold, surrogate and detach_reset if they are not given.

    Raises InputError for an unknown network or preset.
    """
    family = family_of(name)
    parameters = make_parameters(family.neuron if neuron is None else neuron)
    return {
        "tau": parameters.tau,
        "v_threshold": parameters.v_threshold,
        "surrogate": next(name for name, kind in SURROGATES.items() if type(parameters.surrogate) is kind),
        "detach_reset": parameters.detach_reset,
    }


def describe(net: MSResNet) -> list[str]:
    """Return what a user should know about a network before training it, one line per fact."""
    parameters = sum(p.numel() for p in net.parameters())
    lines = [f"{parameters / 1e6:.3f} M parameters, T={net.T}, {net.coding_name} coding"]
    temporal = net.coding.gate.temporal if isinstance(net.coding, GatedAttentionCoding) else None
    if isinstance(temporal, TemporalAttention):
        dead, units = temporal.dead_units(), temporal.squeeze.out_features
        line = f"temporal attention: {dead} of {units} hidden units dead for static images (maximum path)"
        if dead == units:
            line += (
                ": the gate stays near 1/2 with almost no gradient;"
                " another train.seed or model.temporal_init=alive avoids it"
            )
        lines.append(line)
    return lines


def _lookup(name: str) -> tuple[Family, tuple[int, ...]]:
    try:
        return _NETWORKS[name.removeprefix(_GAC_PREFIX)]
    except KeyError:
        raise InputError(f"unknown network {name!r}, expected one of: {', '.join(list_models())}") from None
