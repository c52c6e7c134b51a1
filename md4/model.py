"""The whole model from its configuration."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from md4 import noise
from md4.genmd4 import GenMD4
from md4.networks.conditioning import NULL_LABEL
from md4.networks.transformer import Transformer, TransformerConfig
from md4.networks.unet import UNet, UNetConfig
from md4.networks.uvit import UViT, UViTConfig
from md4.objectives import MD4, MaskedDiffusion
from md4.schedules import LearnedPolynomial, parse_schedule
from md4.times import UNIFORM, Times

NetworkConfig = TransformerConfig | UNetConfig | UViTConfig


class ModelConfig(BaseModel):
    """What is modelled, how it is hidden, and by which network it is predicted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["md4", "genmd4"] = Field(
        "md4", description="one masking schedule for all tokens (md4), or a learned one for each of them (genmd4)"
    )
    vocab_size: int = Field(ge=2, description="number of real tokens; the mask id is one more")
    length: int = Field(ge=1, description="tokens of one example; for images height * width * channels")
    shape: tuple[int, int, int] | None = Field(None, description="height, width and channels of an image; null = text")
    classes: int = Field(0, ge=0, description="number of classes an example may be labelled with; 0 = none")
    label_dropout: float = Field(
        0.0, ge=0, le=1, description="share of the training examples whose class is hidden, for guidance"
    )
    schedule: str = Field("linear", description="masking schedule of md4: linear, cosine, or poly and a power (poly2)")
    power_init: float = Field(1.0, gt=0, description="power that genmd4's learned schedules start from")
    time: Literal["continuous", "discrete"] = Field("continuous", description="kind of time in the loss")
    timesteps: int = Field(1000, ge=1, description="steps of discrete time; unused in continuous time")
    times: Times = Field(UNIFORM, description="what times of training are drawn from; the loss makes up for it")
    attention: Literal["full", "document"] = Field(
        "full",
        description="what a position of a text sees: full = its row, document = its own document alone. Documents end "
        "with the vocabulary's end-of-text token, known to the network in training; in sampling those count that are "
        "in the prompt or drawn already",
    )
    end_of_text: int | None = Field(
        None, ge=0, description="the token that ends a document, of attention=document; follows from the vocabulary"
    )
    network: Annotated[NetworkConfig, Field(discriminator="kind")] = Field(
        default_factory=lambda: TransformerConfig(), description="the network"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        """A network without `kind` is a transformer; the length of an image follows from its shape."""
        if not isinstance(tree, dict):
            return tree
        network, shape = tree.get("network"), tree.get("shape")
        if isinstance(network, dict) and "kind" not in network:
            tree = {**tree, "network": {"kind": "transformer", **network}}
        if "length" not in tree and isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape):
            tree = {**tree, "length": math.prod(shape)}
        return tree

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, name: str) -> str:
        return parse_schedule(name).name

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        kind, problems = self.network.kind, []
        if self.shape is None and not isinstance(self.network, TransformerConfig):
            problems.append(f"network.kind={kind} is for images: shape must give [height, width, channels]")
        if self.shape is not None:
            if isinstance(self.network, TransformerConfig):
                problems.append(f"network.kind={kind} is for text: shape must be null, or the network unet or uvit")
            if min(self.shape) < 1:
                problems.append(f"shape={list(self.shape)} must be positive")
            elif self.length != math.prod(self.shape):
                problems.append(
                    f"length={self.length} must be height * width * channels = {math.prod(self.shape)} of shape"
                )
            if isinstance(self.network, UViTConfig) and any(side % self.network.divisor for side in self.shape[:2]):
                problems.append(
                    f"shape={list(self.shape)}: this uvit needs height and width in multiples of {self.network.divisor}"
                )
        if self.attention == "document":
            if not isinstance(self.network, TransformerConfig):
                problems.append("attention=document is for text: images are not made of documents")
            elif self.end_of_text is None or self.end_of_text >= self.vocab_size:
                problems.append(
                    f"attention=document needs a vocabulary with an end-of-text token below vocab_size="
                    f"{self.vocab_size}, and end_of_text={self.end_of_text}: text8 has none, gpt2 has one, and so has "
                    "every tokenizer of `md4 tokenizer train`"
                )
        if self.label_dropout and not self.classes:
            problems.append(f"label_dropout={self.label_dropout} hides classes, but classes=0")
        if self.objective == "genmd4" and self.time != "continuous":
            problems.append(f"objective=genmd4 has continuous time alone, not time={self.time}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def drop_labels(labels: Tensor, rate: float, seed: int, step: int, slots: Tensor) -> Tensor:
    """`labels` [n] with a share `rate` of them replaced by the null class, as a function of (seed, step, slot).

    Args:
        labels: classes `[n]`, int64.
        rate: `ModelConfig.label_dropout`.
        slots: places `[n]` of the examples in global batch `step`.
    """
    if not rate:
        return labels
    dropped = noise.uniform(noise.key(seed, "label", step), slots) < rate
    return labels.masked_fill(dropped, NULL_LABEL)


def _network(config: ModelConfig, compute: torch.dtype) -> Transformer | UNet | UViT:
    shape, V, classes = config.shape, config.vocab_size, config.classes
    match config.network:
        case UNetConfig() if shape:
            return UNet(config.network, shape, V, classes, compute)
        case UViTConfig() if shape:
            return UViT(config.network, shape, V, classes, compute)
        case TransformerConfig():
            end = config.end_of_text if config.attention == "document" else None
            return Transformer(config.network, V, classes, compute, end)
    raise ValueError(f"network.kind={config.network.kind} does not fit shape={shape}")


def _assemble(config: ModelConfig, compute: torch.dtype) -> MaskedDiffusion:
    network = _network(config, compute)
    if config.objective == "genmd4":
        return GenMD4(network, config.vocab_size, power_init=config.power_init, times=config.times)
    return MD4(
        network,
        parse_schedule(config.schedule),
        config.vocab_size,
        continuous=config.time == "continuous",
        timesteps=config.timesteps,
        times=config.times,
    )


def skeleton(
    config: ModelConfig, compute: torch.dtype = torch.float32, device: torch.device | str = "meta"
) -> MaskedDiffusion:
    """The model with its names and shapes but no memory behind them (on the meta device).

    On another `device` the weights are what PyTorch makes them: for torch's fake tensors, which have no memory either.
    """
    with torch.device(device):
        return _assemble(config, compute)


def build(config: ModelConfig, compute: torch.dtype = torch.float32, seed: int = 0) -> MaskedDiffusion:
    """A model with freshly initialised float32 weights on the CPU, a function of (config, seed) alone.

    `compute` is torch.float32, or torch.bfloat16 to run the network's blocks in it.
    """
    model = skeleton(config, compute)  # torch's own initialisation would cost time and draw global random numbers
    model.to_empty(device="cpu")
    assert isinstance(model.network, Transformer | UNet | UViT)
    model.network.initialise(seed)
    if isinstance(model.schedule, LearnedPolynomial):
        model.schedule.initialise()
    return model


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, without allocating them."""
    return sum(p.numel() for p in skeleton(config).parameters())
