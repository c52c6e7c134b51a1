"""Figures of steps: means over all workers, however rows are dealt out."""

import pytest
import torch

from md4.times import Times
from orchestration.clock import Clock
from orchestration.meter import BUCKETS, Meter

DRAW = torch.Generator().manual_seed(3)
BITS, HIDDEN = torch.rand(24, generator=DRAW), torch.randint(32, (24,), generator=DRAW)
TIMES = (torch.arange(24, dtype=torch.float64) + 0.5) / 24


def step(shares: list[torch.Tensor], waits: list[float]) -> tuple:
    """The figures of all workers in one step, whose rows are dealt out as `shares` say, in passes of five."""
    owns = []
    for rows, waited in zip(shares, waits, strict=True):
        meter = Meter()
        meter.begin(waited, torch.device("cpu"))
        for part in rows.split(5):
            meter.add(BITS[part], HIDDEN[part], TIMES[part], 1, 32)
        owns.append(meter.own())
    return Meter.together(torch.stack(owns))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_means_are_those_of_the_global_batch(world):
    total, waited = step(list(torch.arange(24).tensor_split(world)), [0.1 * (n + 1) for n in range(world)])
    assert waited == pytest.approx(0.1 * world)
    assert total.loss == pytest.approx(BITS.mean().item())
    meter = Meter()
    meter.take(total, waited, 1e9)
    figures = meter.figures()
    assert figures["bits_per_token"] == total.loss
    assert figures["mask_ratio"] == pytest.approx(HIDDEN.float().mean().item() / 32)
    for bucket in range(BUCKETS):
        inside = (bucket / BUCKETS <= TIMES) & ((bucket + 1) / BUCKETS > TIMES)
        assert figures["bits_by_time"][bucket] == pytest.approx(BITS[inside].mean().item())
    assert (meter.timed_tokens, meter.timed_steps, meter.flops) == (24 * 32, 1, 1e9)


def test_loss_by_time_is_that_at_these_times_whatever_they_were_drawn_from():
    """A loss that depends on the time alone, drawn densely at one end: by bucket it is the loss there."""
    times = Times(a=0.5, share=0.8)
    t = times.draw((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    meter = Meter()
    meter.begin(0.0, torch.device("cpu"))
    meter.add((1 + t) * times.weight(t), torch.zeros(4000), t, 1, 32, times.density(t))
    total, waited = Meter.together(meter.own()[None])
    meter.take(total, waited, 0.0)
    assert total.loss == pytest.approx(1.5, rel=1e-3)
    for bucket, value in enumerate(meter.figures()["bits_by_time"]):
        assert value == pytest.approx(1 + (bucket + 0.5) / BUCKETS, rel=5e-3)


def test_a_skipped_step_leaves_no_trace_but_its_number():
    good, _ = step([torch.arange(12)], [0.0])
    bad = type(good)([float("nan")] * len(good.values))
    bad.tokens = good.tokens
    meter = Meter()
    meter.skip(bad, 0.0, 0.0)
    assert meter.figures()["bits_per_token"] is None
    meter.take(good, 0.0, 0.0)
    assert meter.figures()["bits_per_token"] == good.loss
    assert meter.figures()["skipped"] == 1
    again = Meter(meter.dump())
    assert again.figures() == meter.figures()
    meter.clear()
    assert meter.figures()["mask_ratio"] is None


def test_time_is_of_one_cause_at_a_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock({"train": 10.0})
    now[0] = 1.0
    with clock.spending("evaluation"):
        now[0] = 3.0
        assert clock.spent()["evaluation"] == 2.0
        with clock.spending("checkpoint"):
            now[0] = 7.0
    now[0] = 8.0
    clock.shift(0.5, "train", "data")
    assert clock.spent() == {"train": 11.5, "data": 0.5, "evaluation": 2.0, "checkpoint": 4.0}
