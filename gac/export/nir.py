"""Export a network's spiking part as NIR, the Neuromorphic Intermediate Representation, with its encoder beside it.

NIR has convolutions, LIF neurons, pooling and linear layers, and neither sigmoid nor product: the encoder (stem and
coding) becomes a program of torch.export, OUTPUT.encoder.pt2. gac.export.nir.read_nir(OUTPUT) puts both together.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gac.command_line import Parser, new_file
from gac.errors import InputError
from gac.export.fidelity import Fidelity, Outputs, compare, write_and_tell
from gac.export.forms import plain, refuse_encoders
from gac.export.packages import require
from gac.export.program import METADATA, as_program
from gac.export.source import Source, open_source
from gac.files import atomic_write, writing
from gac.models.blocks import ConvNorm, MSBlock
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode

SECONDS_PER_STEP = 1e-4
"""The time step of the graph; SpikingJelly's and snnTorch's readers take it for granted."""


class Backbone(nn.Module):
    """What follows a network's encoder, one time step at a time, in modules that NIR has: [B, C, H, W] to [B, K].

    BatchNorm is folded into the convolutions (in float64, then rounded). Neurons are SpikingJelly's, with the true
    thresholds; as they fire on h >= threshold and the network's on h > threshold, they are only there to be exported.

    Args:
        network: Stays as it is.
        size: Height and width in pixels of what the last neurons see.

    Raises:
        InputError: For parts that NIR cannot hold: other blocks, normalisations or neurons, and a soft reset.
    """

    def __init__(self, network: MSResNet, size: tuple[int, int]) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(nn.Sequential(*map(_Block, stage)) for stage in network.stages))
        self.lif = _neuron(network.lif)
        self.pool = nn.AvgPool2d(size, stride=size, padding=(0, 0))
        self.flatten = nn.Flatten()
        if type(network.head) is not nn.Linear:
            raise InputError(f"NIR export knows heads of one linear layer, not {type(network.head).__name__}")
        self.head = copy.deepcopy(network.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.lif(self.stages(x)))))


class _Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if type(block) is not MSBlock:
            raise InputError(f"NIR export knows membrane-shortcut blocks (MSBlock), not {type(block).__name__}")
        self.lif1, self.lif2 = _neuron(block.lif1), _neuron(block.lif2)
        self.conv1, self.conv2 = _folded(block.conv1), _folded(block.conv2)
        self.shortcut = None if isinstance(block.shortcut, nn.Identity) else _folded(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.lif2(self.conv1(self.lif1(x))))
        return y + (x if self.shortcut is None else self.shortcut(x))


def _folded(layer: nn.Module) -> nn.Conv2d:
    if type(layer) is not ConvNorm:
        raise InputError(
            f"NIR export knows blocks of convolutions with BatchNorm (ConvNorm), not {type(layer).__name__}"
        )
    if not (isinstance(layer.norm, nn.BatchNorm2d) and layer.norm.track_running_stats):
        raise InputError(
            f"NIR has no {type(layer.norm).__name__}: only BatchNorm with running statistics folds into a convolution"
        )
    layer = copy.deepcopy(layer).double().eval()
    return fuse_conv_bn_eval(layer.conv, layer.norm).float()


def _neuron(node: nn.Module) -> neuron.LIFNode:
    if type(node) is not LIFNode:
        raise InputError(
            "NIR export knows the neurons gac.LIFNode, which fire on h > threshold, not"
            f" {type(node).__module__}.{type(node).__name__}"
        )
    if node.v_reset is None:
        raise InputError("NIR has no soft reset: its neurons are reset to a potential, and these have v_reset=None")
    return neuron.LIFNode(node.tau, node.decay_input, node.v_threshold, node.v_reset, step_mode="s")


class _Encoder(nn.Module):
    """The stem and the coding of a network, without what follows."""

    def __init__(self, network: MSResNet) -> None:
        super().__init__()
        self.network = plain(network)
        self.network.stages, self.network.lif, self.network.head = nn.ModuleList(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.network.encode(x)


class NIRNetwork(nn.Module):
    """A network that :func:`read_nir` has read: [B, C, H, W] or event frames [T, B, C, H, W] to logits [T, B, K].

    ``backbone`` is the graph that SpikingJelly's importer makes of the file, whose neurons are this package's: they
    fire on h > threshold, as NIR's do, and are SpikingJelly's otherwise. ``metadata`` says the classes and how images
    are normalised.
    """

    def __init__(self, encoder: nn.Module, backbone: fx.GraphModule, metadata: dict[str, Any]) -> None:
        super().__init__()
        # Not a submodule: a program of torch.export has no training mode and raises when it is told which one to be in.
        self.encode = encoder.forward
        self.backbone = backbone
        self.metadata = metadata

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.backbone(self.encode(x))
        return logits


@torch.no_grad()
def build_nir(source: Source) -> tuple[bytes, bytes]:
    """Return the contents of two files: the backbone as a NIR graph, and the encoder as a program of torch.export.

    The graph takes the encoder's output, one time step at a time, and gives that step's logits. Its thresholds are the
    true ones: a NIR neuron fires above its threshold, not at it. NIR has no residual sum: a node with several incoming
    edges adds them, in whatever order its reader likes. Only :func:`read_nir` adds them in the network's order.

    Raises:
        InputError: For what NIR cannot hold, and if a package is missing.
    """
    nir, exchange = require("nir", "nir", "spikingjelly.activation_based.nir_exchange")
    network, example = source.network, source.example()
    refuse_encoders(network, "is not exported as NIR, as it makes a sequence of its own")
    metadata = source.metadata() | {"seconds_per_step": SECONDS_PER_STEP}
    encoder = _Encoder(network)
    coded = membrane = encoder(example)
    for stage in network.stages:
        membrane = stage(membrane)
    module = Backbone(network, tuple(membrane.shape[-2:])).eval()
    graph = exchange.export_to_nir(module, coded[0], dt=SECONDS_PER_STEP)
    graph.metadata = {METADATA: json.dumps(metadata)}
    backbone = io.BytesIO()
    nir.write(backbone, graph)
    content = backbone.getvalue()
    metadata["backbone_sha256"] = hashlib.sha256(content).hexdigest()
    return content, as_program(encoder, (example,), ({example.dim() - 4: Dim("batch")},), metadata)


def encoder_path(path: Path) -> Path:
    """Return where the encoder of a NIR file lies."""
    return path.with_name(f"{path.name.removesuffix('.nir')}.encoder.pt2")


def read_nir(path: str | os.PathLike) -> NIRNetwork:
    """Return the network of a NIR file of this package and of the encoder beside it, in evaluation mode on the CPU.

    Two things are repaired that SpikingJelly's ``import_from_nir`` leaves different: its neurons fire on
    h >= threshold, and the terms of a residual sum are added in the order of a set of strings, which changes from
    process to process and from one reader of the same sum to the next.

    Raises:
        InputError: For files that are missing, damaged or not of one export, and if a package is missing.
    """
    contents = []
    for each in (Path(path), encoder_path(Path(path))):
        try:
            contents.append(each.read_bytes())
        except OSError as error:
            raise InputError(f"NIR export {each}: cannot be read: {error.strerror}") from error
    try:
        return _assembled(*contents)
    except InputError as error:
        raise InputError(f"NIR export {path}: {error}") from error


def _assembled(backbone: bytes, encoder: bytes) -> NIRNetwork:
    nir, exchange = require("nir", "nir", "spikingjelly.activation_based.nir_exchange")
    # Of anything else torch.export prints a page before it raises.
    if not zipfile.is_zipfile(io.BytesIO(encoder)):
        raise InputError("its encoder is no program of torch.export")
    files = {METADATA: ""}
    program = torch.export.load(io.BytesIO(encoder), extra_files=files)
    metadata = json.loads(files[METADATA])
    if metadata.get("backbone_sha256") != hashlib.sha256(backbone).hexdigest():
        raise InputError("it is damaged, or the encoder beside it is of another export: export both again")
    graph = exchange.import_from_nir(nir.read(io.BytesIO(backbone)), metadata["seconds_per_step"], step_mode="m")
    _restore_strictness(graph)
    _restore_order_of_sums(graph)
    return NIRNetwork(program.module(), graph, metadata).eval()


def measure(source: Source, backbone: bytes, encoder: bytes) -> Fidelity:
    """Run what :func:`build_nir` returned, read back through SpikingJelly, beside our network on its test images."""
    network = _assembled(backbone, encoder)
    # SpikingJelly's reader wraps its neurons in modules that return (spikes, state).
    wrapper = type(network.backbone.get_submodule("lif"))

    def exported(x: Tensor) -> Outputs:
        with monitor.OutputMonitor(network.backbone, wrapper, lambda output: output[0]) as recorded, torch.no_grad():
            logits = network(x)
        return logits, {name.replace("_", "."): recorded[name][0] for name in recorded.monitored_layers}

    program = "NIR through SpikingJelly's reader, strictness restored"
    return compare(source.network, exported, source.test_images(), program=program, data=source.tried_on)


def add_options(parser: Parser) -> None:
    """Add the options of this subcommand."""
    parser.add("output", "the file to write", type=new_file(".nir"))


def run(options: argparse.Namespace) -> None:
    """Write both files and how far they are from our network."""
    source = open_source(options.checkpoint, options.images, options.root)
    backbone, encoder = build_nir(source)
    fidelity = measure(source, backbone, encoder) if options.images else None
    beside = encoder_path(options.output)
    with writing(beside), atomic_write(beside) as file:
        file.write(encoder)
    print(f"wrote {beside}: {len(encoder) / 1e6:.1f} MB")
    write_and_tell(options.output, backbone, fidelity)


def _restore_strictness(graph: fx.GraphModule) -> None:
    """Put this package's neurons, which fire on h > threshold, in place of SpikingJelly's."""
    for parent in list(graph.modules()):
        for name, node in list(parent.named_children()):
            if type(node) is neuron.LIFNode:
                constants = node.tau, node.decay_input, node.v_threshold, node.v_reset
                setattr(parent, name, LIFNode(*constants, node.surrogate_function, step_mode=node.step_mode))


def _restore_order_of_sums(graph: fx.GraphModule) -> None:
    """Add the terms of each sum in the order in which the network computes them: from the shallowest to the deepest."""
    below: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.graph.nodes:
        below[node] = set().union(*(below[each] for each in node.all_input_nodes)) | {node}
    for last in graph.graph.nodes:
        if last.target is not torch.add or any(user.target is torch.add for user in last.users):
            continue
        sums, terms = [last], [last.args[1]]
        while (before := sums[0].args[0]).target is torch.add:
            sums.insert(0, before)
            terms.append(before.args[1])
        terms.append(before)
        total, *terms = sorted(terms, key=lambda term: len(below[term]))
        for each, term in zip(sums, terms, strict=True):
            each.args = (total, term)
            total = each
    graph.recompile()
