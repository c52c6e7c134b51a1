"""A model whose network costs nothing, so that what is left is what everything around it costs.

python -m tests.benchmarks.serving.free RUN PORT      serves it from one process, without Ray
"""

import sys
from dataclasses import replace

import torch
import uvicorn
from torch import Tensor, nn

from orchestration.runs import Loaded, load_model
from orchestration.serving.config import ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.http import make_api
from orchestration.serving.models import Local


class Free(nn.Module):
    """Says at once that every token is as likely as any other."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, 1, vocabulary), requires_grad=False)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.logits.expand(*z.shape, -1)


def load(run: str) -> Loaded:
    """The model of a run's folder, with another network."""
    loaded = load_model(run)
    loaded.model.network = Free(loaded.config.model.vocab_size)
    return replace(loaded, weights_hash="free")


def main() -> None:
    torch.set_num_threads(1)
    loaded = load(sys.argv[1])
    models = Local({loaded.config.name: Engine(loaded)})
    uvicorn.run(make_api(models, ServingConfig()), port=int(sys.argv[2]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
