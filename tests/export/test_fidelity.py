"""The comparison of an export with our network finds what differs, and says where it proves nothing."""

import copy
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from gac.errors import InputError
from gac.export.fidelity import compare, network_outputs, write_and_tell
from gac.export.forms import PlainNeuron, Sequence
from gac.models import create_model


class AtTies(PlainNeuron):
    """Fires on h >= threshold, as SpikingJelly does."""

    def __init__(self, neuron: PlainNeuron) -> None:
        below = torch.nextafter(torch.tensor(neuron.parameters.v_threshold), torch.tensor(0.0))
        super().__init__(replace(neuron.parameters, v_threshold=float(below)))


def found(source, exported, network=None):
    network = source.network if network is None else network
    return compare(network, exported, source.test_images(), program="this", data=source.tried_on)


def test_a_network_is_equal_to_itself(digits):
    fidelity = found(digits, network_outputs(digits.network))
    assert (fidelity.images, fidelity.max_difference, fidelity.predictions_differ) == (360, 0, 0)
    assert fidelity.correct == fidelity.correct_exported >= 355
    assert len(fidelity.spikes) == fidelity.spiking_layers == 8
    assert all(each.differ == 0 < each.fired < each.of for each in fidelity.spikes.values())
    assert "0 of 13271040 differ" in str(fidelity)
    assert "on all 360 test images of digits" in str(fidelity)


def test_neurons_that_fire_at_ties_are_found(digits):
    strict = Sequence(digits.network)
    other = copy.deepcopy(strict)
    for name, module in list(other.named_modules()):
        if isinstance(module, PlainNeuron):
            other.set_submodule(name, AtTies(module))
    fired = {}

    def keep(name):
        return lambda module, inputs, spikes: fired.update({name: spikes})

    for name, module in other.network.named_modules():
        if isinstance(module, PlainNeuron):
            module.register_forward_hook(keep(name))
    assert found(digits, lambda x: (strict(x), {})).max_difference == 0
    fidelity = found(digits, lambda x: (other(x), dict(fired)))
    # The gate saturates at 1 and a spike is 1: the first block's neurons see exactly their threshold.
    assert fidelity.spikes["coding.lif"].differ == 0
    assert fidelity.spikes["stages.0.0.lif1"].differ > 500
    assert fidelity.max_difference > 0.01
    assert "\n  stages.0.0.lif1" in str(fidelity)


def test_silent_layers_are_named(digits):
    torch.manual_seed(0)
    silent = create_model("gac_msresnet18_cifar", 10, 2, width=4, depth=[1, 1, 1], in_channels=1).eval()
    fidelity = found(digits, network_outputs(silent), silent)
    # The trap that the comparison is for: in a fresh network the last neurons never fire, and any export is "equal".
    assert re.search(r"warning +no neuron fired in .*, lif: about these layers this says nothing", str(fidelity))


def test_what_cannot_be_compared_is_refused(digits):
    with pytest.raises(InputError, match="this: gives logits that are not finite"):
        found(digits, lambda x: (torch.full((len(x), 10), float("nan")), {}))
    with pytest.raises(InputError, match="there are no images"):
        compare(digits.network, network_outputs(digits.network), [], program="this", data="none")


def test_it_stands_beside_the_file(digits, tmp_path, capsys):
    fidelity = found(digits, network_outputs(digits.network))
    path = tmp_path / "net.onnx"
    write_and_tell(path, b"content", fidelity, engine="this")
    beside = tmp_path / "net.onnx.fidelity.json"
    said = json.loads(beside.read_text())
    assert said == json.loads(json.dumps(fidelity.to_dict())) | {
        "engine": "this",
        "sha256": hashlib.sha256(b"content").hexdigest(),
    }
    assert str(fidelity) in capsys.readouterr().out
    # What was measured of an earlier file is not left beside another one.
    write_and_tell(path, b"other", None)
    assert not beside.exists()
    assert path.read_bytes() == b"other"
    assert "not compared with our network" in capsys.readouterr().out
