"""What a sampler can be told."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.samplers.grids import Grid

Draws = Literal["exact"]
Leftovers = Literal["exact", "argmax"]


class SamplingConfig(BaseModel):
    """How one row is sampled; rows of one batch may differ in all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(256, ge=1, le=1_000_000, description="steps of the time grid; more are closer to the model")
    grid: Grid = Field("cosine", description="where the steps lie: evenly, or finer where most is still masked")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="divides the logits; 1 = the model's own")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the most probable tokens that hold this probability")
    draws: Draws = Field("exact", description="exact: when and what drawn apart, tokens in float64")
    leftovers: Leftovers = Field(
        "exact",
        description="the few tokens still masked at t = 0: exact = drawn one at a time; argmax = the most probable "
        "ones of one call, as the reference implementation does",
    )

    @property
    def mode(self) -> str:
        """How tokens are drawn, as it stands in every result."""
        return self.draws if self.leftovers == "exact" else f"{self.draws}, {self.leftovers} leftovers"
