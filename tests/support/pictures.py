"""Picture files to send."""

import io
from functools import cache

import numpy as np
from PIL import Image


@cache
def picture(seed: int, width: int = 50, height: int = 30, form: str = "PNG") -> bytes:
    """Noise: no two seeds have a tile in common."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
