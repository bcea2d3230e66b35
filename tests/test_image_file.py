"""Only whole PNG, JPEG and WebP files of bounded size become pixels, and those pixels are the right ones."""

import io
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dori.errors import DoriError
from dori.image_file import load_image, png_bytes, size


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Random bytes, shape (height, width, channels)."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encoded(pixels: np.ndarray, kind: str, **settings: object) -> bytes:
    """An image file in memory."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def claim(width: int, height: int) -> bytes:
    """A small PNG file whose header claims any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000)))


def test_an_image_of_the_right_size_comes_back_exactly(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG"))
    (tmp_path / "b.webp").write_bytes(encoded(pixels, "WEBP", lossless=True))
    for name in ("a.png", "b.webp"):
        assert torch.equal(load_image(tmp_path / name, 16), expected)
        assert size(tmp_path / name) == (16, 16)
    for sideways, expected_size in ((1, (16, 8)), (6, (8, 16)), (8, (8, 16))):
        exif = Image.Exif()
        exif[274] = sideways
        for suffix in ("jpg", "png"):
            Image.fromarray(noise(8, 16)).save(tmp_path / f"turned.{suffix}", exif=exif)
            assert size(tmp_path / f"turned.{suffix}") == expected_size
    (tmp_path / "c.png").write_bytes(png_bytes(expected))
    assert torch.equal(load_image(tmp_path / "c.png", 16), expected)


@pytest.mark.parametrize(("height", "width"), [(16, 40), (41, 16)])
def test_the_central_square_is_cut_out(tmp_path: Path, height: int, width: int) -> None:
    pixels = noise(height, width)
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG"))
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = torch.from_numpy(pixels[top : top + 16, left : left + 16]).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "a.png", 16), expected)


def test_resizing_keeps_a_flat_colour_and_the_mean(tmp_path: Path) -> None:
    flat = np.full((50, 50, 3), (10, 100, 250), np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(flat, "PNG"))
    image = load_image(tmp_path / "a.png", 16)
    assert torch.equal(image, (torch.tensor([10, 100, 250]) / 255)[:, None, None].expand(3, 16, 16))
    (tmp_path / "b.png").write_bytes(encoded(noise(64, 64), "PNG"))
    assert load_image(tmp_path / "b.png", 16).mean().item() == pytest.approx(noise(64, 64).mean() / 255, abs=0.01)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[0, 0, 3], pixels[0, 1, 3] = 255, 255, 51
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG"))
    image = load_image(tmp_path / "a.png", 4)
    assert image[:, 0, 0].tolist() == [1, 0, 0]
    assert image[:, 0, 1].tolist() == pytest.approx([1, 0.8, 0.8])  # 0.2 red + 0.8 white
    assert (image[:, 1:] == 1).all()


def test_grey_sixteen_bit_palette_and_cmyk_images_are_read(tmp_path: Path) -> None:
    grey16 = np.full((4, 4), 0x80FF, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "deep.png")
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert torch.allclose(load_image(tmp_path / "deep.png", 4), torch.tensor(128 / 255))
    assert torch.allclose(load_image(tmp_path / "grey.png", 4), torch.tensor(128 / 255))
    assert load_image(tmp_path / "palette.png", 4).max() == 0
    assert load_image(tmp_path / "bits.png", 4).min() == 1
    assert torch.allclose(load_image(tmp_path / "print.jpg", 8)[:, 0, 0], torch.tensor([1.0, 0, 0]), atol=0.03)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above as stored; orientation 3 turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "a.jpg").write_bytes(encoded(pixels, "JPEG", exif=exif))
    image = load_image(tmp_path / "a.jpg", 16)
    assert image[:, :7].max() < 0.1 and image[:, 9:].min() > 0.9


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "TGA", "ICO"])
def test_other_formats_are_refused_whatever_the_name_says(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(16, 16), kind))
    for read in (size, lambda other: load_image(other, 16)):
        with pytest.raises(DoriError, match="no PNG, JPEG or WebP"):
            read(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_off_anywhere_is_refused_or_has_every_pixel(tmp_path: Path, kind: str) -> None:
    path, whole = tmp_path / "a", encoded(noise(24, 24), kind)
    path.write_bytes(whole)
    expected, refused = load_image(path, 24), 0
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        try:
            assert torch.equal(load_image(path, 24), expected), end
        except DoriError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused >= 0.95 * (len(whole) // 7)


@pytest.mark.parametrize(
    ("width", "height"), [(30_000, 30_000), (10_000, 10_000), (7_072, 7_072), (2**31 - 1, 1), (50_000_001, 1)]
)
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(claim(width, height))
    start_s = time.process_time()
    for read in (size, lambda other: load_image(other, 16)):
        with pytest.raises(DoriError, match="bomb.png claims more than 50 megapixels"):
            read(path)
    assert time.process_time() - start_s < 1


def test_a_claim_below_the_cap_without_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(claim(1000, 1000))
    assert size(path) == (1000, 1000)
    with pytest.raises(DoriError, match="damaged or cut off"):
        load_image(path, 16)


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(DoriError, match="missing or no file"):
            size(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_mutated_files_give_pixels_or_a_sentence(tmp_path: Path, kind: str) -> None:
    dice, path = random.Random(0), tmp_path / "a"
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(noise(12, 12), kind, exif=exif)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(min(len(data), dice.choice((40, 200, 10**6))))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            image = load_image(path, 8)
            assert image.shape == (3, 8, 8) and image.min() >= 0 and image.max() <= 1
            outcomes.add("pixels")
        except DoriError:
            outcomes.add("sentence")
    assert outcomes == {"pixels", "sentence"}
