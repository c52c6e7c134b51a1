"""In bfloat16, and on a GPU, company may change the last bits of a logit: then a draw may change, but only a tie.

64 rows are sampled together and alone. Where a row's tokens differ, its first difference is looked at: the state before
that call is the same in both runs, and what was drawn there are two tokens of a race mu_v / E_v. The two must be as
close to each other as company moves logits. What follows a first difference differs for a good reason.
"""

import sys

import torch
from torch import Tensor

from md4 import noise, samplers
from md4.inference import Prediction
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MD4
from md4.samplers import Batch, Job, SamplingConfig
from md4.samplers.sampler import Sampler
from tests.oracle.proof import Proof, Trial
from tests.oracle.rows import _keyed_by_place
from tests.oracle.sampling import replaced

VOCABULARY, LENGTH, ROWS = 500, 24, 64
KINDS = (
    {"sampler": "first_hitting"},
    {"sampler": "first_hitting", "steps": 7},
    {"sampler": "ancestral", "steps": 20},
    {"sampler": "ancestral", "steps": 6, "leftovers": "independent", "temperature": 0.7},
)
COMPANY = (2, 3, 7, 16, ROWS)  # rows that a row is asked with, to see how far its logits move


def wide_transformer() -> MD4:
    """A random network whose blocks run in bfloat16, on the GPU if there is one."""
    network = TransformerConfig(feature_dim=64, heads=4, layers=2)
    model = build(ModelConfig(vocab_size=VOCABULARY, length=LENGTH, network=network), torch.bfloat16, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, MD4)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _jobs(trial: Trial, count: int) -> list[Job]:
    """`count` jobs of one row."""
    jobs = []
    for index in range(count):
        key = noise.derive(trial.key, index)
        place = torch.arange(LENGTH)
        known = noise.uniform(noise.derive(key, "known"), place) < (0.0, 0.3)[index % 2]
        tokens = (noise.uniform(noise.derive(key, "tokens"), place) * VOCABULARY).long()
        settings = SamplingConfig.model_validate(KINDS[index % len(KINDS)])
        jobs.append(Job(torch.where(known, tokens, VOCABULARY)[None], key[None], settings))
    return jobs


def _only_ties(trial: Trial, count: int = ROWS) -> float:
    """1 if every first difference between a row alone and the row in company is a tie, else 0."""
    model, jobs = wide_transformer(), _jobs(trial, count)
    together = samplers.run(model, jobs, batch_size=ROWS)
    different, ties = 0, 0
    for job, other in zip(jobs, together, strict=True):
        (alone,) = samplers.run(model, [job])
        apart = alone.tokens[0] != other.tokens[0]
        if bool(apart.any()):
            different += 1
            ties += _is_tie(model, job, alone.event[0], apart, alone.tokens[0], other.tokens[0])
    where = next(model.parameters()).device.type
    print(f"bfloat16 on {where}: {different} of {count} rows differ, {ties} of them by a tie", file=sys.stderr)
    return float(ties == different)


def _is_tie(model: MD4, job: Job, event: Tensor, apart: Tensor, alone: Tensor, other: Tensor) -> bool:
    """Is the first difference a tie? event, apart, alone, other: `[L]`."""
    call = int(event[apart].min())
    batch = Batch(model)
    batch.join(job, [0])
    for _ in range(call):
        batch.advance()
    ((sampler, *_), rows), *_ = batch._rows.items()
    ask = sampler.ask(rows)
    z, t = rows.tokens, ask.time
    device = z.device
    for position in (apart & (event == call)).nonzero()[:, 0].to(device):
        row, at = torch.zeros(1, dtype=torch.int64, device=device), position[None]
        own = Prediction(model, z, t).logits(row, at)[0].double()
        moved = 0.0
        for size in COMPANY:
            others = torch.Generator().manual_seed(size)
            strangers = torch.randint(0, VOCABULARY + 1, (size - 1, LENGTH), generator=others)
            crowd = torch.cat([z, strangers.to(device)])
            changed = Prediction(model, crowd, t.expand(size)).logits(row, at)[0].double()
            moved = max(moved, float((changed - own).abs().max()))
        clock = noise.exponential(sampler.token_keys(rows, row, at), torch.arange(VOCABULARY, device=device))
        score = own / float(job.settings.temperature) - clock.log()
        margin = float((score[alone[position]] - score[other[position]]).abs())
        # Both logits may move; company not tried here may move them somewhat further.
        if not 0 < margin <= 4 * moved / job.settings.temperature:
            return False
    return True


def _keyed_by_place_is_no_tie(trial: Trial) -> float:
    with replaced(Sampler, "token_keys", _keyed_by_place):
        return _only_ties(trial, 8)


def proofs() -> list[Proof]:
    return [
        Proof(
            f"{ROWS} rows in bfloat16 differ from what they are alone by ties only",
            _only_ties,
            {"noise keyed by the place in the batch": _keyed_by_place_is_no_tie},
        )
    ]
