"""Rows sampled together: their independence, their cost and their mistakes. Their laws are proved in tests/oracle."""

import pytest
import torch
from torch import Tensor

from md4 import noise, samplers
from md4.errors import UserError
from md4.samplers import Batch, Job, SamplingConfig, ancestral
from md4.samplers.batch import glance
from tests.md4.oracle import Toy
from tests.md4.samplers.company import mixed_jobs, transformer

TOY = Toy(vocabulary=3, length=4)


def test_argmax_leftovers_are_the_most_probable_tokens_of_one_call():
    """What is left after one step, a fifth of all, is what the network finds most probable at t = 0."""
    model = TOY.model("linear", 0.2, timed=True)
    job = Job(torch.full((200, 4), TOY.mask), torch.arange(200), SamplingConfig(steps=1, leftovers="argmax"))
    (samples,) = samplers.run(model, [job], batch_size=200)
    _, left = ancestral.ancestral_plan(
        model.schedule, job.canvas == TOY.mask, noise.derive(job.seeds, "sample"), job.settings.resolve("md4")
    )
    assert 100 < left.sum() < 300
    expected = model.logits(torch.where(left, TOY.mask, samples.tokens), torch.zeros(200)).argmax(dim=2)
    assert torch.equal(samples.tokens[left], expected[left])
    assert samples.calls.max() == 2
    assert samples.mode == "exact, argmax leftovers"


OWN_SETTINGS = [
    {"steps": 1, "leftovers": "argmax"},
    {"steps": 5, "grid": "uniform"},
    {"steps": 300, "min_reveals": 2, "max_reveals": 3},
    {"grid": (1.0, 0.7, 0.1, 0.0), "leftovers": "independent"},
    {"steps": 8, "block": 7},
    {"sampler": "first_hitting"},
    {"sampler": "first_hitting", "steps": 5},
    {"sampler": "first_hitting", "steps": 6, "extrapolate": True},
    {"sampler": "first_hitting", "steps": 7, "correct": True, "extrapolate": True},
    {"sampler": "first_hitting", "block": 5, "max_reveals": 2},
]


def texts(results: list[samplers.Samples]) -> list[list[int]]:
    """The tokens of every row."""
    return [row for samples in results for row in samples.tokens.tolist()]


@pytest.mark.parametrize("time_input", [True, False])
def test_a_row_gets_the_tokens_it_gets_alone(time_input):
    """Bit-equal in float32: every row alone, and all rows in one queue at several batch sizes."""
    model, jobs = transformer(time_input=time_input), mixed_jobs(OWN_SETTINGS)
    alone = [samplers.run(model, [job.part(i, i + 1)])[0] for job in jobs for i in range(len(job))]
    for batch_size in (2, 7, 64):
        together = samplers.run(model, jobs, batch_size=batch_size)
        assert texts(together) == texts(alone)
        assert torch.equal(torch.cat([s.calls for s in together]), torch.cat([s.calls for s in alone]))
    assert len({token for row in texts(alone) for token in row}) == 27


def test_known_tokens_stand_and_no_mask_stays():
    for job, samples in zip(
        mixed_jobs(OWN_SETTINGS), samplers.run(transformer(), mixed_jobs(OWN_SETTINGS)), strict=True
    ):
        known = job.canvas != 27
        assert torch.equal(samples.tokens[known], job.canvas[known])
        assert (samples.tokens < 27).all()
        assert torch.equal(samples.event == -1, known)


def test_seeds_name_the_samples():
    model, settings = transformer(), SamplingConfig(steps=8)
    canvas = torch.full((3, 24), 27)
    (samples,) = samplers.run(model, [Job(canvas, torch.tensor([5, 6, 5]), settings)])
    assert torch.equal(samples.tokens[0], samples.tokens[2])
    assert not torch.equal(samples.tokens[0], samples.tokens[1])


