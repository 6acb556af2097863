import os
import pickle
import random
from dataclasses import asdict

import parity
import pytest
import torch

import gac
from gac import checkpoint
from gac.config import ModelConfig
from gac.errors import InputError
from gac.models import create_model

CASES = {case["case"]: case for case in parity.CASES["nets"] if case["file"] == "cifar_net.npz"}
CASES |= {case["net"]: case for case in parity.CASES["nets"] if case["case"] == "quiet_T4_32"}


def authors_file(folder, case, prefix=""):
    weights, images = parity.recipe.net_case(case, parity.HERE)
    state = parity.recipe.original_state(parity.HERE / f"{case['net']}_keys.json", weights)
    path = folder / "authors.pth"
    torch.save({prefix + key: torch.from_numpy(value) for key, value in state.items()}, path)
    return path, torch.from_numpy(images)


def our_file(folder, **overrides):
    config = ModelConfig(width=4, depth=[1, 1, 1], T=3)
    torch.manual_seed(0)
    net = create_model(num_classes=7, in_channels=1, **asdict(config)).eval()
    payload = {
        "model": net.state_dict(),
        "config": {"model": asdict(config)},
        "num_classes": 7,
        "in_channels": 1,
    }
    path = folder / "best.pt"
    checkpoint.write_checkpoint(path, payload | overrides)
    return path, net


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["gac_T6_c100", "gac_T6_c10", "quiet_gac_T2", "imagenet18", "imagenet34"])
def test_the_authors_file_gives_the_authors_logits(tmp_path, name, prefix):
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


def test_a_T_that_contradicts_the_weights_is_refused(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T4"])
    with pytest.raises(ValueError, match="T=6 was asked for, but its gated attention is made for T=4"):
        gac.load_checkpoint(path, T=6)


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


def test_unknown_keys_are_listed(tmp_path):
    path = tampered(tmp_path, lambda state: state.update({"layer1.0.gate.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unknown keys: layer1\.0\.gate\.weight"):
        gac.load_checkpoint(path)


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


def test_a_nested_state_dict_loads(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T2"])
    torch.save({"epoch": 3, "state_dict": torch.load(path, weights_only=True)}, path)
    assert gac.load_checkpoint(path).T == 2


def test_our_file_gives_the_same_network(tmp_path):
    path, net = our_file(tmp_path)
    loaded = gac.load_checkpoint(path)
    assert (loaded.T, loaded.num_classes, loaded.in_channels, loaded.training) == (3, 7, 1, False)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), net(images))


@pytest.mark.parametrize("name", ["gac_msresnet18_cifar", "msresnet18_cifar", "gac_msresnet18", "msresnet34"])
@pytest.mark.parametrize("T", [1, 5])
def test_a_bare_state_dict_in_our_names_loads(tmp_path, name, T):
    net = create_model(name, 4, T, width=4, kernel_size=3, reduction=3).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    loaded = gac.load_checkpoint(tmp_path / "weights.pt", T=T)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), net(images))


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_file_with_code_does_not_run(tmp_path, save):
    victim, path = tmp_path / "ran", tmp_path / "evil.pt"
    save({"model": Malicious(str(victim))}, path)
    with pytest.raises(ValueError, match=r"evil\.pt: .*(could run code|damaged or not a PyTorch file)"):
        gac.load_checkpoint(path)
    assert not victim.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert victim.exists(), "the file would have done harm"


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_line(tmp_path, kept):
    path, _ = our_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"best\.pt: damaged or not a PyTorch file") as raised:
        gac.load_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_foreign_content_is_one_clear_line(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    expected = {
        "absent.pt": "no such file",
        ".": "is a folder",
        "image.png": "damaged or not a PyTorch file",
        "tensor.pt": "holds a Tensor, expected a dict",
        "empty.pt": "holds nothing",
        "other.pt": "got other entries: epoch",
        "foreign.pt": "unknown keys: weight",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            gac.load_checkpoint(tmp_path / name)


def ours_but(**changes):
    def content(folder):
        path, _ = our_file(folder)
        return torch.load(path, weights_only=True) | changes

    return content


def bare_but(**changes):
    def content(folder):
        state = create_model("gac_msresnet18_cifar", 4, 2, width=4, depth=[1, 1, 1]).state_dict()
        return dict(state) | {key.replace("__", "."): value for key, value in changes.items()}

    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda folder: {"format": "gac-checkpoint-1"}, "entry model is missing or damaged"),
        (ours_but(num_classes=None), "entry num_classes is missing or damaged"),
        (ours_but(config="x"), "entry config is missing or damaged"),
        (ours_but(config={"model": 3}), "entry config is damaged"),
        (ours_but(config={"model": {"T": "six"}}), r"model\.T must be a whole number; got 'six'"),
        (ours_but(config={"model": {"colour": 3}}), "colour"),
        (ours_but(model={"stem.conv.weight": 3}), r"other entries: stem\.conv\.weight"),
        (lambda folder: {"state_dict": 3}, "holds no state dict"),
        (lambda folder: {1: torch.zeros(3)}, "other entries: 1"),
        (bare_but(stem__conv__weight=torch.zeros(3)), "expected 4 dimensions"),
        (bare_but(head__weight=torch.zeros(())), "expected 2 dimensions"),
        (bare_but(coding__gate__temporal__squeeze__weight=torch.zeros(0, 3)), "none of them 0"),
    ],
)
def test_damaged_content_is_one_clear_line(tmp_path, content, message):
    torch.save(content(tmp_path), tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=message) as raised:
        gac.load_checkpoint(tmp_path / "damaged.pt")
    assert "\n" not in str(raised.value)


