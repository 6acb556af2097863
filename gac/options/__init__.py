"""Command line and YAML -> Config: ``parse_train`` for train.py, ``parse_eval`` for eval.py."""

from gac.options.evaluation import EvalArguments, parse_eval
from gac.options.train import TrainArguments, parse_train

__all__ = ["EvalArguments", "TrainArguments", "parse_eval", "parse_train"]
