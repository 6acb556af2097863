"""Running a network to look inside it."""

from collections.abc import Iterable

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from gac.errors import InputError, did_you_mean, first_few
from gac.models.batch_first import BatchFirst


def run(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Call a network on each batch in evaluation mode, as fresh sequences, and return the number of images.

    The network returns to the mode it was in, and SpikingJelly's neurons are reset after the last batch.

    Args:
        network: Of any kind.
        batches: What it is called with: images [B, C, H, W] or sequences [T, B, C, H, W] (``gac.BatchFirst``:
            [B, T, C, H, W]).

    Raises:
        InputError: If there are no images, for other shapes, and for a compiled network.
    """
    if any(map(_is_compiled, network.modules())):
        raise InputError(
            f"{type(network).__name__} is compiled, so that its layers cannot be watched: pass the network that it was"
            " made from"
        )
    images = 0
    was_training = network.training
    network.eval()
    try:
        # Not in inference mode: SpikingJelly's counters would miss linear layers and convolutions without a word.
        with torch.inference_mode(False), torch.no_grad():
            for batch in batches:
                if batch.dim() not in (4, 5):
                    expected = "images [B, C, H, W] or sequences [T, B, C, H, W]"
                    raise InputError(f"expected {expected}, got {list(batch.shape)}")
                functional.reset_net(network)
                network(batch)
                images += batch.shape[0 if isinstance(network, BatchFirst) else -4]
    finally:
        functional.reset_net(network)
        network.train(was_training)
    if images == 0:
        raise InputError("there are no images to run the network on")
    return images


def find_layer(network: nn.Module, name: str, kind: type[nn.Module], what: str) -> nn.Module:
    """Return the layer of a network, of this kind, that is called ``name``; ``what`` says the kind in words.

    Raises:
        InputError: If there is none; the message has the closest name.
    """
    layers = {each: module for each, module in network.named_modules() if each and isinstance(module, kind)}
    if name not in layers:
        suggestion = did_you_mean(name, {each: each for each in layers})
        there = f"there are {first_few(list(layers))}" if layers else f"the network has no {what}"
        raise InputError(f"there is no {what} {name!r}{suggestion}: {there}")
    return layers[name]


def _is_compiled(module: nn.Module) -> bool:
    # torch.compile's wrapper is told by its one module: importing its class takes a second.
    wrapper = "_orig_mod" in module._modules
    return wrapper or isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None
