"""A folder of real photographs in ImageNet's layout and typical size, for loading them."""

import io
import os
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (500, 375)
"""The commonest size in ImageNet, in pixels."""
QUALITY = 98
"""Of the JPEG files, which so have about 100 kB, as ImageNet's (138 GB in 1,281,167 files)."""
CROPS = 8


def write_photographs(folder: Path, images: int) -> None:
    """Write ``images`` JPEG files, half of them in each of two class folders below ``folder``.

    They are links to 16 different ones, crops of the two photographs that scikit-learn holds, so that a large number
    takes no space. Reading them never waits for a disk.
    """
    photographs = load_sample_images()
    for label, (name, pixels) in enumerate(zip(("china", "flower"), photographs.images, strict=True)):
        image = Image.fromarray(pixels)
        (folder / name).mkdir(parents=True)
        for number in range(label, images, 2):
            path, crop = folder / name / f"{number}.JPEG", number // 2
            if crop < CROPS:
                path.write_bytes(_encode(image, crop))
            else:
                os.link(folder / name / f"{label + 2 * (crop % CROPS)}.JPEG", path)


def _encode(image: Image.Image, crop: int) -> bytes:
    file = io.BytesIO()
    left = crop * (image.width - SIZE[0]) // (CROPS - 1)
    image.crop((left, 0, left + SIZE[0], SIZE[1])).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
