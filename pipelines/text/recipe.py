"""What a reader of text must know of the configuration."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How records become documents."""

    column: str = "text"  # of jsonl, parquet and Hugging Face
    damaged: Literal["refuse", "skip"] = "refuse"
