"""torch.export files: the network to the bit, where only PyTorch is installed."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.errors import InputError
from gac.export.program import METADATA, build_program, measure
from gac.export.source import open_source
from gac.models import create_model
from lively import lively

WITHOUT_OTHER_PACKAGES = """
import sys
for name in ("gac", "spikingjelly", "torchvision", "captum", "onnx", "cupy"):
    sys.modules[name] = None
import torch
network = torch.export.load(sys.argv[1]).module()
torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_it_runs_where_only_torch_is_installed(digits, digits_program, tmp_path):
    network, images, logits = (tmp_path / name for name in ("network.pt2", "images.pt", "logits.pt"))
    network.write_bytes(digits_program)
    x = torch.cat([x for x, _ in digits.test_images()])
    torch.save(x, images)
    files = [str(each) for each in (network, images, logits)]
    subprocess.run([sys.executable, "-c", WITHOUT_OTHER_PACKAGES, *files], check=True, cwd=tmp_path, timeout=300)
    with torch.no_grad():
        expected = digits.network(x).mean(0)
    torch.testing.assert_close(torch.load(logits), expected, rtol=0, atol=1e-4)


def test_a_trained_network_is_itself(digits, digits_program):
    fidelity = measure(digits, digits_program)
    assert (fidelity.max_difference, fidelity.predictions_differ) == (0, 0)
    assert len(fidelity.spikes) == fidelity.spiking_layers == 8
    assert all(each.differ == 0 < each.fired for each in fidelity.spikes.values())
    extra = {METADATA: ""}
    torch.export.load(io.BytesIO(digits_program), extra_files=extra)
    assert json.loads(extra[METADATA]) == digits.metadata() | {"form": "mean", "torch": torch.__version__}
    assert str(Path(__file__).parents[2]).encode() not in digits_program


def test_the_step_form(direct):
    fidelity = measure(direct, build_program(direct, "step"), "step")
    # Convolutions of one step may round otherwise than those of the sequence, which moves a spike here and there.
    assert fidelity.predictions_differ <= 1
    assert len(fidelity.spikes) == fidelity.spiking_layers == 7
    assert all(each.differ <= 1e-3 * each.of and each.fired for each in fidelity.spikes.values())


def test_a_sequence_of_event_frames(digits):
    torch.manual_seed(0)
    net = create_model("gac_msresnet18_cifar", 10, 3, width=4, depth=[1, 1, 1], in_channels=2, temporal_init="alive")
    x = torch.rand(3, 5, 2, 8, 8)
    lively(net, x)
    info = replace(digits.info, channels=2, mean=(0.0, 0.0), std=(1.0, 1.0), frames=3)
    content = build_program(replace(digits, network=net, info=info), "sequence")
    with torch.no_grad():
        expected = net(x)
    assert expected.std(1).max() > 0.01
    torch.testing.assert_close(torch.export.load(io.BytesIO(content)).module()(x), expected, rtol=0, atol=1e-4)


def with_coding(coding, folder):
    payload = read_checkpoint(FOLDER / "digits.safetensors")
    payload["config"]["model"] |= {"coding": coding}
    payload["model"] = {name: each for name, each in payload["model"].items() if not name.startswith("coding.")}
    write_checkpoint(folder / "best.pt", payload)
    return open_source(str(folder / "best.pt"), 20)


def test_rate_coding_draws_from_torchs_generator(tmp_path):
    source = with_coding("rate", tmp_path)
    fidelity = measure(source, content := build_program(source))
    assert fidelity.max_difference < 1e-5
    assert fidelity.spikes["stages.0.0.lif1"].fired > 0
    with pytest.raises(RuntimeError, match=r"intensities in \[0, 1\]"):
        torch.export.load(io.BytesIO(content)).module()(source.example() + 1)


def test_phase_coding_is_refused(tmp_path):
    with pytest.raises(InputError, match="phase coding cannot be exported"):
        build_program(with_coding("phase", tmp_path))
