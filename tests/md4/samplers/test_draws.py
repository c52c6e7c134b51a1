"""Draws against the probabilities they are made from. Chi-square tests reject a correct draw once in 1,000 seeds; the
seeds are fixed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md4 import noise
from md4.errors import UserError
from md4.samplers import draws
from md4.samplers.draws import categorical, filter_top_k, filter_top_p, filtered, log_weights
from tests.md4.oracle import chi_square

ALPHA = 1e-3


def keys(count: int, name: str) -> torch.Tensor:
    return noise.derive(noise.key(1, name), torch.arange(count))


def some_logits(vocabulary: int, scale: float, name: str) -> torch.Tensor:
    return scale * (2 * noise.uniform(noise.key(2, name), torch.arange(vocabulary)) - 1)


@pytest.mark.parametrize(("vocabulary", "scale"), [(2, 3.0), (27, 3.0), (101, 3.0)])
def test_categorical_follows_its_probabilities(vocabulary, scale):
    """False-alarm rate 1e-3 each; 5e4 draws. The mutant scales the logits by 1.05."""
    count = 50_000
    logits = some_logits(vocabulary, scale, "categorical")
    tokens = categorical(logits.expand(count, -1), keys(count, f"categorical {vocabulary}"))
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert chi_square(counts, logits.softmax(0)) > ALPHA
    assert chi_square(counts, (1.05 * logits).softmax(0)) < ALPHA


def test_a_token_depends_on_its_own_logits_and_key_alone(monkeypatch):
    logits = torch.stack([some_logits(50, 2.0, f"own {i}") for i in range(64)])
    all_keys = keys(64, "own")
    together = categorical(logits, all_keys)
    alone = torch.cat([categorical(logits[i : i + 1], all_keys[i : i + 1]) for i in range(64)])
    monkeypatch.setattr(draws, "_CHUNK", 50 * 7)
    chunked = categorical(logits, all_keys)
    assert torch.equal(together, alone)
    assert torch.equal(together, chunked)
    assert together.unique().numel() > 10


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((20_000, 5), -torch.inf)
    logits[:, 3] = -1e4
    logits[:, 1] = -1e4
    tokens = categorical(logits, keys(20_000, "forbidden"))
    assert set(tokens.tolist()) == {1, 3}


def draw_tokens(logits, keys, temperature, top_p):
    """As samplers do it, without top-k."""
    weights = filtered(log_weights(logits, temperature), top_p, torch.zeros(len(logits), dtype=torch.int64))
    return categorical(weights, keys)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_then_top_p(temperature):
    """False-alarm rate 1e-3 each; 2e4 draws. The mutant swaps the order of temperature and top-p."""
    logits = some_logits(27, 2.0, "temperature")
    count = 20_000
    tokens = draw_tokens(
        logits.expand(count, -1),
        keys(count, f"temperature {temperature}"),
        torch.full((count,), temperature),
        torch.full((count,), 0.8),
    )
    counts = torch.bincount(tokens, minlength=27)
    right = filter_top_p(logits / temperature, 0.8).softmax(0)
    swapped = (filter_top_p(logits, 0.8) / temperature).softmax(0)
    assert chi_square(counts, right) > ALPHA
    assert chi_square(counts, swapped) < ALPHA


def test_every_position_has_its_own_temperature_and_top_p():
    logits = some_logits(27, 2.0, "own settings").expand(6, -1)
    temperature = torch.tensor([0.3, 1.0, 1.0, 2.0, 1.0, 0.3])
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.9, 1e-9, 0.7])
    together = draw_tokens(logits, keys(6, "own settings"), temperature, top_p)
    for i in range(6):
        one = slice(i, i + 1)
        alone = draw_tokens(logits[one], keys(6, "own settings")[one], temperature[one], top_p[one])
        assert alone == together[one]
    assert together[4] == logits[4].argmax()


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_the_coldest_draw_is_the_argmax(temperature):
    logits = torch.stack([some_logits(27, 2.0, f"cold {i}") for i in range(100)])
    tokens = draw_tokens(
        logits, keys(100, "cold"), torch.full((100,), temperature, dtype=torch.float64), torch.full((100,), 0.9)
    )
    assert torch.equal(tokens, logits.argmax(dim=1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 5.0]), min_size=1, max_size=12),
    st.floats(1e-6, 1.0),
)
def test_top_p_keeps_the_smallest_sufficient_set_with_ties(values, p):
    """Against the definition: the largest threshold tau such that {v : mu_v >= tau} holds p, with many ties."""
    logits = torch.tensor(values, dtype=torch.float64)
    kept = torch.isfinite(filter_top_p(logits, p))
    mu = logits.softmax(0)
    sufficient = [tau for tau in mu.unique() if mu[mu >= tau].sum() >= p - 1e-12]
    expected = mu >= max(sufficient)
    # At a set whose probability equals p up to rounding both answers are right.
    close = any(abs(mu[mu >= tau].sum() - p) < 1e-9 for tau in mu.unique())
    assert close or torch.equal(kept, expected)
    assert kept.any()
    assert torch.equal(filter_top_p(logits, p)[kept], logits[kept])


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5, float("nan")])
def test_top_p_outside_its_range_is_refused(p):
    with pytest.raises(UserError, match="top_p"):
        filter_top_p(torch.zeros(3), p)


def test_top_k_keeps_k_and_what_is_tied_with_the_last():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]).expand(6, -1)
    kept = torch.isfinite(filter_top_k(logits, torch.tensor([0, 1, 2, 3, 4, 9])))
    assert kept.tolist() == [
        [True] * 5,
        [False, True, False, False, False],
        [False, True, True, True, False],
        [False, True, True, True, False],
        [True, True, True, True, False],
        [True] * 5,
    ]


def test_top_p_holds_its_share_of_what_top_k_left():
    """Probabilities .4 .3 .2 .1: of the two most probable, renormalised to 4/7 and 3/7, top_p = 0.5 leaves one."""
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = torch.isfinite(filtered(weights, torch.tensor([0.5]), torch.tensor([2])))
    assert kept.tolist() == [[True, False, False, False]]
    assert torch.isfinite(filtered(weights, torch.tensor([0.5]), torch.tensor([0]))).sum() == 2
