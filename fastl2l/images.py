"""Pictures in and out of files, of whatever kind people have: as Tensors [3, height, width] of RGB in [0, 1]."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastl2l.files import write_bytes

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""That pictures are written in, by the name's suffix."""
LEAST_SIDE = 8
"""Pixels of a picture's shorter side."""

_OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
_TO_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64, device="cpu"
)
"""RGB to brightness and two differences of colour (BT.601, as JPEG)."""
_LINE = 14  # pixels that a caption takes


def read(name: str, path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, upright and in 8-bit RGB.

    It is turned as its EXIF orientation says; what is transparent shows white; grey, palettes, CMYK and 16 bits a
    channel become RGB.

    Args:
        name: of the argument that the file is, for messages.
        path: the file, in any format that Pillow reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, a damaged one, an animation, or smaller than 8 pixels.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{name}: expected a picture, got {path}, which does not exist")
    if not Path(path).is_file():
        raise ValueError(f"{name}: expected a picture, got {path}, which is a folder or a device")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                frames = getattr(opened, "n_frames", 1)
                if frames > 1:
                    raise ValueError(f"{name}: expected a still picture, got {path} with {frames} frames; save one")
                picture = _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: expected a picture in a format that Pillow reads, got {path}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, got more in {path}") from error
    except (OSError, SyntaxError, EOFError) as error:  # of Pillow's readers, about damaged files
        raise ValueError(f"{name}: expected a picture, got {path}, which is damaged: {error}") from error
    if min(picture.size) < LEAST_SIDE:
        got = " x ".join(map(str, picture.size))
        raise ValueError(f"{name}: expected at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got {got} in {path}")
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):  # 16 bits of grey, which Pillow would cut off at 255
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        grey = np.asarray(picture, dtype=np.float64)
        white = 1.0 if np.nanmax(grey) <= 1 else 255.0
        return Image.fromarray((np.nan_to_num(grey / white).clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def tensor(picture: Image.Image) -> Tensor:
    """float32 [3, height, width] in [0, 1] of an RGB picture."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def picture(pixels: Tensor) -> Image.Image:
    """The picture of a Tensor [3, height, width], whose numbers are cut off at 0 and 1."""
    numbers = pixels.detach().cpu().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(numbers.permute(1, 2, 0).contiguous().numpy())


def fitted(picture: Image.Image, size: int) -> Image.Image:
    """Resized so that the longer side has `size` pixels; the other keeps the proportions, with at least 8."""
    return picture.resize(fitted_size(picture, size), Image.Resampling.LANCZOS)


def fitted_size(picture: Image.Image, size: int) -> tuple[int, int]:
    """Width and height that `fitted` gives it."""
    longer = max(picture.size)
    width, height = (max(LEAST_SIDE, round(side * size / longer)) for side in picture.size)
    return width, height


def square(picture: Image.Image, size: int, *, left: float = 0.5, top: float = 0.5, side: float = 1.0) -> Image.Image:
    """A square of it, resized to `size` x `size`.

    Args:
        picture: of any size.
        size: pixels.
        left, top: where in the room that there is, from 0 to 1: by default in the middle.
        side: of the square, as a share of the shorter side.
    """
    length = side * min(picture.size)
    x, y = left * (picture.width - length), top * (picture.height - length)
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + length, y + length))


def with_colours_of(pixels: Tensor, colours: Tensor) -> Tensor:
    """The brightness of `pixels` with the colours of `colours`, both [3, height, width] in [0, 1]."""
    to_ycc = _TO_YCC.to(pixels.device, pixels.dtype)
    bright, coloured = (torch.einsum("ij,jhw->ihw", to_ycc, image.clamp(0, 1)) for image in (pixels, colours))
    mixed = torch.cat([bright[:1], coloured[1:]])
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(_TO_YCC).to(mixed), mixed).clamp(0, 1)


def sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows on white, each as large as the first, with captions above the columns."""
    width, height = rows[0][0].size
    gap, top = max(2, width // 32), _LINE if captions else 0
    columns = max(map(len, rows))
    whole = Image.new(
        "RGB", (columns * width + (columns - 1) * gap, top + len(rows) * (height + gap) - gap), (255, 255, 255)
    )
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(11)
    for column, caption in enumerate(captions):
        draw.text((column * (width + gap), 0), _cut(caption, width, font), fill=(40, 40, 40), font=font)
    for row, pictures in enumerate(rows):
        for column, one in enumerate(pictures):
            shown = one if one.size == (width, height) else ImageOps.contain(one, (width, height))
            whole.paste(shown, (column * (width + gap), top + row * (height + gap)))
    return whole


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def check_output(name: str, path: str | os.PathLike[str], formats: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise a ValueError unless a picture can be written there: a name with such a suffix, a folder that takes it."""
    target = Path(path)
    if target.suffix.lower() not in formats:
        raise ValueError(f"{name}: expected a name that ends in {', '.join(formats)}, got {str(path)!r}")
    if target.is_dir():
        raise ValueError(f"{name}: expected the name of a picture, got the folder {path}")
    there = next(folder for folder in target.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "a folder that cannot be written to" if there.is_dir() else "a file"
        raise ValueError(f"{name}: expected a file in a folder, new or to be written to, got {path}: {there} is {what}")


def write(path: str | os.PathLike[str], picture: Image.Image) -> Path:
    """Write a picture, in the format that the name's suffix says, whole or not at all, and return the path."""
    kind, content = FORMATS[Path(path).suffix.lower()], io.BytesIO()
    picture.save(content, format=kind, **_OPTIONS.get(kind, {}))
    return write_bytes(path, content.getvalue())


def write_gif(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, milliseconds: int = 120) -> Path:
    """Write an animation, the last frame of which stays for two seconds, whole or not at all, and return the path."""
    content = io.BytesIO()
    first, *others = (frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames)
    times = [milliseconds] * len(others) + [2000]
    first.save(content, format="GIF", save_all=True, append_images=others, duration=times, loop=0)
    return write_bytes(path, content.getvalue())
