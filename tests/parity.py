"""The numbers of the original implementation, and the networks they belong to."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from gac.checkpoint import build_network

HERE = Path(__file__).parent / "goldens"

_spec = importlib.util.spec_from_file_location("recipe", HERE / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

CASES = json.loads((HERE / "cases.json").read_text())


def load(file: str, case: str) -> dict[str, np.ndarray]:
    """Return the arrays of one case of a file by the names that follow the case's."""
    with np.load(HERE / file) as arrays:
        return {key.removeprefix(f"{case}."): arrays[key] for key in arrays.files if key.startswith(f"{case}.")}


def network(case: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the network of a case, built from a checkpoint in the authors' format, and its images [B, 3, H, W]."""
    weights, images = recipe.net_case(case, HERE)
    state = recipe.original_state(HERE / f"{case['net']}_keys.json", weights)
    # Without gated attention the weights do not say T.
    T = None if case["using_gac"] else case["T"]
    net = build_network({key: torch.from_numpy(value) for key, value in state.items()}, T)
    net.set_backend("torch")
    return net.to(dtype), torch.from_numpy(images).to(dtype)


def sample(tensor: torch.Tensor) -> np.ndarray:
    """Return the entries of a tensor that the goldens store."""
    flat = tensor.detach().reshape(-1).double().numpy()
    return flat[recipe.sample_indices(flat.size)]


def rms_unit(norm: np.ndarray, numel: np.ndarray) -> np.ndarray:
    """Return the root mean square of tensors, the unit for comparing single entries and means."""
    return norm / np.sqrt(numel)
