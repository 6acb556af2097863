"""The numbers of the original implementation, and the networks they belong to."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gac.checkpoint import build_network

HERE = Path(__file__).parent / "goldens"
COMPLETE = Path(__file__).parents[2] / "shared" / "goldens"

_spec = importlib.util.spec_from_file_location("recipe", HERE / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

CASES = json.loads((HERE / "cases.json").read_text())


def load(file: str, prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays of one case without their prefix; skip where the file with them is not at hand."""
    for folder in (HERE, COMPLETE):
        if (folder / file).is_file():
            with np.load(folder / file) as arrays:
                found = {k.removeprefix(f"{prefix}."): arrays[k] for k in arrays.files if k.startswith(f"{prefix}.")}
            if found:
                return found
    pytest.skip(f"{file} with case {prefix} is not in tests/goldens, and ../shared/goldens is not there")


def network(case: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the network of a case, loaded as a checkpoint in the authors' format, and its images."""
    weights, images = recipe.net_case(case, HERE)
    state = recipe.original_state(HERE / f"{case['net']}_keys.json", weights)
    net = build_network({key: torch.from_numpy(value) for key, value in state.items()}, _T(case))
    net.set_backend("torch")
    return net.to(dtype), torch.from_numpy(images).to(dtype)


def _T(case: dict) -> int | None:
    return None if case["using_gac"] else case["T"]


def sample(tensor: torch.Tensor) -> np.ndarray:
    """Return the entries of a tensor that the goldens store."""
    flat = tensor.detach().reshape(-1).double().numpy()
    return flat[recipe.sample_indices(flat.size)]


def rms_unit(norm: np.ndarray, numel: np.ndarray) -> np.ndarray:
    """Return the root mean square of tensors, the unit for comparing single entries and means."""
    return norm / np.sqrt(numel)
