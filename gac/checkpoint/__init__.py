"""Checkpoints: ``read_checkpoint`` reads a file, ``build_network`` makes its network, ``load_checkpoint`` does both.

Ours are written atomically, the authors' are read as they are; neither can run code. ``load_pretrained`` and
``create_model`` know released weights by name.
"""

from gac.checkpoint.build import FixedT, build_network, initialise, load_checkpoint, load_weights, read_config
from gac.checkpoint.format import FORMAT, DamagedCheckpoint, is_ours, is_plain, read_checkpoint, write_checkpoint
from gac.checkpoint.weights import create_model, find_released, list_pretrained, load_pretrained

__all__ = [
    "FORMAT",
    "DamagedCheckpoint",
    "FixedT",
    "build_network",
    "create_model",
    "find_released",
    "initialise",
    "is_ours",
    "is_plain",
    "list_pretrained",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "read_checkpoint",
    "read_config",
    "write_checkpoint",
]
