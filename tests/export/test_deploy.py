"""Files for engines on a CPU: int8 where spikes are exact, accuracy as before, and refusals in one line."""

import sys
from dataclasses import replace

import numpy as np
import onnx
import openvino
import pytest
import torch

from gac.config import Config, ModelConfig
from gac.data import DataInfo
from gac.errors import InputError
from gac.export.deploy import made_for
from gac.export.engines import open_model
from gac.export.onnx import build_model, measure
from gac.export.quantisation import quantise
from gac.export.source import Source
from gac.models import create_model


def int8_convolutions(model):
    """Return how many convolutions have int8 weights, and the names of those that do not."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    kinds = {each.name: each.data_type for each in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantised = [
        node
        for node in convolutions
        if (weight := made_by.get(node.input[1])) is not None
        and weight.op_type == "DequantizeLinear"
        and kinds[weight.input[0]] == onnx.TensorProto.INT8
    ]
    return len(quantised), len(convolutions)


def test_openvino_computes_in_float32_unless_asked(digits, digits_onnx):
    fidelity = measure(digits, digits_onnx, engine="openvino")
    assert fidelity.program.startswith("OpenVINO ")
    # bf16, which it takes by itself where the CPU has it, differs by 1.3.
    assert fidelity.max_difference < 1e-3
    assert fidelity.predictions_differ <= 1
    assert fidelity.spikes["stages.0.0.lif1"].differ <= 1


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_int8_is_calibrated_on_training_images(engine, digits, digits_onnx):
    digits = replace(digits, images=180)
    model = made_for(engine, "int8", digits_onnx, digits, 128)
    # All that see spikes: not the stem, the attention's two and the three shortcuts.
    assert int8_convolutions(model) == (6, 12)
    fidelity = measure(digits, model, engine=engine, precision="int8")
    assert abs(fidelity.correct - fidelity.correct_exported) <= 3
    assert 0 < fidelity.max_difference < 2
    assert len(fidelity.spikes) == 8
    # What precedes the first int8 convolution is as it was.
    assert fidelity.spikes["stages.0.0.lif1"].differ <= 1
    said = {each.key: each.value for each in model.metadata_props}
    assert (said["engine"], said["precision"]) == (f'"{engine}"', '"int8"')
    assert said["calibration"] == '"128 training images"'
    assert "checkpoint_sha256" in said


def test_bf16(digits, digits_onnx):
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(InputError, match="this CPU does not compute in bf16"):
            open_model("openvino", digits_onnx.SerializeToString(), "bf16")
        return
    fidelity = measure(digits, digits_onnx, engine="openvino", precision="bf16")
    assert fidelity.max_difference > 1e-2
    assert abs(fidelity.correct - fidelity.correct_exported) <= 4


def test_what_an_engine_cannot_do_is_one_line(digits_onnx, monkeypatch):
    with pytest.raises(InputError, match="ONNX Runtime has no bf16 on a CPU"):
        open_model("onnxruntime", digits_onnx.SerializeToString(), "bf16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"openvino is not installed: pip install '\.\[deploy\]'"):
        open_model("openvino", digits_onnx.SerializeToString())


def test_a_model_without_spikes_is_not_quantised():
    weight = onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "weight")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 2, 2]) for name in ("x", "y")]
    node = onnx.helper.make_node("Conv", ["x", "weight"], ["y"], name="conv")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "real", ends[:1], ends[1:], [weight]))
    with pytest.raises(InputError, match="no convolution of the network sees spikes"):
        quantise(model, [], "openvino")


def test_the_file_says_how_many_training_images_there_were(digits, digits_onnx, monkeypatch):
    images = torch.rand(40, 1, 8, 8)
    monkeypatch.setattr(type(digits), "training_images", lambda self, count: iter(images[:count].split(32)))
    for asked, found in ((8, 8), (5000, 40)):
        model = made_for("onnxruntime", "int8", digits_onnx, digits, asked)
        (said,) = (each.value for each in model.metadata_props if each.key == "calibration")
        assert said == f'"{found} training images"'


def test_a_network_that_openvino_does_not_take_is_refused():
    network = create_model("msresnet104", 3, 1, width=2, depth=[1, 1, 1, 1])
    info = DataInfo("made", 3, 3, 8, 8, None, 1, 1, (0.0,) * 3, (1.0,) * 3)
    config = Config(model=ModelConfig(name="msresnet104", T=1))
    model = build_model(Source(network.eval(), config, info, ["a", "b", "c"], "", 0, None, None))
    open_model("onnxruntime", model.SerializeToString())
    # Its average of 2 x 2 values of a map that has one.
    with pytest.raises(InputError, match=r"OpenVINO does not take this network: .*; use --engine onnxruntime$"):
        open_model("openvino", model.SerializeToString())
