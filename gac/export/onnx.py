"""Export a network as ONNX, for any number of images, and compare what ONNX Runtime makes of it with our network.

The file's metadata hold what its user has to know: classes, mean, std, image size, T and the checkpoint's sha256.
"""

import argparse
import ast
import json
import warnings
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gac.command_line import Parser, new_file
from gac.export.engines import Engine, Precision, Run, open_model
from gac.export.fidelity import Fidelity, Outputs, compare, write_and_tell
from gac.export.forms import Form, PlainNeuron, Step, add_form, prepared, refuse_encoders
from gac.export.packages import require
from gac.export.source import Source, open_source

if TYPE_CHECKING:
    from onnx import ModelProto

_LAYER = "gac.spiking_layer"


def build_model(source: Source, form: Form = "mean") -> "ModelProto":
    """Return a checkpoint's network as an ONNX model whose number of images is dynamic.

    Form mean takes ``images`` [B, C, H, W] (``frames`` [T, B, C, H, W] for event sets) and returns ``logits`` [B, K],
    sequence returns [T, B, K]. Form step also takes ``v.LAYER``, the membrane potential of each spiking layer, and
    returns ``next_v.LAYER``; a sequence begins at zeros.

    Raises:
        InputError: For a form that the coding does not have, for rate, latency and phase coding, and if a package is
            missing.
    """
    onnx, *_ = require("onnx", "onnx", "onnxscript", "onnxruntime")
    network = source.network
    refuse_encoders(
        network, "is not exported as ONNX, which has neither its random numbers nor its check of intensities in [0, 1]"
    )
    module, arguments, shapes = prepared(network, form, source.example())
    inputs, outputs = ["images" if arguments[0].dim() == 4 else "frames"], ["logits"]
    if isinstance(module, Step):
        inputs += [f"v.{layer}" for layer in module.layers]
        outputs += [f"next_v.{layer}" for layer in module.layers]
    # What it prints is about opsets and packages of the exporter's own.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
        ).model_proto
    _name_layers(model)
    set_metadata(model, source.metadata() | {"form": form})
    onnx.checker.check_model(model)
    return model


def set_metadata(model: "ModelProto", entries: dict[str, Any]) -> None:
    """Put plain values into a model's metadata, as JSON, in place of those of the same names."""
    del model.metadata_props[:]
    for key, value in (entries | {"torch": torch.__version__}).items():
        model.metadata_props.add(key=key, value=json.dumps(value))


def measure(
    source: Source,
    model: "ModelProto",
    form: Form = "mean",
    *,
    engine: Engine = "onnxruntime",
    precision: Precision = "f32",
) -> Fidelity:
    """Run an ONNX model of :func:`build_model` beside our network on the source's test images.

    The logits are those of the model as it is; the spikes those of the same model that also returns them.
    """
    program, run = open_model(engine, model.SerializeToString(), precision)
    shown, layers = _showing_spikes(model)
    _, run_shown = open_model(engine, shown.SerializeToString(), precision)
    call = partial(_in_steps, model) if form == "step" else _at_once

    def exported(x: Tensor) -> Outputs:
        spikes = defaultdict(list)
        for fired in call(run_shown, x, source.network.T)[1]:
            for layer, each in zip(layers, fired, strict=True):
                spikes[layer].append(each)
        logits, _ = call(run, x, source.network.T)
        return logits, {layer: torch.from_numpy(np.stack(each)) for layer, each in spikes.items()}

    return compare(source.network, exported, source.test_images(), program=program, data=source.tried_on)


def add_options(parser: Parser) -> None:
    """Add the options of this subcommand."""
    parser.add("output", "the file to write", type=new_file(".onnx"))
    add_form(parser)


def run(options: argparse.Namespace) -> None:
    """Write the file and how far it is from our network."""
    source = open_source(options.checkpoint, options.images, options.root)
    model = build_model(source, options.form)
    fidelity = measure(source, model, options.form) if options.images else None
    write_and_tell(options.output, model.SerializeToString(), fidelity)


def _name_layers(model: "ModelProto") -> None:
    """Keep of what the exporter says about each node only which spiking layer's comparison it is.

    The rest holds stack traces with the folders of this machine.
    """
    for node in model.graph.node:
        said = {each.key: each.value for each in node.metadata_props}
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type == "Greater":
            *_, kind, _ = ast.literal_eval(said["pkg.torch.onnx.class_hierarchy"])
            *_, module, _ = ast.literal_eval(said["pkg.torch.onnx.name_scopes"])
            if kind == f"{PlainNeuron.__module__}.{PlainNeuron.__qualname__}":
                node.metadata_props.add(key=_LAYER, value=module.removeprefix("network."))
    del model.graph.metadata_props[:]
    for each in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        if hasattr(each, "metadata_props"):
            del each.metadata_props[:]


def _showing_spikes(model: "ModelProto") -> tuple["ModelProto", list[str]]:
    """Return the model with further outputs, the spikes of each layer and time step, and the layers of these."""
    (onnx,) = require("onnx", "onnx")
    shown = type(model)()
    shown.CopyFrom(model)
    layers = []
    for node in shown.graph.node:
        for said in node.metadata_props:
            if said.key == _LAYER:
                shown.graph.output.append(
                    onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.BOOL, None)
                )
                layers.append(said.value)
    return shown, layers


def _at_once(run: Run, x: Tensor, T: int) -> tuple[Tensor, list[list[np.ndarray]]]:
    """Return the logits, and the further outputs of each call."""
    logits, *fired = run(x.numpy())
    return torch.from_numpy(logits), [fired]


def _in_steps(model: "ModelProto", run: Run, x: Tensor, T: int) -> tuple[Tensor, list[list[np.ndarray]]]:
    """Return the same of the step form, called once for each time step."""
    frames = x if x.dim() == 5 else x.expand(T, *x.shape)
    shapes = [[each.dim_value for each in v.type.tensor_type.shape.dim[1:]] for v in model.graph.input[1:]]
    state = [np.zeros((frames.shape[1], *shape), np.float32) for shape in shapes]
    logits, calls = [], []
    for frame in frames:
        of_step, *others = run(frame.numpy(), *state)
        state, fired = others[: len(state)], others[len(state) :]
        logits.append(torch.from_numpy(of_step))
        calls.append(fired)
    return torch.stack(logits), calls
