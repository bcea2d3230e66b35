"""Pictures of a run as `data:` URIs: small, never from outside the run's folder, and blurred where they must be.

Blurring happens in the pixels, before anything is written: an image is reduced to 8 x 8 cells, which is all that
remains of it, then enlarged and smoothed. A reader cannot undo that, whatever style sheet he uses.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageFilter

from dori.errors import DoriError
from dori.image_file import load_image, size

SIDE_PX = 128
REDACTED_CELLS = 8
REDACTED_PX = 64


@dataclass(frozen=True, slots=True)
class Album:
    """The pictures of one run's folder."""

    folder: Path

    def uri(self, picture: str, *, blurred: bool) -> str:
        """`image` as a JPEG in a data URI; "" where there is no such file."""
        image = self.image(picture, blurred=blurred)
        if image is None:
            return ""
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, subsampling=0)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    def image(self, picture: str, *, blurred: bool) -> Image.Image | None:
        """An image of at most 128 px a side (central square); None where there is no such file.

        Args:
            picture: path relative to the folder, with forward slashes; "" for none.
            blurred: reduce it to 8 x 8 cells first.

        Raises:
            DoriError: the path leaves the folder, or the file is no image or damaged.
        """
        path = self._inside(picture)
        if path is None or not path.exists():
            return None
        side = REDACTED_CELLS if blurred else min(SIDE_PX, *size(path))
        pixels = load_image(path, side).permute(1, 2, 0).numpy()
        image = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
        if blurred:
            image = image.resize((REDACTED_PX, REDACTED_PX), Image.Resampling.BICUBIC)
            image = image.filter(ImageFilter.GaussianBlur(REDACTED_PX / REDACTED_CELLS))
        return image

    def _inside(self, picture: str) -> Path | None:
        if not picture:
            return None
        parts, windows = PurePosixPath(picture), PureWindowsPath(picture)
        unsafe = parts.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in picture
        folder = self.folder.resolve()
        if unsafe or not (path := (folder / parts).resolve()).is_relative_to(folder):
            raise DoriError(f"picture {picture[:80]!r} lies outside the run's folder; give a path inside it")
        return path


def svg_uri(svg: str) -> str:
    """An SVG as a data URI; in an <img> nothing inside it can run or load."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")
