"""One image of any kind to pixels of the kind asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Decoder:
    """Turns a data set's image values into uint8 pixels of one mode and one size.

    Takes encoded bytes, ``{bytes, path}``, a path, a PIL image, or (nested) lists of pixels. Transparent images are
    pasted on white, palettes resolved, 16 bits scaled to 8.

    Args:
        mode: ``"L"`` (grey) or ``"RGB"``.
        size: (height, width) to resize to, or None: all images must have the first one's size.
        folder: Where relative paths begin.
    """

    def __init__(self, mode: str, size: tuple[int, int] | None, folder: Path | None = None) -> None:
        self.mode, self.size, self.resize, self.folder = mode, size, size is not None, folder

    def __call__(self, value: Any, where: str) -> Tensor:
        """Decode one image.

        Args:
            value: The data set's value.
            where: Split and row, for errors.

        Returns:
            uint8 ``(channels, height, width)``.

        Raises:
            ValueError: If it cannot be decoded, or has another size than the images before.
        """
        from PIL import Image

        try:
            image = flat(self._open(value), self.mode)
        except (OSError, SyntaxError, TypeError, ValueError, KeyError, Image.DecompressionBombError) as error:
            raise ValueError(f"The image in {where} cannot be read: {error}. Remove or repair the row.") from error
        if self.resize and self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        size = (image.height, image.width)
        if self.size is None:
            self.size = size
        if size != self.size:
            raise ValueError(
                f"The image in {where} is {size[0]}×{size[1]} pixels (height × width), those before it are "
                f"{self.size[0]}×{self.size[1]}: give image_size to resize all images to one size."
            )
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

    def _open(self, value: Any) -> Any:
        from PIL import Image

        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise ValueError("it has neither bytes nor a path")
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str):
            return Image.open(Path(self.folder or ".") / value)
        if isinstance(value, Image.Image):
            return value
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255 or array.ndim not in (2, 3):
            raise ValueError(
                f"as an array it must hold integers from 0 to 255 in 2 or 3 dimensions, not {array.dtype} {array.shape}"
            )
        return Image.fromarray(array.astype(np.uint8))


def flat(image: Any, mode: str) -> Any:
    """A PIL image of any mode as grey or RGB: transparency on white, 16 bits to 8 by dropping the lower ones.

    Raises:
        ValueError: For pixels that are neither 8 nor 16 bits of light.
    """
    from PIL import Image

    image.load()
    if image.mode.startswith("I;16") or image.mode == "I":
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 0xFFFF:
            raise ValueError(f"pixels from {array.min()} to {array.max()} are not 16-bit light")
        image = Image.fromarray((array >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no scale that is known; store 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
