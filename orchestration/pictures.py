"""Pictures of images: a grid of samples, and the story of a model from real images to noised, denoised and new ones.

A position that is still hidden is shown in blue. In a story nothing is sampled for show: the sampler says at which step
it revealed each position, and a frame of the story is its result with the later positions hidden again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from md4 import noise, samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig
from pipelines.images import brightness
from pipelines.shards import ShardSet

if TYPE_CHECKING:
    from orchestration.runs import Loaded

HIDDEN = (38, 84, 140)  # of positions not revealed, RGB
_GAP = 0.12  # between two images, in images


@dataclass(frozen=True)
class Row:
    """Images side by side, and what they are."""

    title: str
    tiles: np.ndarray  # [n, H, W, 3] uint8


def tiles(tokens: np.ndarray | Tensor, shape: tuple[int, int, int], levels: int) -> np.ndarray:
    """Rows of tokens `[n, L]`, the mask id `levels` where hidden, as RGB images `[n, H, W, 3]` uint8."""
    pixels = np.asarray(tokens).reshape(-1, *shape)
    hidden = pixels == levels
    shown = np.broadcast_to(brightness(np.where(hidden, 0, pixels), levels), (*pixels.shape[:3], 3))
    return np.where(hidden, np.array(HIDDEN, np.uint8), shown)


def draw(rows: Sequence[Row], path: Path, heading: str, note: str = "") -> Path:
    """Rows of images below each other as a PNG at `path`, each with its title at the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(len(row.tiles) for row in rows)
    height, width = rows[0].tiles.shape[1:3]
    inch = max(0.62, min(width, 128) / 120)  # an image's width
    line = inch * height / width * (1 + _GAP)
    margin, top, bottom = 1.9, 0.45, 0.3 if note else 0.08
    size = (margin + columns * inch * (1 + _GAP), top + bottom + len(rows) * line)
    figure = plt.figure(figsize=size, dpi=150)
    figure.text(0.12 / size[0], 1 - 0.28 / size[1], heading, fontsize=11, weight="bold", va="center")
    for number, row in enumerate(rows):
        above = 1 - (top + (number + 1) * line) / size[1]
        figure.text(
            (margin - 0.12) / size[0], above + 0.5 * line / size[1], row.title, fontsize=9, ha="right", va="center"
        )
        for column, tile in enumerate(row.tiles):
            left = (margin + column * inch * (1 + _GAP)) / size[0]
            axes = figure.add_axes((left, above, inch / size[0], inch * height / width / size[1]))
            axes.imshow(tile, interpolation="nearest")
            axes.set_axis_off()
    figure.text(0.12 / size[0], 0.14 / size[1], note, fontsize=8, color="0.35", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def draw_samples(texts: Sequence[str], loaded: "Loaded", path: Path, columns: int = 10) -> Path:
    """Samples as `md4 sample` has them, numbers with spaces between, as a grid of images at `path`."""
    shape, levels = _pixels_of(loaded)
    tokens = np.array([[levels if number == "_" else int(number) for number in text.split()] for text in texts])
    if tokens.shape[1] != np.prod(shape):
        raise UserError(f"samples of {tokens.shape[1]} tokens are no images of {' x '.join(map(str, shape))}")
    images = tiles(tokens, shape, levels)
    rows = [
        Row("samples" if not start else "", images[start : start + columns]) for start in range(0, len(images), columns)
    ]
    return draw(rows, path, f"{loaded.config.name}, step {loaded.step:,}")


def draw_filled(
    given: np.ndarray, canvas: np.ndarray, texts: Sequence[str], loaded: "Loaded", path: Path, columns: int = 10
) -> Path:
    """An image `[L]`, the same with what was hidden `[L]`, and what samples, as in `draw_samples`, filled in."""
    shape, levels = _pixels_of(loaded)
    filled = tiles(np.array([[int(number) for number in text.split()] for text in texts]), shape, levels)
    rows = [Row("given", tiles(given, shape, levels)), Row("hidden", tiles(canvas, shape, levels))]
    rows += [
        Row("filled" if not start else "", filled[start : start + columns]) for start in range(0, len(filled), columns)
    ]
    return draw(rows, path, f"{loaded.config.name}, step {loaded.step:,}")


def draw_story(
    loaded: "Loaded", data: ShardSet, path: Path, *, columns: int = 10, samples: int = 4, seed: int = 0, note: str = ""
) -> Path:
    """Real images, noised, denoised in steps, and new ones, as a PNG at `path`.

    data: the split that real images are taken from; of a labelled set one of each class, as far as there are columns.
    samples: rows of new images. UserError if the model's answer is NaN.
    """
    shape, levels = _pixels_of(loaded)
    settings = loaded.config.sampling
    classes = loaded.config.model.classes
    ids = _one_of_each(data, columns)
    real, known = data.read_labelled(ids)
    tokens = torch.from_numpy(real.astype(np.int64))
    labels = torch.from_numpy(known.astype(np.int64)) if known is not None and classes else None

    def row(title: str, canvas: Tensor) -> Row:
        return Row(title, tiles(canvas, shape, levels))

    rows = [row("real, unseen", tokens)]
    uniforms = noise.uniform(noise.derive(noise.key(seed, "story"), torch.from_numpy(ids))[:, None], _places(tokens))
    half, most = (torch.where(uniforms < share, levels, tokens) for share in (0.5, 0.85))
    rows += [row("half hidden", half), row("85 % hidden", most)]
    filled = _sampled(loaded, most, labels, settings, seed)
    rows += [
        row(title, _frame(filled, share, levels))
        for title, share in (("denoised: a third", 1 / 3), ("two thirds", 2 / 3))
    ]
    rows.append(row("all of it", filled.tokens))

    empty = torch.full((columns * samples, tokens.shape[1]), levels)
    wanted = torch.arange(len(empty)) % columns % classes if classes else None
    new = _sampled(loaded, empty, wanted, settings, seed + 1)
    shares = ((f"from nothing: {share * 100:.0f} %", share) for share in (0.2, 0.5, 0.8))
    rows += [row(title, _frame(new, share, levels)[:columns]) for title, share in shares]
    for number in range(samples):
        part = new.tokens[number * columns : (number + 1) * columns]
        rows.append(row("new samples" if not number else "", part))
    return draw(rows, path, f"{loaded.config.name}, step {loaded.step:,}", note)


def _pixels_of(loaded: "Loaded") -> tuple[tuple[int, int, int], int]:
    data = loaded.config.data
    if data.shape is None or data.levels is None:
        raise UserError(f"run {loaded.config.name} models {data.vocabulary}, not images")
    return data.shape, data.levels


def _one_of_each(data: ShardSet, count: int) -> np.ndarray:
    """Row ids `[count]`: of a labelled set the first rows of each label in turn, else the first rows."""
    ids = np.arange(min(data.rows, 100 * count))
    labels = data.read_labelled(ids)[1]
    if labels is not None:
        nth = np.array([np.sum(labels[:place] == label) for place, label in enumerate(labels)])
        ids = ids[np.lexsort((labels, nth))]
    return ids[:count]


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1])


def _sampled(
    loaded: "Loaded", canvas: Tensor, labels: Tensor | None, settings: SamplingConfig, seed: int
) -> samplers.Samples:
    seeds = torch.arange(len(canvas)) + seed * len(canvas)
    (found,) = samplers.run(loaded.model, [Job(canvas, seeds, settings, labels)])
    if bool(found.broken.any()):
        raise UserError("the network answered with NaN or infinity: the model is damaged or its training diverged")
    return found


def _frame(found: samplers.Samples, share: float, mask: int) -> Tensor:
    """Samples `[n, L]` as they were when at least `share` of what was hidden had been revealed."""
    unknown = found.event >= 0
    never = torch.iinfo(torch.int64).max
    in_order = torch.where(unknown, found.event, never).sort(dim=1).values
    last = (unknown.sum(1, keepdim=True) * share).ceil().long().clamp(min=1) - 1
    return torch.where(found.event <= in_order.gather(1, last), found.tokens, mask)
