"""Checkpoints: ours are written atomically, the authors' are read as they are, neither can run code."""

from gac.checkpoint.build import build_network, load_checkpoint
from gac.checkpoint.format import FORMAT, DamagedCheckpoint, is_ours, read_checkpoint, write_checkpoint

__all__ = [
    "FORMAT",
    "DamagedCheckpoint",
    "build_network",
    "is_ours",
    "load_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
]
