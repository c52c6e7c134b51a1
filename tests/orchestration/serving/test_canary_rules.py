"""Which requests a candidate gets, and when it is dropped or confirmed; chances that are promised are simulated."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pytest
from scipy import stats

from orchestration.sampling import Request
from orchestration.serving import canary, trial_record
from orchestration.serving.canary import FAILED, Figures, Quality, Verdict
from orchestration.serving.config import CanaryConfig
from orchestration.serving.trial_record import Part, Record

CONFIG = CanaryConfig(min_requests=100)


def verdict(present: Figures, candidate: Figures, quality: Quality | None = None, **changes) -> Verdict:
    config = CONFIG.model_copy(update=changes)
    return canary.judge(present, candidate, quality, config, share=0.1, seconds=60)


def figures(answered: int = 0, errors: int = 0, entropy: float = 4.0, spread: float = 0.2) -> Figures:
    squares = answered * (entropy**2 + spread**2)
    return Figures(answered=answered, errors=errors, entropy=answered * entropy, entropy_squares=squares)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_the_share_is_the_share(share):
    """Of 10,000 requests; a false alarm for one set of hashes in 100,000."""
    keys = [canary.key(Request(seed=seed)) for seed in range(10_000)]
    part = np.mean([canary.chosen(key, share, "a") for key in keys])
    assert abs(part - share) < 4.5 * math.sqrt(share * (1 - share) / len(keys))


def test_requests_keep_their_version_and_trials_draw_anew():
    keys = [canary.key(Request(seed=seed)) for seed in range(4000)]
    one, again, other = ([canary.chosen(key, 0.5, trial) for key in keys] for trial in ("a", "a", "b"))
    assert one == again
    agree = np.mean(np.array(one) == np.array(other))
    assert abs(agree - 0.5) < 4.5 * 0.5 / math.sqrt(len(keys))
    # With a larger share, whoever had the candidate keeps it.
    assert all(canary.chosen(key, 0.6, "a") for key, had in zip(keys, one, strict=True) if had)


def test_the_key_is_of_what_is_asked_for():
    same = Request(prompt="the", seed=3)
    assert canary.key(same) == canary.key(Request(prompt="the", seed=3))
    others = [Request(seed=3), Request(prompt="a", seed=3), Request(prompt="the", seed=4), Request(tokens=(1,), seed=3)]
    assert len({canary.key(one) for one in [same, *others]}) == 5
    assert canary.key(Request(seed=1, group="g")) == canary.key(Request(seed=2, group="g"))  # of one body
    assert canary.key(Request(prompt="\udc80"))  # halves of characters are refused later, not here


def test_entropy_of_words_by_hand():
    assert canary.entropy("aabb") == 1
    assert canary.entropy("abcd") == 2
    assert canary.entropy("aaaa") == 0
    assert canary.entropy("10 2 10 2") == 1  # levels of an image
    assert canary.entropy("") == 0


# --- errors ---


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_the_evidence_is_an_e_value(n, share):
    """Its mean is 1 if each of n errors is the candidate's with probability `share`: exactly, over all outcomes."""
    values = np.exp([canary.log_evidence(c, n, share) for c in range(n + 1)])
    assert np.dot(stats.binom.pmf(range(n + 1), n, share), values) == pytest.approx(1, rel=1e-9)


def test_the_evidence_is_what_it_is_said_to_be():
    parts = np.linspace(0.2, 1, 200_001)
    likelihood = parts**4 * (1 - parts) ** 3
    expected = np.trapezoid(likelihood, parts) / 0.8 / (0.2**4 * 0.8**3)
    assert canary.log_evidence(4, 7, 0.2) == pytest.approx(math.log(expected), abs=1e-6)
    assert canary.log_evidence(0, 0, 0.2) == pytest.approx(0)


def test_how_few_errors_are_enough():
    def enough(share: float) -> int:
        return next(n for n in range(99) if canary.fails_more(Figures(), Figures(errors=n), share, 0.01))

    assert [enough(share) for share in (0.1, 0.5, 0.9)] == [3, 9, 62]


