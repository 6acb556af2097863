"""The command line of eval.py."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gac.checkpoint import is_ours, read_checkpoint, read_config
from gac.config import EVALUATION_FIELDS, Config
from gac.errors import InputError
from gac.files import check_new_folder, check_writable, user_path
from gac.options.written import make_config, read_command_line

# What a bare state dict does not say.
_OF_NETWORK = ("T", "coding", "neuron", "tau", "v_threshold", "surrogate", "detach_reset")


class EvalArguments(NamedTuple):
    """The command line of eval.py.

    ``payload`` is the checkpoint's content, ``config`` its own with overrides, ``network`` those of T, coding,
    neuron and its constants, which :func:`gac.checkpoint.build_network` takes, ``amp`` that of train.amp, None if
    there is none, ``sha256`` the digest of the checkpoint's file.
    """

    checkpoint: Path
    payload: dict[str, Any]
    config: Config
    network: dict[str, Any]
    amp: str | None
    json: Path | None
    predictions: Path | None
    energy: bool
    report: Path | None
    saliency: Path | None
    layer: str | None
    sha256: str


def parse_eval(arguments: Sequence[str], processes: int = 1) -> EvalArguments:
    """Return what a command line of eval.py, run by so many processes, asks for, with the checkpoint read.

    Raises InputError.
    """
    given, overrides = read_command_line(
        arguments,
        "eval.py --checkpoint FILE [--json FILE] [--predictions FILE] [--energy] [--report FOLDER] "
        "[--saliency FILE] [--layer NAME]",
        "Score the network of a checkpoint on a test set. Defaults are the values it was trained with; a checkpoint of "
        "the authors holds none, so --data.name is required with it. Of what a checkpoint says, data.download is never "
        "followed, and data.root only where it exists on this machine.",
        {
            "--checkpoint FILE": "File of train.py or of the authors.",
            "--json FILE": "Write all numbers, the accuracy of each class, the confusion matrix, the configuration and"
            " the versions there.",
            "--predictions FILE": "Write the label, the prediction and the five most probable classes of each image"
            " there, as CSV. With it data.name imagefolder also takes a folder of images without class folders.",
            "--energy": "Count the operations of each layer on some of the test images and print the energy of an image"
            " in two conventions; see docs/energy.md.",
            "--report FOLDER": "Write a page about the network there, index.html, with all tables and figures behind"
            " it: accuracy, energy, firing rates, spikes, gates, saliency. The folder must be new or empty.",
            "--saliency FILE": "Draw some of the test images there, as PNG, under maps of what speaks for the class"
            " that each is taken for, at every time step; see docs/analysis.md. With it and with --report, as with"
            " --predictions, a folder of images without class folders is taken.",
            "--layer NAME": "The layer whose saliency is drawn, for example stages.2; without it the last stage whose"
            " maps have 4 x 4 pixels.",
        },
        EVALUATION_FIELDS,
    )
    if not given.get("checkpoint"):
        raise InputError("--checkpoint is required: name a file, for example --checkpoint runs/digits/best.pt")
    if processes > 1 and {"report", "saliency"} & given.keys():
        # One that has a part of the images would call them all of them.
        raise InputError("--report and --saliency are for a single process: start eval.py without torchrun")
    path = Path(given["checkpoint"])
    digest = hashlib.sha256()
    payload = read_checkpoint(path, digest)
    if not is_ours(payload) and "data.name" not in overrides:
        raise InputError(
            f"checkpoint {path} does not say what it was trained on: name it with --data.name, for example"
            " --data.name cifar100"
        )
    try:
        base = read_config(payload) if is_ours(payload) else Config()
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    stored = base.data
    # Whoever wrote the file must not make this machine load anything; another data set may know no Cutout.
    cutout = 0 if "data.name" in overrides else stored.cutout
    config = make_config(replace(base, data=replace(stored, download=False, cutout=cutout)), overrides)
    named = not is_ours(payload) or {"data.name", "data.root", "data.download"} & overrides.keys()
    if not named and stored.reads_root and not user_path(stored.root, "data.root").exists():
        raise InputError(
            f"the data set of checkpoint {path}, {stored.name}, was in {stored.root!r}, which is not here: name it"
            " with --data.root"
        )
    network = {name: getattr(config.model, name) for name in _OF_NETWORK if f"model.{name}" in overrides}
    amp = config.train.amp if "train.amp" in overrides else None
    if "data.root" in overrides and not config.data.reads_root:
        raise InputError(
            f"--data.root {config.data.root} is not read, as data.name is {config.data.name}: add --data.name"
            " imagefolder for images in a folder, npz for arrays"
        )
    used = {os.path.realpath(path): "--checkpoint"}
    if config.data.name == "npz":
        used[os.path.realpath(user_path(config.data.root, "data.root"))] = "data.root"
    outputs: dict[str, Path] = {}
    for name in [each for each in ("json", "predictions", "saliency") if each in given]:
        outputs[name] = check_writable(Path(given[name]), f"--{name}")
        if (other := used.setdefault(os.path.realpath(outputs[name]), f"--{name}")) != f"--{name}":
            raise InputError(f"--{name} {outputs[name]} is the file of {other} too: choose another one")
    if "layer" in given and not {"saliency", "report"} & given.keys():
        raise InputError("--layer is the layer of --saliency and --report: add one of them")
    report = check_new_folder(Path(given["report"]), "--report") if "report" in given else None
    return EvalArguments(
        checkpoint=path,
        payload=payload,
        config=config,
        network=network,
        amp=amp,
        json=outputs.get("json"),
        predictions=outputs.get("predictions"),
        energy="energy" in given,
        report=report,
        saliency=outputs.get("saliency"),
        layer=given.get("layer"),
        sha256=digest.hexdigest(),
    )
