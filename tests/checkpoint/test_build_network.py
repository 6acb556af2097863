"""From the content of a checkpoint to its network."""

import pytest
import torch

import gac
from checkpoint_files import CASES, authors_file, our_file
from gac.errors import InputError
from gac.models import create_model


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
