"""The forms in which networks are exported compute what the network does."""

import copy
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import neuron

from gac.errors import InputError
from gac.export.forms import Mean, PlainNeuron, Sequence, Step, plain
from gac.models import create_model
from gac.neuron import PRESETS
from gac.ops import lif


@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("preset", ["cifar", "imagenet"])
@pytest.mark.parametrize("single_step", [False, True])
def test_a_plain_neuron_is_the_specification(preset, decay_input, v_reset, single_step):
    parameters = replace(PRESETS[preset], decay_input=decay_input, v_reset=v_reset)
    # Eighths, so that potentials lie exactly on the threshold.
    x = torch.randint(-8, 17, (6, 3, 50), generator=torch.Generator().manual_seed(0)) / 8
    expected, v = lif.reference(x, parameters.v_start, parameters)
    ties = (
        (lif.reference(x, parameters.v_start, replace(parameters, v_threshold=parameters.v_threshold - 1e-6))[0])
        != expected
    )
    # An input that is multiplied by 3/4 does not meet a threshold of 1/2.
    assert ties.any() or (preset, decay_input) == ("imagenet", True)
    assert expected.any()
    plain_neuron = PlainNeuron(parameters)
    if not single_step:
        assert torch.equal(plain_neuron(x), expected)
        return
    plain_neuron.single_step = True
    assert torch.equal(torch.stack([plain_neuron(each) for each in x]), expected)
    assert torch.equal(plain_neuron.v, v)


def test_mean_and_sequence_are_the_network(digits):
    for x, _ in digits.test_images():
        with torch.no_grad():
            logits = digits.network(x)
        assert torch.equal(Sequence(digits.network)(x), logits)
        assert torch.equal(Mean(digits.network)(x), logits.mean(0))


def test_steps_are_the_sequence(direct):
    step = Step(direct.network)
    for x, _ in direct.test_images():
        with torch.no_grad():
            expected = direct.network(x)
        state = step.fresh_state(x)
        assert len(state) == len(step.layers) == 7
        for logits in expected:
            of_step, *state = step(x, *state)
            # A convolution of one step may round otherwise, which moves a spike; most images see none.
            close = (of_step - logits).abs().amax(-1) < 1e-4
            assert close.float().mean() > 0.8
    assert all(module.v is None for module in step.modules() if isinstance(module, PlainNeuron))
    assert direct.network.step_mode == "m"


def test_what_has_no_such_form_is_refused(digits):
    with pytest.raises(InputError, match="the step form is for direct coding, and gac coding needs the whole sequence"):
        Step(digits.network)
    twin = create_model("msresnet18_cifar", 10, 1, width=4, depth=[1, 1, 1], activation="relu")
    with pytest.raises(InputError, match="the network has no spiking neurons"):
        Step(twin)
    other = copy.deepcopy(digits.network)
    other.lif = neuron.IFNode(step_mode="m")
    with pytest.raises(InputError, match="spiking layer lif is a IFNode"):
        plain(other)
