"""Gated attention coding in a network that is not this package's, in the place of its first neuron."""

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from gac.coding.gated import GatedAttentionCoding
from gac.errors import InputError


def replace_input_neuron(network: nn.Module, x: Tensor, **options: object) -> GatedAttentionCoding:
    """Put gated attention coding in the place of the neuron that ``x`` reaches first, and return the coding.

    That neuron stays its spiking layer. T and the channels are those of what it gets, [T, B, C, H, W]. What follows
    it gets gated spikes, real values in [0, 1), where it got spikes; docs/plug_and_play.md has what that costs.

    Args:
        network: Any whose neurons are SpikingJelly's, in step mode "m". It runs once, in evaluation mode, is reset
            before and after that, and returns to the mode that it was in.
        x: What it is called with; the batch may be of one image.
        **options: kernel_size, reduction, temporal_init and gate of
            :class:`~gac.coding.gated.GatedAttentionCoding`.

    Raises:
        InputError: If no neuron runs, or the network returns anything but a tensor; if the first gets no sequence of
            maps, runs more than once in a call or has a gate already; if something goes around it to the scores, as a
            membrane shortcut does.
    """
    names = {module: name for name, module in network.named_modules() if isinstance(module, neuron.BaseNode)}
    calls: list[tuple[nn.Module, Tensor]] = []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> Tensor:
        calls.append((module, inputs[0]))
        return spikes.detach() if len(calls) == 1 else spikes

    x = x.detach().clone().requires_grad_()
    modes = {module: module.training for module in network.modules()}
    hooks = [module.register_forward_hook(cut) for module in names]
    functional.reset_net(network)
    network.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            scores = network(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        functional.reset_net(network)
    if not calls:
        raise InputError(f"{type(network).__name__} runs none of SpikingJelly's neurons, so that none can be replaced")
    if not isinstance(scores, Tensor):
        raise InputError(f"{type(network).__name__} returns a {type(scores).__name__}, expected one tensor of scores")
    first, features = calls[0]
    name = names[first]
    parent, _, child = name.rpartition(".")
    if features.dim() != 5 or first.step_mode != "m":
        raise InputError(
            f"{name}, the first neuron, gets {list(features.shape)} in step mode {first.step_mode!r}, expected a"
            ' sequence [T, B, C, H, W] in step mode "m": use functional.set_step_mode(network, "m") and give a sequence'
        )
    if isinstance(network.get_submodule(parent), GatedAttentionCoding):
        raise InputError(f"{name}, the first neuron, is that of gated attention coding already")
    if sum(module is first for module, _ in calls) > 1:
        raise InputError(f"{name}, the first neuron, runs more than once in a call, so that it is not only the first")
    # Of a frozen network nothing asks for a gradient but what goes around.
    if scores.requires_grad and torch.autograd.grad(scores.sum(), x, allow_unused=True)[0] is not None:
        raise InputError(
            f"something goes around {name}, the first neuron, to the scores: put GatedAttentionCoding between the stem"
            " and the first block instead"
        )
    coding = GatedAttentionCoding(len(features), features.shape[2], neuron=first, **options)
    # Only the gate is new.
    coding.gate.to(device=features.device, dtype=features.dtype)
    setattr(network.get_submodule(parent), child, coding)
    return coding
