"""The folder that holds everything a run writes, and whether a run may use it."""

from pathlib import Path

import yaml

from gac.config import Config
from gac.errors import InputError
from gac.files import atomic_write

# Where and how fast a run computes, not what: free to change when it resumes.
FREE_WHEN_RESUMING = frozenset(
    {"device", "model.backend", "data.root", "data.download", "data.workers", "train.eval_batch_size"}
)


class RunFolder:
    """The files of a run: config.yaml, metrics.jsonl, last.pt, best.pt and TensorBoard's event files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"

    def checkpoint_to_resume(self, resume: str | None) -> Path | None:
        """Return the checkpoint that ``resume`` means: None, "auto" (last.pt if it is there) or a path.

        Raises InputError if a run is in the folder that would not be continued but overwritten.
        """
        if resume == "auto" and self.last.exists():
            return self.last
        if resume == "auto" and self._crashed_in_the_first_epoch():
            return None
        checkpoint = None if resume in (None, "auto") else Path(resume)
        continues_here = checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()
        if self.last.exists() and not continues_here:
            raise InputError(
                f"{self.path} holds a run already: continue it with --resume auto or choose another --output"
            )
        results = [path.name for path in (self.best, self.metrics) if path.exists() and path.stat().st_size > 0]
        if results and not continues_here:
            raise InputError(
                f"{self.path} holds the {' and '.join(results)} of a run that cannot be continued, as its last.pt is"
                " not there, and that would be overwritten: choose another --output or move them away"
            )
        return checkpoint

    def _crashed_in_the_first_epoch(self) -> bool:
        # An epoch writes its line, then best.pt, then last.pt. Starting afresh writes the same again.
        epochs = len(self.metrics.read_bytes().splitlines()) if self.metrics.exists() else 0
        return epochs == 1 or (epochs == 0 and not self.best.exists())

    def create(self, config: Config) -> None:
        """Make the folder and write config.yaml. Raises InputError if the folder cannot be made or written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.config) as file:
                file.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --output"
            ) from error


def check_same_run(stored: Config, now: Config, checkpoint: Path) -> None:
    """Raise InputError if a run with the configuration ``now`` is not the one that ``checkpoint`` holds."""
    before, after = stored.flat(), now.flat()
    differing = [
        f"{name} {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name not in FREE_WHEN_RESUMING
    ]
    if differing:
        raise InputError(
            f"cannot resume {checkpoint} with another configuration ({', '.join(differing)}): restore these values or"
            " start a new run with another --output"
        )
