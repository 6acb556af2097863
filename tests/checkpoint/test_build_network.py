"""From the content of a checkpoint to its network."""

import io
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import gac
from checkpoint_files import CASES, authors_file, our_file
from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.config import Config, ModelConfig
from gac.errors import InputError
from gac.models import create_model
from hostile import wide


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
    coding, neuron = None if name.startswith("gac") else "direct", "cifar" if "cifar" in name else "imagenet"
    loaded = gac.load_checkpoint(tmp_path / "weights.pt", T=T, coding=coding, neuron=neuron)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), net(images))


@pytest.mark.parametrize("gate", ["temporal", "spatial_channel"])
def test_an_ablation_of_the_gate_loads(tmp_path: Path, gate: str, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(T=6, width=4, depth=[1, 1, 1], kernel_size=3, gate=gate)
    net = create_model(num_classes=7, in_channels=1, **asdict(config)).eval()
    images = torch.randn(2, 1, 8, 8)
    entries = {"model": net.state_dict(), "config": {"model": asdict(config)}, "num_classes": 7, "in_channels": 1}
    write_checkpoint(tmp_path / "best.pt", entries)
    assert gac.load_checkpoint(tmp_path / "best.pt")(images).equal(net(images))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    assert gac.load_checkpoint(tmp_path / "weights.pt", neuron="cifar")(images).equal(net(images))
    # Only a temporal attention shows T.
    assert ("assuming T=6" in caplog.text) is (gate == "spatial_channel")
    for other in {"both", "temporal", "spatial_channel"} - {gate}:
        write_checkpoint(tmp_path / "best.pt", entries | {"config": {"model": asdict(config) | {"gate": other}}})
        with pytest.raises(InputError, match=r"missing keys: coding\.gate|unknown keys: coding\.gate"):
            gac.load_checkpoint(tmp_path / "best.pt")


def test_a_checkpoint_from_before_the_ablations_has_the_whole_gate(tmp_path: Path) -> None:
    path, net = our_file(tmp_path)
    payload = read_checkpoint(path)
    del payload["config"]["model"]["gate"]
    write_checkpoint(path, payload)
    images = torch.randn(2, 1, 8, 8)
    assert gac.load_checkpoint(path)(images).equal(net(images))


def test_a_nested_state_dict_loads(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T2"])
    torch.save({"epoch": 3, "state_dict": torch.load(path, weights_only=True)}, path)
    assert gac.load_checkpoint(path).T == 2


def test_a_T_that_contradicts_the_weights_is_refused(tmp_path):
    path, _ = authors_file(tmp_path, CASES["quiet_gac_T4"])
    with pytest.raises(ValueError, match="T=6 was asked for, but its gated attention is made for T=4"):
        gac.load_checkpoint(path, T=6)


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
        (ours_but(config={"model": 3}), "its configuration: model must be a section with its fields; got 3"),
        (ours_but(config={"model": {"T": "six"}}), r"model\.T must be a whole number; got 'six'"),
        (ours_but(config={"model": {"colour": 3}}), "colour"),
        (ours_but(model={"stem.conv.weight": 3}), r"other entries: stem\.conv\.weight"),
        (lambda folder: {"state_dict": 3}, "got other entries: state_dict"),
        (lambda folder: {}, "holds nothing"),
        (lambda folder: {"n_averaged": torch.tensor(1)}, r"missing keys: stem\.conv\.weight"),
        (ours_but(num_classes=2**40), r"says num_classes 1099511627776, and its weights are of num_classes 7"),
        (
            ours_but(config={"model": {"width": 60_000, "depth": [1, 1, 1]}}),
            r"says width 60000, and its weights are of",
        ),
        (ours_but(config={"model": {"width": 4, "depth": [300, 1, 1]}}), r"says depth \[300, 1, 1\], and its weights"),
        (bare_but(head__bias=torch.full((4,), torch.inf)), r"head\.bias holds values that are not finite"),
        (bare_but(head__bias=torch.zeros(4, dtype=torch.long)), r"head\.bias is torch\.int64, expected a floating"),
        (bare_but(head__bias=torch.zeros(4, dtype=torch.cfloat)), r"head\.bias is torch\.complex64, expected"),
        (bare_but(stem__norm__running_var=-torch.ones(4)), r"stem\.norm\.running_var holds values below 0"),
        (
            bare_but(head__weight=torch.zeros(1).expand(2**40, 32)),
            r"head\.weight has shape .*, more than the file",
        ),
        (bare_but(head__bias=torch.zeros(4, dtype=torch.float8_e5m2)), r"head\.bias is torch\.float8_e5m2, expected"),
        (bare_but(stem__norm__num_batches_tracked=torch.tensor(-1)), "num_batches_tracked holds values below 0"),
        (bare_but(stem__norm__num_batches_tracked=torch.tensor(1j)), "num_batches_tracked is torch.complex64"),
        (bare_but(head__bias=torch.nested.nested_tensor([torch.zeros(4)])), r"head\.bias is no plain tensor"),
        (ours_but(epoch=torch.zeros(2)), "entry epoch is damaged"),
        (ours_but(weights=[]), "entry weights is damaged"),
        (ours_but(backend=3), "entry backend is damaged"),
        (ours_but(backend_reason=["a"]), "entry backend_reason is damaged"),
        (ours_but(format=wide()), "format a list is not known"),
        (bare_but(head__bias=torch.zeros(4).to_sparse()), r"head\.bias is no plain tensor"),
        (
            bare_but(**{f"stages__0__0__{k}": torch.zeros(1) for k in "abcde"}),
            r"unknown keys: stages\.0\.0\.a, stages\.0\.0\.b, stages\.0\.0\.c and 2 more",
        ),
        (lambda folder: {1: torch.zeros(3)}, "other entries: 1"),
        (bare_but(stem__conv__weight=torch.zeros(3)), "expected 4 dimensions"),
        (bare_but(head__weight=torch.zeros(())), "expected 2 dimensions"),
        (bare_but(coding__gate__temporal__squeeze__weight=torch.zeros(0, 3)), "none of them 0"),
    ],
)
def test_damaged_content_is_one_clear_line(tmp_path, content, message):
    torch.save(content(tmp_path), tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=message) as raised:
        gac.load_checkpoint(tmp_path / "damaged.pt", neuron="cifar")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: nn.DataParallel(net).state_dict(),
        lambda net: torch.compile(net).state_dict(),
        lambda net: nn.DataParallel(torch.compile(nn.DataParallel(net))).state_dict(),
        lambda net: gac.BatchFirst(net).state_dict(),
        lambda net: torch.optim.swa_utils.AveragedModel(nn.DataParallel(net)).state_dict(),
        lambda net: torch.compile(torch.optim.swa_utils.AveragedModel(net)).state_dict(),
        lambda net: {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}},
        lambda net: {"epoch": 3, "arch": "x", "state_dict_ema": nn.DataParallel(net).state_dict()},
        lambda net: {"model_ema": {"module": net.state_dict()}["module"], "optimizer": {}},
        lambda net: {"model": {"state_dict": {f"net.module._orig_mod.{k}": v for k, v in net.state_dict().items()}}},
    ],
)
def test_what_wrappers_and_trainers_add_is_taken_off(wrap: Callable, tmp_path: Path) -> None:
    _, net = our_file(tmp_path)
    torch.save(wrap(net), tmp_path / "wrapped.pt")
    images = torch.randn(2, 1, 8, 8)
    assert gac.load_checkpoint(tmp_path / "wrapped.pt", neuron="cifar")(images).equal(net(images))


