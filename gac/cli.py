"""The programs train.py and eval.py: what they run and their exit statuses.

Whatever is wrong with a command line or a configuration file becomes one line on stderr and exit status 2.
"""

import functools
import hashlib
import io
import json
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from gac.analysis.energy import IMAGES, Energy, format_energy
from gac.analysis.report import check_replaceable, energy_of, write_report, write_saliency
from gac.analysis.running import find_layer
from gac.checkpoint import build_network, read_checkpoint, read_config
from gac.checkpoint.weights_file import card_of, write_weights
from gac.command_line import discard_output
from gac.config import Config
from gac.errors import InputError
from gac.evaluation.report import Report, evaluate_checkpoint, format_report
from gac.execution.distributed import Ranks, is_lost_connection, process_group
from gac.execution.resources import explain
from gac.files import ResultsNotWritten, atomic_write, writing
from gac.options import parse_eval, parse_train
from gac.training.dry_run import dry_run, overfit_one_batch
from gac.training.engine import train
from gac.training.signals import Interrupted
from gac.training.totals import TrainingDiverged

logger = logging.getLogger("gac")


def _program(run: Callable[[Sequence[str], Ranks], int]) -> Callable[[Sequence[str] | None], int]:
    """Return ``run`` as a program: it takes sys.argv by default, and what goes wrong is one line and an exit status."""

    @functools.wraps(run)
    def main(arguments: Sequence[str] | None = None) -> int:
        who = ""
        for stream in (sys.stdout, sys.stderr):
            # What a terminal cannot show, such as a class's name in ASCII, must not cost a result. A stream that was
            # closed (>&-) is None, and a notebook's takes everything.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with process_group() as ranks:
                who = "" if ranks.is_main else f"rank {ranks.rank}: "
                logging.basicConfig(format=f"{who}%(message)s", stream=sys.stderr)
                # Only rank 0 logs what all ranks share.
                logging.getLogger("gac").setLevel(logging.INFO if ranks.is_main else logging.WARNING)
                return run(sys.argv[1:] if arguments is None else arguments, ranks)
        except InputError as error:
            print(f"{who}error: {error}", file=sys.stderr)
            return 2
        except (TrainingDiverged, ResultsNotWritten) as error:
            # Training diverges on all ranks at once, which one of them says.
            if not who or isinstance(error, ResultsNotWritten):
                print(f"{who}error: {error}", file=sys.stderr)
            return 1
        except Interrupted as interrupted:
            return interrupted.exit_status
        except (RuntimeError, OSError, EOFError) as error:
            if (limit := explain(error)) is not None:
                print(f"{who}error: {limit}", file=sys.stderr)
                return 1
            if not is_lost_connection(error):
                raise
            # Gloo's error cannot be told from one of this process's own, whose traceback must not be lost.
            traceback.print_exception(error.__cause__ or error)
            print(f"{who}error: another process has ended or hangs, or this one failed as shown above", file=sys.stderr)
            return 1

    return main


@_program
def train_main(arguments: Sequence[str], ranks: Ranks) -> int:
    """Run train.py's command line and return its exit status."""
    parsed = ranks.together(lambda: parse_train(arguments, ranks.size))
    if parsed.dry_run:
        _show(dry_run(parsed.config, parsed.output))
    elif parsed.overfit_one_batch:
        learnt, verdict = overfit_one_batch(parsed.config, parsed.output)
        _show(verdict)
        return 0 if learnt else 1
    else:
        folder = parsed.output / "report"
        if parsed.report:
            ranks.on_main(lambda: check_replaceable(folder))
        train(parsed.config, parsed.output, parsed.resume, ranks=ranks)
        if parsed.export_weights is not None:
            command = shlex.join(["train.py", *arguments])
            ranks.on_main(lambda: _export(parsed.output / "best.pt", parsed.export_weights, command))
        if parsed.report:
            # By one process, which sees all images.
            ranks.on_main(lambda: _report(parsed.config, parsed.output / "best.pt", folder), patient=True)
    return 0


def _export(checkpoint: Path, output: Path, command: str) -> None:
    """Write a run's best network as safetensors."""
    payload = read_checkpoint(checkpoint)
    card = card_of(payload) | {"command": command, "seed": read_config(payload).train.seed}
    _write(output, lambda file: write_weights(file, payload["model"], card))
    logger.info("its weights: %s", output)


def _report(config: Config, checkpoint: Path, folder: Path) -> None:
    """Write the report of a run's best network."""
    digest = hashlib.sha256()
    payload = read_checkpoint(checkpoint, digest)
    report = evaluate_checkpoint(checkpoint, payload, config, sample=IMAGES)
    _write_page(report, digest.hexdigest(), energy_of(report), folder, may_replace=True)


def _write_page(report: Report, sha256: str, energy: Energy, folder: Path, **options: Any) -> None:
    """Write a page about a network and say where it is."""
    write_report(report, sha256, energy, folder, **options)
    logger.info("a page about it: %s", folder / "index.html")


@_program
def eval_main(arguments: Sequence[str], ranks: Ranks) -> int:
    """Run eval.py's command line and return its exit status."""
    parsed = ranks.together(lambda: parse_eval(arguments, ranks.size))
    if parsed.layer is not None:
        # Its name is known to be right before hours of work rather than after them.
        options = {name: value for name, value in parsed.network.items() if name != "T"}
        find_layer(build_network(parsed.payload, **options), parsed.layer, nn.Module, "layer")
    looks = parsed.report is not None or parsed.saliency is not None
    report = evaluate_checkpoint(
        parsed.checkpoint,
        parsed.payload,
        parsed.config,
        parsed.network,
        ranks,
        amp=parsed.amp,
        unlabelled=parsed.predictions is not None or looks,
        sample=IMAGES if parsed.energy or looks else 0,
    )
    if not ranks.is_main:
        return 0
    text, values = format_report(report), report.to_dict()
    if parsed.energy or parsed.report is not None:
        sample, energy = report.sample, energy_of(report)
    if parsed.energy:
        text += f"\n\nenergy of an image over T={sample.network.T} steps, mean over {sample}\n{format_energy(energy)}"
        values["energy"] = {"data": str(sample)} | energy.to_dict()
    # Files are written before anything is printed, but one that cannot be written costs no other result.
    with ExitStack() as last_first:
        last_first.callback(_show, text)
        if parsed.json is not None:
            content = f"{json.dumps(values, indent=2)}\n".encode()
            last_first.callback(_write, parsed.json, lambda file: file.write(content))
        if parsed.predictions is not None:
            last_first.callback(_write, parsed.predictions, report.write_predictions)
        if parsed.saliency is not None:
            last_first.callback(_write, parsed.saliency, lambda file: write_saliency(report, file, parsed.layer))
        if parsed.report is not None:
            last_first.callback(_write_page, report, parsed.sha256, energy, parsed.report, layer=parsed.layer)
    return 0


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of results, whole or not at all. Raises ResultsNotWritten."""
    with writing(path), atomic_write(path) as file:
        write(file)


def _show(text: str) -> None:
    """Print a result; whoever was to read it may be gone, as in ``eval.py ... | head -1``. Raises ResultsNotWritten."""
    try:
        print(text, flush=True)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            raise ResultsNotWritten(f"cannot write to the standard output: {error.strerror}") from error
