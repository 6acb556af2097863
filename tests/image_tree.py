"""A small tree of real photographs, scikit-learn's, in the kinds of files that ImageNet holds."""

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("china", "flower")
ROTATED_BY_EXIF = 6
PHOTOGRAPHS = {
    name: Image.fromarray(pixels).resize((160, 107))
    for name, pixels in zip(CLASSES, load_sample_images().images, strict=True)
}


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    """Return the image with an alpha channel that rises from left to right."""
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def rotated_by_exif(image: Image.Image) -> bytes:
    """Return a JPEG file that asks its viewer to turn the image."""
    exif = Image.Exif()
    exif[0x0112] = ROTATED_BY_EXIF
    return encode(image, exif=exif)


SOUND: dict[str, Callable[[Image.Image], bytes]] = {
    "landscape.JPEG": encode,
    "portrait.JPEG": lambda image: encode(image.crop((20, 0, 80, 107))),
    "small.jpg": lambda image: encode(image.resize((40, 30)), quality=95),
    "progressive.jpeg": lambda image: encode(image, progressive=True),
    "grey.JPEG": lambda image: encode(image.convert("L")),
    "cmyk.JPEG": lambda image: encode(image.convert("CMYK"), quality=95),
    "exif.JPEG": rotated_by_exif,
    "alpha.png": lambda image: encode(with_alpha(image), "PNG"),
    "a_png_called.JPEG": lambda image: encode(image, "PNG"),
}
DAMAGED: dict[str, Callable[[Image.Image], bytes]] = {
    "truncated.JPEG": lambda image: encode(image)[:-500],
    "zero_bytes.JPEG": lambda image: b"",
}


def write_split(folder: Path, images: int, damaged: tuple[str, ...] = ()) -> None:
    """Write ``images`` images into the folders of both classes, the damaged ones into the second; sound ones repeat."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for file in damaged:
        (folder / CLASSES[1] / file).write_bytes(DAMAGED[file](PHOTOGRAPHS[CLASSES[1]]))
    for path, content in itertools.islice(_sound_files(folder), images - len(damaged)):
        path.write_bytes(content)


def _sound_files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    contents = {
        (name, file): make(photograph) for file, make in SOUND.items() for name, photograph in PHOTOGRAPHS.items()
    }
    for copy in itertools.count():
        for (name, file), content in contents.items():
            yield folder / name / f"{copy}_{file}", content
