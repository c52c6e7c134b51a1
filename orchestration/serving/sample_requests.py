"""A body that asks for samples, in the terms of `orchestration.sampling`, and the samples back: of HTTP and of jobs."""

from collections.abc import Mapping
from typing import Any

from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from orchestration.sampling import Answer, Request, random_seed
from orchestration.serving import pixels
from orchestration.serving.config import ServingConfig
from orchestration.serving.messages import Drawn, SampleWish
from orchestration.serving.models import ModelInfo


def check_count(count: int, config: ServingConfig, name: str = "count") -> None:
    """UserError for more samples than a request may have."""
    if count > config.max_count:
        raise UserError(f"{name}={count}: at most {config.max_count} samples a request")


def settings_of(info: ModelInfo, changes: Mapping[str, Any], config: ServingConfig) -> SamplingConfig:
    """A model's settings with those of a request. UserError for what is none, or too many steps."""
    found = wording.change(info.sampling, changes)
    steps = len(found.grid) - 1 if isinstance(found.grid, tuple) else found.steps
    if changes and steps is not None and steps > config.max_steps:
        raise UserError(f"sampling.steps={steps}: at most {config.max_steps:,} steps a request")
    return found


def request_of(body: SampleWish, info: ModelInfo, config: ServingConfig) -> Request:
    """The request to sample. UserError for what goes beyond the limits of `config`, or does not go together."""
    check_count(body.count, config)
    longest = max(config.max_length, info.length)
    if body.length is not None and body.length > longest:
        raise UserError(f"length={body.length}: at most {longest:,} tokens a text")
    given = [name for name in ("prompt", "pixels", "image") if getattr(body, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: only one of them can be given")
    if (body.image is None) != (body.mask is None):
        raise UserError("image and mask go together: an image is filled where its mask is white")
    if body.png:
        pixels.shape_of(info)
    tokens = None
    if body.pixels is not None:
        tokens = pixels.from_lists(body.pixels, info)
    elif body.image is not None and body.mask is not None:
        tokens = pixels.from_pngs(body.image, body.mask, info)
    changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
    return Request(
        prompt=body.prompt,
        count=body.count,
        length=body.length,
        seed=random_seed() if body.seed is None else body.seed,
        label=body.label,
        settings=settings_of(info, changes, config),
        order=body.order,
        stop=body.stop,
        tokens=tokens,
        longest=longest,
    )


def drawn(answer: Answer, info: ModelInfo, png: bool) -> list[Drawn]:
    """The samples of an answer; png: as pictures, too."""
    return [
        Drawn(**sample.model_dump(), png=pixels.png_of(sample.text, info) if png else None) for sample in answer.samples
    ]
