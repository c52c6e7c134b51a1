"""Rows of a GenMD4 model sampled together: each gets what it gets alone."""

import pytest
import torch

from md4 import samplers
from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.samplers import Job, SamplingConfig

MASK = 27
OWN_SETTINGS = [
    {},
    {"sampler": "adaptive_thinning"},
    {"sampler": "race"},
    {"sampler": "frozen"},
    {"sampler": "ancestral", "steps": 6, "grid": "uniform"},
    {"sampler": "ancestral", "grid": (1.0, 0.7, 0.1, 0.0)},
    {"sampler": "ancestral", "steps": 300},
]


def transformer() -> GenMD4:
    """A small random network with powers between 0.4 and 2; its head and gates start at zero: all are disturbed."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=2)
    config = ModelConfig(objective="genmd4", vocab_size=MASK, length=12, network=network)
    model = build(config, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.schedule.w += torch.linspace(-1.2, 1.2, MASK)
    assert isinstance(model, GenMD4)
    return model


def mixed_jobs() -> list[Job]:
    """Rows that differ in length, prompt, seed, sampler and its settings."""
    generator = torch.Generator().manual_seed(7)
    jobs = []
    for index in range(14):
        canvas = torch.randint(0, MASK, (1 + index % 2, [12, 9][index % 5 == 4]), generator=generator)
        hidden = torch.rand(canvas.shape, generator=generator) < [1.0, 0.6, 0.2][index % 3]
        settings = SamplingConfig(
            **OWN_SETTINGS[index % len(OWN_SETTINGS)],
            temperature=[1.0, 0.7, 1.3][index % 3],
            top_p=[1.0, 0.9][index // 7 % 2],
            top_k=[None, 9][index // 4 % 2],
        )
        seeds = torch.randint(0, 2**53, (len(canvas),), generator=generator)
        jobs.append(Job(torch.where(hidden, MASK, canvas), seeds, settings))
    return jobs


def told(results: list[samplers.Samples]) -> list[dict]:
    """All that is known of every row."""
    return [
        {
            "tokens": samples.tokens[row].tolist(),
            "event": samples.event[row].tolist(),
            "calls": int(samples.calls[row]),
            "draws": int(samples.row_draws[row]),
            **{name: int(number[row]) for name, number in samples.counted.items()},
        }
        for samples in results
        for row in range(len(samples.tokens))
    ]


def test_a_row_gets_the_tokens_it_gets_alone():
    """Bit-equal in float32: every row alone, and all rows in one queue at several batch sizes."""
    model, jobs = transformer(), mixed_jobs()
    alone = told([samplers.run(model, [job.part(i, i + 1)])[0] for job in jobs for i in range(len(job))])
    for batch_size in (2, 7, 64):
        assert told(samplers.run(model, jobs, batch_size=batch_size)) == alone
    assert len({token for row in alone for token in row["tokens"]}) > 20
    assert any(row.get("rejected") for row in alone)


def test_rows_join_between_calls():
    """A row that joins when others are half done gets its own tokens, and so do they."""
    model, jobs = transformer(), mixed_jobs()
    expected = [row["tokens"] for row in told(samplers.run(model, jobs))]
    batch, waiting, found, number = samplers.Batch(model), list(jobs), {}, 0
    while waiting or len(batch):
        if waiting:
            job = waiting.pop(0)
            batch.join(job, range(number, number + len(job)))
            number += len(job)
        for _ in range(3):
            batch.advance()
            for rows in batch.leave():
                found.update(zip(rows.number.tolist(), rows.tokens.tolist(), strict=True))
    assert [found[i] for i in range(number)] == expected


def test_known_tokens_stand_and_no_mask_stays():
    for job, samples in zip(mixed_jobs(), samplers.run(transformer(), mixed_jobs()), strict=True):
        known = job.canvas != MASK
        assert torch.equal(samples.tokens[known], job.canvas[known])
        assert (samples.tokens < MASK).all()
        assert torch.equal(samples.event == -1, known)


def test_seeds_name_the_samples_and_results_the_sampler():
    canvas = torch.full((3, 12), MASK)
    for own in OWN_SETTINGS:
        (samples,) = samplers.run(transformer(), [Job(canvas, torch.tensor([5, 6, 5]), SamplingConfig(**own))])
        assert torch.equal(samples.tokens[0], samples.tokens[2])
        assert not torch.equal(samples.tokens[0], samples.tokens[1])
        assert samples.settings.sampler == own.get("sampler", "thinning")
        assert samples.mode == "exact"


@pytest.mark.parametrize("own", OWN_SETTINGS)
def test_a_full_canvas_needs_no_call(own):
    canvas = torch.arange(12)[None]
    (samples,) = samplers.run(transformer(), [Job(canvas, torch.tensor([1]), SamplingConfig(**own))])
    assert torch.equal(samples.tokens, canvas)
    assert (samples.network_calls, samples.draws) == (0, 0)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"steps": 8}, r"steps=8 is no setting of the sampler thinning, which has: none of its own"),
        ({"sampler": "remdm"}, r"sampler=remdm is not for models of objective genmd4; allowed: thinning"),
        ({"sampler": "ancestral", "leftovers": "argmax"}, r"leftovers=argmax is no setting of the sampler ancestral"),
    ],
)
def test_settings_of_others_are_refused(own, message):
    with pytest.raises(UserError, match=message):
        samplers.run(transformer(), [Job(torch.full((1, 4), MASK), torch.tensor([0]), SamplingConfig(**own))])
