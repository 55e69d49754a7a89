"""Pictures inside pages."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image


def data_url(picture: Image.Image) -> str:
    """A picture as PNG for the ``src`` of an ``img`` element."""
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(pixels: np.ndarray, side: int) -> str:
    """A picture, uint8 [H, W, 3], for an ``img`` element of ``side`` pixels: no larger in the page than a screen shows it."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((2 * side, 2 * side))  # sharp on dense screens too
    return data_url(picture)
