"""The programs train.py and eval.py: what they run and their exit statuses.

Whatever is wrong with a command line or a configuration file becomes one line on stderr and exit status 2.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint, format_report
from gac.execution.distributed import Ranks, is_lost_connection, process_group
from gac.files import ResultsNotWritten, atomic_write, writing
from gac.options import TrainArguments, parse_eval, parse_train
from gac.training.dry_run import dry_run, overfit_one_batch
from gac.training.engine import train
from gac.training.signals import Interrupted
from gac.training.totals import TrainingDiverged


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run train.py's command line and return its exit status."""

    def run(arguments: Sequence[str], ranks: Ranks) -> int:
        parsed = ranks.together(lambda: _for_ranks(parse_train(arguments), ranks))
        if parsed.dry_run:
            print(dry_run(parsed.config, parsed.output))
        elif parsed.overfit_one_batch:
            learnt, verdict = overfit_one_batch(parsed.config, parsed.output)
            print(verdict)
            return 0 if learnt else 1
        else:
            train(parsed.config, parsed.output, parsed.resume, ranks=ranks)
        return 0

    return _run(run, arguments)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """Run eval.py's command line and return its exit status."""

    def run(arguments: Sequence[str], ranks: Ranks) -> int:
        parsed = ranks.together(lambda: parse_eval(arguments))
        report = evaluate_checkpoint(parsed.checkpoint, parsed.payload, parsed.config, parsed.T, ranks)
        if not ranks.is_main:
            return 0
        print(format_report(report))
        if parsed.json is not None:
            with writing(parsed.json), atomic_write(parsed.json) as file:
                file.write(f"{json.dumps(asdict(report), indent=2)}\n".encode())
        return 0

    return _run(run, arguments)


def _for_ranks(parsed: TrainArguments, ranks: Ranks) -> TrainArguments:
    if ranks.size > 1 and (parsed.dry_run or parsed.overfit_one_batch):
        raise InputError("--dry-run and --overfit-one-batch are for a single process: start train.py without torchrun")
    return parsed


def _run(command: Callable[[Sequence[str], Ranks], int], arguments: Sequence[str] | None) -> int:
    who = ""
    try:
        with process_group() as ranks:
            who = "" if ranks.is_main else f"rank {ranks.rank}: "
            logging.basicConfig(format=f"{who}%(message)s", stream=sys.stderr)
            # Only rank 0 logs what all ranks share.
            logging.getLogger("gac").setLevel(logging.INFO if ranks.is_main else logging.WARNING)
            return command(sys.argv[1:] if arguments is None else arguments, ranks)
    except InputError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, ResultsNotWritten) as error:
        # Training diverges on all ranks at once, which one of them says.
        if not who or isinstance(error, ResultsNotWritten):
            print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "lower train.batch_size or train.eval_batch_size, or raise train.accumulate_steps"
        print(f"{who}error: {reason}; {advice}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_status
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"{who}error: another process of the run has ended or hangs ({reason})", file=sys.stderr)
        return 1
