import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import parity
from gac.coding.gated import GatedAttentionCoding, GatedAttentionUnit, TemporalAttention

OURS = {
    "TA.sharedMLP.0.weight": "temporal.squeeze.weight",
    "TA.sharedMLP.2.weight": "temporal.expand.weight",
    "SCA.sharedMLP.0.weight": "spatial_channel.conv1.weight",
    "SCA.sharedMLP.2.weight": "spatial_channel.conv2.weight",
}


def close(found: torch.Tensor, gold: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), gold, atol=1e-5 * np.abs(gold).max(), rtol=0)


SEQUENCES = [(case, False) for case in parity.CASES["gac"]]
FRAMES = [(case, True) for case in parity.CASES["gac"] if case["constant_in_time"]]


@pytest.mark.parametrize(
    ("case", "one_frame"),
    SEQUENCES + FRAMES,
    ids=lambda value: value["case"] if isinstance(value, dict) else None,
)
def test_the_gate_equals_the_original(case, one_frame):
    gold = parity.load("gac_cases.npz", case["case"])
    keys = ("T", "B", "C", "H", "W", "constant_in_time", "mean", "seed")
    weights, *arrays = parity.recipe.gate_case(**{key: case[key] for key in keys})
    x, spikes, grad_out = (torch.from_numpy(array).transpose(0, 1) for array in arrays)

    gate = GatedAttentionUnit(case["T"], case["C"])
    state = {OURS[key]: torch.from_numpy(value) for key, value in weights.items()}
    gate.load_state_dict({key: w.flatten(1) if "temporal" in key else w for key, w in state.items()})

    leaf = (x[0].clone() if one_frame else x.clone()).requires_grad_()
    spikes.requires_grad_()
    out = gate(leaf, spikes)
    close(out.transpose(0, 1), gold["out"])
    out.backward(grad_out)
    close(spikes.grad.transpose(0, 1), gold["grad_spikes"])
    if one_frame:
        close(leaf.grad, gold["grad_x"].sum(1))
    else:
        close(leaf.grad.transpose(0, 1), gold["grad_x"])
    for key, name in OURS.items():
        gradient = gate.get_parameter(name).grad
        if f"grad.{key}" in gold:
            close(gradient.flatten(), gold[f"grad.{key}"].ravel())
        else:
            close(gradient.flatten()[::8], gold[f"grad_every8.{key}"])


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel_size", [1, 3, 4])
@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_a_frame_equals_the_sequence_that_repeats_it(T, kernel_size, reduction):
    torch.manual_seed(T)
    coding = GatedAttentionCoding(T, 5, kernel_size, reduction, "alive").double()
    frame = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    results = []
    for x in (frame.clone(), frame.repeat(T, 1, 1, 1, 1)):
        functional.reset_net(coding)
        coding.zero_grad()
        x.requires_grad_()
        out = coding(x)
        out.square().sum().backward()
        grad_x = x.grad if x.dim() == 4 else x.grad.sum(0)
        results.append([out.detach(), grad_x, *(p.grad.clone() for p in coding.parameters())])
    for once, repeated in zip(*results, strict=True):
        torch.testing.assert_close(once, repeated, atol=1e-12, rtol=1e-12)
    assert results[0][0].shape == (T, 2, 5, 7, 6)
    assert results[0][0].abs().sum() > 0


@pytest.mark.parametrize("gate", ["temporal", "spatial_channel"])
def test_an_ablation_has_one_in_place_of_the_other_attention(gate):
    torch.manual_seed(0)
    coding = GatedAttentionCoding(3, 4, temporal_init="alive", gate=gate).double()
    frame = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert {name.split(".")[1] for name, _ in coding.named_parameters()} == {gate}
    score = coding.gate.get_submodule(gate)(frame)
    score = score[:, :, None, None, None] if gate == "temporal" else score
    spikes = coding.lif(frame.expand(3, *frame.shape))
    expected = torch.sigmoid(score) * spikes
    assert 0 < expected.mean() < spikes.mean()
    torch.testing.assert_close(coding(frame), expected, rtol=0, atol=0)
    torch.testing.assert_close(coding(frame.repeat(3, 1, 1, 1, 1)), expected, rtol=0, atol=1e-12)
    coding(frame).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in coding.parameters())


def test_without_temporal_attention_T_may_change():
    coding = GatedAttentionCoding(3, 4, gate="spatial_channel")
    coding.T = 5
    assert coding(torch.rand(2, 4, 6, 5)).shape == (5, 2, 4, 6, 5)
    with pytest.raises(ValueError, match="T of gated attention coding is fixed"):
        GatedAttentionCoding(3, 4, gate="temporal").T = 5


def test_time_varying_input_gives_each_step_its_own_score():
    attention = TemporalAttention(4, init="alive")
    x = torch.rand(4, 2, 3, 5, 5) * torch.tensor([1.0, 5.0, 0.1, 3.0])[:, None, None, None, None]
    values = torch.stack((x.flatten(2).mean(-1), x.flatten(2).amax(-1)))
    hidden = torch.einsum("ht,ptb->pbh", attention.squeeze.weight, values).relu()
    torch.testing.assert_close(attention(x), torch.einsum("th,pbh->tb", attention.expand.weight, hidden))


