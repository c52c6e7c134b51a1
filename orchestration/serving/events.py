"""What a watched request tells while it is sampled: `begun`, a `step` for each network call of a sample, `done`.

Over HTTP each is a server-sent event, `event: TYPE` and `data: JSON`. Played back in order, the steps give the sample:
start from the canvas, put what a step revealed where it belongs, and take away what it hid.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from orchestration.sampling import Answer, ModelFacts


class Canvas(BaseModel):
    """What a sample starts from."""

    seed: int
    canvas: list[str | None] | list[int | None] = Field(
        description="the words of each token, or the levels of an image row by row; null where one is to be filled in"
    )


class Begun(BaseModel):
    """The first row was started."""

    type: Literal["begun"] = "begun"
    model: ModelFacts
    samples: list[Canvas]
    shape: tuple[int, int, int] | None = Field(None, description="height, width, channels of an image; null for text")


class Step(BaseModel):
    """A network call changed a sample. Who reads too slowly is told of several calls at once."""

    type: Literal["step"] = "step"
    sample: int = Field(description="index of the sample, from 0")
    call: int = Field(description="the sample's network call, from 0; of several the last")
    positions: list[int] = Field(description="that were revealed")
    pieces: list[str] | None = Field(
        None, description="the words of their tokens; U+FFFD stands for a part of a character"
    )
    levels: list[int] | None = Field(None, description="or, of an image, their levels")
    hidden: list[int] = Field([], description="positions that were masked again")


class Done(BaseModel):
    """All samples are there: the last event, with what the request gives when nobody watches."""

    type: Literal["done"] = "done"
    answer: Answer


class Failed(BaseModel):
    """It ended without an answer: the last event."""

    type: Literal["error"] = "error"
    status: int = Field(description="what HTTP would have answered")
    detail: str


Event = Annotated[Begun | Step | Done | Failed, Field(discriminator="type")]


def played(begun: Begun, steps: Sequence[Step]) -> list[list[str | int | None]]:
    """Each sample's canvas after some steps, null where it is still hidden."""
    found: list[list[str | int | None]] = [list(sample.canvas) for sample in begun.samples]
    for step in steps:
        canvas = found[step.sample]
        for position in step.hidden:
            canvas[position] = None
        values = step.levels if step.pieces is None else step.pieces
        for position, value in zip(step.positions, values or (), strict=True):
            canvas[position] = value
    return found
