"""Networks in a folder as the Hugging Face Hub has it: what is saved comes back, and says only what is true of it."""

import importlib
import json
import shutil
import socket
import sys

import pytest
import torch
from huggingface_hub import hub_mixin

import gac
from checkpoint_files import our_file
from gac.checkpoint import find_released, read_checkpoint
from gac.cli import eval_main
from gac.data.digits import load_digits
from gac.errors import InputError
from gac.hub import HubNetwork

DIGITS = find_released("digits")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "digits"
    HubNetwork.from_released("digits").save_pretrained(folder)
    return folder


def test_what_was_saved_comes_back(folder):
    again = HubNetwork.from_pretrained(folder)
    assert not again.training
    assert again.card == DIGITS.card
    images = load_digits().splits["test"].images[:50]
    network, transform, _ = gac.load_pretrained("digits")
    with torch.inference_mode():
        assert torch.equal(again(again.transform(images)), network(transform(images)))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_its_weights_are_a_checkpoint(folder, tmp_path):
    scores = tmp_path / "scores.json"
    command = ["--checkpoint", str(folder / "model.safetensors"), "--json", str(scores), "--device=cpu"]
    assert eval_main(command) == 0
    assert abs(json.loads(scores.read_text())["scores"]["correct"] - 357) <= 1


def test_a_network_that_was_trained_on_says_nothing_of_the_old_scores(folder, tmp_path, caplog):
    network = HubNetwork.from_pretrained(folder)
    with torch.no_grad():
        network.network.head.bias += 1
    network.save_pretrained(tmp_path / "tuned")
    assert caplog.messages == ["the weights are not those that the card is of: scores, command and seed are left out"]
    again = HubNetwork.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again.network.head.bias, network.network.head.bias)
    assert again.card.keys() == {"config", "data", "num_classes", "in_channels"}
    text = (tmp_path / "tuned/README.md").read_text()
    assert "Top-1" not in text
    assert "train.py" not in text
    assert "Top-1 99.17 % on the 360 test images" in (folder / "README.md").read_text()


def test_the_licence_is_the_one_that_was_named(folder, tmp_path):
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    HubNetwork.from_pretrained(folder).save_pretrained(tmp_path, model_card_kwargs={"license": "MIT"})
    assert "license: mit" in (tmp_path / "README.md").read_text()


def test_weights_that_cannot_be_written_leave_those_that_were_there(folder, tmp_path, monkeypatch):
    network = HubNetwork.from_pretrained(folder)
    network.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(file, *_):
        file.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gac.hub.write_weights", full)
    with pytest.raises(OSError, match="No space left"):
        network.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_upload_holds_the_same_files(folder, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return repo_id

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert HubNetwork.from_pretrained(folder).push_to_hub("someone/digits") == "someone/digits"
    assert uploaded.keys() == {"model.safetensors", "config.json", "README.md"}
    assert uploaded["README.md"] == (folder / "README.md").read_bytes()


def test_a_folder_that_contradicts_itself_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["card"]["num_classes"] = 11
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json says something else than model\.safetensors"):
        HubNetwork.from_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        HubNetwork.from_pretrained(tmp_path / "other")


def test_what_cannot_be_chosen_is_refused(folder):
    assert HubNetwork.from_pretrained(folder, revision="main", local_files_only=True).network.T == 4
    with pytest.raises(InputError, match=r"digits: T, strict cannot be chosen: a network is as it was trained"):
        HubNetwork.from_pretrained(folder, T=2, strict=False)


def test_a_file_that_does_not_say_its_data_is_refused(tmp_path):
    path, network = our_file(tmp_path)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    for each in (path, tmp_path / "bare.pt"):
        with pytest.raises(InputError, match="expected one that says its configuration and data set"):
            HubNetwork.from_checkpoint(each)


def test_a_run_becomes_a_repository(tmp_path):
    path, network = our_file(tmp_path, data=DIGITS.card["data"] | {"num_classes": 7, "class_names": None}, step=3)
    assert "training" not in read_checkpoint(path)
    HubNetwork.from_checkpoint(path).save_pretrained(tmp_path / "out")
    again = HubNetwork.from_pretrained(tmp_path / "out")
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "gac.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"huggingface_hub is not installed: pip install '\.\[hub\]'"):
        importlib.import_module("gac.hub")
