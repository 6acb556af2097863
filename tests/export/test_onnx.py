"""ONNX files: what ONNX Runtime makes of them is the trained network, and they say what their user must know."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils._pytree import tree_map

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.errors import InputError
from gac.export.onnx import build_model, measure
from gac.export.source import open_source


def session_of(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_trained_network_is_itself_in_onnx_runtime(digits, digits_onnx):
    fidelity = measure(digits, digits_onnx)
    assert fidelity.program == f"ONNX Runtime {onnxruntime.__version__}, f32"
    assert fidelity.images == 360
    assert fidelity.correct >= 355
    # A convolution that rounds its last bit otherwise may move a spike on some processor, not many.
    assert fidelity.predictions_differ <= 1
    assert len(fidelity.spikes) == fidelity.spiking_layers == 8
    # The first neurons see one convolution: 234 of these images have membrane potentials exactly on the threshold.
    assert fidelity.spikes["stages.0.0.lif1"].differ <= 1
    assert sum(each.differ for each in fidelity.spikes.values()) < 1e-4 * sum(
        each.of for each in fidelity.spikes.values()
    )


def test_any_number_of_images(digits, digits_onnx):
    session = session_of(digits_onnx)
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("images", ["batch", 1, 8, 8])]
    (x, _), *_ = digits.test_images()
    with torch.no_grad():
        expected = digits.network(x).mean(0)
    for count in (1, 3):
        (logits,) = session.run(["logits"], {"images": x[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=0, atol=1e-4)


def test_metadata_and_nothing_of_this_machine(digits, digits_onnx):
    said = {each.key: json.loads(each.value) for each in digits_onnx.metadata_props}
    assert said == digits.metadata() | {"form": "mean", "torch": torch.__version__}
    content = digits_onnx.SerializeToString()
    assert str(Path.home()).encode() not in content
    assert b".py" not in content
    assert {node.domain for node in digits_onnx.graph.node} == {""}


def test_the_step_form_carries_the_membrane_potentials(direct):
    model = build_model(direct, "step")
    fidelity = measure(direct, model, "step")
    assert len(fidelity.spikes) == fidelity.spiking_layers == 7
    assert fidelity.correct > direct.images / 2
    # Convolutions of one step may round otherwise than those of the sequence, which moves a spike here and there.
    assert fidelity.predictions_differ <= 1
    assert fidelity.spikes["stages.0.0.lif1"].differ <= 1
    assert all(each.differ <= 1e-3 * each.of and each.fired for each in fidelity.spikes.values())
    session = session_of(model)
    names = [each.name for each in session.get_inputs()]
    assert names[:2] == ["images", "v.stages.0.0.lif1"]
    assert [each.name for each in session.get_outputs()] == ["logits", *(f"next_{name}" for name in names[1:])]
    # A step that begins elsewhere ends elsewhere: the state is used.
    (x, _), *_ = direct.test_images()
    state = {each.name: np.full([len(x), *each.shape[1:]], 0.5, np.float32) for each in session.get_inputs()[1:]}
    at_rest = tree_map(np.zeros_like, state)
    logits = [session.run(["logits"], {"images": x.numpy(), **each})[0] for each in (state, at_rest)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize(
    ("coding", "advice"),
    [("rate", "the subcommand program"), ("latency", "the subcommand program"), ("phase", "torch.jit.trace")],
)
def test_codings_whose_file_would_be_another_network_are_refused(coding, advice, tmp_path):
    payload = read_checkpoint(FOLDER / "digits.safetensors")
    payload["config"]["model"] |= {"coding": coding}
    payload["model"] = {name: each for name, each in payload["model"].items() if not name.startswith("coding.")}
    write_checkpoint(tmp_path / "best.pt", payload)
    with pytest.raises(InputError, match=f"{coding} coding is not exported as ONNX, .*{advice}$"):
        build_model(open_source(str(tmp_path / "best.pt"), 0))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(digits, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed: pip install '\.\[onnx\]'"):
        build_model(digits)
