"""Images, from a folder with one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from perturbkit.audit.opening._opened import OpenedData, first_line
from perturbkit.core import checks

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def from_folder(path: Path) -> OpenedData:
    """Read images as RGB in [0, 1], shape (n, 3, height, width); links that leave the folder are refused.

    Raises
    ------
    DataError
        If there are no images, one cannot be read, or they differ in size.
    """
    import pandas as pd
    from PIL import Image

    root = path.resolve()
    # What systems and editors leave behind is no class.
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    files = [
        (i, f) for i, d in enumerate(folders) for f in sorted(d.iterdir()) if f.suffix.lower() in _IMAGES
    ]
    if not files:
        raise checks.DataError(
            f"{path} holds no images in class folders; allowed: {path}/CLASS/IMAGE.png (or jpg). Sort the images "
            "into one folder a class."
        )
    pictures = []
    for _, file in files:
        if not file.resolve().is_relative_to(root):
            raise checks.DataError(
                f"{file} is a link out of {path}; allowed: files inside it. Copy the image there."
            )
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
        except Exception as error:
            raise checks.DataError(
                f"{file} could not be read as an image ({first_line(error)}); allowed: PNG, JPEG, BMP or WebP. "
                "Remove or mend it."
            ) from error
    shapes = {p.shape for p in pictures}
    if len(shapes) > 1:
        some = ", ".join(f"{s[1]}x{s[0]}" for s in sorted(shapes)[:3])
        raise checks.DataError(
            f"{path} holds images of {len(shapes)} sizes ({some}); allowed: one size, the model's. Resize them first."
        )
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    targets = pd.Series([folders[i].name for i, _ in files])
    return OpenedData(
        path.name, "image", targets, classes=tuple(d.name for d in folders), x=x, from_file=True
    )
