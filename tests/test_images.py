"""Pictures of every kind that people have are read as they look, and what is none is an error that says so."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastl2l import images

RED, BLUE = (250, 10, 20), (10, 20, 240)


def halves(size=(24, 16)):
    """Red above, blue beneath."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (0, size[1] // 2, size[0], size[1]))
    return picture


def near(pixel, colour, within=12):
    return all(abs(a - b) <= within for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_formats(tmp_path, suffix):
    halves().save(tmp_path / f"x.{suffix}")
    found = images.read("content", tmp_path / f"x.{suffix}")
    assert (found.mode, found.size) == ("RGB", (24, 16))
    assert near(found.getpixel((3, 2)), RED)
    assert near(found.getpixel((20, 13)), BLUE)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    halves().save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = images.read("content", tmp_path / "x.jpg")
    assert found.size == (16, 24)
    assert near(found.getpixel((13, 12)), RED)
    assert near(found.getpixel((2, 12)), BLUE)


def test_what_is_transparent_is_white(tmp_path):
    picture = halves().convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 128))
    picture.paste((0, 0, 0, 0), (0, 0, 12, 16))
    picture.save(tmp_path / "x.png")
    found = images.read("content", tmp_path / "x.png")
    assert found.getpixel((3, 3)) == (255, 255, 255)
    assert near(found.getpixel((20, 3)), [(a + 255) // 2 for a in RED])
    picture.convert("RGB").quantize(4).save(tmp_path / "palette.png", transparency=0)
    assert images.read("content", tmp_path / "palette.png").mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P"])
def test_other_modes(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    halves().convert(mode).save(tmp_path / f"x.{suffix}")
    found = images.read("content", tmp_path / f"x.{suffix}")
    assert (found.mode, found.size) == ("RGB", (24, 16))
    if mode in ("L", "LA"):
        assert near(found.getpixel((3, 2)), (halves().convert("L").getpixel((3, 2)),) * 3, within=1)


def test_sixteen_bits_are_not_cut_off(tmp_path):
    grey = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    found = np.asarray(images.read("content", tmp_path / "x.png"))
    assert np.abs(found[..., 0].astype(float) - grey / 257).max() <= 0.51
    Image.fromarray((grey / 65535).astype(np.float32)).save(tmp_path / "x.tif")
    found = np.asarray(images.read("content", tmp_path / "x.tif"))
    assert np.abs(found[..., 0].astype(float) - grey / 257).max() <= 0.51


def test_what_is_no_picture_is_an_error(tmp_path):
    frames = [Image.new("L", (20, 20), value) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    content = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(content, format="PNG")
    (tmp_path / "cut.png").write_bytes(content.getvalue()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (40, 7)).save(tmp_path / "tiny.png")
    for name, error, message in (
        ("gone.png", FileNotFoundError, r"content: expected a picture, got .*gone\.png, which does not exist"),
        (".", ValueError, r"content: expected a picture, got .*, which is a folder or a device"),
        ("moving.gif", ValueError, r"content: expected a still picture, got .*moving\.gif with 3 frames; save one"),
        ("cut.png", ValueError, r"content: expected a picture, got .*cut\.png, which is damaged"),
        ("text.png", ValueError, r"content: expected a picture in a format that Pillow reads, got .*text\.png"),
        ("empty.png", ValueError, "content: expected a picture in a format that Pillow reads"),
        ("tiny.png", ValueError, r"content: expected at least 8 x 8 pixels, got 40 x 7 in .*tiny\.png"),
    ):
        with pytest.raises(error, match=message):
            images.read("content", tmp_path / name)


def test_pictures_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    halves((40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"content: expected at most 1,000 pixels, got more in .*x\.png"):
        images.read("content", tmp_path / "x.png")


def test_tensors_and_pictures_are_each_others_inverse():
    picture = halves()
    pixels = images.tensor(picture)
    assert pixels.shape == (3, 16, 24)
    assert pixels[0, 0, 0].item() == pytest.approx(250 / 255)
    assert np.array_equal(np.asarray(images.picture(pixels)), np.asarray(picture))
    assert images.picture(pixels * 20 - 1).getextrema() == ((0, 255), (0, 145), (145, 255))


def test_sizes():
    assert images.fitted(halves((400, 300)), 100).size == (100, 75)
    assert images.fitted(halves((30, 3000)), 100).size == (8, 100)
    assert images.square(halves((400, 300)), 50).size == (50, 50)
    upper = images.square(halves((40, 40)), 20, top=0.0, side=0.5)
    assert near(upper.getpixel((10, 15)), RED)


def test_colours_of_another():
    grey = torch.linspace(0.3, 0.6, 40).view(1, 5, 8).expand(3, 5, 8)
    coloured = images.with_colours_of(grey, torch.tensor([0.6, 0.4, 0.4]).view(3, 1, 1).expand(3, 5, 8))
    brightness = 0.299 * coloured[0] + 0.587 * coloured[1] + 0.114 * coloured[2]
    torch.testing.assert_close(brightness, grey[0], rtol=0, atol=1e-5)
    assert (coloured[0] - coloured[1]).mean().item() == pytest.approx(0.2, abs=1e-3)
    same = torch.rand(3, 4, 4)
    torch.testing.assert_close(images.with_colours_of(same, same), same)


def test_pictures_are_written_whole_in_the_format_of_their_names(tmp_path):
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")):
        assert Image.open(images.write(tmp_path / "new" / f"x{suffix}", halves())).format == kind
    movie = Image.open(images.write_gif(tmp_path / "x.gif", [halves(), halves().rotate(180), halves().rotate(90)]))
    assert movie.n_frames == 3
    assert not list(tmp_path.glob(".*"))


def test_places_that_cannot_be_written_to_are_found_before(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "x.tga", r"out: expected a name that ends in \.png, \.jpg, \.jpeg, \.webp, got"),
        (tmp_path, r"out: expected a name that ends in"),
        (tmp_path / "file" / "x.png", r"out: expected a file in a folder.*file is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            images.check_output("out", path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="out: expected the name of a picture, got the folder"):
        images.check_output("out", tmp_path / "folder.png")


def test_a_sheet_has_rows_and_captions():
    sheet = images.sheet([[halves(), halves()], [halves((30, 30))]], ["a caption that is much too long", "b"])
    assert sheet.size == (2 * 24 + 2, 14 + 2 * 16 + 2)
    assert near(sheet.getpixel((1, 15)), RED)
    assert near(sheet.getpixel((3, 34)), RED)
    assert sheet.getpixel((20, 34)) == (255, 255, 255)  # a square in a wide place
