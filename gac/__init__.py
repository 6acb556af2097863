"""Gated Attention Coding and MS-ResNet spiking neural networks on SpikingJelly."""

from gac.checkpoint import load_checkpoint
from gac.coding.gated import GatedAttentionCoding
from gac.models import create_model, list_models
from gac.models.batch_first import BatchFirst
from gac.neuron import LIFNode
from gac.version import __version__

__all__ = [
    "BatchFirst",
    "GatedAttentionCoding",
    "LIFNode",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
]
