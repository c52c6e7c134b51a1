"""From an image to tokens: its size, its colours and its levels become those of the set.

Images of another size are refused (`fit` exact), or cut to the shape's proportions around their centre and then
averaged down, or enlarged bicubically (`fit` crop). Colours follow the shape: grey pictures in an RGB set become RGB,
coloured ones in a grey set their luma, transparent ones lie on white, and each such conversion is counted. What is no
image, damaged, of the wrong size or deeper than 8 bits stops the preparation, or is left out and counted (`damaged`).
"""

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipelines import documents
from pipelines.images.records import Rejected

# Not whatever Pillow knows: some formats run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def native_levels(kind: str) -> int:
    """Brightness levels that the images of a source have."""
    return 17 if kind == "digits" else 256


@dataclass(frozen=True)
class Recipe:
    """How images become tokens, as the configuration has it."""

    kind: str
    shape: tuple[int, int, int]  # H, W, C; C is 1 (grey) or 3 (RGB)
    levels: int = 256  # V: a brightness v of n levels becomes the token floor(v * V / n)
    fit: Literal["exact", "crop"] = "exact"
    damaged: Literal["refuse", "skip"] = "refuse"
    image_column: str | None = None  # of parquet files
    label_column: str | None = None


@dataclass
class Notes:
    """What happened to the images on their way, by kind: counts, and those that were left out."""

    converted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    left_out: list[documents.Rejected] = field(default_factory=list)


def pixels_of(image: bytes | np.ndarray, recipe: Recipe, notes: Notes) -> np.ndarray:
    """An image as brightnesses `[L]` uint8; conversions are noted. Raises Rejected where that is not possible."""
    if isinstance(image, np.ndarray):
        if image.shape == recipe.shape:
            return image.reshape(-1)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    else:
        picture = decoded(image)
    height, width, channels = recipe.shape
    picture = _coloured(picture, "L" if channels == 1 else "RGB", notes)
    if picture.size != (width, height):
        if recipe.fit == "exact":
            raise Rejected(
                "wrong size",
                f"it is {picture.height} high and {picture.width} wide, data.shape says {height} and {width} "
                "(data.fit=crop would cut and resize it)",
            )
        notes.converted["resized"] += 1
        smaller = width <= picture.width and height <= picture.height
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return np.asarray(picture, np.uint8).reshape(-1)


def decoded(data: bytes) -> Image.Image:
    """The picture in a file's contents, upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Image.UnidentifiedImageError as error:
        raise Rejected("not an image", "it is no image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too large", f"it is too large ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damage in many ways
        raise Rejected("damaged", f"it is damaged ({error or type(error).__name__})") from error


def _coloured(picture: Image.Image, mode: str, notes: Notes) -> Image.Image:
    """The picture in `mode`, L or RGB."""
    if picture.mode == mode and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):
        raise Rejected("more than 8 bits", f"its pixels have more than 8 bits (mode {picture.mode})")
    notes.converted[f"{picture.mode} to {mode}"] += 1
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def quantised(pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Brightnesses `[n, L]` uint8 as tokens of the recipe's levels."""
    native = native_levels(recipe.kind)
    if recipe.levels == native:
        return pixels
    return (pixels.astype(np.uint16) * recipe.levels // native).astype(np.uint8)


def brightness(tokens: np.ndarray, levels: int) -> np.ndarray:
    """Tokens `[...]` of `levels` levels as uint8 from black to white, for looking at."""
    return np.rint(np.asarray(tokens, np.float64) * (255 / (levels - 1))).astype(np.uint8)
