"""The whole model from its configuration."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from md4.networks.transformer import Transformer, TransformerConfig
from md4.objectives import MD4
from md4.schedules import parse_schedule


class ModelConfig(BaseModel):
    """What is modelled, how it is hidden, and by which network it is predicted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(ge=2, description="number of real tokens; the mask id is one more")
    length: int = Field(ge=1, description="tokens of one example")
    classes: int = Field(0, ge=0, description="number of classes an example may be labelled with; 0 = none")
    schedule: str = Field("linear", description="masking schedule: linear, cosine, or poly and a power (poly2)")
    time: Literal["continuous", "discrete"] = Field("continuous", description="kind of time in the loss")
    timesteps: int = Field(1000, ge=1, description="steps of discrete time; unused in continuous time")
    network: TransformerConfig = Field(default_factory=lambda: TransformerConfig(), description="the network")

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, name: str) -> str:
        return parse_schedule(name).name


def _assemble(config: ModelConfig, compute: torch.dtype) -> MD4:
    return MD4(
        Transformer(config.network, config.vocab_size, config.classes, compute),
        parse_schedule(config.schedule),
        config.vocab_size,
        continuous=config.time == "continuous",
        timesteps=config.timesteps,
    )


def skeleton(config: ModelConfig, compute: torch.dtype = torch.float32) -> MD4:
    """The model with its names and shapes but no memory behind them (on the meta device)."""
    with torch.device("meta"):
        return _assemble(config, compute)


def build(config: ModelConfig, compute: torch.dtype = torch.float32, seed: int = 0) -> MD4:
    """A model with freshly initialised float32 weights on the CPU, a function of (config, seed) alone.

    `compute` is torch.float32, or torch.bfloat16 to run the network's blocks in it.
    """
    model = skeleton(config, compute)  # torch's own initialisation would cost time and draw global random numbers
    model.to_empty(device="cpu")
    assert isinstance(model.network, Transformer)
    model.network.initialise(seed)
    return model


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, without allocating them."""
    return sum(p.numel() for p in skeleton(config).parameters())
