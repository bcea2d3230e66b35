"""Image files of strangers: what is decoded, and what is refused before a pixel is decoded.

Only PNG, JPEG and WebP, told by content and not by name; at most 50 megapixels by the header's claim; torn files are
refused rather than filled with grey (anchors.md B: Pillow >= 12.2, PNG/JPEG/WebP only, cap 50 Mpx).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dori.errors import DoriError

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PIXELS = 50_000_000
FILE_BYTES = 200_000_000
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, OverflowError, LookupError, TypeError, struct.error, zlib.error)


def size(path: Path) -> tuple[int, int]:
    """Width and height of the upright image by the file's header; no pixel is decoded.

    Raises:
        DoriError: no such file, another format, or more than 50 megapixels.
    """
    with _opened(path) as image:
        # Pillow decodes a PNG to look for what stands behind its pixels.
        known = image.format != "PNG" or "exif" in image.info
        lying = known and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        return (image.height, image.width) if lying else image.size


def load_image(path: Path, side_px: int) -> Tensor:
    """An image as a square, shape (3, side_px, side_px), float32 in [0, 1].

    Turned upright (EXIF), laid on white where it is transparent, cut to the central square and resized (Lanczos);
    an image that has the size already comes back unchanged.

    Raises:
        DoriError: no such file, another format, more than 50 megapixels, or torn data.
    """
    with _opened(path) as opened:
        image = _rgb(opened)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != side_px:
        image = image.resize((side_px, side_px), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1).contiguous() / 255


def png_bytes(image: Tensor) -> bytes:
    """An 8-bit PNG file of an image, shape (3, H, W), in [0, 1]; the same bytes for the same pixels."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with only its header read; whatever the decoder raises in the block is told as one sentence."""
    try:
        if not path.is_file():
            raise DoriError(f"{path} is missing or no file; add the image or remove its line")
        if path.stat().st_size > FILE_BYTES:
            raise DoriError(f"{path} is larger than {FILE_BYTES // 10**6} MB; give a smaller copy")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns below its own limit; ours is lower and refuses
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except (Image.DecompressionBombError, MemoryError):
        raise DoriError(f"{path} claims more than {PIXELS // 10**6} megapixels; give a smaller copy") from None
    except UnidentifiedImageError:
        raise DoriError(f"{path} is no PNG, JPEG or WebP image, whatever its name says; convert it to PNG") from None
    except PermissionError:
        raise DoriError(f"{path} may not be read; mend its permissions") from None
    except DAMAGED as error:
        reason = (str(error).split("\n")[0] or type(error).__name__)[:80]
        raise DoriError(f"{path} is damaged or cut off ({reason}); fetch it again") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded, upright, without transparency, 8 bits a channel."""
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")