@pytest.mark.parametrize("T", [1, 2, 4, 6, 7])
def test_the_alive_initialisation_has_no_dead_unit(T):
    for seed in range(50):
        torch.manual_seed(seed)
        attention = TemporalAttention(T, init="alive")
        assert attention.dead_units() == 0
        frame = torch.rand(2, 3, 4, 4)
        attention(frame).square().sum().backward()
        assert attention.squeeze.weight.grad.abs().amin() > 0


def test_alive_only_flips_signs_of_the_default():
    torch.manual_seed(3)
    default = TemporalAttention(6)
    torch.manual_seed(3)
    alive = TemporalAttention(6, init="alive")
    assert torch.equal(default.squeeze.weight.abs(), alive.squeeze.weight.abs())
    assert torch.equal(default.expand.weight, alive.expand.weight)


@pytest.mark.parametrize(("T", "expected"), [(2, 1 / 2), (4, 1 / 4), (6, 1 / 8)])
def test_the_default_initialisation_is_all_dead_as_often_as_stated(T, expected):
    torch.manual_seed(0)
    trials = 2000
    dead = sum(TemporalAttention(T).dead_units() == T // 2 for _ in range(trials))
    assert abs(dead / trials - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5


def test_dead_units_give_zero_on_the_maximum_path():
    attention = TemporalAttention(4)
    with torch.no_grad():
        attention.squeeze.weight.copy_(-attention.squeeze.weight.abs())
    assert attention.dead_units() == 2
    frame = torch.rand(3, 2, 4, 4)  # positive: the average path is dead as well
    assert attention(frame).abs().max() == 0


def test_the_gradient_of_the_maximum_goes_to_one_position():
    attention = TemporalAttention(2, init="alive")
    frame = torch.zeros(1, 1, 2, 2)
    frame[0, 0, 0] = 1.0  # two equal maxima
    frame.requires_grad_()
    attention(frame).sum().backward()
    assert (frame.grad == frame.grad.amin()).sum() == 3 or (frame.grad == frame.grad.amax()).sum() == 3


def test_only_sequences_have_a_temporal_attention():
    with pytest.raises(ValueError, match="step_mode can only be"):
        functional.set_step_mode(GatedAttentionCoding(4, 8), "s")


@pytest.mark.parametrize("shape", [(4, 2, 9, 5, 5), (3, 2, 8, 5, 5), (2, 9, 5, 5), (8, 5, 5)])
def test_a_wrong_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"expected a sequence \[T=4, B, C=8, H, W\].*got \[" + str(shape[0])):
        GatedAttentionCoding(4, 8)(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [{"T": 0}, {"channels": 0}, {"kernel_size": 0}, {"reduction": 0}, {"T": 2.0}])
def test_sizes_below_one_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
        GatedAttentionCoding(**{"T": 4, "channels": 8} | arguments)


def test_sizes_of_other_libraries_are_whole_numbers():
    coding = GatedAttentionCoding(np.int64(4), torch.tensor([8]).numpy()[0])
    assert [type(size) for size in (coding.T, coding.channels)] == [int, int]
    with pytest.raises(ValueError, match="T must be an integer >= 1, got True"):
        GatedAttentionCoding(True, 8)
    with pytest.raises(ValueError, match="T must be an integer >= 1, got 0"):
        GatedAttentionCoding(4, 8, gate="spatial_channel").T = 0


def test_a_neuron_that_takes_single_steps_is_refused():
    coding = GatedAttentionCoding(4, 8, neuron=neuron.LIFNode())  # SpikingJelly's default is step mode "s"
    with pytest.raises(ValueError, match="neuron is in step mode 's', the network in 'm'"):
        coding(torch.rand(4, 2, 8, 5, 5))
    functional.set_step_mode(coding, "m")
    assert coding(torch.rand(4, 2, 8, 5, 5)).shape == (4, 2, 8, 5, 5)


@pytest.mark.parametrize("wrong", ["cifar", nn.ReLU()])
def test_what_is_no_spiking_layer_is_refused(wrong):
    with pytest.raises(ValueError, match=r"neuron must be a spiking layer, such as gac\.neuron\.LIFNode\(\), got"):
        GatedAttentionCoding(4, 8, neuron=wrong)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="gate must be one of both, temporal, spatial_channel, got 'spatial'"):
        GatedAttentionCoding(4, 8, gate="spatial")
    with pytest.raises(ValueError, match="temporal_init must be one of default, alive"):
        GatedAttentionCoding(4, 8, temporal_init="dead")


def test_every_call_is_a_fresh_sequence():
    coding = GatedAttentionCoding(3, 4)
    frame = torch.rand(2, 4, 5, 5)
    first = coding(frame)
    first.sum().backward()
    second = coding(frame)
    assert torch.equal(first, second)
    second.sum().backward()
