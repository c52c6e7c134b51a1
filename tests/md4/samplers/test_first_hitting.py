"""First hitting: its plan, its calls, and what the refined forms remember. Its laws are proved in tests/oracle."""

import pytest
import torch

from md4 import noise, samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig
from md4.samplers.first_hitting import first_hitting_plan
from md4.samplers.rows import KNOWN
from md4.schedules import parse_schedule
from tests.md4.oracle import Toy

KEYS = noise.derive(torch.arange(50), "sample")


def resolved(**settings) -> SamplingConfig:
    return SamplingConfig(sampler="first_hitting", **settings).resolve("md4")


@pytest.mark.parametrize("name", ["linear", "cosine", "poly2", "poly0.5"])
@pytest.mark.parametrize("steps", [None, 1, 4, 30, 99])
def test_calls_share_the_order_evenly(name, steps):
    """Known positions have no event; the others are shared out in falling order of their times, sizes differing by 1;
    a call has the time of its first reveal."""
    unknown = noise.uniform(7, torch.arange(50 * 30)).view(50, 30) < 0.7
    plan, tau = first_hitting_plan(parse_schedule(name), unknown, KEYS, resolved(steps=steps))
    assert ((plan.event == KNOWN) == ~unknown).all()
    for row in range(50):
        times, event, shown = tau[row][unknown[row]], plan.event[row][unknown[row]], plan.time[row][unknown[row]]
        order = times.argsort(descending=True)
        assert (event[order].diff() >= 0).all()
        sizes = event.bincount()
        assert len(sizes) == min(len(times), steps or len(times))
        assert sizes.max() - sizes.min() <= 1
        for number in range(len(sizes)):
            assert (shown[event == number] == times[event == number].max()).all()


def test_blocks_are_filled_one_after_the_other_and_share_the_calls():
    unknown = torch.ones(50, 24, dtype=torch.bool)
    block = torch.arange(24).expand(50, -1) // 6
    for steps in (None, 8):
        plan, _ = first_hitting_plan(parse_schedule("linear"), unknown, KEYS, resolved(steps=steps, block=6), block)
        events = plan.event.view(50, 4, 6)
        for number in range(3):
            assert (events[:, number].amax(1) < events[:, number + 1].amin(1)).all()
        assert int(plan.event.max()) + 1 == (steps or 24)


@pytest.mark.parametrize("leftovers", ["exact", "independent", "argmax"])
def test_leftovers(leftovers):
    """At eps = 0.3 a share 3/7 of all is left at t = 0: in order, or together behind the others."""
    unknown = torch.ones(50, 20, dtype=torch.bool)
    schedule = parse_schedule("cosine", eps=0.3)
    plan, tau = first_hitting_plan(schedule, unknown, KEYS, resolved(leftovers=leftovers))
    left = tau == 0
    assert 0.38 < left.double().mean() < 0.48
    assert (plan.time[left] == 0).all()
    for row in range(50):
        events = plan.event[row].unique().numel()
        assert events == (20 if leftovers == "exact" else 20 - int(left[row].sum()) + 1)
        assert plan.event[row][left[row]].min() > plan.event[row][~left[row]].max()


@pytest.mark.parametrize("settings", [{}, {"extrapolate": True}, {"correct": True}])
def test_network_calls_are_the_steps(settings):
    """Also of a row with fewer unknown positions than steps; corrected tokens are drawn twice but those of the last."""
    toy = Toy(vocabulary=3, length=6)
    canvas = torch.full((5, 6), toy.mask)
    canvas[4, :4] = 0
    config = SamplingConfig(sampler="first_hitting", steps=4, **settings)
    (samples,) = samplers.run(toy.model(), [Job(canvas, torch.arange(5), config)])
    assert samples.calls.tolist() == [4, 4, 4, 4, 2]
    assert samples.network_calls == 4
    assert samples.row_draws.tolist() == ([11, 11, 11, 11, 3] if "correct" in settings else [6, 6, 6, 6, 2])
    assert torch.equal(samples.event.amax(dim=1), samples.calls - 1)


def test_refined_forms_with_one_call_a_token_are_plain():
    """At K = L a call reveals one position at its own time: r = 0 and l = 0, so nothing is mixed in."""
    toy = Toy(vocabulary=3, length=4)
    job = Job(torch.full((300, 4), toy.mask), torch.arange(300), SamplingConfig(sampler="first_hitting", steps=4))
    (plain,) = samplers.run(toy.model(timed=True), [job])
    for name in ("extrapolate", "correct"):
        changed = Job(job.canvas, job.seeds, job.settings.changed({name: True}))
        (refined,) = samplers.run(toy.model(timed=True), [changed])
        assert torch.equal(refined.tokens, plain.tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extrapolate": True}, "extrapolate needs steps"),
        ({"steps": 3, "correct": True, "block": 2}, "block does not go with correct"),
        ({"steps": 3, "extrapolate": True, "min_reveals": 2}, "min_reveals does not go with extrapolate"),
    ],
)
def test_settings_that_do_not_go_together(wrong, message):
    with pytest.raises(UserError, match=message):
        resolved(**wrong)


def test_a_setting_of_another_sampler_is_refused():
    with pytest.raises(ValueError, match=r"grid=cosine is no setting of the sampler first_hitting, which has: block,"):
        resolved(grid="cosine")
    with pytest.raises(UserError, match="not for models of objective genmd4; allowed: thinning"):
        SamplingConfig(sampler="first_hitting").resolve("genmd4")
