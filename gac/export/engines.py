"""What runs an ONNX model on a CPU: ONNX Runtime, or OpenVINO in a precision of its own."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from gac.errors import InputError
from gac.export.packages import require

Engine = Literal["onnxruntime", "openvino"]
Precision = Literal["f32", "bf16", "int8"]
Run = Callable[..., Sequence[np.ndarray]]
"""Takes the model's inputs in their order and returns its outputs."""


def open_model(engine: Engine, model: bytes, precision: Precision = "f32") -> tuple[str, Run]:
    """Return what runs an ONNX model, in words, and a function that does, in as many threads as PyTorch has.

    An int8 model is one that :mod:`gac.export.quantisation` made; what it leaves in floating point is float32.

    Raises:
        InputError: If the engine is not installed, does not compute in this precision here or does not take the model.
    """
    return (_onnxruntime if engine == "onnxruntime" else _openvino)(model, precision)


def _onnxruntime(model: bytes, precision: Precision) -> tuple[str, Run]:
    if precision == "bf16":
        raise InputError("ONNX Runtime has no bf16 on a CPU: use --precision f32 or int8, or --engine openvino")
    (onnxruntime,) = require("onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Warnings about the models of its own quantiser, which name nothing that a user could do.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return (
        f"ONNX Runtime {onnxruntime.__version__}, {precision}",
        lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True))),
    )


# OpenVINO's models put a signal stack of their own in place and free its memory when they go in another order than they
# came: the next signal, of a child process that ends or of Ctrl-C, would be a segmentation fault (2026.4.1).
_KEPT: list[object] = []


def _openvino(model: bytes, precision: Precision) -> tuple[str, Run]:
    (openvino,) = require("deploy", "openvino")
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError("this CPU does not compute in bf16: use --precision f32 or int8")
    # Left to itself it takes bf16 where the CPU has it, without a word.
    hint = "bf16" if precision == "bf16" else "f32"
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        compiled = core.compile_model(core.read_model(model), "CPU", options)
    except RuntimeError as error:
        raise InputError(
            f"OpenVINO does not take this network: {' '.join(str(error).split())}; use --engine onnxruntime"
        ) from error
    _KEPT.append(compiled)
    request = compiled.create_infer_request()

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        found = request.infer(list(inputs))
        return [found[output] for output in compiled.outputs]

    return f"OpenVINO {openvino.__version__.partition('-')[0]}, {precision}", run
