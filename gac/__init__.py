"""Gated Attention Coding and MS-ResNet spiking neural networks on SpikingJelly."""

from gac.checkpoint import create_model, list_pretrained, load_checkpoint, load_pretrained
from gac.coding.gated import GatedAttentionCoding
from gac.models import list_models
from gac.models.batch_first import BatchFirst
from gac.models.input_neuron import replace_input_neuron
from gac.neuron import LIFNode
from gac.version import __version__

__all__ = [
    "BatchFirst",
    "GatedAttentionCoding",
    "LIFNode",
    "__version__",
    "create_model",
    "list_models",
    "list_pretrained",
    "load_checkpoint",
    "load_pretrained",
    "replace_input_neuron",
]
