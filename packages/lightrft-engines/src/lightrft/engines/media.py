"""Images and videos, from the forms that trainers use to the form that engines take."""

from pathlib import Path
from typing import Any

import numpy as np


def to_rgb(image: object) -> Any:
    """An RGB image from a PIL image or a path; any other object unchanged."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    return image.convert("RGB") if isinstance(image, Image.Image) and image.mode != "RGB" else image


def to_frames(video: object) -> Any:
    """One array (frames, height, width, 3) from a list of images or paths; any other object unchanged."""
    from PIL import Image

    if isinstance(video, (list, tuple)) and video and all(isinstance(item, (Image.Image, str, Path)) for item in video):
        return np.stack([np.asarray(to_rgb(frame)) for frame in video])
    return video