def test_idle_steps_cost_nothing():
    """10,000 steps for 4 positions: as many network calls as the busiest row has events, at least 4 rows in each."""
    model = TOY.model()
    job = Job(torch.full((3, 4), TOY.mask), torch.arange(3), SamplingConfig(steps=10_000))
    (samples,) = samplers.run(model, [job])
    events = [row.unique().numel() for row in samples.event]
    assert samples.calls.tolist() == events
    assert samples.network_calls == max(events) == len(model.network.calls)  # type: ignore[arg-type]
    assert set(model.network.calls) == {4}  # type: ignore[arg-type]
    assert samples.draws == 12


def test_a_full_canvas_needs_no_call_and_no_rows_no_result():
    model = TOY.model()
    canvas = torch.tensor([[0, 1, 2, 0]])
    (samples,) = samplers.run(model, [Job(canvas, torch.tensor([1]), SamplingConfig())])
    assert torch.equal(samples.tokens, canvas)
    assert (samples.network_calls, samples.draws) == (0, 0)
    assert samplers.run(model, []) == []


def test_a_full_row_may_stay_while_others_advance():
    batch = Batch(transformer())
    canvas = torch.tensor([[5, 1, 2, 9], [0, 27, 27, 27]])
    batch.join(Job(canvas, torch.tensor([1, 2]), SamplingConfig(steps=1)), [10, 11])
    batch.advance()
    ended = batch.leave()
    assert [rows.number.tolist() for rows in ended] == [[10, 11]]
    assert torch.equal(ended[0].tokens[0], canvas[0])
    assert ended[0].calls.tolist() == [0, 1]
    assert len(batch) == 0


def test_labels_and_guidance_need_classes():
    canvas, seeds = torch.full((1, 4), 3), torch.tensor([0])
    with pytest.raises(UserError, match="no classes"):
        samplers.run(TOY.model(), [Job(canvas, seeds, SamplingConfig(), torch.tensor([1]))])
    with pytest.raises(UserError, match=r"guidance=2.0 is towards a class"):
        samplers.run(TOY.model(), [Job(canvas, seeds, SamplingConfig(guidance=2))])


def test_rows_join_between_calls():
    """A row that joins when others are half done gets its own tokens, and so do they."""
    model, jobs = transformer(), mixed_jobs(OWN_SETTINGS)
    expected = texts(samplers.run(model, jobs))
    batch, waiting, found, number = Batch(model), list(jobs), {}, 0
    while waiting or len(batch):
        if waiting:
            job = waiting.pop(0)
            batch.join(job, range(number, number + len(job)))
            number += len(job)
        for _ in range(3):
            batch.advance()
            for rows in batch.leave():
                found.update(zip(rows.number.tolist(), rows.tokens, strict=True))
    assert [found[i].tolist() for i in range(number)] == expected