def test_flipped_bytes_never_give_anything_but_one_clear_line(tmp_path):
    path, _ = our_file(tmp_path)
    content = bytearray(path.read_bytes())
    generator = random.Random(0)
    messages = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[generator.randrange(2000)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            gac.load_checkpoint(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("kind", ["flipped bit", "zeros to the end", "cut short"])
def test_no_damage_anywhere_goes_unnoticed(tmp_path, kind):
    # Tensors included: torch.load alone would return them changed.
    payload = {"model": {"weight": torch.arange(600.0)}, "step": 3}
    path = tmp_path / "last.pt"
    checkpoint.write_checkpoint(path, payload)
    content, whole = path.read_bytes(), checkpoint.read_checkpoint(path)
    generator = random.Random(0)
    noticed = 0
    positions = generator.sample(range(len(content)), 400)
    for position in positions:
        damaged = bytearray(content)
        if kind == "flipped bit":
            damaged[position] ^= 1 << generator.randrange(8)
        else:
            damaged[position:] = bytes(len(content) - position) if kind == "zeros to the end" else b""
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.read_checkpoint(path)
        except checkpoint.DamagedCheckpoint:
            noticed += 1
        else:
            # The padding between the records means nothing.
            assert kind == "flipped bit"
            assert same(loaded, whole), position
    assert noticed > (200 if kind == "flipped bit" else 399)


def test_a_flipped_bit_in_a_tensor_of_the_authors_file_is_noticed(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T2"])
    content = bytearray(path.read_bytes())
    weight = max(torch.load(path, weights_only=True).values(), key=torch.numel)
    position = content.find(weight.numpy().tobytes())
    assert position > 0
    content[position + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        gac.load_checkpoint(path)


def test_a_file_from_before_archives_has_no_checksums_and_loads(tmp_path):
    net = create_model("gac_msresnet18_cifar", 4, 2, width=4)
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert gac.load_checkpoint(tmp_path / "old.pth").T == 2


def test_a_format_of_the_future_is_refused(tmp_path):
    path, _ = our_file(tmp_path, format="gac-checkpoint-9")
    with pytest.raises(ValueError, match="format 'gac-checkpoint-9' is not known"):
        gac.load_checkpoint(path)


def test_a_failing_write_keeps_the_previous_checkpoint(tmp_path):
    path, net = our_file(tmp_path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.write_checkpoint(path, {"model": net.state_dict(), "config": lambda: None})
    assert os.listdir(tmp_path) == ["best.pt"]
    assert gac.load_checkpoint(path).T == 3
