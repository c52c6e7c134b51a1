"""Latent race and frozen: what they are exact for, how far they are off, and every form at equal powers.

Chi-square tests reject a correct sampler once in 1,000 seeds each; the seeds are fixed.
"""

import pytest
import torch

from md4.samplers import registry
from md4.samplers.race import LatentRace
from tests.md4.genmd4_oracle import PowerToy, first_times, kolmogorov, sampled, variation
from tests.md4.oracle import chi_square

ALPHA = 1e-3
TOY = PowerToy((0.5, 1.0, 3.0), length=4)


def test_frozen_is_exact_without_time_input():
    """Against the enumerated jumps of a network that is no posterior; one call a reveal."""
    counts, samples = sampled(TOY, TOY.model("still"), 100_000, sampler="frozen")
    assert chi_square(counts, TOY.jumps_law()) > ALPHA
    assert chi_square(counts, TOY.jumps_law(powers=torch.ones(3))) < ALPHA
    assert (samples.calls == 4).all()
    assert (samples.row_draws == 4).all()


def test_frozen_misses_the_law_of_a_true_posterior():
    """The mutant of exact samplers: TV 0.23 from the true law, in which 1e5 exact samples are within 0.01."""
    counts, _ = sampled(TOY, TOY.model("exact"), 20_000, sampler="frozen")
    assert chi_square(counts, TOY.law) < ALPHA
    assert 0.21 < variation(counts, TOY.law) < 0.26
    times = first_times(TOY.model("exact"), 4, 5_000, "frozen")
    assert kolmogorov(times, TOY.first_event(times)) < ALPHA


def test_the_race_has_a_small_bias():
    """TV 0.04 to 0.06 from the true law, noise of 20,000 samples (0.015) included."""
    counts, samples = sampled(TOY, TOY.model("exact"), 20_000, sampler="race")
    assert chi_square(counts, TOY.law) < ALPHA
    assert 0.03 < variation(counts, TOY.law) < 0.06
    assert (samples.calls == 4).all()


class Thorough(LatentRace):
    """Asks for every masked position, whether it may win or not."""

    def next(self, rows):
        return super().next(rows)[0], rows.active(self.mask)


def test_the_race_leaves_out_who_can_not_win(monkeypatch):
    """Tokens are those of the race among all, from fewer draws: 10 positions were masked in all calls of a row."""
    _, samples = sampled(TOY, TOY.model("exact"), 3_000, sampler="race")
    monkeypatch.setitem(registry._SAMPLERS, ("genmd4", "race"), Thorough)
    _, thorough = sampled(TOY, TOY.model("exact"), 3_000, sampler="race")
    assert torch.equal(samples.tokens, thorough.tokens)
    assert (thorough.row_draws == 10).all()
    assert samples.row_draws.double().mean() < 8.5


def test_the_race_of_independent_positions_is_exact():
    """One position, and so a law that has no dependence: the race gives it, at the right times."""
    toy = PowerToy((0.5, 1.0, 3.0), length=1)
    counts, _ = sampled(toy, toy.model("exact"), 20_000, sampler="race")
    assert chi_square(counts, toy.law) > ALPHA
    times = first_times(toy.model("exact"), 1, 20_000, "race")
    assert kolmogorov(times, toy.first_event(times)) > ALPHA


@pytest.mark.parametrize("sampler", ["thinning", "adaptive_thinning", "race", "frozen"])
def test_equal_powers_give_first_hitting(sampler):
    """A network that is no posterior, in uniform order, one call a reveal. Powers that differ are elsewhere."""
    toy = PowerToy((1.5, 1.5, 1.5), length=4)
    counts, samples = sampled(toy, toy.model("still"), 50_000, sampler=sampler)
    assert chi_square(counts, toy.jumps_law(powers=torch.ones(3))) > ALPHA
    assert chi_square(counts, TOY.jumps_law()) < ALPHA
    assert (samples.calls == 4).all()
    assert (samples.row_draws == 4).all()
    assert all((number == 0).all() for number in samples.counted.values())


@pytest.mark.parametrize("sampler", ["race", "frozen"])
def test_infilling(sampler):
    """Known tokens stand; a call for each of the others."""
    start = torch.tensor([TOY.mask, 1, TOY.mask, 2])
    _, samples = sampled(TOY, TOY.model("exact"), 1_000, start, sampler=sampler)
    assert (samples.tokens[:, [1, 3]] == torch.tensor([1, 2])).all()
    assert (samples.tokens < TOY.mask).all()
    assert (samples.calls == 2).all()


def test_winners_are_found_in_pieces(monkeypatch):
    """Logits that are made four positions at a time lead to the same tokens as all at once."""
    _, samples = sampled(TOY, TOY.model("exact"), 60, sampler="frozen")
    monkeypatch.setattr("md4.samplers.batch._CHUNK", 4 * TOY.mask)
    _, pieces = sampled(TOY, TOY.model("exact"), 60, sampler="frozen")
    assert torch.equal(samples.tokens, pieces.tokens)