def test_a_file_that_is_open_and_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, net = our_file(tmp_path)
    images = torch.randn(2, 1, 8, 8)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (io.BytesIO(path.read_bytes()), "~/best.pt"):
        assert gac.load_checkpoint(source)(images).equal(net(images))
    with path.open("rb") as file:
        assert gac.load_checkpoint(file)(images).equal(net(images))
    with pytest.raises(InputError, match=r"~nosuchuser/best\.pt: no such file"):
        gac.load_checkpoint("~nosuchuser/best.pt")
    with pytest.raises(InputError, match="checkpoint in memory: damaged"):
        gac.load_checkpoint(io.BytesIO(b"nothing"))


@pytest.mark.parametrize("coding", ["direct", "rate", "latency", "phase"])
def test_what_weights_do_not_show_has_to_be_said(coding: str, tmp_path: Path) -> None:
    net = create_model("msresnet18_cifar", 4, 3, coding=coding, width=4, depth=[1, 1, 1], neuron="imagenet").eval()
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    with pytest.raises(InputError, match="do not show whether it is direct, rate, latency or phase"):
        gac.load_checkpoint(path)
    loaded = gac.load_checkpoint(path, T=3, coding=coding, neuron="imagenet")
    images = torch.rand(2, 3, 8, 8)
    results = []
    for each in (net, loaded):
        torch.manual_seed(0)
        results.append(each(images))
    assert results[0].equal(results[1])
    assert (loaded.coding_name, loaded.T) == (coding, 3)