def trials(rng: np.random.Generator, number: int, requests: int, share: float, rates: tuple[float, float]) -> Iterator:
    """Errors of the candidate and of both after each error, of many trials in which requests fail at these rates."""
    for _ in range(number):
        candidate = rng.random(requests) < share
        failed = rng.random(requests) < np.where(candidate, rates[1], rates[0])
        own = np.cumsum(candidate[failed])
        yield list(zip(own.tolist(), range(1, len(own) + 1), strict=True))


@pytest.mark.parametrize(("share", "rate"), [(0.1, 0.002), (0.1, 0.3), (0.5, 0.02)])
def test_a_candidate_that_fails_as_often_is_rarely_dropped(share, rate):
    """At most in alpha = 5 % of 1,000 trials, though looked at after every error; a false alarm in 1,000."""
    rng = np.random.default_rng(7)
    bound = math.log(1 / 0.05)
    memo: dict[tuple[int, int], float] = {}

    def evidence(c: int, n: int) -> float:
        if (c, n) not in memo:
            memo[c, n] = canary.log_evidence(c, n, share)
        return memo[c, n]

    dropped = sum(
        any(evidence(c, n) >= bound for c, n in path) for path in trials(rng, 1000, 1000, share, (rate, rate))
    )
    assert dropped <= stats.binom.ppf(0.999, 1000, 0.05)


def test_one_that_fails_more_often_is_dropped_soon():
    """One request in ten against one in two hundred: within 300 requests of the candidate's in 99 % of trials."""
    rng = np.random.default_rng(8)
    paths = list(trials(rng, 300, 3000, 0.1, (0.005, 0.1)))
    found = sum(any(canary.log_evidence(c, n, 0.1) >= math.log(100) for c, n in path) for path in paths)
    assert found >= 0.99 * len(paths)


def test_errors_drop_it_before_it_has_enough_requests():
    found = verdict(figures(answered=20), figures(answered=2, errors=3))
    assert found == Verdict("rollback", "errors: 3 of 5 requests failed, 0 of 20 of the present version")
    assert verdict(figures(answered=20, errors=9), figures(answered=2, errors=3)).action == "wait"


def record(parts: dict[str, Part]) -> Record:
    since = datetime(2026, 3, 1, tzinfo=UTC)
    return Record(change="c", changes=2, present=1, candidate=2, share=0.1, since=since, replicas=parts)


def test_a_request_that_fails_in_every_replica_is_one_error():
    """Else one that only the candidate fails with would be enough, with three replicas or two new beginnings of one."""
    one = Part().with_request(2**64 - 1, Figures(), FAILED).with_request(5, figures(answered=1), Figures())
    total = record({"a": one, "b": one, "c": one}).total()
    assert (total.candidate.errors, total.present.answered) == (1, 3)
    assert verdict(total.present, total.candidate).action == "wait"
    others = {str(key): one.with_request(key, Figures(), FAILED) for key in (7, 8)}
    total = record(others).total()
    assert total.candidate.errors == 3
    assert verdict(total.present, total.candidate).action == "rollback"
    assert not {"present_failed", "candidate_failed"} & total.model_dump().keys()  # too much for the name's history
    again = record(others)
    assert Record.model_validate_json(again.model_dump_json()) == again


def test_errors_that_are_too_many_to_keep_are_counted_of_neither(monkeypatch):
    monkeypatch.setattr(trial_record, "_ERRORS", 3)
    part = Part()
    for key in range(6):
        part = part.with_request(key, *((FAILED, Figures()) if key % 2 else (Figures(), FAILED)))
    part = part.with_request(6, Figures(), figures(answered=1))
    assert (part.present_failed, part.candidate_failed) == ((1,), (0, 2))
    assert (part.present.errors, part.candidate.errors, part.candidate.answered) == (1, 2, 1)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_chance_is_kept_with_several_replicas(share):
    """Every request comes to each of four replicas, which look after every error; at most 5 % of 400 trials."""
    rng, bound, dropped = np.random.default_rng(11), math.log(1 / 0.05), 0
    for _ in range(400):
        parts = dict.fromkeys("abcd", Part())
        found = False
        for key in range(12):
            outcome = (Figures(), FAILED) if rng.random() < share else (FAILED, Figures())
            for replica in rng.permutation(list(parts)):
                parts[replica] = parts[replica].with_request(key, *outcome)
                total = record(parts).total()
                errors = total.candidate.errors, total.candidate.errors + total.present.errors
                found = found or canary.log_evidence(*errors, share) >= bound
        dropped += found
    assert dropped <= stats.binom.ppf(0.999, 400, 0.05)


