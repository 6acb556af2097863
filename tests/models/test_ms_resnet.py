import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, monitor, neuron, op_counter
from torch import nn

from gac.models import create_model, list_models
from gac.models.batch_norm import BatchNorm2d
from gac.neuron import LIFNode
from lively import lively

CODINGS = ("gac", "direct", "rate", "latency", "phase")


def small(name="gac_msresnet18_cifar", T=3, **options):
    torch.manual_seed(0)
    return create_model(name, 5, T, **{"width": 8, "temporal_init": "alive", "backend": "torch"} | options)


def alive(**options):
    net = lively(small(**options), torch.rand(16, 3, 16, 16))
    assert not torch.equal(*(net(images)[:, 0] for images in torch.rand(2, 1, 3, 16, 16)))
    return net


def depth_of_one(name):
    return [1, 1, 1] if "cifar" in name else [1, 1, 1, 1]


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("T", [1, 2, 5])
def test_every_network_trains_and_evaluates(name, T):
    net = small(name, T, depth=depth_of_one(name))
    side = 32 if "cifar" in name else 64
    images = torch.randn(5, 3, side, side)
    logits = net(images)
    assert logits.shape == (T, 5, 5)
    F.cross_entropy(logits.mean(0), torch.arange(5)).backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert gradients["stem.conv.weight"].abs().sum() > 0
    assert net.eval()(images).shape == (T, 5, 5)


@pytest.mark.parametrize("coding", CODINGS)
def test_every_coding_trains(coding):
    net = small(coding=coding)
    net(torch.rand(4, 3, 16, 16)).mean(0).logsumexp(-1).sum().backward()
    assert net.stem.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("coding", CODINGS[1:])
def test_a_coding_without_a_gate_refuses_a_part_of_it(coding):
    with pytest.raises(ValueError, match=f"gate is 'temporal', and {coding} coding has no gate: leave it out or set"):
        small(coding=coding, gate="temporal")


@pytest.mark.parametrize(("width", "depth", "channels"), [(8, [1, 1, 1], 1), (16, [2, 1, 3], 3), (12, [1, 2, 1], 2)])
def test_width_depth_and_input_channels_are_arguments(width, depth, channels):
    net = small(width=width, depth=depth, in_channels=channels)
    assert [len(stage) for stage in net.stages] == depth
    assert net.stem.conv.weight.shape == (width, channels, 3, 3)
    assert net.head.in_features == 8 * width
    assert net(torch.randn(2, channels, 16, 16)).shape == (3, 2, 5)


@pytest.mark.parametrize("coding", ["gac", "direct"])
@pytest.mark.parametrize("name", ["msresnet18_cifar", "msresnet18"])
def test_an_image_equals_the_sequence_that_repeats_it(name, coding):
    once, repeated = (small(name, coding=coding, depth=depth_of_one(name)).double() for _ in range(2))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    for net, x in ((once, images), (repeated, images.repeat(3, 1, 1, 1, 1))):
        net(x).mean(0).logsumexp(-1).sum().backward()
    for (key, p), q in zip(once.named_parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=1e-9, msg=key)
    for (key, p), q in zip(once.named_buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12, msg=key)
    lively(once, images), repeated.load_state_dict(once.state_dict()), repeated.eval()
    assert not torch.equal(once(images)[:, 0], once(images)[:, 1])
    torch.testing.assert_close(once(images), repeated(images.repeat(3, 1, 1, 1, 1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"momentum": None},
        {"num_batches_tracked": None},
        {"momentum": None, "num_batches_tracked": None},
        {"track_running_stats": False},
        {"running_mean": None, "running_var": None},
    ],
    ids=lambda changed: "-".join(changed) or "default",
)
def test_static_batch_norm_is_that_of_all_frames(changed):
    ours, torchs = BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    for module in (ours, torchs):
        for name, value in changed.items():
            setattr(module, name, value)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(ours(x, repeats=4), torchs(x.repeat(4, 1, 1, 1))[:2], atol=1e-12, rtol=0)
    for (key, a), b in zip(ours.named_buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0, msg=key)


def test_every_call_is_a_fresh_sequence():
    net = alive()
    images = torch.randn(2, 3, 16, 16)
    first = net(images)
    net(torch.randn(2, 3, 16, 16))
    assert torch.equal(net(images), first)


def test_two_training_steps_without_a_reset_by_the_user():
    net = small()
    for _ in range(2):
        net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert net.stem.norm.num_batches_tracked == 2


def test_a_neuron_that_replaces_another_is_reset_too():
    net = small()
    net(torch.randn(2, 3, 16, 16))
    net.stages[0][0].lif1 = LIFNode(v_threshold=0.5)
    for _ in range(2):
        net(torch.randn(2, 3, 16, 16)).sum().backward()