class _Poisoned(torch.nn.Module):
    """Answers NaN for rows that begin with token 1 once their last position is revealed."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.network(z, t, labels)
        return torch.where(((z[:, 0] == 1) & (z[:, -1] != 27))[:, None, None], torch.nan, logits)


def test_a_row_with_nan_ends_alone():
    model = transformer()
    canvas = torch.full((6, 24), 27)
    canvas[:, 0] = torch.tensor([0, 1, 2, 1, 4, 5])
    job = Job(canvas, torch.arange(6), SamplingConfig(steps=24))
    (sound,) = samplers.run(model, [job])
    model.network = _Poisoned(model.network)
    (samples,) = samplers.run(model, [job], batch_size=3)
    assert samples.broken.tolist() == [False, True, False, True, False, False]
    assert torch.equal(samples.tokens[~samples.broken], sound.tokens[~samples.broken])


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        ([[0, 1, 2, 4]], "0..2 and the mask id 3"),
        ([[-1, 0, 0, 0]], "mask id"),
        ([[]], "length >= 1"),
        ([3, 3], "rows >= 1"),
        ([[3, 3], [3, 3]], "2 rows need as many seeds"),
    ],
)
def test_a_bad_canvas_is_refused(canvas, message):
    with pytest.raises(UserError, match=message):
        samplers.run(TOY.model(), [Job(torch.tensor(canvas, dtype=torch.int64), torch.tensor([0]), SamplingConfig())])


def test_batches_are_not_empty():
    job = Job(torch.full((1, 4), 3), torch.tensor([0]), SamplingConfig())
    with pytest.raises(UserError, match="batch_size"):
        samplers.run(TOY.model(), [job], batch_size=0)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"temperature": 0}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1}, {"grid": "sine"}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


REVISING = [
    {"sampler": "remdm", "steps": 12, "eta": 0.2},
    {"sampler": "p2", "steps": 9},
    {"sampler": "confidence", "steps": 7},
    {"draws": "legacy_fp32_joint", "steps": 9},
]


def test_rows_that_are_taken_out_and_moved_change_nothing():
    """At every call some rows go on in another batch and come back, some are looked at, a few leave for good."""
    model, jobs = transformer(), mixed_jobs(OWN_SETTINGS + REVISING, 28)
    expected = texts(samplers.run(model, jobs))
    here, there = Batch(model), Batch(model)
    for number, job in enumerate(jobs):
        here.join(job, range(10 * number, 10 * number + len(job)))
    numbers = [10 * number + row for number, job in enumerate(jobs) for row in range(len(job))]
    removed, found, turn = set(), {}, 0
    while len(here) or len(there):
        turn += 1
        here.move([n for n in numbers if n * turn % 5 == 1], there)
        there.move([n for n in numbers if n * turn % 3 == 1], here)
        if turn in (2, 5):
            gone = [n for n in numbers if n % 10 == 0 and n % 4 == turn % 4]
            here.remove(gone)
            there.remove(gone)
            removed |= set(gone)
        for batch in (here, there):
            batch.advance()
            assert sum(len(rows) for rows in batch.rows(numbers)) == len(batch)
            for rows in batch.leave():
                found.update(zip(rows.number.tolist(), rows.tokens.tolist(), strict=True))
    kept = {n: tokens for n, tokens in zip(numbers, expected, strict=True) if n not in removed or n in found}
    assert found == kept
    assert len(numbers) - len(kept) > 2


def test_a_glance_is_how_far_rows_have_come():
    model = transformer()
    batch = Batch(model)
    batch.join(Job(torch.full((2, 24), 27), torch.arange(2), SamplingConfig(sampler="first_hitting")), [5, 6])
    batch.join(Job(torch.full((1, 17), 27), torch.arange(1), SamplingConfig(steps=99)), [7])
    for _ in range(3):
        batch.advance()
    seen = {one.number: one for one in glance(batch.rows([7, 6, 99]))}
    assert set(seen) == {6, 7}
    assert seen[6].calls == 3
    assert int((seen[6].tokens == 27).sum()) == 21
    assert seen[7].tokens.shape == (17,)
    assert glance(batch.rows([])) == []


class _Unreliable(torch.nn.Module):
    """A network whose head fails every now and then."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.count = network, 0

    def body(self, *args):
        return self.network.body(*args)  # type: ignore[operator]

    def head(self, hidden):
        self.count += 1
        if self.count % 17 == 0:
            raise RuntimeError("no memory")
        return self.network.head(hidden)  # type: ignore[operator]


def test_a_call_that_failed_changes_no_row():
    """Samplers of all kinds in one call, in which now and then the logits of one of them can't be made."""
    model, jobs = transformer(), mixed_jobs(OWN_SETTINGS + REVISING, 14)
    expected = texts(samplers.run(model, jobs))
    model.network = _Unreliable(model.network)
    batch, found, failures = Batch(model), {}, 0
    for number, job in enumerate(jobs):
        batch.join(job, range(10 * number, 10 * number + len(job)))
    while len(batch):
        try:
            batch.advance()
        except RuntimeError:
            failures += 1
        for rows in batch.leave():
            found.update(zip(rows.number.tolist(), rows.tokens.tolist(), strict=True))
    assert [found[number] for number in sorted(found)] == expected
    assert failures > 2