# --- quality ---


@pytest.mark.parametrize(("difference", "low", "high"), [(0.1, 0.01, 0.05), (0.0, 0.0, 0.001), (0.5, 0.999, 1.0)])
def test_quality_is_a_test_of_its_level(difference, low, high):
    """Of 4,000 candidates whose difference is the margin 3 % are dropped; of better ones fewer, of bad ones all.

    The bounds are more than six standard errors away.
    """
    rng = np.random.default_rng(5)
    config = CONFIG.model_copy(update={"quality_margin": 0.1, "quality_alpha": 0.03})
    dropped = 0
    for rows in rng.normal(difference, 0.1, size=(4000, 12)):
        found = canary.judge(Figures(), Figures(), Quality.of(rows.tolist()), config, share=0.1, seconds=0)
        dropped += found.action == "rollback"
    assert low <= dropped / 4000 <= high


def test_quality_is_waited_for_where_it_is_asked_for():
    enough = figures(answered=100)
    assert verdict(enough, enough, texts="held-out.txt", max_seconds=61).action == "wait"
    found = verdict(enough, enough, texts="held-out.txt", max_seconds=59)
    assert found == Verdict("rollback", "time: the held-out texts are not scored in 60 s")
    sound = Quality(texts=64, difference=0.0, standard_error=0.01)
    assert verdict(enough, enough, sound, texts="held-out.txt").action == "confirm"
    worse = Quality(texts=64, difference=0.1, standard_error=0.01)
    found = verdict(Figures(), Figures(), worse)  # needs no requests
    assert found.action == "rollback"
    assert found.why == "quality: +0.1000 ± 0.0100 bits per token on 64 held-out texts; allowed are +0.02"


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_is_compared_when_it_has_answered_enough(sign):
    other = figures(answered=100, entropy=4 + sign * 0.5)
    found = verdict(figures(answered=900), other)
    assert (found.action, found.why.startswith("entropy: ")) == ("rollback", True)
    assert verdict(figures(answered=900), other, entropy_margin=None).action == "confirm"
    assert verdict(figures(answered=900), figures(answered=99, entropy=4 + sign * 0.5)).action == "wait"
    assert verdict(figures(answered=900), figures(answered=100, entropy=4 + sign * 0.25)).action == "confirm"


def test_nothing_is_confirmed_without_traffic():
    assert verdict(Figures(), Figures()).action == "wait"
    assert verdict(figures(answered=10**6), Figures()).action == "wait"
    found = verdict(figures(answered=10), figures(answered=3), max_seconds=59)
    assert found == Verdict("rollback", "time: 3 of 100 requests in 60 s")
    assert verdict(figures(answered=10), figures(answered=3), max_seconds=61).action == "wait"


def test_a_candidate_like_the_present_version_is_confirmed():
    """In at least 98 % of trials at the default levels; a false alarm of this test in 1,000."""
    rng = np.random.default_rng(3)
    confirmed = 0
    for _ in range(1000):
        sides = []
        for answered in (900, 100):
            bits = rng.normal(4, 0.3, answered)
            sides.append(Figures(answered=answered, entropy=bits.sum(), entropy_squares=(bits**2).sum()))
        scored = Quality.of(rng.normal(0, 0.1, 64).tolist())
        confirmed += verdict(*sides, scored, texts="some").action == "confirm"
    assert confirmed >= stats.binom.ppf(0.001, 1000, 0.98)


def test_figures_of_replicas_add_up():
    one = Figures(answered=2, errors=1, seconds=3.0, calls=5, entropy=2.0, entropy_squares=2.5)
    assert one + one == Figures(answered=4, errors=2, seconds=6.0, calls=10, entropy=4.0, entropy_squares=5.0)
    bits = [1.0, 2.0, 4.0, 4.5]
    told = [Figures(answered=1, entropy=one, entropy_squares=one * one) for one in bits]
    mean = (told[0] + told[1] + told[2] + told[3]).mean_entropy()
    assert mean == pytest.approx((np.mean(bits), stats.sem(bits) ** 2))
    assert told[0].mean_entropy() is None
