import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gac.data.class_folders import open_folders
from gac.errors import InputError
from image_tree import CLASSES, write_split

BOTH = ("train", "test")


@pytest.fixture
def root() -> Iterator[Path]:
    # Not pytest's folder, which only its owner may enter: one test gives up its privileges.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for split in ("train", "val"):
        write_split(folder / split, images=6)
    yield folder
    shutil.rmtree(folder)


def test_lists_images_by_class_in_order(root):
    train = open_folders(str(root), BOTH)["train"]
    assert (train.class_names, len(train)) == (CLASSES, 6)
    paths = [Path(os.fsdecode(path)) for path in train.paths]
    assert paths == sorted((root / "train").glob("*/*"))
    assert [CLASSES[label] for label in train.labels] == [path.parent.name for path in paths]


def test_other_files_are_not_images(root):
    (root / "val" / "china" / "README.txt").write_text("not an image")
    assert len(open_folders(str(root), ("test",))["test"]) == 6


def test_names_need_not_be_ascii(root):
    (root / "val" / "china").rename(root / "val" / "长城")
    paths = open_folders(str(root), ("test",))["test"].paths
    assert sum(Path(os.fsdecode(path)).parent.name == "长城" for path in paths) == 3


def remove_val(root: Path):
    (root / "val").rename(root / "test")


def add_empty_classes(root: Path):
    for name in ("ant", "bee", "cat", "dog", "eel"):
        (root / "train" / name).mkdir()


def rename_class(root: Path):
    (root / "val" / "china").rename(root / "val" / "japan")


def add_classes(root: Path):
    for name in ("ant", "bee", "cat", "dog"):
        shutil.copytree(root / "train" / "china", root / "train" / name)


def unsort(root: Path):
    for path in (root / "val").glob("*/*"):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


def point_nowhere(root: Path):
    (root / "val" / "flower" / "0.JPEG").symlink_to("moved away")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_val, r"there is no folder .*val; imagefolder needs train and val under --data.root"),
        (add_empty_classes, r"train has no images for ant, bee, cat and 2 more; add images \(.jpg, .jpeg, "),
        (rename_class, r"the same class folders.* order; in train only: china; in val only: japan$"),
        (add_classes, r"in train only: ant, bee, cat and 1 more$"),
        (unsort, r"val has no class folders; it needs one folder of images per class \(docs/imagenet.md"),
        (point_nowhere, r"val/flower/0.JPEG cannot be opened: No such file or directory; check all images of"),
    ],
)
def test_bad_tree_is_one_line(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        open_folders(str(root), BOTH)
    assert "\n" not in str(caught.value)


def test_root_that_is_no_folder(root):
    with pytest.raises(InputError, match=r"^there is no folder .*absent; imagefolder needs"):
        open_folders(str(root / "absent"), BOTH)
    file = root / "val" / "china" / "0_small.jpg"
    with pytest.raises(InputError, match=r"0_small.jpg is a file; imagefolder needs train and val under --data.root"):
        open_folders(str(file), BOTH)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as an unprivileged user if the current user may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", r": Permission denied; let this user read all of --data.root"),
        ("val", r"val: Permission denied; let this user read all of --data.root"),
        ("val/flower", r"val/flower: Permission denied; let this user read all of --data.root"),
        (
            "val/flower/0_landscape.JPEG",
            r"0_landscape.JPEG cannot be opened: Permission denied; check all images of its class",
        ),
    ],
)
def test_what_must_not_be_read_is_one_line(root, place, message):
    (root / place).chmod(0)
    with as_nobody(), pytest.raises(InputError, match=message) as caught:
        open_folders(str(root), BOTH)
    (root / place).chmod(0o755)
    assert "\n" not in str(caught.value)
