import logging
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from gac.config import DataConfig
from gac.data import build_data, image_folder
from gac.data.augment import POLICIES
from gac.data.class_folders import open_folders
from gac.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, read_image
from gac.errors import InputError
from image_tree import CLASSES as REAL_CLASSES
from image_tree import DAMAGED, PHOTOGRAPHS, SOUND, encode, write_split

CLASSES = ("ant", "bee", "cat")
SIZES = ((40, 30), (33, 64), (24, 24), (90, 50))  # width, height


def write_image(path, number, mode="RGB"):
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(SIZES[number % len(SIZES)]).convert(mode).save(path, quality=95)


@pytest.fixture
def root(tmp_path):
    """Thirteen training and six test JPEG files of several sizes, one of them grey."""
    number = 0
    for folder, counts in (("train", (5, 4, 4)), ("val", (2, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            for index in range(count):
                mode = "L" if (folder, name, index) == ("val", "bee", 0) else "RGB"
                write_image(tmp_path / folder / name / f"{index}.jpeg", number, mode)
                number += 1
    return tmp_path


def build(
    root, *, splits=("train", "test"), seed=3, workers=0, normalize=True, batch_size=4, eval_batch_size=5, **options
):
    config = DataConfig(name="imagefolder", root=str(root), image_size=24, resize=28, workers=workers, **options)
    return build_data(
        config,
        device="cpu",
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        seed=seed,
        normalize=normalize,
        splits=splits,
    )


def assert_same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_facts(root):
    info = build(root).info
    assert (info.num_classes, info.class_names) == (3, CLASSES)
    assert (info.channels, info.height, info.width) == (3, 24, 24)
    assert (info.train_size, info.test_size) == (13, 6)
    assert (info.mean, info.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_batches_have_the_stated_shapes(root):
    loader = build(root).train
    batches = list(loader.epoch(0))
    assert (len(loader), loader.size) == (4, 13)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 1]
    assert all(images.shape == (len(labels), 3, 24, 24) for images, labels in batches)
    assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in batches)
    labels = torch.cat([labels for _, labels in batches])
    assert torch.bincount(labels).tolist() == [5, 4, 4]
    assert labels.tolist() != sorted(labels.tolist())


def test_test_images_equal_torchvisions_in_order(root):
    steps = transforms.Compose(
        [
            transforms.Resize(28),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    paths = sorted((root / "val").glob("*/*.jpeg"))
    expected = torch.stack([steps(Image.open(path).convert("RGB")) for path in paths])
    images, labels = (torch.cat(parts) for parts in zip(*build(root).test.epoch(0), strict=True))
    assert torch.equal(images, expected)
    assert labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]


def test_every_training_image_comes_once(tmp_path):
    # One image a class, each of one colour, which no crop or flip changes: the colour must fit the label.
    for number in range(9):
        for folder in ("train", "val"):
            path = tmp_path / folder / str(number) / "image.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(path)
    images, labels = (torch.cat(parts) for parts in zip(*build(tmp_path, normalize=False).train.epoch(0), strict=True))
    assert labels.sort().values.tolist() == list(range(9))
    assert torch.equal((images * 255).round()[:, 0], (20.0 * labels).view(-1, 1, 1).expand(-1, 24, 24))


@pytest.mark.parametrize("augmented", [False, True])
def test_workers_do_not_change_the_batches(root, augmented):
    options = {"augment": "trivialaugment", "random_erasing": 0.5} if augmented else {}
    in_process = build(root, **options).train
    helped = build(root, workers=2, **options).train
    # The workers stay alive from one epoch to the next and must learn its number.
    for epoch in (0, 1):
        assert_same_batches(in_process.epoch(epoch), helped.epoch(epoch))
    unfinished = helped.epoch(5)
    next(unfinished)
    assert_same_batches(list(in_process.epoch(2))[3:], helped.epoch(2, start=3))


@pytest.mark.parametrize("start", range(4))
def test_resumed_epoch_has_the_remaining_batches(root, start):
    whole = list(build(root).train.epoch(2))
    assert_same_batches(whole[start:], build(root).train.epoch(2, start))


def test_epoch_resumed_at_its_end_is_empty(root):
    assert list(build(root).train.epoch(0, start=4)) == []
    with pytest.raises(InputError, match="cannot begin at batch 5"):
        build(root).train.epoch(0, start=5)


def test_augmentation_differs_between_epochs_and_seeds(tmp_path):
    # A single image: the order cannot differ.
    write_image(tmp_path / "train" / "ant" / "0.jpeg", 1)

    def image(seed, epoch):
        ((images, _),) = build(tmp_path, seed=seed, splits=("train",)).train.epoch(epoch)
        return images

    assert torch.equal(image(0, 0), image(0, 0))
    assert not torch.equal(image(0, 0), image(0, 1))
    assert not torch.equal(image(0, 0), image(1, 0))


def test_each_image_has_its_own_crop(tmp_path):
    for index in range(4):
        write_image(tmp_path / "train" / "ant" / f"{index}.jpeg", 1)  # four times the same image
    ((images, _),) = build(tmp_path, splits=("train",)).train.epoch(0)
    assert len(images.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("option", "off", "on"),
    [
        ("horizontal_flip", False, True),
        ("random_erasing", 0.0, 1.0),
        *(("augment", "off", policy) for policy in POLICIES),
    ],
)
def test_options_change_the_training_images_only(root, option, off, on):
    off, on = build(root, **{option: off}), build(root, **{option: on})
    assert_same_batches(off.test.epoch(0), on.test.epoch(0))
    pairs = zip(off.train.epoch(0), on.train.epoch(0), strict=True)
    assert any(not torch.equal(one, other) for (one, _), (other, _) in pairs)


def test_global_generator_is_left_alone(root):
    loader = build(root).train
    before = torch.random.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_intensities_without_normalization(root):
    data = build(root, normalize=False)
    images, _ = next(data.train.epoch(0))
    assert 0 <= images.min() < 0.2 < 0.8 < images.max() <= 1
    assert (data.info.mean, data.info.std) == ((0.0,) * 3, (1.0,) * 3)


def test_evaluation_needs_no_training_folder(root):
    (root / "train").rename(root / "elsewhere")
    data = build(root, splits=("test",))
    assert data.train is None
    assert data.info.train_size is None
    assert len(list(data.test.epoch(0))) == 2


def center(image: Image.Image) -> torch.Tensor:
    steps = transforms.Compose([transforms.Resize(28), transforms.CenterCrop(24), transforms.PILToTensor()])
    return steps(image).float()


def test_every_kind_of_file_shows_its_photograph(tmp_path):
    write_split(tmp_path / "val", images=len(SOUND) * len(REAL_CLASSES))
    ((images, labels),) = build(tmp_path, splits=("test",), normalize=False, eval_batch_size=18).test.epoch(0)
    paths = sorted((tmp_path / "val").glob("*/*"))
    for path, image, label in zip(paths, images * 255, labels, strict=True):
        photograph, kind = PHOTOGRAPHS[REAL_CLASSES[label]], path.name.removeprefix("0_")
        changed = {
            "portrait.JPEG": lambda image: image.crop((20, 0, 80, 107)),
            "small.jpg": lambda image: image.resize((40, 30)),
            "grey.JPEG": lambda image: image.convert("L").convert("RGB"),
        }
        shown = changed.get(kind, Image.Image.copy)(photograph)
        # Alpha is dropped and EXIF's orientation ignored, as torchvision's ImageFolder does. Lossy files differ from
        # the photograph by less than 5 of 255 grey levels on average; turned, inverted or exchanged ones by over 25.
        assert (image - center(shown)).abs().mean() < 5, path.name
        assert (image - center(shown.transpose(Image.Transpose.ROTATE_180))).abs().mean() > 25, path.name


def write_damaged_tree(root: Path, *, images: int = 200) -> Path:
    """A training split of which two images are damaged, and nothing else."""
    write_split(root / "train", images, damaged=tuple(DAMAGED))
    return root


def train_loader(root: Path, **options):
    return build(root, splits=("train",), augment="autoaugment_imagenet", batch_size=32, **options).train


def test_workers_replace_damaged_images_alike(tmp_path):
    root = write_damaged_tree(tmp_path)
    loaders = [train_loader(root, workers=workers) for workers in (0, 1, 3)]
    for epoch in (0, 1):
        epochs = [list(loader.epoch(epoch)) for loader in loaders]
        assert [loader.skipped for loader in loaders] == [2, 2, 2]
        assert_same_batches(epochs[0], epochs[1])
        assert_same_batches(epochs[0], epochs[2])


def test_workers_outlive_the_epoch(root):
    def workers():
        return {process.pid for process in multiprocessing.active_children()}

    before = workers()
    loader = build(root, workers=2).train
    list(loader.epoch(0))
    begun = workers() - before
    list(loader.epoch(1))
    assert len(begun) == 2
    assert workers() - before == begun


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no signal masks")
def test_workers_start_with_sigterm_blocked(root, tmp_path, monkeypatch):
    """One that is told to end before it knows what to do about it would end, and the run with it."""
    outlive = image_folder._outlive_signals

    def note_and_outlive(worker: int) -> None:
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        (tmp_path / f"worker{worker}").write_text(str(blocked))
        outlive(worker)

    monkeypatch.setattr(image_folder, "_outlive_signals", note_and_outlive)
    list(build(root, workers=2).train.epoch(0))
    assert [(tmp_path / f"worker{i}").read_text() for i in range(2)] == ["True", "True"]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_next_image_takes_the_place_of_a_damaged_one(tmp_path):
    damaged, sound = tmp_path / "damaged", tmp_path / "sound"
    write_damaged_tree(damaged)
    write_damaged_tree(sound)
    flower = sound / "train" / "flower"
    # The damaged files are the last two, so that the first image of all follows.
    assert [path.name for path in sorted(flower.iterdir())[-2:]] == ["truncated.JPEG", "zero_bytes.JPEG"]
    first = min((sound / "train" / "china").iterdir())
    for name in DAMAGED:
        (flower / name).write_bytes(first.read_bytes())
    loader = train_loader(damaged)
    replaced = 0
    for (images, labels), (expected, flowers) in zip(loader.epoch(3), train_loader(sound).epoch(3), strict=True):
        assert torch.equal(images, expected)
        # The label is that of the image shown.
        assert set(flowers[labels != flowers].tolist()) <= {REAL_CLASSES.index("flower")}
        replaced += int((labels != flowers).sum())
    assert replaced == loader.skipped == 2


def test_skipped_images_are_named_once_and_counted_in_every_epoch(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "gac")
    loader = train_loader(write_damaged_tree(tmp_path), workers=2)
    assert loader.skipped == 0
    counts = []
    for epoch in range(2):
        for _ in loader.epoch(epoch):
            counts.append(loader.skipped)
        assert loader.skipped == 2
    assert sorted(counts[:7]) == counts[:7]
    flower = tmp_path / "train" / "flower"
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert messages[0].startswith(f"{flower / 'truncated.JPEG'} cannot be read (image file is truncated")
    assert messages[1].startswith(f"{flower / 'zero_bytes.JPEG'} cannot be read (not an image of a known format): the")
    assert messages[1].endswith("the next image in the folders' order takes its place")
    # A resumed epoch counts only the images that are left.
    list(loader.epoch(1, start=len(loader)))
    assert loader.skipped == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_set_is_scored_without_its_damaged_images(tmp_path, caplog, workers):
    write_split(tmp_path / "val", images=102, damaged=("truncated.JPEG",))
    paths = sorted((tmp_path / "val").glob("*/*"))
    loader = build(tmp_path, splits=("test",), workers=workers, eval_batch_size=20).test
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [20, 20, 20, 20, 20, 1]
    expected = [REAL_CLASSES.index(path.parent.name) for path in paths if path.name != "truncated.JPEG"]
    assert torch.cat([labels for _, labels in batches]).tolist() == expected
    assert (loader.size, loader.skipped) == (102, 1)
    assert "it is left out, and the scores are those of the other images" in caplog.text


def test_a_batch_with_nothing_left_does_not_come(tmp_path):
    write_split(tmp_path / "val", images=101, damaged=("truncated.JPEG",))
    loader = build(tmp_path, splits=("test",), eval_batch_size=100).test
    assert [len(labels) for _, labels in loader.epoch(0)] == [100]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("test", "val")])
def test_more_damage_than_tolerated_is_one_line(tmp_path, split, folder, workers):
    write_split(tmp_path / folder, images=199, damaged=tuple(DAMAGED))
    loader = getattr(build(tmp_path, splits=(split,), workers=workers), split)
    message = f"more than 1 % of the 199 images in {tmp_path / folder} cannot be read, {tmp_path / folder}/flower/"
    # Not kept: workers whose loader is left to the garbage collector take 5 s each to end.
    with pytest.raises(InputError, match=rf"\A{message}\S+ among them \([^\n]*\); replace or delete these images\Z"):
        list(loader.epoch(0))


def test_folders_that_vanish_are_noticed_in_the_first_batch(tmp_path):
    loader = train_loader(write_damaged_tree(tmp_path))
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"more than 1 % of the 200 images .*\(No such file or directory\)"):
        next(loader.epoch(0))
    assert loader.skipped == 1


