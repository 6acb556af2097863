"""Where in an image a network sees its class: Grad-CAM of a layer at each time step, and the spikes beside it."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from gac.analysis.running import find_layer, run
from gac.errors import InputError
from gac.models.batch_first import BatchFirst


@dataclass(frozen=True, eq=False)
class Saliency:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of a layer on N images, for their classes ``targets``, int64 [N].

    ``maps``, float32 [N, T, h, w], are signed, in units of the outputs: at each time step the layer's channels, each
    times the mean over the pixels of the gradient of the class's mean output, summed. Where a map is positive, the
    layer speaks for the class. ``spikes``, [N, h, w], are the numbers of spikes over time and channels in
    ``spiking_layer``, the first that the layer's output reaches. They explain no class, but need no gradient: that of a
    spike is a surrogate, and a map made with it can mislead.
    """

    layer: str
    targets: Tensor
    maps: Tensor
    spiking_layer: str
    spikes: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of the maps over time, [N, h, w]."""
        return self.maps.mean(1)


class _Look:
    """What passes when a network is called on a batch: its outputs, and the first spikes from a layer on."""

    def __init__(self, network: nn.Module, layer: nn.Module, name: str, batch: Tensor, steps: int | None) -> None:
        self.name = name
        self.steps = steps
        self.shape: torch.Size | None = None
        self.spiking_layer: str | None = None
        self.spikes: Tensor | None = None
        self.classes: Tensor | None = None
        self.outputs = 0
        with ExitStack() as hooks:
            hooks.callback(layer.register_forward_hook(self._see_layer).remove)
            for each, node in network.named_modules():
                if isinstance(node, neuron.BaseNode):
                    hooks.callback(node.register_forward_hook(self._spikes_of(each)).remove)
            hooks.callback(network.register_forward_hook(self._see_outputs).remove)
            run(network, [batch])
        if self.shape is None:
            raise InputError(f"layer {name} does not run when the network is called")
        if self.spikes is None:
            raise InputError(f"no spiking layer follows layer {name}: name one before it")

    def _see_layer(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not isinstance(output, Tensor) or output.dim() != 5:
            found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise InputError(
                f"layer {self.name} gives {found}, and a saliency map needs [T, B, C, H, W]: name a stage, such as"
                " stages.0, or a spiking layer"
            )
        self.shape = output.shape

    def _spikes_of(self, name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def see(node: nn.Module, inputs: tuple, output: Tensor) -> None:
            if self.shape is not None and self.spikes is None:
                self.spiking_layer, self.spikes = name, output[: self.steps].sum((0, 2)).float().cpu()

        return see

    def _see_outputs(self, network: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(network, BatchFirst) or output.dim() != 3 or output.shape[1] != inputs[0].shape[-4]:
            raise InputError(
                f"{type(network).__name__} gives {list(output.shape)}, and a saliency map needs outputs [T, B, K] for"
                f" {list(inputs[0].shape)}: pass a network that gives them"
            )
        self.outputs = output.shape[-1]
        self.classes = output[: self.steps].mean(0).argmax(-1)


def measure_saliency(
    network: nn.Module,
    batches: Iterable[Tensor],
    layer: str,
    targets: Tensor | None = None,
    steps: int | None = None,
) -> Saliency:
    """Return Grad-CAM of the layer that is called ``layer``, by captum's LayerGradCam.

    Args:
        network: Gives outputs [T, B, K]. It returns to the mode it was in, and its neurons are reset.
        batches: What it is called with: images [B, C, H, W] or sequences [T, B, C, H, W]. One takes the memory of a
            training step.
        layer: Any whose output is [T, B, C, H, W].
        targets: The class of each image, int64 [N]; by default the one that the network takes it for.
        steps: Look only at the first so many time steps, of outputs, maps and spikes; None for all of them.

    Raises:
        InputError: If there are no images, or not one target for each, if there is no such layer (the message has the
            closest name), if its output or the network's has other dimensions, and if it or no spiking layer after it
            runs.
    """
    # It takes as long to import as all the rest.
    from captum.attr import LayerGradCam

    found = find_layer(network, layer, nn.Module, "layer")
    # LayerGradCam takes the first two dimensions of a layer's output for batch and channels, and would mix images: it
    # gets [T B, C, h, w], as the output of a module in between.
    frames = nn.Identity()
    cam = LayerGradCam(lambda batch: network(batch)[:steps].mean(0), frames)
    looks, maps, classes = [], [], []
    was_training = network.training
    for batch in batches:
        looks.append(look := _Look(network, found, layer, batch, steps))
        first = sum(map(len, classes))
        target = look.classes
        if targets is not None:
            target = targets[first : first + len(target)].to(batch.device)
            if len(target) != len(look.classes) or not ((target >= 0) & (target < look.outputs)).all():
                raise InputError(
                    f"targets must be a class from 0 to {look.outputs - 1} for each image, got {targets.tolist()}"
                )
        classes.append(target)
        hook = found.register_forward_hook(
            lambda module, inputs, output: frames(output.flatten(0, 1)).unflatten(0, output.shape[:2])
        )
        network.eval()
        try:
            functional.reset_net(network)
            with torch.inference_mode(False), torch.enable_grad():
                # Autograd takes no tensor of inference mode.
                images = batch.clone() if batch.is_inference() else batch
                found_maps = cam.attribute(images, target=target.clone()).detach()  # [T B, 1, h, w]
        finally:
            hook.remove()
            functional.reset_net(network)
            network.train(was_training)
        maps.append(found_maps.float().cpu().unflatten(0, look.shape[:2]).squeeze(2).transpose(0, 1)[:, :steps])
    if not maps:
        raise InputError("there are no images to run the network on")
    if targets is not None and len(targets) != sum(map(len, classes)):
        raise InputError(f"targets must be one class for each of {sum(map(len, classes))} images, got {len(targets)}")
    spikes = torch.cat([look.spikes for look in looks])
    return Saliency(layer, torch.cat(classes).cpu(), torch.cat(maps), looks[0].spiking_layer, spikes)
