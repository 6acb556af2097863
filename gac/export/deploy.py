"""Make a file that ONNX Runtime or OpenVINO runs fast on a CPU, in float32, bf16 or int8, and say what it scores.

The file is ONNX, whose metadata say for which engine and precision it was made. int8 is calibrated on training images.
"""

import argparse
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, get_args

from torch import Tensor

from gac.command_line import Parser, at_least, new_file
from gac.errors import InputError
from gac.export.engines import Engine, Precision, open_model
from gac.export.fidelity import write_and_tell
from gac.export.onnx import build_model, measure, set_metadata
from gac.export.quantisation import quantise
from gac.export.source import Source, open_source

if TYPE_CHECKING:
    from onnx import ModelProto


def made_for(
    engine: Engine, precision: Precision, model: "ModelProto", source: Source, calibration: int
) -> "ModelProto":
    """Return an ONNX model of a network, in the form mean, as an engine runs it in a precision.

    int8 takes its scales from ``calibration`` training images, or all if there are fewer; ``model`` stays as it is.

    Raises:
        InputError: For what the engine cannot do here, and if the training images cannot be opened.
    """
    entries = source.metadata() | {"form": "mean", "engine": engine, "precision": precision}
    # Whether the engine is there and takes it is known now, not after all images.
    open_model(engine, model.SerializeToString(), "f32" if precision == "int8" else precision)
    if precision == "int8":
        used = 0

        def counted(batches: Iterable[Tensor]) -> Iterator[Tensor]:
            nonlocal used
            for batch in batches:
                used += batch.shape[-4]
                yield batch

        model = quantise(model, counted(source.training_images(calibration)), engine)
        entries["calibration"] = f"{used} training images"
    else:
        model = copy.deepcopy(model)
    set_metadata(model, entries)
    return model


def add_options(parser: Parser) -> None:
    """Add the options of this subcommand."""
    parser.add("output", "the file to write", type=new_file(".onnx"))
    parser.add("--engine", "what runs the file", choices=get_args(Engine), default="openvino")
    parser.add("--precision", "what its convolutions compute in", choices=get_args(Precision), default="f32")
    parser.add("--calibration", "training images for int8, at most; None: 256", type=at_least(1), metavar="N")


def run(options: argparse.Namespace) -> None:
    """Write the file and how far it is from our network, accuracy before and after included."""
    if options.calibration is not None and options.precision != "int8":
        raise InputError(f"--calibration is for int8, and --precision is {options.precision}: leave one of them out")
    source = open_source(options.checkpoint, options.images, options.root)
    model = made_for(options.engine, options.precision, build_model(source), source, options.calibration or 256)
    asked = {"engine": options.engine, "precision": options.precision}
    fidelity = measure(source, model, **asked) if options.images else None
    write_and_tell(options.output, model.SerializeToString(), fidelity)
