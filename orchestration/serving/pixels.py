"""Images in requests and answers: levels in lists, and PNGs in base64.

The tokens of an image are its levels row by row, the channels of a pixel side by side.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from md4.errors import UserError
from orchestration.serving.models import ModelInfo
from pipelines.images import Recipe, brightness, read_bytes

_WHITE = 128  # brightness from which a mask's pixel is filled
Tokens = tuple[int | None, ...]


def shape_of(info: ModelInfo) -> tuple[int, int, int]:
    """Height, width and channels of a model's images. UserError for a model of text."""
    if info.shape is None:
        raise UserError(f"model {info.name!r} writes text: there are no images to fill or to make")
    return info.shape


def from_lists(pixels: Sequence[Any], info: ModelInfo) -> Tokens:
    """Levels, flat or as lines of pixels of channels, None where one is wanted. UserError where they don't fit."""
    height, width, channels = shape_of(info)
    flat = _flattened(pixels, (height, width, channels))
    if len(flat) != info.length:
        raise UserError(
            f"pixels: {len(flat)} levels; an image of {height} lines, {width} columns and {channels} channels has "
            f"{info.length}"
        )
    for place, level in enumerate(flat):
        if level is not None and (type(level) is not int or not 0 <= level < info.vocab_size):
            line, column = divmod(place // channels, width)
            shown = "a list or an object" if isinstance(level, list | dict) else repr(level)[:40]
            raise UserError(
                f"pixels: {shown} at line {line}, column {column} is no level; allowed are whole numbers "
                f"from 0 to {info.vocab_size - 1}, and null for a hole"
            )
    return tuple(flat)


def _flattened(pixels: Sequence[Any], shape: tuple[int, int, int]) -> list[Any]:
    """The levels of nested lists. In an image of one channel pixels may be levels instead of lists of one."""
    height, width, channels = shape
    wanted = f"{height} lists of {width} lists of {channels}"
    if pixels and not any(isinstance(line, list) for line in pixels):
        return list(pixels)
    found = []
    for line in pixels:
        if not isinstance(line, list) or len(line) != width or len(pixels) != height:
            raise UserError(f"pixels: nested lists are wanted as {wanted} levels, or all levels in one list")
        for pixel in line:
            values = pixel if isinstance(pixel, list) else [pixel]
            if len(values) != channels:
                raise UserError(f"pixels: nested lists are wanted as {wanted} levels, or all levels in one list")
            found.extend(values)
    return found


def from_pngs(image: str, mask: str, info: ModelInfo) -> Tokens:
    """The levels of a PNG in base64, None where the mask, another one, is white. UserError where they don't fit."""
    height, width, channels = shape_of(info)
    recipe = Recipe("images", (height, width, channels), info.vocab_size)
    levels, _ = read_bytes(_png(image, "image", (width, height)), "of field 'image'", recipe)
    over = replace(recipe, shape=(height, width, 1), levels=256)
    white, _ = read_bytes(_png(mask, "mask", (width, height)), "of field 'mask'", over)
    hidden = np.repeat(white >= _WHITE, channels)
    if not hidden.any():
        raise UserError("mask: it has no white pixel: there is nothing to fill")
    return tuple(None if hole else int(level) for level, hole in zip(levels, hidden, strict=True))


def _png(text: str, name: str, size: tuple[int, int]) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
        # Before anything is unpacked: a small file may hold a large image.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            found = picture.size
    except (ValueError, binascii.Error, UnidentifiedImageError, OSError, SyntaxError):
        raise UserError(f"{name}: a PNG in base64 is wanted") from None
    except Image.DecompressionBombError:
        found = (0, 0)
    if found != size:
        raise UserError(
            f"{name}: it is {found[0]} wide and {found[1]} high; the model's images are {size[0]} and {size[1]}"
        )
    return data


def png_of(text: str, info: ModelInfo) -> str:
    """A sample of an image, levels with spaces between, as a PNG in base64."""
    height, width, channels = shape_of(info)
    levels = np.array(text.split(), np.int64).reshape(height, width, channels)
    shown = brightness(levels, info.vocab_size)
    buffer = io.BytesIO()
    Image.fromarray(shown[:, :, 0] if channels == 1 else shown).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
