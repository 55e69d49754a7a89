"""Pictures inside pages."""

from __future__ import annotations

import base64
from io import BytesIO

from PIL import Image


def data_url(picture: Image.Image) -> str:
    """A picture as PNG for the ``src`` of an ``img`` element."""
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
