"""From an image to tokens: colours, sizes and levels, and images that cannot be used."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from md4.errors import UserError
from pipelines.images import Recipe, brightness
from pipelines.images.tokens import quantised
from tests.pipelines.pictures import encoded, read_all, some_images, write_mnist, write_tar

RGB, GREY = (6, 5, 3), (6, 5, 1)


def one(image: bytes, **changes) -> np.ndarray:
    """The tokens `[H, W, C]` of one image file."""
    return one_read(image, **changes)[0]


def one_read(image: bytes, **changes):
    recipe = replace(Recipe("webdataset", RGB), **changes)
    file = write_tar(Path(one_read.folder) / "one.tar", {"a.png": image})
    (found,) = read_all(recipe, file)
    return found.tokens.reshape(-1, *recipe.shape)[0] if len(found.tokens) else None, found.notes


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    one_read.folder = tmp_path


def test_rows_of_pixels_with_their_channels_side_by_side():
    image = some_images(1)[0]
    assert np.array_equal(one(encoded(image)), image)
    assert np.array_equal(one(encoded(image, "BMP")), image)


@given(st.integers(2, 256))
@settings(max_examples=30, deadline=None)
def test_levels_are_cut_evenly_and_shown_from_black_to_white(levels):
    ramp = np.arange(256, dtype=np.uint8)
    tokens = quantised(ramp[None], Recipe("images", (16, 16, 1), levels))[0].astype(int)
    assert (tokens[0], tokens[-1]) == (0, levels - 1)
    assert set(np.diff(tokens).tolist()) <= {0, 1}
    counts = np.bincount(tokens)
    assert counts.max() - counts.min() <= 1
    shown = brightness(np.arange(levels), levels)
    assert (shown[0], shown[-1], shown.dtype) == (0, 255, np.uint8)
    assert np.array_equal(shown, np.sort(shown))


def test_grey_images_in_an_rgb_set_are_converted_and_counted():
    image = some_images(1, GREY)[0]
    found, notes = one_read(encoded(image))
    assert np.array_equal(found, np.repeat(image, 3, axis=2))
    assert notes.converted == {"L to RGB": 1}
    assert not notes.rejected


def test_colours_in_a_grey_set_become_their_luma():
    image = some_images(1)[0]
    found, notes = one_read(encoded(image), shape=GREY)
    assert np.abs(found[..., 0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert notes.converted == {"RGB to L": 1}


def test_transparency_lies_on_white():
    image = some_images(1, (6, 5, 4))[0]
    image[..., 3] = 255
    image[0, 0, 3] = 0
    found, notes = one_read(encoded(image))
    expected = image[..., :3].copy()
    expected[0, 0] = 255
    assert np.array_equal(found, expected)
    assert notes.converted == {"RGBA to RGB": 1}


def test_a_palette_and_a_bitmap():
    buffer = io.BytesIO()
    Image.fromarray(some_images(1)[0]).quantize(4).save(buffer, "PNG")
    assert one_read(buffer.getvalue())[1].converted == {"P to RGB": 1}
    buffer = io.BytesIO()
    bits = some_images(1, GREY)[0, ..., 0] > 127
    Image.fromarray(bits).save(buffer, "PNG")
    found, notes = one_read(buffer.getvalue(), shape=GREY)
    assert np.array_equal(found[..., 0], bits * 255)
    assert notes.converted == {"1 to L": 1}


def test_a_photograph_is_turned_upright():
    image = np.zeros((5, 6, 3), np.uint8)
    image[0] = 255  # the camera's top row
    turned = Image.fromarray(image)
    facts = turned.getexif()
    facts[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=facts)
    upright = one(buffer.getvalue())
    assert upright.shape == RGB
    assert (upright[:, -1] == 255).all()
    assert (upright[:, :-1] == 0).all()


def test_crop_cuts_the_middle_and_averages():
    wide = np.zeros((12, 20, 3), np.uint8)
    wide[:, 5:15] = np.arange(10, dtype=np.uint8)[None, :, None] // 2 * 20
    found, notes = one_read(encoded(wide), fit="crop")
    assert np.array_equal(found[..., 0], np.tile(np.arange(5) * 20, (6, 1)))
    assert notes.converted == {"resized": 1}
    small = one(encoded(some_images(1, (3, 4, 3))[0]), fit="crop")
    assert small.shape == RGB


def test_pixels_of_another_size_are_fitted_too(tmp_path):
    """MNIST, for instance, as RGB of 32 x 32."""
    write_mnist(tmp_path)
    found = read_all(Recipe("idx", (32, 32, 3), fit="crop"), tmp_path)
    assert found[0].tokens.shape[1] == 3072
    assert sum((part.notes.converted for part in found), Counter()) == {"L to RGB": 37, "resized": 37}
    with pytest.raises(UserError, match=r"28 high and 28 wide, data\.shape says 32 and 32"):
        read_all(Recipe("idx", (32, 32, 1)), tmp_path)


# -- what can be wrong -----------------------------------------------------------------------------------------------


def damaged_images() -> list[tuple[str, bytes, str]]:
    good = encoded(some_images(1)[0])
    jpeg = encoded(some_images(1, (64, 64, 3))[0], "JPEG")
    deep = io.BytesIO()
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000).save(deep, "PNG")
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    return [
        ("not an image", b"this is text", "no image of a known format"),
        ("not an image", b"", "no image of a known format"),
        ("damaged", good[: len(good) // 2], "damaged"),
        ("damaged", bytes(flipped), "damaged"),
        ("damaged", jpeg[: len(jpeg) // 2], "damaged"),
        ("wrong size", encoded(some_images(1, (5, 6, 3))[0]), "5 high and 6 wide, data.shape says 6 and 5"),
        ("more than 8 bits", deep.getvalue(), "more than 8 bits"),
    ]


@pytest.mark.parametrize(("reason", "data", "message"), damaged_images())
def test_unusable_images_are_named_or_counted(tmp_path, reason, data, message):
    with pytest.raises(UserError, match=rf"image '.*one\.tar: a\.png': .*{message}.*data.damaged=skip"):
        one(data)
    found, notes = one_read(data, damaged="skip")
    assert found is None
    assert notes.rejected == {reason: 1}
    assert len(notes.examples) == 1
    assert message in notes.examples[0]


def test_an_image_that_unpacks_to_gigabytes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="it is too large"):
        one(encoded(some_images(1)[0]))
