"""int8 for the convolutions that see spikes, which are exact in 8 bits; membrane potentials stay float32.

ONNX Runtime's quantiser, from the ranges of calibration images, with scales for each output channel. The stem, the
gate's attention and the shortcuts see real values and stay float32: they are a small part of the work, and rounding
them to 8 bits cost most of the accuracy that was lost (docs/export.md).
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gac.errors import InputError
from gac.export.engines import Engine
from gac.export.packages import require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What lies between a neuron's comparison and the convolution that its spikes enter: the same numbers in other shapes.
_RESHAPING = ("Cast", "Concat", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "MaxPool")


def quantise(model: "ModelProto", batches: Iterable[Tensor], engine: Engine) -> "ModelProto":
    """Return an ONNX model whose convolutions over spikes are int8 where ``engine`` runs it.

    Args:
        model: Of :func:`gac.export.onnx.build_model`, in the form mean or sequence.
        batches: Calibration images, as the network takes them.
        engine: ONNX Runtime computes a convolution in int8 only if its output has 8 bits as well; for OpenVINO outputs
            stay float32.

    Raises:
        InputError: If no convolution sees spikes, or a package is missing.
    """
    onnx, quantization = require("onnx", "onnx", "onnxruntime.quantization")
    made_by = {output: node for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    real = [node.name for node in convolutions if not _sees_spikes(node.input[0], made_by)]
    if len(real) == len(convolutions):
        raise InputError("no convolution of the network sees spikes, so that nothing is there to be quantised")
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, written = (Path(folder, name) for name in ("given.onnx", "prepared.onnx", "int8.onnx"))
        onnx.save(model, given)
        # Shapes only: what its optimiser rewrites no longer says which layer it is of.
        quantization.shape_inference.quant_pre_process(
            given, prepared, skip_optimization=True, skip_symbolic_shape=True
        )
        quantization.quantize_static(
            prepared,
            written,
            _reader(quantization, model.graph.input[0].name, batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=real,
            per_channel=True,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"] if engine == "openvino" else []},
        )
        return onnx.load(written)


def _sees_spikes(tensor: str, made_by: dict[str, "NodeProto"]) -> bool:
    node = made_by.get(tensor)
    if node is None or node.op_type == "Greater":
        return node is not None
    if node.op_type not in _RESHAPING:
        return False
    inputs = node.input if node.op_type == "Concat" else node.input[:1]
    return all(_sees_spikes(each, made_by) for each in inputs)


def _reader(quantization: object, name: str, batches: Iterable[Tensor]) -> object:
    """Return the calibration images as ONNX Runtime's quantiser takes them."""
    remaining = iter(batches)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            batch = next(remaining, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()
