"""What a sampler can be told."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.samplers.grids import Grid

Steps = Annotated[int, Field(ge=1, le=1_000_000, description="steps of the time grid; more are closer to the model")]
GridName = Annotated[Grid, Field(description="where the steps lie: evenly, or finer where most is still masked")]
Temperature = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="divides the logits; 1 = the model's own probabilities")
]
TopP = Annotated[float, Field(gt=0, le=1, description="draw from the most probable tokens that hold this probability")]
Draws = Annotated[
    Literal["exact"],
    Field(description="exact: whether a token is revealed and which one it is are drawn apart, in float64"),
]
Leftovers = Annotated[
    Literal["exact", "argmax"],
    Field(
        description="the few tokens still masked at t = 0: exact = drawn one at a time; argmax = the most probable "
        "ones of one call, as the reference implementation does"
    ),
]


class SamplingConfig(BaseModel):
    """How one row is sampled; rows of one batch may differ in all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Steps = 256
    grid: GridName = "cosine"
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    draws: Draws = "exact"
    leftovers: Leftovers = "exact"

    @property
    def mode(self) -> str:
        """How tokens are drawn, as it stands in every result."""
        return self.draws if self.leftovers == "exact" else f"{self.draws}, {self.leftovers} leftovers"
