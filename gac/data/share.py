"""How the ranks of a run share a batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of every batch that rank ``rank`` of ``ranks`` loads.

    The parts of all ranks, one after another, are the batch, cut as ``tensor_split`` does: the first ones may have one
    image more than the others, and the last ones are empty if a batch has fewer images than there are ranks.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, images: int) -> slice:
        """Return the part of a batch of ``images`` images."""
        each, more = divmod(images, self.ranks)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))


WHOLE = Share()
"""The share of a run's only process."""
