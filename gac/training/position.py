"""Where a run is."""

import math
from dataclasses import dataclass


@dataclass
class Position:
    """Where a run is; together with the weights, the optimiser and the generators all that resuming needs."""

    epoch: int = 0
    """Complete epochs, evaluation included."""
    batch: int = 0
    """Batches done of the epoch in progress."""
    step: int = 0
    """Batches done in all."""
    seconds: float = 0.0
    """Seconds spent training in the epoch in progress."""
    skipped_images: int = 0
    """Images of the epoch in progress that could not be read."""
    mix_epoch: bool | None = None
    """With train.cutmix epoch: whether the batches of this epoch are mixed; None before it is decided."""
    best_top1: float = -math.inf
    """Highest test accuracy so far, in percent."""
