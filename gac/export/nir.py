"""NIR, the Neuromorphic Intermediate Representation: the spiking part of a network for other frameworks and for chips.

NIR has convolutions, LIF neurons, pooling and linear layers, and no sigmoid or product: the encoder (stem and gated
attention coding) is exported beside it, as a program of torch.export. Source: Pedersen et al., Nature Communications
2024, and SpikingJelly's ``nir_exchange``, which writes and reads the file.
"""

import copy
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gac.errors import InputError
from gac.models.blocks import ConvNorm, MSBlock
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode

if TYPE_CHECKING:
    import nir

BACKBONE = "backbone.nir"
ENCODER = "encoder.pt2"
INSTALL = "pip install 'gac-snn[nir]'"


class Backbone(nn.Module):
    """What follows a network's encoder, one time step at a time, in modules that NIR has: [B, C, H, W] to [B, K].

    BatchNorm is folded into the convolutions (in float64, then rounded). Neurons are SpikingJelly's, with the true
    thresholds; as they fire on h >= threshold and the network's on h > threshold, they are only there to be exported.

    Args:
        network: In evaluation mode; stays as it is.
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


def _folded(layer: ConvNorm) -> nn.Conv2d:
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
        self.network = copy.deepcopy(network)
        self.network.stages, self.network.lif, self.network.head = nn.ModuleList(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.network.encode(x)


class NIRNetwork(nn.Module):
    """A network that :func:`read_nir` has read: images [B, C, H, W] or a sequence [T, B, C, H, W] to logits [T, B, K].

    ``backbone`` is the graph that SpikingJelly's importer makes of the file, whose neurons are this package's: they
    fire on h > threshold, as NIR says, and are SpikingJelly's otherwise.
    """

    def __init__(self, encoder: nn.Module, backbone: nn.Module) -> None:
        super().__init__()
        # Not a submodule: a program of torch.export has no training mode and raises when it is told which one to be in.
        self.encode = encoder.forward
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.backbone(self.encode(x))
        return logits


@torch.no_grad()
def write_nir(network: MSResNet, images: Tensor, folder: str | os.PathLike) -> "nir.NIRGraph":
    """Write a network's backbone (``backbone.nir``) and its encoder (``encoder.pt2``) into a folder; return the graph.

    The graph takes the encoder's output, one time step at a time, and gives that step's logits. Its thresholds are the
    true ones: a NIR neuron fires above its threshold, not at it. NIR has no residual sum: a node with several incoming
    edges adds them, in whatever order its reader likes. Only :func:`read_nir` sums in the network's order.

    Args:
        network: With gated attention or direct coding, in float32; the other codings make their own random or coded
            sequence, which is not the work of a graph.
        images: What it is called with, two images or more: [B, C, H, W], or [T, B, C, H, W]. Height and width are
            those that the files are made for; the number of images is not.
        folder: A folder that exists.

    Raises:
        InputError: For a network that NIR cannot hold, and if ``nir`` and ``nirtorch`` are missing.
    """
    exchange = _nir_exchange()
    if network.coding_name not in ("gac", "direct"):
        raise InputError(f"NIR export takes networks with gac or direct coding, not {network.coding_name}")
    if type(network) is not MSResNet:
        raise InputError(f"NIR export knows MSResNet, not {type(network).__name__}")
    network = copy.deepcopy(network).cpu().float().eval()
    # Strides of a larger tensor would become conditions on the number of images.
    images = images.cpu().float().contiguous()
    coded = network.encode(images)
    size = _pooled_size(network, coded[0])
    backbone = Backbone(network, size).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        _Encoder(network), (images,), dynamic_shapes=({images.dim() - 4: batch},), strict=False
    )
    torch.export.save(program, Path(folder, ENCODER))
    return exchange.export_to_nir(backbone, coded[0], Path(folder, BACKBONE))


def read_nir(folder: str | os.PathLike) -> NIRNetwork:
    """Return the network that :func:`write_nir` wrote, in evaluation mode on the CPU.

    Two things are repaired that SpikingJelly's ``import_from_nir`` leaves different: its neurons fire on
    h >= threshold, and the terms of a residual sum are added in the order of a set of strings, which changes from
    process to process and from one reader of the same sum to the next.

    Raises:
        InputError: For files that are missing or damaged, and if ``nir`` and ``nirtorch`` are missing.
    """
    exchange = _nir_exchange()
    path = Path(folder, BACKBONE)
    try:
        backbone = exchange.import_from_nir(path, step_mode="m")
    except (OSError, KeyError, ValueError, NotImplementedError) as error:
        raise InputError(f"NIR file {path}: cannot be read: {error}") from error
    _restore_strictness(backbone)
    _restore_order_of_sums(backbone)
    path = Path(folder, ENCODER)
    # Of anything else torch.export prints a page before it raises.
    if not zipfile.is_zipfile(path):
        raise InputError(f"encoder {path}: cannot be read: missing, or no program of torch.export")
    encoder = torch.export.load(path).module()
    return NIRNetwork(encoder, backbone).eval()


def _nir_exchange() -> Any:
    try:
        from spikingjelly.activation_based import nir_exchange
    except ImportError as error:
        raise InputError(f"NIR export needs the packages nir and nirtorch: {INSTALL}") from error
    return nir_exchange


def _pooled_size(network: MSResNet, frame: Tensor) -> tuple[int, int]:
    for stage in network.stages:
        for block in stage:
            frame = block.conv2.conv(block.conv1.conv(frame))
    return tuple(frame.shape[-2:])


def _restore_strictness(graph: nn.Module) -> None:
    """Put this package's neurons, which fire on h > threshold, in place of SpikingJelly's."""
    for parent in list(graph.modules()):
        for name, node in list(parent.named_children()):
            if type(node) is neuron.LIFNode:
                strict = LIFNode(
                    node.tau,
                    node.decay_input,
                    node.v_threshold,
                    node.v_reset,
                    node.surrogate_function,
                    node.detach_reset,
                    step_mode=node.step_mode,
                )
                setattr(parent, name, strict)


def _restore_order_of_sums(graph: fx.GraphModule) -> None:
    """Add the terms of each sum in the order in which the network computes them: from the shallowest to the deepest."""
    depth: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.graph.nodes:
        depth[node] = set().union(*(depth[each] for each in node.all_input_nodes)) | {node}
    sums = [node for node in graph.graph.nodes if node.target is torch.add]
    for last in sums:
        if any(user.target is torch.add for user in last.users):
            continue
        chain, terms = [last], [last.args[1]]
        while chain[0].args[0] in sums:
            chain.insert(0, chain[0].args[0])
            terms.append(chain[0].args[1])
        terms.append(chain[0].args[0])
        terms.sort(key=lambda term: len(depth[term]))
        chain[0].args = (terms[0], terms[1])
        for total, before, term in zip(chain[1:], chain, terms[2:], strict=False):
            total.args = (before, term)
    graph.recompile()
