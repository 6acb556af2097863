"""torch.export files: the network to the bit, where only PyTorch is installed."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gac.checkpoint import write_checkpoint
from gac.checkpoint.weights import FOLDER, read_weights
from gac.errors import InputError
from gac.export.program import METADATA, build_program, measure
from gac.export.source import open_source

WITHOUT_OTHER_PACKAGES = """
import sys
for name in ("gac", "spikingjelly", "torchvision", "captum", "onnx", "cupy"):
    sys.modules[name] = None
import torch
network = torch.export.load(sys.argv[1]).module()
torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_it_runs_where_only_torch_is_installed(digits, tmp_path):
    network, images, logits = (tmp_path / name for name in ("network.pt2", "images.pt", "logits.pt"))
    network.write_bytes(build_program(digits))
    x = torch.cat([x for x, _ in digits.test_images()])
    torch.save(x, images)
    files = [str(each) for each in (network, images, logits)]
    subprocess.run([sys.executable, "-c", WITHOUT_OTHER_PACKAGES, *files], check=True, cwd=tmp_path, timeout=300)
    with torch.no_grad():
        expected = digits.network(x).mean(0)
    torch.testing.assert_close(torch.load(logits), expected, rtol=0, atol=1e-4)


def test_a_trained_network_is_itself(digits):
    content = build_program(digits, "sequence")
    fidelity = measure(digits, content, "sequence")
    assert (fidelity.max_difference, fidelity.predictions_differ) == (0, 0)
    assert len(fidelity.spikes) == fidelity.spiking_layers == 8
    assert all(each.differ == 0 < each.fired for each in fidelity.spikes.values())
    extra = {METADATA: ""}
    torch.export.load(io.BytesIO(content), extra_files=extra)
    assert json.loads(extra[METADATA]) == digits.metadata() | {"form": "sequence", "torch": torch.__version__}
    assert str(Path(__file__).parents[2]).encode() not in content


def test_the_step_form(direct):
    fidelity = measure(direct, build_program(direct, "step"), "step")
    # Convolutions of one step may round otherwise than those of the sequence, which moves a spike here and there.
    assert fidelity.predictions_differ <= 1
    assert len(fidelity.spikes) == fidelity.spiking_layers == 7
    assert all(each.differ <= 1e-3 * each.of and each.fired for each in fidelity.spikes.values())


def with_coding(coding, folder):
    payload = read_weights(FOLDER / "digits.safetensors")
    payload["config"]["model"] |= {"coding": coding}
    payload["model"] = {name: each for name, each in payload["model"].items() if not name.startswith("coding.")}
    write_checkpoint(folder / "best.pt", payload)
    return open_source(str(folder / "best.pt"), 20)


@pytest.mark.parametrize("coding", ["rate", "latency"])
def test_codings_of_intensities(coding, tmp_path):
    source = with_coding(coding, tmp_path)
    fidelity = measure(source, content := build_program(source))
    assert fidelity.max_difference < 1e-5
    assert fidelity.spikes["stages.0.0.lif1"].fired > 0
    with pytest.raises(RuntimeError, match=r"intensities in \[0, 1\]"):
        torch.export.load(io.BytesIO(content)).module()(source.example() + 1)


def test_phase_coding_is_refused(tmp_path):
    with pytest.raises(InputError, match="phase coding cannot be exported"):
        build_program(with_coding("phase", tmp_path))