CHOSEN = {"tau": 3.0, "v_threshold": 0.6, "surrogate": "atan", "detach_reset": True}


def test_a_checkpoint_says_its_neurons_constants(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(T=3, width=4, depth=[1, 1, 1], **CHOSEN))
    torch.manual_seed(0)
    net = create_model(num_classes=7, in_channels=1, **asdict(config.model)).eval()
    entries = {"model": net.state_dict(), "config": config.to_dict(), "num_classes": 7, "in_channels": 1}
    path = tmp_path / "best.pt"
    write_checkpoint(path, entries)
    images = torch.randn(2, 1, 8, 8)
    assert gac.load_checkpoint(path)(images).equal(net(images))
    assert gac.load_checkpoint(path, tau=3.0, neuron="cifar")(images).equal(net(images))
    assert gac.load_checkpoint(path).lif.lif_parameters().flatten() == net.lif.lif_parameters().flatten()
    with pytest.raises(InputError, match=r"tau=2\.0 was asked for, but it was trained with 3\.0"):
        gac.load_checkpoint(path, tau=2.0)
    for damaged, message in (({"tau": 0.5}, "model.tau must be greater than 1"), ({"surrogate": 3}, "model.surrogate")):
        values = config.to_dict()
        values["model"] |= damaged
        write_checkpoint(path, entries | {"config": values})
        with pytest.raises(InputError, match=message):
            gac.load_checkpoint(path)


def test_a_checkpoint_from_before_the_constants_has_those_of_its_preset(tmp_path: Path) -> None:
    path, net = our_file(tmp_path)
    payload = read_checkpoint(path)
    old = {name: value for name, value in payload["config"]["model"].items() if name not in CHOSEN}
    assert len(old) == len(payload["config"]["model"]) - 4
    write_checkpoint(path, payload | {"config": {"model": old}})
    images = torch.randn(2, 1, 8, 8)
    assert gac.load_checkpoint(path)(images).equal(net(images))


def test_a_state_dicts_neurons_have_to_be_said(tmp_path: Path) -> None:
    net = create_model("gac_msresnet18_cifar", 4, 3, width=4, depth=[1, 1, 1], **CHOSEN).eval()
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    images = torch.randn(2, 3, 8, 8)
    for said in ({}, {"neuron": "imagenet"}):
        assert gac.load_checkpoint(path, **CHOSEN, **said)(images).equal(net(images))
    assert gac.load_checkpoint(path, neuron="cifar").lif.tau == 2.0
    for said in ({}, {"tau": 3.0, "v_threshold": 0.6}):
        with pytest.raises(
            InputError, match=r"do not show its neurons: .* neuron= \(eval\.py: --model\.neuron\), cifar or"
        ):
            gac.load_checkpoint(path, **said)


def test_what_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path, _ = our_file(tmp_path)
    with pytest.raises(InputError, match="coding=rate was asked for, but it was trained with gac"):
        gac.load_checkpoint(path, coding="rate")
    with pytest.raises(InputError, match="neuron=imagenet was asked for, but it was trained with cifar"):
        gac.load_checkpoint(path, neuron="imagenet")


def test_without_strict_the_rest_is_loaded_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, net = our_file(tmp_path)
    with pytest.raises(InputError, match=r"wrong shapes: head\.bias \[7\] instead of \[5\], head\.weight"):
        gac.load_checkpoint(path, num_classes=5)
    with caplog.at_level(logging.WARNING, "gac"):
        loaded = gac.load_checkpoint(path, num_classes=5, strict=False)
    assert loaded(torch.randn(2, 1, 8, 8)).shape == (3, 2, 5)
    assert loaded.stem.conv.weight.equal(net.stem.conv.weight)
    assert "not loaded, wrong shapes: head.bias" in caplog.text
