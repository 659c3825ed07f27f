"""Pictures and videos as trainers hold them, in the form that engines take."""

from pathlib import Path
from typing import Any

import numpy as np


def picture(source: Any) -> Any:
    """An RGB picture from a PIL image, or from the path of one; anything else as it is."""
    from PIL import Image

    if isinstance(source, (str, Path)):
        with Image.open(source) as opened:
            return opened.convert("RGB")
    return source.convert("RGB") if isinstance(source, Image.Image) and source.mode != "RGB" else source


def frames(source: Any) -> Any:
    """A video as one array (frames, height, width, 3) from a list of pictures; anything else as it is."""
    from PIL import Image

    if isinstance(source, (list, tuple)) and source and all(isinstance(it, (Image.Image, str, Path)) for it in source):
        return np.stack([np.asarray(picture(frame)) for frame in source])
    return source
