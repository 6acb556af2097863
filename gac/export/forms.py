"""The network as other programs run it: its neurons as a plain loop of comparisons, in one of three forms.

The neuron that trains carries a surrogate gradient, and fires on h > threshold by taking the ties away from
SpikingJelly's h >= threshold. Neither is needed where nothing learns: what is exported is the comparison itself, a
fifth of the operations and strict by itself.
"""

import copy
from typing import Literal, get_args

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from torch.export import Dim

from gac.command_line import Parser
from gac.errors import InputError
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode
from gac.ops.neuron import LIFParameters

Form = Literal["mean", "sequence", "step"]


def add_form(parser: Parser) -> None:
    """Add the option that chooses a form."""
    help = "the mean over time, the whole sequence, or one time step"
    parser.add("--form", help, choices=get_args(Form), default="mean")


def refuse_encoders(network: MSResNet, reason: str) -> None:
    """Raise InputError for codings other than gac and direct; ``reason`` says why a kind of file does not hold them."""
    coding = network.coding_name
    if coding not in ("gac", "direct"):
        # Phase coding is in no exported program either.
        advice = "use torch.jit.trace" if coding == "phase" else "export it with the subcommand program"
        raise InputError(f"{coding} coding {reason}: {advice}")


class PlainNeuron(nn.Module):
    """A LIF neuron for inference: spikes [T, B, ...] of a sequence, of which nothing stays.

    With ``single_step`` a call is one time step, [B, ...] to [B, ...], that begins at the attribute ``v``, the membrane
    potential [B, ...] (None: that of a fresh sequence), and puts the next one there. Equal to
    :func:`gac.ops.lif.reference` but for the sign of zeros.
    """

    keeps_state = False

    def __init__(self, parameters: LIFParameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.single_step = False
        self.v: Tensor | None = None

    def reset(self) -> None:
        """Do nothing: for networks that reset the neurons of others."""

    def forward(self, x: Tensor) -> Tensor:
        if self.single_step:
            spikes, self.v = self._advance(x, self.v)
            return spikes
        v, spikes = None, []
        for each in x:
            fired, v = self._advance(each, v)
            spikes.append(fired)
        return torch.stack(spikes)

    def _advance(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        constants = self.parameters
        # Operations that change nothing are left out, as not every program that reads them does so.
        charge = x if constants.gain == 1 else constants.gain * x
        if v is None and constants.v_start:
            v = torch.full_like(x, constants.v_start)
        h = charge if v is None else constants.decay * v + charge
        if constants.bias:
            h = h + constants.bias
        fired = h > constants.v_threshold
        reset = h - constants.v_threshold if constants.v_reset is None else constants.v_reset
        return fired.to(x.dtype), torch.where(fired, reset, h)


def plain(network: MSResNet) -> MSResNet:
    """Return a copy of a network in evaluation mode whose neurons are :class:`PlainNeuron`.

    Raises InputError for spiking neurons of another class than this package's.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, LIFNode):
            network.set_submodule(name, PlainNeuron(module.lif_parameters()))
        elif isinstance(module, neuron.BaseNode):
            raise InputError(
                f"spiking layer {name} is a {type(module).__name__}, and only networks whose neurons are this package's"
                " LIFNode are exported"
            )
    return network


class Mean(nn.Module):
    """Images [B, C, H, W] or event frames [T, B, C, H, W] to the mean of the logits over time, [B, K]."""

    def __init__(self, network: MSResNet) -> None:
        super().__init__()
        self.network = plain(network)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).mean(0)


class Sequence(nn.Module):
    """The same to the logits of each time step, [T, B, K]."""

    def __init__(self, network: MSResNet) -> None:
        super().__init__()
        self.network = plain(network)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Step(nn.Module):
    """One time step: (x [B, C, H, W], state) to (logits [B, K], next state); for direct coding.

    The state is the membrane potential [B, ...] of each spiking layer, in the order of ``layers``, their names. A
    sequence begins with :meth:`fresh_state`.

    Raises:
        InputError: For other codings, which make or see the whole sequence, and for ReLU twins.
    """

    def __init__(self, network: MSResNet) -> None:
        super().__init__()
        if "s" not in network.supported_step_mode():
            raise InputError(
                f"the step form is for direct coding, and {network.coding_name} coding needs the whole sequence: export"
                " the form mean or sequence"
            )
        self.network = plain(network)
        functional.set_step_mode(self.network, "s")
        neurons = {name: each for name, each in self.network.named_modules() if isinstance(each, PlainNeuron)}
        if not neurons:
            raise InputError("the network has no spiking neurons, whose state steps would carry: export the form mean")
        self.layers = list(neurons)
        self._neurons = list(neurons.values())
        for each in self._neurons:
            each.single_step = True

    def fresh_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the state that a sequence of samples like ``x`` begins with."""
        with torch.no_grad():
            self.network(x)
        return tuple(
            torch.full_like(v, each.parameters.v_start) for each, v in zip(self._neurons, self._take(), strict=True)
        )

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        for each, v in zip(self._neurons, state, strict=True):
            each.v = v
        logits = self.network(x)
        return logits, *self._take()

    def _take(self) -> list[Tensor]:
        # A tensor that stayed would be one that the exporter takes for part of the network.
        potentials = [each.v for each in self._neurons]
        for each in self._neurons:
            each.v = None
        return potentials


_FORMS: dict[Form, type[nn.Module]] = {"mean": Mean, "sequence": Sequence, "step": Step}


def prepared(network: MSResNet, form: Form, example: Tensor) -> tuple[nn.Module, tuple[Tensor, ...], tuple]:
    """Return a network in a form, example arguments for an exporter, and which of their dimensions is the batch.

    Args:
        network: In step mode "m".
        form: One of the above.
        example: Images [B, C, H, W] or event frames [T, B, C, H, W]; the step form takes one of the latter.

    Raises:
        InputError: For a form that the coding does not have.
    """
    module, batch = _FORMS[form](network), Dim("batch")
    if not isinstance(module, Step):
        return module, (example,), ({example.dim() - 4: batch},)
    x = example if example.dim() == 4 else example[0]
    state = module.fresh_state(x)
    return module, (x, *state), ({0: batch}, tuple({0: batch} for _ in state))
