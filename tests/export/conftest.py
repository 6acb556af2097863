"""The trained digits network, and what is exported of it, made once for all tests."""

import pytest
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.export import onnx, program
from gac.export.source import Source, open_source


@pytest.fixture(scope="session")
def digits() -> Source:
    """The network that travels in the package, on all 360 test images."""
    return open_source("digits", 360)


@pytest.fixture(scope="session")
def digits_onnx(digits: Source) -> object:
    """Its ONNX model in the form mean; tests leave it as it is."""
    return onnx.build_model(digits)


@pytest.fixture(scope="session")
def digits_program(digits: Source) -> bytes:
    """The content of its .pt2 file in the form mean."""
    return program.build_program(digits)


@pytest.fixture(scope="session")
def direct_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with direct coding, of the digits network's trained weights without its gated attention.

    It still gets two digits in three right, and neurons fire in all layers.
    """
    carried = read_checkpoint(FOLDER / "digits.safetensors")
    config = carried["config"] | {
        "model": carried["config"]["model"] | {"name": "msresnet18_cifar", "coding": "direct"}
    }
    weights = {name: tensor.float() for name, tensor in carried["model"].items() if not name.startswith("coding.")}
    path = tmp_path_factory.mktemp("direct") / "direct.pt"
    write_checkpoint(path, carried | {"model": weights, "config": config})
    return str(path)


@pytest.fixture(scope="session")
def direct(direct_file: str) -> Source:
    """That network, on a few test images."""
    return open_source(direct_file, 18)


@pytest.fixture(autouse=True)
def quiet_core() -> None:
    """Run PyTorch, and with it the engines, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
