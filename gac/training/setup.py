"""The device, the data set and the network of a training run."""

import logging
from collections.abc import Callable
from dataclasses import asdict

import torch

from gac.checkpoint import initialise, is_ours, read_checkpoint, read_config
from gac.config import Config, ModelConfig, TrainConfig
from gac.data import Data, DataInfo, build_data
from gac.errors import InputError
from gac.execution import footprint
from gac.execution.cuda_graph import Graphs, check_capturable, select_graphs
from gac.execution.device import check_precision, select_device
from gac.execution.distributed import Ranks
from gac.memory import check_fits
from gac.models import create_model
from gac.models.batch_norm import BatchNorm2d
from gac.models.ms_resnet import MSResNet
from gac.models.registry import resolve_coding
from gac.neuron import LIFNode
from gac.training.freezing import freeze

logger = logging.getLogger("gac")


def choose_device(config: Config, ranks: Ranks) -> torch.device:
    """Return the device of this rank. Raises InputError if it cannot train with this configuration."""
    device = select_device(config.device, ranks)
    if config.train.overlap_weight_gradients and ranks.size > 1:
        raise InputError(
            "train.overlap_weight_gradients keeps gradients from the exchange between processes, and there are"
            f" {ranks.size}: leave it off"
        )
    check_precision(device, config.train.amp)
    if config.train.cuda_graph is True:
        check_capturable(config.model)
        if ranks.size > 1:
            raise InputError(
                f"train.cuda_graph replays the steps of one process, and there are {ranks.size}: set it to auto or"
                " false"
            )
    if device.type != "cuda":
        for name in ("cuda_graph", "overlap_weight_gradients"):
            if getattr(config.train, name) is True:
                logger.warning("train.%s true is for CUDA devices: on %s it does nothing", name, device)
    return device


def choose_graphs(config: Config, device: torch.device, ranks: Ranks, *networks: MSResNet) -> Graphs | None:
    """Return what replays the run's steps: where that is demanded, and with "auto" where it is possible, on CUDA.

    ``networks`` are those that the steps run: the one that learns and its teacher, if it has one.
    """
    wanted = demanded = config.train.cuda_graph is True
    if config.train.cuda_graph == "auto":
        possible = device.type == "cuda" and ranks.size == 1 and config.model.takes_normalized_images
        wanted = possible and all(_runs_own_kernels(network, device) for network in networks)
    return select_graphs(wanted, device, demanded)


def _runs_own_kernels(network: MSResNet, device: torch.device) -> bool:
    # A replay of SpikingJelly's kernel ended in an illegal memory access (docs/performance.md), after which a process
    # cannot go on.
    probe = torch.empty(0, device=device)
    return all(each.chosen_backend(probe) == "cupy" for each in network.modules() if isinstance(each, LIFNode))


def open_data(config: Config, device: torch.device, part: Callable[[Data], Data] | None, ranks: Ranks) -> Data:
    """Open the data set, or the ``part`` of it. Raises InputError if the ranks cannot share its batches."""
    data = build_data(
        config.data,
        device=device,
        batch_size=config.train.batch_size,
        eval_batch_size=config.train.eval_batch_size,
        seed=config.train.seed,
        normalize=config.model.takes_normalized_images,
        shard=ranks.shard,
        frames=config.model.T,
    )
    if data.info.frames is not None:
        _check_frames(config.model, data.info)
    smallest = min(_batch_sizes(data, config.train))
    if smallest < ranks.size:
        raise InputError(
            f"{ranks.size} processes cannot share a batch of {smallest} images, which train.batch_size"
            f" {config.train.batch_size} leaves of {data.train.size}: choose another train.batch_size or start"
            " fewer processes"
        )
    return data if part is None else part(data)


def _check_frames(model: ModelConfig, info: DataInfo) -> None:
    """Raise InputError unless a network takes the event frames of a data set, one for each time step."""
    if info.frames != model.T:
        raise InputError(
            f"data set {info.name} has {info.frames} event frames in a sample, one for each time step, and model.T is"
            f" {model.T}: set model.T to {info.frames}"
        )
    if (coding := resolve_coding(model.name, model.coding)) not in ("gac", "direct"):
        raise InputError(
            f"data set {info.name} has event frames, and {coding} coding makes time steps of its own from images: set"
            " model.coding to gac or direct"
        )