def flip_bits(path: Path):
    content = bytearray(path.read_bytes())
    content[2:40] = bytes(38)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "image file is truncated"),
        (lambda path: path.write_text("not an image"), "not an image of a known format"),
        (lambda path: path.write_bytes(b"P6 x 4 255\n"), "invalid literal for int"),
        (lambda path: path.write_bytes(b"P6 99999 99999 255\n"), "Image size .9999800001 pixels. exceeds limit"),
        (flip_bits, "not an image of a known format"),
        (Path.unlink, "No such file or directory"),
    ],
)
def test_the_reason_is_given(tmp_path, caplog, damage, reason):
    write_split(tmp_path / "val", images=100)
    path = tmp_path / "val" / "flower" / "1_cmyk.JPEG"
    loader = build(tmp_path, splits=("test",)).test
    damage(path)
    list(loader.epoch(0))
    assert loader.skipped == 1
    (record,) = caplog.records
    assert re.match(rf"{path} cannot be read \(.*{reason}", record.getMessage())


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode image"), TypeError("'str' object"), IndexError("no")])
def test_whatever_a_decoder_raises_is_a_damaged_image(error, tmp_path, caplog, monkeypatch):
    # Pillow's AVIF decoder and its reader of TIFF tags do so for damaged bytes.
    write_split(tmp_path / "val", images=100)

    def read(path):
        if path.endswith("flower/1_cmyk.JPEG"):
            raise error
        return read_image(path)

    monkeypatch.setattr("gac.data.image_folder.read_image", read)
    loader = build(tmp_path, splits=("test",), workers=0).test
    list(loader.epoch(0))
    assert loader.skipped == 1
    assert f"cannot be read ({error})" in caplog.text


