"""Images of which a part is to be filled, read from files as the run's own training images are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from md4.errors import UserError
from orchestration.config import Config
from pipelines.images import read_file


@dataclass(frozen=True)
class Holes:
    """An image and what is to be filled of it."""

    given: np.ndarray  # [L] int64, the whole image
    canvas: np.ndarray  # [L] int64, with the mask id where it is hidden
    notes: str  # what was done to make a file fit; empty if nothing


def read_holes(config: Config, image: Path, hide: Sequence[str] = (), mask: Path | None = None) -> Holes:
    """An image for the model of a run, hidden in all regions of `hide` and wherever `mask` is white.

    hide: `x0,y0,x1,y1` in pixels, each from the upper left corner; columns x0..x1-1 of the lines y0..y1-1 are hidden.
    mask: an image of the model's own size; brightness 128 and above is white.

    Raises `UserError` for a run of text, a file that can't be read or doesn't fit, or if nothing is hidden.
    """
    data = config.data
    if data.shape is None or data.levels is None:
        raise UserError(f"--image: run {config.name} models {data.vocabulary}, not images; use a --prompt with holes")
    if not hide and mask is None:
        raise UserError("--image needs what is to be filled: --hide x0,y0,x1,y1 or --mask FILE")
    recipe = data.recipe()
    height, width, channels = recipe.shape
    tokens, notes = read_file(image, recipe)
    hidden = np.zeros((height, width), bool)
    for region in hide:
        x0, y0, x1, y1 = _corners(region, width, height)
        hidden[y0:y1, x0:x1] = True
    if mask is not None:
        shape = (height, width, 1)
        white, _ = read_file(mask, replace(recipe, shape=shape, levels=256, fit="exact"))
        hidden |= white.reshape(height, width) >= 128
    if not hidden.any():
        raise UserError(f"the mask {mask} has no white pixel: there is nothing to fill")
    canvas = np.where(np.repeat(hidden.reshape(-1), channels), data.levels, tokens.astype(np.int64))
    return Holes(tokens.astype(np.int64), canvas, ", ".join(notes.converted))


def _corners(region: str, width: int, height: int) -> tuple[int, int, int, int]:
    """The numbers of a region; UserError if they are none that lie inside the image."""
    words = region.split(",")
    if len(words) == 4 and all(word.strip().isdecimal() for word in words):
        x0, y0, x1, y1 = map(int, words)
        if x0 < x1 <= width and y0 < y1 <= height:
            return x0, y0, x1, y1
    raise UserError(
        f"--hide {region!r}: wanted are whole numbers x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and "
        f"0 <= y0 < y1 <= {height}, such as 0,{height // 2},{width},{height} for the lower half"
    )
