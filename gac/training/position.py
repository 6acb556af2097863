"""How far a run has come: what a checkpoint holds of it beside the weights."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gac.execution.distributed import Ranks


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0
    """Completed epochs, evaluation included."""
    batch: int = 0
    """Batches done in the epoch in progress."""
    step: int = 0
    """Batches done in the whole run."""
    seconds: float = 0.0
    """Seconds spent training in the epoch in progress."""
    skipped_images: int = 0
    """Images of the epoch in progress that could not be read."""
    mix_epoch: bool | None = None
    """With train.cutmix epoch: whether the batches of this epoch are mixed; None before that is drawn."""
    best_top1: float = -math.inf
    """Highest test accuracy so far, in percent."""

    def next_epoch(self, top1: float) -> "Position":
        """Return the beginning of the next epoch, this one's test accuracy being ``top1``."""
        return Position(epoch=self.epoch + 1, step=self.step, best_top1=max(top1, self.best_top1))

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return what a checkpoint holds: the same on all ranks, with the sum of what each has counted."""
        (skipped,) = ranks.sum(self.skipped_images)
        return asdict(replace(self, skipped_images=skipped))

    @classmethod
    def from_state(cls, state: Mapping[str, Any], ranks: Ranks) -> "Position":
        """Return the position of this rank that :meth:`state_dict` gave; rank 0 goes on with the sums of all ranks."""
        position = cls(**state)
        return position if ranks.is_main else replace(position, skipped_images=0)
