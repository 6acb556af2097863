"""Export a network with torch.export, as a .pt2 file that is loaded where only PyTorch is installed.

torch.export.load(FILE).module() is the network; its metadata are the extra file "gac.json", as JSON.
"""

import argparse
import io
import json
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from gac.command_line import Parser, new_file
from gac.errors import InputError
from gac.export.fidelity import Fidelity, Outputs, compare, write_and_tell
from gac.export.forms import Form, PlainNeuron, Step, add_form, prepared
from gac.export.source import Source, open_source

METADATA = "gac.json"


def build_program(source: Source, form: Form = "mean") -> bytes:
    """Return a checkpoint's network as the content of a .pt2 file, for any number of images.

    What each form takes and returns is in :mod:`gac.export.forms`. Rate coding draws from PyTorch's generator.

    Raises:
        InputError: For a form that the coding does not have, for phase coding, and for a network with operations of
            other packages than PyTorch.
    """
    module, arguments, shapes = prepared(source.network, form, source.example())
    return as_program(module, arguments, shapes, source.metadata() | {"form": form})


def as_program(module: nn.Module, arguments: tuple[Tensor, ...], shapes: tuple, entries: dict[str, Any]) -> bytes:
    """Return a module as the content of a .pt2 file with these metadata; ``shapes`` says what the batch is.

    Raises InputError for operations of other packages than PyTorch.
    """
    with torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    _check_operations(program)
    for node in program.graph.nodes:
        # It names the folders of this machine.
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(entries | {"torch": torch.__version__})})
    return file.getvalue()


def measure(source: Source, content: bytes, form: Form = "mean") -> Fidelity:
    """Run the content of a .pt2 file beside our network on the source's test images."""
    network = torch.export.load(io.BytesIO(content)).module()
    step = Step(source.network) if form == "step" else None

    def exported(x: Tensor) -> Outputs:
        interpreter = _ShowingSpikes(network)
        if step is None:
            logits = interpreter.run(x)
            return logits, interpreter.spikes()
        frames = x if x.dim() == 5 else x.expand(source.network.T, *x.shape)
        state, logits = step.fresh_state(frames[0]), []
        for frame in frames:
            of_step, *state = interpreter.run(frame, *state)
            logits.append(of_step)
        return torch.stack(logits), interpreter.spikes()

    return compare(source.network, exported, source.test_images(), program="torch.export", data=source.tried_on)


def add_options(parser: Parser) -> None:
    """Add the options of this subcommand."""
    parser.add("output", "the file to write", type=new_file(".pt2"))
    add_form(parser)


def run(options: argparse.Namespace) -> None:
    """Write the file and how far it is from our network."""
    source = open_source(options.checkpoint, options.images, options.root)
    content = build_program(source, options.form)
    write_and_tell(options.output, content, measure(source, content, options.form) if options.images else None)


def _check_operations(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        namespace = getattr(node.target, "namespace", "aten")
        if node.op == "call_function" and namespace not in ("aten", "prims"):
            raise InputError(f"the network needs the operation {node.target}, which PyTorch alone does not have")


class _ShowingSpikes(Interpreter):
    """Runs a graph node by node, and keeps what its neurons' comparisons give."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self._fired: dict[str, list[Tensor]] = defaultdict(list)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.aten.gt.Scalar:
            *_, (module, kind) = n.meta["nn_module_stack"].values()
            if kind == f"{PlainNeuron.__module__}.{PlainNeuron.__qualname__}":
                self._fired[module.removeprefix("network.")].append(result)
        return result

    def spikes(self) -> dict[str, Tensor]:
        """Return the spikes [T, B, ...] of each layer since the last call."""
        return {layer: torch.stack(each) for layer, each in self._fired.items()}
