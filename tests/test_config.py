"""The configuration dataclasses refuse what no run can use."""

import pytest

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (DataConfig, "name", "mnist"),
        (DataConfig, "crop_padding", -1),
        (DataConfig, "augment", "autoaugment"),
        (DataConfig, "augment_group", 0),
        (DataConfig, "random_erasing", 1.5),
        (DataConfig, "cutout", -1),
        (DataConfig, "workers", -1),
        (DataConfig, "synthetic_classes", 1),
        (ModelConfig, "T", 0),
        (ModelConfig, "depth", []),
        (ModelConfig, "depth", [3, 0]),
        (ModelConfig, "coding", "temporal"),
        (ModelConfig, "tau", 1.0),
        (ModelConfig, "tau", 0.5),
        (ModelConfig, "tau", float("nan")),
        (ModelConfig, "v_threshold", 0.0),
        (ModelConfig, "v_threshold", -0.5),
        (ModelConfig, "v_threshold", 1e-60),
        (ModelConfig, "surrogate", "step"),
        (ModelConfig, "activation", "gelu"),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", float("nan")),
        (TrainConfig, "learning_rate", float("inf")),
        (TrainConfig, "momentum", 1.0),
        (TrainConfig, "weight_decay", -1e-5),
        (TrainConfig, "weight_decay_on", "biases"),
        (TrainConfig, "stem_weight_decay", -1e-5),
        (TrainConfig, "gradient_clip_norm", -1.0),
        (TrainConfig, "gradient_clip_norm", float("nan")),
        (TrainConfig, "warmup_epochs", 250),
        (TrainConfig, "label_smoothing", 1.0),
        (TrainConfig, "cutmix_probability", 1.5),
        (TrainConfig, "cutmix_beta", 0.0),
        (TrainConfig, "mixup_alpha", -0.1),
        (TrainConfig, "mix_off_epochs", 251),
        (TrainConfig, "ema_decay", 1.0),
        (TrainConfig, "amp", "fp8"),
        (TrainConfig, "seed", -1),
        (TrainConfig, "checkpoint_minutes", -1.0),
        (TrainConfig, "checkpoint_minutes", float("inf")),
        (TrainConfig, "checkpoint_steps", -1),
        (TrainConfig, "keep_checkpoints", 0),
        (TrainConfig, "self_distillation", -0.5),
        (TrainConfig, "teacher_weight", 0.0),
        (TrainConfig, "distillation_temperature", 0.0),
    ],
)
def test_a_value_out_of_range_is_named_in_one_line(section: type, field: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        section(**{field: value})
    assert f".{field} must be " in str(error.value)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (TrainConfig, "epochs", "3"),
        (TrainConfig, "epochs", 3.0),
        (TrainConfig, "epochs", True),
        (TrainConfig, "epochs", None),
        (TrainConfig, "learning_rate", True),
        (TrainConfig, "nesterov", 1),
        (TrainConfig, "nesterov", "yes"),
        (ModelConfig, "tau", "2"),
        (ModelConfig, "detach_reset", 1),
        (ModelConfig, "depth", 3),
        (ModelConfig, "depth", [1.5]),
        (DataConfig, "root", None),
        (Config, "train", 3),
    ],
)
def test_a_value_of_another_type_is_not_converted(section: type, field: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        section(**{field: value})
    assert f"{field} must be " in str(error.value)
    assert str(error.value).endswith(f"; got {value!r}")


def test_whole_numbers_are_numbers_and_tuples_are_lists() -> None:
    assert type(TrainConfig(learning_rate=1).learning_rate) is float
    assert ModelConfig(depth=(3, 2)).depth == [3, 2]


def test_a_field_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="epoch"):
        TrainConfig(epoch=3)


def test_values_by_position_are_named_in_errors() -> None:
    with pytest.raises(InputError, match=r"^train\.batch_size must be at least 1; got 0$"):
        TrainConfig(3, 0)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(InputError, match="momentum must be"):
        TrainConfig(nesterov=True, momentum=0.0)