def test_a_compiled_network_does_not_depend_on_the_others():
    net, images = alive(), torch.randn(2, 3, 16, 16)
    others = [small().eval() for _ in range(3)]
    for each in (*others, net):
        each(images)
    del each

    def compile_while_the_others_go(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        others.clear()
        gc.collect()
        return graph

    compiled = torch.compile(net, backend=compile_while_the_others_go, fullgraph=True)
    assert torch.equal(compiled(images), net(images))


def test_the_imagenet_initialisation():
    net = create_model("gac_msresnet18", 10, 4)
    norms = {key: m.weight for key, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for key, weight in norms.items():
        last_of_block = ".conv2." in key
        assert torch.equal(weight, torch.full_like(weight, 0.0 if last_of_block else 0.5)), key
    conv = net.stages[1][0].conv1.conv.weight
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_reset_net_clears_every_neuron():
    net = small(coding="direct")
    functional.set_step_mode(net, "s")
    net(torch.randn(2, 3, 16, 16))
    nodes = [m for m in net.modules() if isinstance(m, neuron.LIFNode)]
    assert all(isinstance(node.v, torch.Tensor) for node in nodes)
    functional.reset_net(net)
    assert all(node.v == 0.0 for node in nodes)


def test_single_steps_of_a_directly_coded_network_equal_the_sequence():
    net = alive(coding="direct").double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    together = net(images)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    apart = torch.stack([net(images) for _ in range(net.T)])
    torch.testing.assert_close(apart, together, atol=1e-12, rtol=0)
    functional.set_step_mode(net, "m")
    assert torch.equal(net(images), together)


@pytest.mark.parametrize("coding", ["gac", "rate", "latency", "phase"])
def test_other_codings_have_no_single_steps(coding):
    with pytest.raises(ValueError, match="step_mode can only be"):
        functional.set_step_mode(small(coding=coding), "s")


def test_output_monitors_see_every_layer_of_neurons():
    net = small(depth=[1, 1, 1])
    with monitor.OutputMonitor(net, neuron.LIFNode, lambda s: s.mean().item()) as rates:
        net(torch.randn(2, 3, 16, 16))
        assert len(rates.monitored_layers) == len(rates.records) == 8
        assert rates.monitored_layers[0] == "lif" or "coding.lif" in rates.monitored_layers
        assert all(0 <= rate <= 1 for rate in rates.records)


def test_op_counter_counts_the_synaptic_operations():
    net = small(depth=[1, 1, 1])
    counter = op_counter.SynOpCounter()
    expected = []

    def operations(conv, inputs, _output):
        fan_out = F.conv2d(inputs[0], torch.ones_like(conv.weight), stride=conv.stride, padding=conv.padding)
        expected.append(int(fan_out.sum()))

    fed_by_spikes = [conv.conv for stage in net.stages for conv in (stage[0].conv1, stage[0].conv2)]
    with torch.no_grad():
        hooks = [conv.register_forward_hook(operations) for conv in fed_by_spikes]
        state = copy.deepcopy(net.state_dict())
        images = torch.randn(1, 3, 16, 16)
        net(images)
        for hook in hooks:
            hook.remove()
        net.load_state_dict(state)
        with op_counter.DispatchCounterMode([counter]):
            net(images)
    assert counter.get_total() == sum(expected) > 0


def test_set_backend_reaches_every_neuron():
    net = small()
    net.set_backend("auto")
    assert {m.backend for m in net.modules() if isinstance(m, LIFNode)} == {"auto"}


def test_autocast_runs_in_half_precision_with_a_float32_membrane():
    net = small()
    nodes = [m for m in net.modules() if isinstance(m, LIFNode)]
    for node in nodes:
        node.store_v_seq = True
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(2, 3, 16, 16))
    assert logits.dtype == torch.bfloat16
    assert {node.v_seq.dtype for node in nodes} == {torch.float32}
    logits.float().sum().backward()


@pytest.mark.parametrize(
    "shape", [(4, 2, 3, 8, 8), (3, 2, 1, 8, 8), (2, 1, 8, 8), (3, 8, 8), (3, 2, 3, 8, 8, 1)], ids=str
)
def test_a_wrong_shape_is_refused_with_both_shapes(shape):
    expected = r"expected images \[B, C=3, H, W\] or a sequence \[T=3, B, C=3, H, W\], got "
    with pytest.raises(ValueError, match=expected + r"\[" + ", ".join(map(str, shape))):
        small()(torch.zeros(shape))


def test_encoders_take_images_only():
    with pytest.raises(ValueError, match=r"expected images \[B, C=3, H, W\], got"):
        small(coding="rate")(torch.zeros(3, 2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": 0}, "T must be an integer >= 1"),
        ({"T": 2.5}, "T must be an integer >= 1"),
        ({"T": True}, "T must be an integer >= 1, got True"),
        ({"width": 0}, "width must be"),
        ({"depth": [1, 1]}, "depth must be 3 integers >= 1"),
        ({"depth": [1, 0, 1]}, r"depth\[1\] must be an integer >= 1, got 0"),
        ({"depth": [1.5, 1, 1]}, r"depth\[0\] must be an integer >= 1, got 1\.5"),
        ({"depth": [1, 1, True]}, r"depth\[2\] must be an integer >= 1, got True"),
        ({"depth": "111"}, r"depth\[0\] must be an integer >= 1, got '1'"),
        ({"depth": 3}, "depth must be 3 integers >= 1"),
        ({"neuron": "mnist"}, "neuron must be one of cifar, imagenet"),
        ({"backend": "triton"}, "backend must be one of"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_sizes_and_constants_of_other_libraries_are_numbers() -> None:
    sizes = {"width": np.int64(8), "depth": list(np.ones(3, int)), "tau": np.float32(4), "v_threshold": np.float16(0.5)}
    net = create_model("gac_msresnet18_cifar", np.int32(5), np.int64(3), **sizes)
    assert [type(size) for size in (net.T, net.num_classes, net.lif.tau, net.lif.v_threshold)] == [
        int,
        int,
        float,
        float,
    ]
    assert (net.lif.tau, net.lif.v_threshold, net(torch.rand(2, 3, 8, 8)).shape) == (4.0, 0.5, (3, 2, 5))


@pytest.mark.parametrize("place", ["lif", "stages.0.0.lif2", "coding.lif"])
def test_a_neuron_in_another_step_mode_is_refused(place: str) -> None:
    net = small()
    net.set_submodule(place, neuron.LIFNode())  # SpikingJelly's default is step mode "s"
    message = rf"{place} is in step mode 's', the network in 'm': use functional\.set_step_mode\(network, 'm'\)"
    with pytest.raises(ValueError, match=message):
        net(torch.rand(2, 3, 8, 8))
    functional.set_step_mode(net, "m")
    assert net(torch.rand(2, 3, 8, 8)).shape == (3, 2, 5)


def test_a_sequence_neuron_in_a_network_of_single_steps_is_refused() -> None:
    net = small(coding="direct")
    functional.set_step_mode(net, "s")
    net.stages[0][0].lif1 = LIFNode()
    with pytest.raises(ValueError, match=r"stages\.0\.0\.lif1 is in step mode 'm', the network in 's'"):
        net(torch.rand(2, 3, 8, 8))


def test_a_container_keeps_the_step_mode_of_what_it_holds() -> None:
    net, whole = small(), small()
    constants = {"decay_input": False, "v_threshold": 0.5}
    net.lif = layer.MultiStepContainer(neuron.LIFNode(**constants))
    whole.lif = neuron.LIFNode(**constants, step_mode="m")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(images), whole(images))


class Looping(nn.Module):
    """Takes a sequence, and a step of it at a time."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.node(x) for x in x_seq])


def test_a_module_of_somebodys_own_may_go_step_by_step():
    net, whole = small(), small()
    constants = {"decay_input": False, "v_threshold": 0.5}
    net.lif = Looping(neuron.LIFNode(**constants))
    whole.lif = neuron.LIFNode(**constants, step_mode="m")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(images), whole(images))


@pytest.mark.parametrize("coding", ["gac", "direct"])
@pytest.mark.parametrize("name", ["msresnet18_cifar", "msresnet18"])
@pytest.mark.parametrize("as_sequence", [False, True])
def test_channels_last_reaches_every_convolution(name, coding, as_sequence):
    net = small(name, coding=coding, depth=depth_of_one(name)).to(memory_format=torch.channels_last)
    wrong = []

    def check(conv_name):
        def hook(_module, inputs):
            if not inputs[0].is_contiguous(memory_format=torch.channels_last):
                wrong.append(conv_name)

        return hook

    for conv_name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(check(conv_name))
    frames = torch.randn(3 * 2, 3, 64, 64).to(memory_format=torch.channels_last)
    net(frames.unflatten(0, (3, 2)) if as_sequence else frames[:2])
    assert wrong == []


def test_bytes_are_refused():
    with pytest.raises(ValueError, match=r"expected floating-point images, got torch\.uint8"):
        small()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("coding", ["direct", "rate", "latency", "phase"])
def test_another_number_of_steps_is_set_everywhere(coding):
    net, longer = alive(coding=coding), alive(coding=coding, T=5)
    longer.load_state_dict(net.state_dict())
    net.T = 5
    results = []
    for each in (net, longer):
        torch.manual_seed(1)
        results.append(each(torch.rand(2, 3, 16, 16)))
    assert torch.equal(*results)
    assert results[0].shape[0] == net.T == 5
    assert "T=5" in repr(net)


@pytest.mark.parametrize(
    ("coding", "T", "message"),
    [
        ("gac", 5, "T of gated attention coding is fixed, as its temporal attention has weights for"),
        ("latency", 1, "latency coding needs T >= 2"),
        ("direct", 0, "T must be an integer >= 1, got 0"),
        ("rate", 2.5, r"T must be an integer >= 1, got 2\.5"),
    ],
)
def test_a_number_of_steps_that_cannot_be_is_refused(coding, T, message):
    net = small(coding=coding)
    before = net.T
    with pytest.raises(ValueError, match=message):
        net.T = T
    assert before == net.T
    assert net(torch.rand(2, 3, 16, 16)).shape[0] == before
