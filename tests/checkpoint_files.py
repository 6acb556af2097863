"""Checkpoints on disk, of this package's format and of the authors'."""

from dataclasses import asdict
from pathlib import Path

import torch

import parity
from gac.checkpoint import write_checkpoint
from gac.config import ModelConfig
from gac.models import create_model
from gac.models.ms_resnet import MSResNet

CASES = {case["case"]: case for case in parity.CASES["nets"] if case["file"] == "cifar_net.npz"}
CASES |= {case["net"]: case for case in parity.CASES["nets"] if case["case"] == "quiet_T4_32"}


def authors_file(folder: Path, case: dict, prefix: str = "") -> tuple[Path, torch.Tensor]:
    """Write the weights of a golden case as the authors' code does; return the file and the case's images."""
    weights, images = parity.recipe.net_case(case, parity.HERE)
    state = parity.recipe.original_state(parity.HERE / f"{case['net']}_keys.json", weights)
    path = folder / "authors.pth"
    torch.save({prefix + key: torch.from_numpy(value) for key, value in state.items()}, path)
    return path, torch.from_numpy(images)


def our_file(folder: Path, **overrides: object) -> tuple[Path, MSResNet]:
    """Write a checkpoint of a small network, with ``overrides`` of its entries; return the file and the network."""
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
    write_checkpoint(path, payload | overrides)
    return path, net