def test_relu_has_no_constants_of_neurons() -> None:
    with pytest.raises(InputError, match=r"^model\.tau must be null with model\.activation relu, .*; got 2\.0$"):
        ModelConfig(activation="relu", tau=2.0)
    config = Config(model=ModelConfig(name="msresnet18_cifar", activation="relu"))
    assert config.with_neuron() == config == Config.from_dict(config.to_dict())


def test_cutout_is_not_for_folders_of_images() -> None:
    with pytest.raises(InputError, match=r"^data\.cutout must be 0 with data\.name imagefolder .*; got 8$"):
        DataConfig(name="imagefolder", cutout=8)


def test_test_images_are_at_least_as_large_as_their_crop() -> None:
    with pytest.raises(InputError, match="resize must be at least"):
        DataConfig(name="imagefolder", image_size=224, resize=200)
    DataConfig(name="synthetic", image_size=300, resize=256)


def test_to_dict_and_from_dict_are_inverse() -> None:
    config = Config(
        data=DataConfig(name="digits"), model=ModelConfig(depth=[1, 2]), train=TrainConfig(epochs=3), device="cpu"
    )
    assert Config.from_dict(config.to_dict()) == config


def test_an_absent_field_has_its_default_and_an_unknown_one_is_refused() -> None:
    assert Config.from_dict({"train": {"epochs": 7}}) == Config(train=TrainConfig(epochs=7))
    with pytest.raises(InputError, match=r"train\.epoch"):
        Config.from_dict({"train": {"epoch": 7}})


@pytest.mark.parametrize("value", ["auto", True, False])
def test_a_truth_value_of_an_earlier_version_means_the_same(value: bool | str) -> None:
    config = Config.from_dict({"train": {"cuda_graph": value}})
    assert config.train.cuda_graph is value
    assert Config.from_dict(config.to_dict()) == config


def test_flat_names_every_value() -> None:
    flat = Config().flat()
    assert Config.from_flat(flat) == Config()
    assert flat["train.epochs"] == 250
    assert flat["device"] == "auto"
    assert "train" not in flat


@pytest.mark.parametrize(
    ("coding", "normalized"),
    [(None, True), ("gac", True), ("direct", True), ("rate", False), ("latency", False), ("phase", False)],
)
def test_codings_of_intensities_get_images_that_are_not_normalized(coding: str, normalized: bool) -> None:
    assert ModelConfig(coding=coding).takes_normalized_images is normalized


@pytest.mark.parametrize(
    ("section", "field", "value", "close"),
    [
        (ModelConfig, "surrogate", "Triangle", "triangle"),
        (ModelConfig, "surrogate", "PiecewiseQuadratic", "triangle"),
        (ModelConfig, "surrogate", "Rect", "rectangle"),
        (TrainConfig, "optimizer", "Adam", "adamw"),
    ],
)
def test_the_closest_choice_is_named(section: type, field: str, value: str, close: str) -> None:
    with pytest.raises(InputError, match=rf"\(did you mean {close}\?\); got '{value}'"):
        section(**{field: value})


def test_tau_is_told_from_a_decay() -> None:
    with pytest.raises(
        InputError, match=r"model\.tau must be greater than 1 or null .* tau = 1 / \(1 - d\)\); got 0\.5"
    ):
        ModelConfig(tau=0.5)


@pytest.mark.parametrize(
    ("name", "neuron", "constants"),
    [
        ("gac_msresnet18_cifar", "cifar", (2.0, 1.0, "triangle", False)),
        ("msresnet34", "imagenet", (4 / 3, 0.5, "rectangle", True)),
    ],
)
def test_the_presets_constants_stand_where_none_are_given(name: str, neuron: str, constants: tuple) -> None:
    config = Config(model=ModelConfig(name=name)).with_neuron()
    model = config.model
    assert (model.neuron, model.tau, model.v_threshold, model.surrogate, model.detach_reset) == (neuron, *constants)
    assert config.with_neuron() == config
    given = Config(model=ModelConfig(name=name, tau=3.0, detach_reset=not constants[3])).with_neuron().model
    assert (given.tau, given.v_threshold, given.detach_reset) == (3.0, constants[1], not constants[3])
