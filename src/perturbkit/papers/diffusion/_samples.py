"""Samples that a person can look at and listen to: sheets of pictures, PNG and WAV for ``Evidence.samples``."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

__all__ = ["draw_sheets", "png", "sheet", "wav"]


def sheet(images: Tensor, columns: int = 10, gap: int = 1) -> np.ndarray:
    """Return images (n, height, width) or (n, 1, height, width) in [0, 1] side by side, as bytes."""
    tiles = images.detach().double().cpu().reshape(-1, *images.shape[-2:]).clamp(0, 1)
    rows = math.ceil(len(tiles) / columns)
    filled = torch.ones(rows * columns, *tiles.shape[1:], dtype=tiles.dtype)
    filled[: len(tiles)] = tiles
    framed = torch.nn.functional.pad(filled, (gap, gap, gap, gap), value=1.0)
    whole = framed.reshape(rows, columns, *framed.shape[1:]).permute(0, 2, 1, 3)
    return (255 * whole.reshape(rows * framed.shape[1], -1)).round().to(torch.uint8).numpy()


def draw_sheets(axes: np.ndarray | Axes, sheets: Mapping[str, Tensor], columns: int = 10) -> None:
    """Draw one sheet an axis, with its name above."""
    for ax, (name, images) in zip(np.atleast_1d(np.asarray(axes)).flat, sheets.items(), strict=True):
        ax.imshow(sheet(images, columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()


def png(images: Tensor, *, columns: int = 10, scale: int = 4) -> bytes:
    """Return a sheet of grey images in [0, 1] as a PNG file, every pixel ``scale`` wide."""
    from PIL import Image

    picture = np.kron(sheet(images, columns), np.ones((scale, scale), np.uint8))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def wav(waves: Tensor, rate: int, *, pause: float = 0.2) -> bytes:
    """Return one wave (n,) or several (k, n), one after another, as a 16-bit WAV file; the loudest sample is full scale."""
    rows = waves.detach().double().cpu().reshape(-1, waves.shape[-1])
    silence = torch.zeros(round(pause * rate), dtype=rows.dtype)
    joined = torch.cat([part for row in rows for part in (row, silence)][:-1])
    loud = float(joined.abs().max())
    frames = (joined / (loud or 1.0) * 32767).round().to(torch.int16).numpy().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(frames.tobytes())
    return file.getvalue()
