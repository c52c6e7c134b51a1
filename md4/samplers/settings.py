"""What a sampler can be told, and which sampler listens to what."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from md4.errors import UserError
from md4.samplers.grids import GRIDS, Grid, check_times

Objective = Literal["md4", "genmd4"]
SamplerName = Literal[
    "ancestral",
    "first_hitting",
    "confidence",
    "margin",
    "entropy",
    "remdm",
    "p2",
    "thinning",
    "adaptive_thinning",
    "race",
    "frozen",
    "best",
]

BEST = "best"  # stands for settings that are kept with a model, for a number of network calls; see `saved`
SAVED_GRID = r"searched(-[a-z0-9]+)*"  # names of grids that are kept with a model

# The settings that each sampler has beside those of all samplers. The first sampler of an objective is its default.
_REVEALS = ("min_reveals", "max_reveals", "block")
SAMPLERS: dict[Objective, dict[str, tuple[str, ...]]] = {
    "md4": {
        "ancestral": ("steps", "grid", "leftovers", "draws", "uniform_bits", *_REVEALS),
        "first_hitting": ("steps", "leftovers", "extrapolate", "correct", *_REVEALS),
        "confidence": ("steps", *_REVEALS),
        "margin": ("steps", *_REVEALS),
        "entropy": ("entropy_bound", *_REVEALS),
        "remdm": ("steps", "grid", "remask", "eta", "loop"),
        "p2": ("steps", "eta"),
    },
    "genmd4": {
        "thinning": (),
        "adaptive_thinning": (),
        "race": (),
        "frozen": (),
        "ancestral": ("steps", "grid"),
        "confidence": ("steps", *_REVEALS),
        "margin": ("steps", *_REVEALS),
        "entropy": ("entropy_bound", *_REVEALS),
        "p2": ("steps", "eta"),
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ancestral": {"steps": 256, "grid": "cosine"},
    "entropy": {"entropy_bound": 0.1},
    "remdm": {"steps": 256, "grid": "cosine", "remask": "cap", "eta": 0.02},
    "p2": {"steps": 256, "eta": 1.0},
}

_MOST = 1_000_000  # tokens or steps: more than there ever are

Steps = Annotated[
    int,
    Field(
        ge=1,
        le=_MOST,
        description="ancestral, remdm, p2: steps of the time grid, 256 by default; first_hitting, confidence, margin: "
        "network calls, one a token by default; best: network calls that a sample may cost",
    ),
]
GridSetting = Annotated[
    Grid | Literal["searched"] | Annotated[str, Field(pattern=f"^{SAVED_GRID}$")] | tuple[float, ...],
    Field(
        description="where the steps lie: evenly, finer where most is masked, as was searched for this model (`md4 "
        "grid`), or at these times from 1 to 0"
    ),
]
Temperature = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="divides the logits; 1 = the model's own probabilities")
]
TopP = Annotated[float, Field(gt=0, le=1, description="draw from the most probable tokens that hold this probability")]
TopK = Annotated[int, Field(ge=1, le=_MOST, description="draw from that many most probable tokens; null = from all")]
Guidance = Annotated[
    float,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="towards the class: logits = null + guidance (class - null); 1 = none, else a row costs two",
    ),
]
Block = Annotated[int, Field(ge=1, le=_MOST, description="reveal from left to right in blocks of that many tokens")]
Reveals = Annotated[
    int, Field(ge=1, le=_MOST, description="tokens that a network call reveals, as far as so many are masked")
]


class SamplingConfig(BaseModel):
    """How one row is sampled; rows of one batch may differ in all of it.

    A setting that is left out (null) has the sampler's default; `resolve` fills them in. One that the sampler doesn't
    have is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampler: SamplerName | None = Field(
        default=None,
        description="null = ancestral for md4, thinning for genmd4; best = as was found for this model and these steps",
    )
    steps: Steps | None = None
    grid: GridSetting | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK | None = None
    guidance: Guidance = 1.0
    draws: Literal["exact", "legacy_fp32_joint"] | None = Field(
        default=None,
        description="exact: whether a token is revealed and which one it is are drawn apart, in float64; "
        "legacy_fp32_joint: both at once in float32, the fault of older samplers, to reproduce their tables",
    )
    uniform_bits: int | None = Field(
        default=None, ge=1, le=24, description="legacy_fp32_joint: bits of its uniforms, 24"
    )
    leftovers: Literal["exact", "independent", "argmax"] | None = Field(
        default=None,
        description="tokens still masked at t = 0: exact = drawn one at a time; independent = all from one call; "
        "argmax = the most probable ones of one call, as the reference implementation does",
    )
    extrapolate: bool | None = Field(
        default=None, description="predict from the last two calls (first_hitting with steps)"
    )
    correct: bool | None = Field(
        default=None, description="look again at the last call's tokens (first_hitting with steps)"
    )
    min_reveals: Reveals | None = None
    max_reveals: Reveals | None = None
    block: Block | None = None
    entropy_bound: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="entropy: nats of dependence that tokens of one call may have",
    )
    remask: Literal["cap", "rescale", "conf", "loop"] | None = Field(
        default=None, description="remdm: how likely a revealed token is masked again"
    )
    eta: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="remdm: strength of remasking; p2: weight of revealed tokens",
    )
    loop: tuple[float, float] | None = Field(
        default=None, description="remdm, loop: the times from and to which tokens are masked again, 0.55 and 0.05"
    )

    @field_validator("grid", mode="before")
    @classmethod
    def _names_or_times(cls, grid: Any) -> Any:
        """One message for what is neither, in place of one for each kind of grid."""
        numbers = isinstance(grid, list | tuple) and all(type(time) in (int, float) for time in grid)
        if grid is None or numbers or (isinstance(grid, str) and (grid in GRIDS or re.fullmatch(SAVED_GRID, grid))):
            return grid
        raise ValueError(
            "allowed are 'uniform', 'cosine', or times that fall from 1 to 0, such as [1, 0.4, 0], or 'searched'"
        )

    @model_validator(mode="after")
    def _fits(self) -> "SamplingConfig":
        if isinstance(self.grid, tuple):
            check_times(self.grid)
            if self.steps not in (None, len(self.grid) - 1):
                raise ValueError(f"steps={self.steps}, but grid has {len(self.grid)} times: {len(self.grid) - 1} steps")
        if self.sampler is not None:
            known = {name for table in SAMPLERS.values() for name in table.get(self.sampler, ())}
            known |= {"steps"} if self.sampler == BEST else set()
            self._refuse(self.sampler, known)
        if self.min_reveals and self.max_reveals and self.min_reveals > self.max_reveals:
            raise ValueError(f"min_reveals={self.min_reveals} is above max_reveals={self.max_reveals}")
        return self

    def _refuse(self, sampler: str, known: set[str]) -> None:
        """ValueError for settings that are given and that `sampler` doesn't have."""
        for name in sorted(OWN_SETTINGS - known):
            value = getattr(self, name)
            if value is not None:
                has = ", ".join(sorted(known)) or "none of its own"
                raise ValueError(f"{name}={value} is no setting of the sampler {sampler}, which has: {has}")

    def changed(self, changes: Mapping[str, Any]) -> "SamplingConfig":
        """A copy with `changes`; another sampler starts from its own defaults. ValidationError if it is none.

        Of the fields that count as set, for `Saved.fill`, are the changes, defaults among them, and what differs from
        a default.
        """
        kept = self.model_dump(exclude_defaults=True)
        if changes.get("sampler", self.sampler) != self.sampler:
            kept = {name: value for name, value in kept.items() if name not in OWN_SETTINGS}
        if isinstance(kept.get("grid"), tuple) and "steps" in changes and "grid" not in changes:
            kept["grid"] = None
        if isinstance(changes.get("grid"), list | tuple):
            kept["steps"] = None
        return SamplingConfig.model_validate({**kept, **changes})

    def resolve(self, objective: Objective) -> "SamplingConfig":
        """With every default filled in, as results record it. What stands for settings kept with a model stays.

        Raises `UserError` for a sampler or a setting that models of this objective don't have.
        """
        if self.sampler == BEST:
            return self
        table = SAMPLERS[objective]
        name = self.sampler or next(iter(table))
        if name not in table:
            raise UserError(f"sampler={name} is not for models of objective {objective}; allowed: {', '.join(table)}")
        try:
            self._refuse(name, set(table[name]))
        except ValueError as error:
            raise UserError(str(error)) from None
        filled = {"sampler": name, **{k: v for k, v in _DEFAULTS.get(name, {}).items() if getattr(self, k) is None}}
        if isinstance(self.grid, tuple):
            filled["steps"] = len(self.grid) - 1
        if "draws" in table[name]:
            filled["draws"] = self.draws or "exact"
            if self.draws == "legacy_fp32_joint":
                filled["uniform_bits"] = self.uniform_bits or 24
                for setting in _REVEALS:
                    if getattr(self, setting) is not None:
                        raise UserError(f"{setting} does not go with draws=legacy_fp32_joint")
            elif self.uniform_bits is not None:
                raise UserError(f"uniform_bits={self.uniform_bits} is about draws=legacy_fp32_joint alone")
        if "leftovers" in table[name]:
            filled["leftovers"] = self.leftovers or "exact"
        if name == "first_hitting":
            for setting in ("extrapolate", "correct"):
                filled[setting] = bool(getattr(self, setting))
                if filled[setting] and self.steps is None:
                    raise UserError(f"{setting} needs steps: with one call a token there is nothing to {setting}")
                for other in _REVEALS:
                    if filled[setting] and getattr(self, other) is not None:
                        raise UserError(f"{other} does not go with {setting}")
        if name == "remdm":
            if self.eta is not None and self.eta > 1:
                raise UserError(f"eta={self.eta} of remdm is a share of what can be masked again: it lies in [0, 1]")
            if (self.remask or "cap") == "loop":
                filled["loop"] = self.loop or (0.55, 0.05)
                if not 1 >= filled["loop"][0] > filled["loop"][1] >= 0:
                    raise UserError(f"loop={list(filled['loop'])}: a time in [0, 1] and an earlier one are needed")
                if tuple(filled["loop"]) == (1, 0):
                    raise UserError("loop=[1, 0] leaves no time in which tokens are revealed; take in less of [1, 0]")
            elif self.loop is not None:
                raise UserError(f"loop={list(self.loop)} is about remask=loop alone")
        return self.model_copy(update=filled)

    @property
    def mode(self) -> str:
        """How tokens are drawn, as it stands in every result."""
        draws = self.draws or "exact"
        if self.draws == "legacy_fp32_joint":
            draws = f"{draws}, {self.uniform_bits or 24} bits"
        return draws if self.leftovers in (None, "exact") else f"{draws}, {self.leftovers} leftovers"


# Settings that not every sampler has.
OWN_SETTINGS = {name for table in SAMPLERS.values() for names in table.values() for name in names}