def create_network(config: Config, data: Data, ranks: Ranks) -> MSResNet:
    """Return a new network for the data set. Raises InputError if BatchNorm cannot train on its batches."""
    network = create_model(
        num_classes=data.info.num_classes,
        in_channels=data.info.channels,
        **asdict(config.model),
    )
    network.set_checkpoint_activations(config.train.checkpoint_activations)
    freeze(network, config.train)
    synchronized = config.train.sync_batch_norm and ranks.size > 1
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.synchronized = synchronized
    if not synchronized and not config.train.freeze_batch_norm:
        _check_batch_norm(network, data, config.train, ranks)
    return network


def load_initial_weights(network: MSResNet, config: Config) -> None:
    """Give the network the weights of the checkpoint train.init, and say what begins anew. Raises InputError."""
    path = config.train.init
    payload = read_checkpoint(path)
    try:
        anew = initialise(network, payload)
        if is_ours(payload):
            before, now = (each.with_neuron().model for each in (read_config(payload), config))
            coding = resolve_coding(before.name, before.coding)
            if coding != network.coding_name:
                logger.warning("train.init %s was trained with %s coding", path, coding)
            constants = {name: getattr(before, name) for name in ("tau", "v_threshold", "surrogate", "detach_reset")}
            if before.activation != now.activation:
                logger.warning("train.init %s was trained with activation %s", path, before.activation)
            elif other := [f"{name} {value}" for name, value in constants.items() if value != getattr(now, name)]:
                logger.warning("train.init %s was trained with neurons of %s", path, ", ".join(other))
    except InputError as error:
        raise InputError(f"train.init {path}: {error}") from error
    logger.info("began with the weights of %s%s", path, f"; new: {' and '.join(anew)}" if anew else "")


def check_memory(config: Config, data: Data, device: torch.device, ranks: Ranks) -> None:
    """Raise InputError if the network, or what training it on the CPU has to keep, is larger than the memory.

    Both are lower bounds: four bytes for each parameter, its gradient and what the optimiser and the moving average
    keep of it, and the output of every convolution. A CUDA device says by itself when its memory is full.
    """
    model, train = config.model, config.train
    with torch.device("meta"):
        network = create_model(num_classes=data.info.num_classes, in_channels=data.info.channels, **asdict(model))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    kept_by_optimizer = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    copies = 2 + kept_by_optimizer + (train.ema_decay > 0) if device.type == "cpu" else 1
    check_fits(
        f"a network of {parameters / 1e6:,.0f} M parameters (model.width {model.width}, model.T {model.T},"
        f" model.kernel_size {model.kernel_size})",
        4 * copies * parameters,
        "choose smaller ones",
    )
    if device.type != "cpu":
        return
    outputs = footprint.output_values(network, data.info)
    check_fits(
        f"train.batch_size {train.batch_size} with {footprint.describe(network, data.info)}",
        (4 if train.amp == "off" else 2)
        * max(1, max(_batch_sizes(data, train)) // (ranks.size * train.accumulate_steps))
        * (max(outputs) if train.checkpoint_activations else sum(outputs)),
        "choose smaller ones or a larger train.accumulate_steps",
    )
    footprint.check_evaluation(network, data, train, ranks, train.amp)


def _batch_sizes(data: Data, config: TrainConfig) -> set[int]:
    """Return the sizes of the training batches over all ranks: the full ones, if there are any, and the last one."""
    full, last = divmod(data.train.size, config.batch_size)
    return {*([config.batch_size] if full else []), *([last] if last else [])}


def _check_batch_norm(network: MSResNet, data: Data, config: TrainConfig, ranks: Ranks) -> None:
    """Raise InputError if a BatchNorm would get a single value per channel, which has no variance.

    That takes a micro-batch of one image and a feature map of one pixel.
    """
    on_each_rank = [batch // ranks.size for batch in _batch_sizes(data, config)]
    if min(images // min(config.accumulate_steps, images) for images in on_each_rank) > 1:
        return
    values = [height * width * network.T for _, height, width in footprint.feature_maps(network, data.info)]
    # The stem normalises one frame in place of T equal ones.
    if footprint.repeats_an_image(network, data.info):
        values[0] //= network.T
    if min(values) == 1:
        steps, processes = config.accumulate_steps, ranks.size
        fewer = f", train.accumulate_steps below {steps}" if steps > 1 else ""
        fewer += f", fewer than {processes} processes" if processes > 1 else ""
        raise InputError(
            "BatchNorm cannot train on a single value per channel, which a batch of 1 image of"
            f" {data.info.height} x {data.info.width} pixels leaves at model.T {network.T}: choose a train.batch_size"
            f" that leaves no single image at the end of {data.info.train_size}{fewer}, or larger images"
        )
