"""Thinning, plain and adaptive: exact in law and in time, and what would not be.

Chi-square and Kolmogorov-Smirnov tests reject a correct sampler once in 1,000 seeds each; the seeds are fixed.
"""

import pytest
import torch

from md4.samplers import registry
from md4.samplers.sampler import Ask
from md4.samplers.thinning import AdaptiveThinning, Thinning
from tests.md4.genmd4_oracle import PowerToy, first_times, kolmogorov, sampled
from tests.md4.oracle import chi_square

ALPHA = 1e-3
TOY = PowerToy()
BOTH = pytest.mark.parametrize("sampler", ["thinning", "adaptive_thinning"])


class Stale(Thinning):
    """Mutant: the network is shown the time of the last candidate."""

    def ask(self, rows):
        return Ask(self.shown(rows.own["clock"]), self.next(rows)[1])


class Credulous(Thinning):
    """Mutant: every candidate is accepted."""

    def __init__(self, model):
        super().__init__(model)
        self.powers = self.most.expand_as(self.powers)


class Sluggish(Thinning):
    """Mutant: of n masked positions, n - 1 make candidates (but for the last)."""

    def next(self, rows):
        clock, where = super().next(rows)
        count = rows.active(self.mask).sum(dim=1)
        wait = clock - rows.own["clock"]
        return rows.own["clock"] + wait * count / (count - 1).clamp(min=1), where


class Bold(AdaptiveThinning):
    """Mutant: Lambda of the last call bounds what comes after a reveal, too."""

    def tell(self, rows, seen):
        hazard = self.winner(rows, seen).hazard
        super().tell(rows, seen)
        rows.own["bound"] = hazard


def instead(monkeypatch, mutant) -> str:
    """Sample by a mutant; its sampler's name."""
    name = "adaptive_thinning" if issubclass(mutant, AdaptiveThinning) else "thinning"
    monkeypatch.setitem(registry._SAMPLERS, ("genmd4", name), mutant)
    return name


@BOTH
def test_the_true_posterior_gives_the_true_law(sampler):
    """1e5 samples. Thinning asks for one position a call; no more than p_max / p_min calls a reveal are expected."""
    counts, samples = sampled(TOY, TOY.model("exact"), 100_000, sampler=sampler)
    assert chi_square(counts, TOY.law) > ALPHA
    assert torch.equal(samples.calls, samples.counted["rejected"] + 3)
    assert samples.calls.double().mean() < 3 * 4
    if sampler == "adaptive_thinning":
        assert samples.counted["violations"].sum() == 0


@pytest.mark.parametrize("mutant", [Stale, Credulous, Sluggish])
def test_mutants_miss_the_true_law(monkeypatch, mutant):
    counts, _ = sampled(TOY, TOY.model("exact"), 30_000, sampler=instead(monkeypatch, mutant))
    assert chi_square(counts, TOY.law) < ALPHA


def test_thinning_is_exact_for_any_network(monkeypatch):
    """A network that is no posterior, against the limit of its enumerated steps (known to 3e-4 in total variation)."""
    law = TOY.limit_law("timed")
    counts, _ = sampled(TOY, TOY.model("timed"), 50_000, sampler="thinning")
    assert chi_square(counts, law) > ALPHA
    assert chi_square(counts, TOY.law) < ALPHA
    counts, _ = sampled(TOY, TOY.model("timed"), 50_000, sampler=instead(monkeypatch, Stale))
    assert chi_square(counts, law) < ALPHA


def test_violations_are_counted():
    """A network whose hazards rise: adaptive thinning tells of it, and of a third of the rows at least here."""
    _, samples = sampled(TOY, TOY.model("timed"), 5_000, sampler="adaptive_thinning")
    assert (samples.counted["violations"] > 0).double().mean() > 1 / 3
    assert (samples.counted["violations"] <= samples.calls).all()


def test_a_reveal_can_raise_the_hazards(monkeypatch):
    """A law whose first token tells of fast ones: Lambda bounds nothing across a reveal, even with the true posterior.

    1 (power 1) comes before 22 or 00, evenly; the other nine times of ten it is 000. False-alarm rate 1e-3.
    """
    law = torch.zeros(27, dtype=torch.float64)
    law[0], law[9], law[9 + 3 * 2 + 2] = 0.9, 0.05, 0.05
    toy = PowerToy((0.2, 1.0, 4.0), law=law)
    counts, samples = sampled(toy, toy.model("exact"), 30_000, sampler="adaptive_thinning")
    assert chi_square(counts, toy.law) > ALPHA
    assert samples.counted["violations"].sum() == 0
    counts, samples = sampled(toy, toy.model("exact"), 30_000, sampler=instead(monkeypatch, Bold))
    assert chi_square(counts, toy.law) < ALPHA
    assert samples.counted["violations"].sum() > 0


@BOTH
def test_the_first_event_has_its_time(sampler, monkeypatch):
    """P(T <= s) = sum_x p(x) s^(sum of powers of x), by Kolmogorov-Smirnov on 20,000 rows. A mutant is too slow."""
    times = first_times(TOY.model("exact"), 3, 20_000, sampler)
    assert kolmogorov(times, TOY.first_event(times)) > ALPHA
    if sampler == "thinning":
        slow = first_times(TOY.model("exact"), 3, 20_000, instead(monkeypatch, Sluggish))
        assert kolmogorov(slow, TOY.first_event(slow)) < ALPHA


@BOTH
def test_infilling(sampler):
    """A known token stands, the others follow the law given it."""
    start = torch.tensor([TOY.mask, 1, TOY.mask])
    counts, samples = sampled(TOY, TOY.model("exact"), 30_000, start, sampler=sampler)
    assert (samples.tokens[:, 1] == 1).all()
    assert chi_square(counts, TOY.given(start)) > ALPHA
    assert chi_square(counts, TOY.law) == 0
    assert (samples.event[:, 1] == -1).all()


@BOTH
def test_temperature_and_top_k_come_before_the_powers(sampler):
    """`still` at temperature 0.7, its least probable token left out, against the enumerated jumps."""
    model = TOY.model("still")
    mu = TOY.all_states(1.0, "still")
    mu = torch.where(mu > mu.amin(dim=2, keepdim=True), mu ** (1 / 0.7), 0.0)
    mu = mu / mu.sum(dim=2, keepdim=True)
    counts, _ = sampled(TOY, model, 30_000, sampler=sampler, temperature=0.7, top_k=2)
    assert chi_square(counts, TOY.jumps_law(mu)) > ALPHA
    assert chi_square(counts, TOY.jumps_law()) < ALPHA


@BOTH
def test_tiny_powers_end_long_after_the_time_has_underflowed(sampler):
    """At power 1e-3 most tokens are hidden at t = e^-745 still: the clock goes on, the network is shown t1."""
    toy = PowerToy((0.001, 0.002, 0.003))
    model = toy.model("still", t1=0.01)
    _, samples = sampled(toy, model, 200, sampler=sampler)
    assert (samples.tokens < toy.mask).all()
    shown = torch.cat(model.network.times)  # type: ignore[arg-type]
    assert (shown == torch.tensor(0.01)).double().mean() > 0.9
    assert shown.max() <= 1
