"""State dicts in the authors' names: every key is used, and what they hold is checked."""

import pytest
import torch

import gac
import parity
from checkpoint_files import CASES, authors_file
from gac.checkpoint import initialise, read_checkpoint


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["quiet_gac_T6", "quiet_gac_T2", "imagenet18", "imagenet34"])
def test_the_authors_file_gives_the_authors_logits(tmp_path, name, prefix):
    # Small images: tests/test_parity.py has the large ones, from the same weights without a file.
    case = CASES[name]
    path, images = authors_file(tmp_path, case, prefix)
    net = gac.load_checkpoint(path)
    assert not net.training
    assert (net.T, net.num_classes, net.coding_name) == (case["T"], case["num_classes"], "gac")
    gold = parity.load(case["file"], case["case"])
    with torch.no_grad():
        logits = net.double()(images.double()).transpose(0, 1)
    torch.testing.assert_close(logits, torch.from_numpy(gold["f64.eval_logits"]), atol=1e-10, rtol=0)


def test_the_authors_file_without_gated_attention_takes_T(tmp_path):
    case = CASES["quiet_plain_T6"]
    path, images = authors_file(tmp_path, case)
    net = gac.load_checkpoint(path)
    assert (net.T, net.coding_name) == (6, "direct")
    gold = parity.load(case["file"], case["case"])
    with torch.no_grad():
        logits = net.double()(images.double()).transpose(0, 1)
    torch.testing.assert_close(logits, torch.from_numpy(gold["f64.eval_logits"]), atol=1e-10, rtol=0)
    assert gac.load_checkpoint(path, T=2).T == 2


def tampered(folder, change):
    path, _ = authors_file(folder, CASES["quiet_gac_T2"])
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def test_aliases_that_disagree_are_refused(tmp_path):
    path = tampered(tmp_path, lambda state: state["layer1.0.conv1_s.bn.bn.bias"].add_(1))
    with pytest.raises(ValueError, match=r"hold different values: layer1\.0\.bn1\.bn\.bias and layer1\.0\.conv1_s"):
        gac.load_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex32])
def test_aliases_of_a_type_that_cannot_be_compared_are_refused(tmp_path, dtype):
    name = "layer1.0.conv1_s.bn.bn.bias"
    path = tampered(tmp_path, lambda state: state.update({name: state[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} is {dtype}, expected a floating-point type"):
        gac.load_checkpoint(path)
    with pytest.raises(ValueError, match=rf"{name} is {dtype}, expected a floating-point type"):
        initialise(gac.create_model("gac_msresnet18_cifar", 10, 2), read_checkpoint(path))


def test_unknown_keys_are_listed(tmp_path):
    path = tampered(tmp_path, lambda state: state.update({"layer1.0.gate.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unknown keys: layer1\.0\.gate\.weight"):
        gac.load_checkpoint(path)


def test_without_strict_unknown_keys_are_left_out_and_named(tmp_path, caplog):
    path = tampered(tmp_path, lambda state: state.update({"layer1.0.gate.weight": torch.zeros(1, dtype=torch.long)}))
    loaded = gac.load_checkpoint(path, strict=False)
    assert caplog.messages == ["not loaded, unknown keys: layer1.0.gate.weight"]
    authors, _ = authors_file(tmp_path, CASES["quiet_gac_T2"])
    whole = gac.load_checkpoint(authors).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.state_dict().items())


def test_missing_keys_are_listed(tmp_path):
    def drop(state):
        for key in [key for key in state if key.startswith("layer1.0.conv2") and key.endswith("weight")]:
            if state[key].dim() == 4:
                del state[key]

    with pytest.raises(ValueError, match=r"missing keys: stages\.0\.0\.conv2\.conv\.weight$"):
        gac.load_checkpoint(tampered(tmp_path, drop))


def test_wrong_shapes_are_listed(tmp_path):
    def shrink(state):
        for key in ("layer2.0.bn1.bn.bias", "layer2.0.bn1.seqbn.module.bias"):
            state[key] = state[key][:-1]
        for key in ("layer2.0.conv1_s.bn.bn.bias", "layer2.0.conv1_s.bn.seqbn.module.bias"):
            state[key] = state[key][:-1]

    with pytest.raises(ValueError, match=r"wrong shapes: stages\.1\.0\.conv1\.norm\.bias \[255\] instead of \[256\]"):
        gac.load_checkpoint(tampered(tmp_path, shrink))
