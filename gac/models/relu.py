"""ReLU twins: the same networks as artificial neural networks, as teachers of the spiking ones."""

from typing import Literal

from torch import nn

from gac.coding.gated import GatedAttentionCoding
from gac.errors import InputError
from gac.neuron import LIFNode

Activation = Literal["lif", "relu"]


def replace_neurons_by_relu(network: nn.Module) -> None:
    """Put a ReLU in place of every LIF layer; names and shapes of the parameters stay the same.

    An MS-ResNet becomes a ResNet with activations before its convolutions (He et al., 2016, pre-activation), in which
    nothing changes with time: T = 1 is enough for images.

    Raises:
        InputError: For gated attention coding, which weights spikes.
    """
    if any(isinstance(module, GatedAttentionCoding) for module in network.modules()):
        raise InputError("activation is 'relu', and gac coding weights spikes: use a network with direct coding")
    for name, module in list(network.named_modules()):
        if isinstance(module, LIFNode):
            network.set_submodule(name, nn.ReLU())