def test_a_damaged_avif_file_is_left_out(tmp_path):
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow does not write AVIF")
    write_split(tmp_path / "val", images=100)
    content = encode(PHOTOGRAPHS[REAL_CLASSES[0]], "AVIF")
    # The box that says where the picture is.
    (tmp_path / "val" / "flower" / "1_cmyk.JPEG").write_bytes(content.replace(b"iloc", b"free"))
    loader = build(tmp_path, splits=("test",), workers=0).test
    list(loader.epoch(0))
    assert loader.skipped == 1


def test_an_iteration_that_is_never_finished_does_not_keep_python_from_ending(root):
    # At exit multiprocessing ends workers by SIGTERM, and waits for them.
    program = f"""
from test_image_folder import build
batches = build({str(root)!r}, workers=1).train.epoch(0)
next(batches)
batches.gi_frame.f_locals['self']._loader._iterator._shutdown = True  # DataLoader forgets them
"""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}:{here.parents[1]}"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


# --- Kinds of files

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff(pixels: np.ndarray, white_is_zero: bool = False) -> bytes:
    """Return an uncompressed grey TIFF file of any type of numbers."""
    data, (height, width) = pixels.tobytes(), pixels.shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    numbers = {
        256: width,
        257: height,
        258: 8 * pixels.itemsize,
        259: 1,
        262: int(not white_is_zero),
        273: 8,
        277: 1,
        278: height,
    }
    numbers |= {279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    directory = struct.pack("<H", len(numbers)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("16.png", encode(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG")),
        ("16.pgm", encode(Image.fromarray(RAMP.astype(np.uint16) * 257), "PPM")),
        ("u16.tif", tiff(RAMP.astype(np.uint16) * 257)),
        ("i16.tif", tiff(np.rint(RAMP * (32767 / 255)).astype(np.int16))),
        ("u32.tif", tiff(RAMP.astype(np.uint32) * 16843009)),
        ("i32.tif", tiff(np.rint(RAMP * (2147483647 / 255)).astype(np.int32))),
        ("f32.tif", tiff((RAMP / 255).astype(np.float32))),
        ("8.tif", tiff(RAMP)),
        ("8_negative.tif", tiff(255 - RAMP, white_is_zero=True)),
        ("u16_negative.tif", tiff((255 - RAMP).astype(np.uint16) * 257, white_is_zero=True)),
        ("f32_negative.tif", tiff((1 - RAMP / 255).astype(np.float32), white_is_zero=True)),
    ],
)
def test_images_of_more_bits_keep_their_range(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    pixels = np.asarray(read_image(str(tmp_path / name)))
    assert np.array_equal(pixels, np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize("pixels", [RAMP.astype(np.float32), RAMP / np.float32(-255), np.float32("nan") + RAMP / 255])
def test_a_range_that_nobody_knows_is_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "f.tif").write_bytes(tiff(pixels.astype(np.float32)))
    with pytest.raises(ValueError, match=r"its values are not all from 0 to 1\.0"):
        read_image(str(tmp_path / "f.tif"))


@pytest.mark.parametrize(("extension", "kind"), [("gif", "GIF"), ("jfif", "JPEG"), ("WEBP", "WEBP"), ("avif", "AVIF")])
def test_other_kinds_of_photographs_are_used(extension: str, kind: str, tmp_path: Path) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    for name in REAL_CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / f"0.{extension}").write_bytes(encode(PHOTOGRAPHS[name], kind))
    folders = open_folders(str(tmp_path), ("test",))["test"]
    assert len(folders) == 2
    pixels = np.asarray(read_image(os.fsdecode(folders.paths[0])), dtype=float)
    assert np.abs(pixels - np.asarray(PHOTOGRAPHS[REAL_CLASSES[0]])).mean() < 12


def test_a_turn_that_exif_asks_for_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "turned.jpg").write_bytes(SOUND["exif.JPEG"](PHOTOGRAPHS[REAL_CLASSES[0]]))
    assert read_image(str(tmp_path / "turned.jpg")).size == PHOTOGRAPHS[REAL_CLASSES[0]].size
