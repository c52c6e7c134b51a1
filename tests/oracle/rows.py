"""Rows are strangers: what shares their batch changes no bit of them (float32 on a CPU)."""

import torch
from torch import Tensor

from md4 import noise, samplers
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MD4
from md4.samplers import Job, SamplingConfig
from md4.samplers.rows import Rows
from md4.samplers.sampler import Sampler
from tests.oracle.proof import Proof, Trial
from tests.oracle.sampling import replaced

VOCABULARY, ROWS = 27, 64
LENGTHS = (24, 17, 9)
KINDS = (
    {"sampler": "ancestral", "steps": 5, "grid": "uniform"},
    {"sampler": "ancestral", "grid": (1.0, 0.7, 0.1, 0.0), "leftovers": "independent"},
    {"sampler": "ancestral", "steps": 1, "leftovers": "argmax"},
    {"sampler": "ancestral", "steps": 300, "min_reveals": 2, "max_reveals": 3},
    {"sampler": "ancestral", "steps": 9, "draws": "legacy_fp32_joint"},
    {"sampler": "first_hitting"},
    {"sampler": "first_hitting", "steps": 5},
    {"sampler": "first_hitting", "steps": 6, "extrapolate": True},
    {"sampler": "first_hitting", "steps": 7, "correct": True},
    {"sampler": "first_hitting", "block": 5, "max_reveals": 2},
    {"sampler": "confidence", "steps": 6},
    {"sampler": "margin", "block": 6},
    {"sampler": "entropy", "entropy_bound": 0.5},
    {"sampler": "remdm", "steps": 8, "eta": 0.3},
    {"sampler": "p2", "steps": 8},
)


def small_transformer() -> MD4:
    """A random network of 2 classes; its head and gates start at zero, so all weights are disturbed."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=2)
    model = build(ModelConfig(vocab_size=VOCABULARY, length=24, classes=2, network=network), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, MD4)
    return model


def mixed_jobs(trial: Trial) -> list[Job]:
    """Jobs of one row that differ in length, prompt, seed, class, sampler and its settings."""
    jobs = []
    for index in range(ROWS):
        key = noise.derive(trial.key, index)
        place = torch.arange(LENGTHS[index % 3])
        canvas = (noise.uniform(noise.derive(key, "tokens"), place) * VOCABULARY).long()
        hidden = noise.uniform(noise.derive(key, "hidden"), place) < (1.0, 0.6, 0.2, 0.9)[index % 4]
        hidden[0] = True
        settings = SamplingConfig(
            **KINDS[index % len(KINDS)],
            temperature=(1.0, 0.7, 1.3)[index // 2 % 3],
            top_p=(1.0, 0.9)[index // 3 % 2],
            top_k=(None, 9)[index // 7 % 2],
            guidance=(1.0, 2.0, 1.0)[index // 4 % 3],
        )
        label = torch.tensor([index // 4 % 3 - 1 if settings.guidance == 1 else index % 2])
        jobs.append(Job(torch.where(hidden, VOCABULARY, canvas)[None], key[None], settings, label))
    return jobs


def _independent(trial: Trial, count: int = ROWS) -> float:
    """1 if each of the first `count` rows has the tokens and calls that it has alone, else 0."""
    model, jobs = small_transformer(), mixed_jobs(trial)[:count]
    alone = [samplers.run(model, [job])[0] for job in jobs]
    for size in (5, ROWS):
        together = samplers.run(model, jobs, batch_size=size)
        for one, other in zip(alone, together, strict=True):
            if not torch.equal(one.tokens, other.tokens) or not torch.equal(one.calls, other.calls):
                return 0.0
    return 1.0


def _keyed_by_place(sampler: Sampler, rows: Rows, row: Tensor, position: Tensor, call: Tensor | None = None) -> Tensor:
    """Mutant of Sampler.token_keys: noise by the place in the batch, not by the row's seed."""
    call = rows.calls[row] if call is None else call
    return noise.derive(noise.derive(noise.derive(row, "token"), call), position)


def _keyed_by_place_is_seen(trial: Trial) -> float:
    with replaced(Sampler, "token_keys", _keyed_by_place):
        return _independent(trial, 16)


def proofs() -> list[Proof]:
    return [
        Proof(
            f"{ROWS} rows of mixed kinds give the tokens that each gives alone",
            _independent,
            {"noise keyed by the place in the batch": _keyed_by_place_is_seen},
        )
    ]
