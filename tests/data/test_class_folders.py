import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from gac.data.class_folders import open_folders
from gac.data.image_folder import read_image
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


def test_what_is_not_used_is_counted(root, caplog):
    for name in ("notes.txt", "b.txt", "photo.heic"):
        (root / "val" / "china" / name).write_text("not an image")
    os.mkfifo(root / "val" / "flower" / "pipe.jpg")
    assert len(open_folders(str(root), ("test",))["test"]) == 6
    assert caplog.messages == [
        f"{root}/val: files that are not images are not used: 1 x .heic, 2 x .txt, 1 x pipes, sockets and devices"
    ]


def test_images_beside_the_class_folders_are_counted(root, caplog):
    for number in range(2):
        shutil.copy(root / "val" / "china" / "0_landscape.JPEG", root / "val" / f"{number}.JPEG")
    assert len(open_folders(str(root), ("test",))["test"]) == 6
    assert caplog.messages == [f"{root}/val: files beside the class folders are not used: 2"]


def test_hidden_and_left_behind_files_are_no_classes_and_no_images(root, caplog):
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        for place in (root / "train", root / "train" / "china"):
            shutil.copytree(root / "val" / "china", place / name)
    for name in ("._0.JPEG", "Thumbs.db", ".DS_Store", "desktop.ini"):
        shutil.copy(root / "val" / "china" / "0_landscape.JPEG", root / "train" / "china" / name)
    train = open_folders(str(root), BOTH)["train"]
    assert (train.class_names, len(train)) == (CLASSES, 6)
    assert caplog.messages == []


def test_every_folder_is_read_once(root, caplog):
    (root / "train" / "china" / "up").symlink_to(root / "train")
    (root / "train" / "china" / "round").symlink_to(root / "train" / "china")
    train = open_folders(str(root), BOTH)["train"]
    assert len(train) == 6
    assert "folders that are there already are not read again: " in caplog.text
    assert all(f"{root}/train/china/{name}" in caplog.text for name in ("up", "round"))


def test_links_to_folders_and_files_elsewhere_are_followed(root):
    (root / "train" / "china").rename(root / "elsewhere")
    (root / "train" / "china").symlink_to(root / "elsewhere")
    (root / "train" / "flower" / "linked.jpg").symlink_to(root / "elsewhere" / "0_landscape.JPEG")
    assert len(open_folders(str(root), BOTH)["train"]) == 7


def test_the_order_is_that_of_torchvision(root):
    for name in ("x", "x.1", "x/y", "w"):
        shutil.copytree(root / "val" / "china", root / "train" / "china" / name, dirs_exist_ok=True)
    found = open_folders(str(root), BOTH)["train"]
    expected = ImageFolder(root / "train")
    assert [os.fsdecode(path) for path in found.paths] == [path for path, _ in expected.samples]
    assert found.labels.tolist() == expected.targets


def test_names_need_not_be_utf8(root):
    os.rename(os.fsencode(root / "val" / "china"), os.fsencode(root / "val") + b"/\xff")
    folders = open_folders(str(root), ("test",))["test"]
    assert [os.fsencode(name) for name in folders.class_names] == [b"flower", b"\xff"]
    assert read_image(os.fsdecode(folders.paths[-1])).mode == "RGB"


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


def link_classes(root: Path):
    (root / "train" / "ant").symlink_to(root / "train" / "china")


def point_nowhere(root: Path):
    (root / "val" / "flower" / "0.JPEG").symlink_to("moved away")


def lose_a_class(root: Path):
    for split in ("train", "val"):
        (root / split / "ant").symlink_to("/moved/away")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_class, r"train has links that lead nowhere: ant; mend or remove them$"),
        (remove_val, r"there is no folder .*val; imagefolder needs train and val under --data.root"),
        (add_empty_classes, r"train has no images for ant, bee, cat and 2 more; add images \(.jpg, .jpeg, "),
        (rename_class, r"the same class folders.* order; in train only: china; in val only: japan$"),
        (add_classes, r"in train only: ant, bee, cat and 1 more$"),
        (unsort, r"val has no class folders; it needs one folder of images per class \(docs/imagenet.md"),
        (link_classes, r"train: china link to the folder of another class; remove them$"),
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
