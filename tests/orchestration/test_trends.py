"""Regressions by statistics: the false-alarm rate that is promised, by simulation; what is found, and what is not."""

import math
from datetime import timedelta

import numpy as np
import pytest
from scipy import stats

from md4.errors import UserError
from orchestration import results, trends
from orchestration.results import Contributions, Result
from orchestration.suites import figures
from orchestration.suites.prompts import Filled, Filling
from orchestration.suites.settings import Prompts, Text
from orchestration.trends import holm, judge
from tests.orchestration.test_results import BEGAN, figure


def measured(values: np.ndarray, error: float = 1.0, samples: int = 100_000, **others) -> list[Result]:
    """Evaluations in turn of some metrics, `[evaluations, metrics]`."""
    return [
        figure(
            f"m{j}", value, standard_error=error, samples=samples, step=i + 1, attempt=f"a{i}", **others,
            created=BEGAN + timedelta(hours=i),
        )
        for i, row in enumerate(values.tolist())
        for j, value in enumerate(row)
    ]  # fmt: skip


def kinds(found: list[trends.Evaluation]) -> list[list[str]]:
    return [[one.kind for one in evaluation.verdicts] for evaluation in found]


def test_false_alarms_are_as_rare_as_promised():
    """400 models that never change, 8 evaluations of 5 figures each: at alpha = 5 % of the evaluations at most 5 % are
    called worse in anything, though each is compared with the best so far. Evaluations of a model depend on each other;
    the bound below is 4 standard errors of the mean over models (false-alarm rate of this test < 1e-4; fixed seed)."""
    random, alpha = np.random.default_rng(7), 0.05
    shares, seconds, naive = [], [], []
    for _ in range(400):
        values = random.normal(size=(8, 5))
        judged = judge(measured(values), alpha=alpha)[1:]
        alarms = [bool(one.of("worse")) for one in judged]
        shares.append(np.mean(alarms))
        seconds.append(alarms[0])  # compared with one other
        best = np.minimum.accumulate(values)[:-1]
        naive.append(np.mean((stats.norm.sf((values[1:] - best) / math.sqrt(2)) < alpha).any(1)))
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert np.mean(shares) < alpha + 4 * error
    assert abs(np.mean(seconds) - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / 400)  # and no rarer than need be
    assert np.mean(naive) > 5 * alpha  # what a threshold on z alone would give


def test_few_rows_make_no_more_false_alarms():
    """8 rows that both evaluations share: their error is uncertain itself, which the t distribution takes into account
    (and the normal one does not). 1,500 pairs, fixed seed, 4 standard errors."""
    random, alpha, count = np.random.default_rng(3), 0.01, 1500
    alarms, normal = 0, 0
    for _ in range(count):
        kept = {name: {"m0": Contributions.of_mean(random.normal(size=8))} for name in ("a0", "a1")}
        values = np.array([[one["m0"].values.mean()] for one in kept.values()])
        (verdict,) = judge(measured(values, samples=8), kept.__getitem__, alpha)[1].verdicts
        assert verdict.difference is not None
        assert (verdict.difference.paired, verdict.difference.freedom) == (True, 7)
        alarms += verdict.kind == "worse"
        normal += stats.norm.sf(verdict.difference.z) < alpha
    assert abs(alarms / count - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / count)
    assert normal / count > 1.8 * alpha


def answers(values: np.ndarray, place: int) -> tuple[Result, Contributions]:
    """The exact matches of an evaluation as a suite makes them of fillings `[texts, count]`."""
    texts = tuple(Text(text="a_", answer="ab") for _ in values)
    fillings = [
        Filling(prompt="a_", text="", seed=0, entropy=0.0, right=bool(value))
        for row in values.tolist()
        for value in row
    ]
    found = Filled(Prompts.model_validate({"texts": texts, "count": values.shape[1]}), fillings, {}, "text8")
    _, one = figures.of_prompts(None, found)
    assert one.rows is not None
    return figure(
        one.metric, one.value, standard_error=one.error, samples=one.samples, better=one.better, step=place + 1,
        attempt=f"a{place}", created=BEGAN + timedelta(hours=place),
    ), one.rows  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (4, 2)])
def test_from_all_right_to_all_wrong_is_worse(shape):
    """Neither side shows any spread, so that both errors were zero, and the difference could not be judged."""
    found = [answers(np.full(shape, value), place) for place, value in enumerate((1, 1, 0, 0))]
    kept = {one.attempt: {one.metric: rows} for one, rows in found}
    assert kinds(judge([one for one, _ in found], kept.__getitem__)) == [["first"], ["same"], ["worse"], ["worse"]]


@pytest.mark.parametrize(
    ("texts", "count", "right"), [(1, 8, 0.9), (2, 4, 0.9), (2, 4, 0.97), (3, 2, 0.5), (4, 1, 0.8)]
)
def test_shares_make_no_more_false_alarms(texts, count, right):
    """Models that never change, 4 evaluations each, of few fillings, which are often all right or all wrong: of 150
    models, fixed seed, 4 standard errors."""
    random, alpha, alarms = np.random.default_rng(5), 0.05, []
    for _ in range(150):
        found = [answers(random.random((texts, count)) < right, place) for place in range(4)]
        kept = {one.attempt: {one.metric: rows} for one, rows in found}
        judged = judge([one for one, _ in found], kept.__getitem__, alpha)[1:]
        alarms.append(np.mean([bool(one.of("worse")) for one in judged]))
    assert np.mean(alarms) < alpha + 4 * np.std(alarms, ddof=1) / math.sqrt(len(alarms))


def test_a_step_back_is_found_and_named():
    """Slowly better, then one figure of five worse by 8 standard errors of the difference: that one and no other."""
    values = np.random.default_rng(0).normal(scale=0.02, size=(6, 5)) - np.arange(6)[:, None]
    values[5, 2] = values[4, 2] + 8 * 0.02 * math.sqrt(2)
    judged = judge(measured(values, error=0.02))
    assert kinds(judged)[:5] == [["first"] * 5, *[["better"] * 5] * 4]
    assert kinds(judged)[5] == ["better", "better", "worse", "better", "better"]
    (one,) = judged[5].of("worse")
    assert one.reference is not None
    assert one.difference is not None
    assert (one.result.metric, one.reference.step) == ("m2", 5)
    assert one.difference.z == pytest.approx(8)


def test_slow_decline_is_found_against_the_best():
    """Each step is far too small to stand out from the one before."""
    values = np.linspace(0, 12, 13)[:, None]
    judged = judge(measured(values))
    steps = [evaluation.first.step for evaluation in judged if evaluation.of("worse")]
    assert steps[0] is not None
    assert 4 < steps[0] < 8
    assert steps == list(range(steps[0], 14))


def test_which_way_is_better():
    values = np.array([[0.0], [9.0]])
    assert kinds(judge(measured(values, better="higher")))[1] == ["better"]
    assert kinds(judge(measured(-values, better="higher")))[1] == ["worse"]
    assert kinds(judge(measured(values, better="neither")))[1] == ["changed"]
    assert kinds(judge(measured(-values, better="neither")))[1] == ["changed"]
    assert kinds(judge(measured(values[::-1], better="neither")[:1]))[0] == ["first"]


def test_only_what_was_measured_alike_is_compared():
    found = measured(np.array([[0.0], [9.0], [0.0]]))
    other = [found[0], found[1].model_copy(update={"settings": "others"}), found[2]]
    assert kinds(judge(other)) == [["first"], ["first"], ["same"]]
    without = [one.model_copy(update={"standard_error": None}) for one in found]
    assert kinds(judge(without)) == [["first"], ["unjudged"], ["unjudged"]]


def test_order_is_that_of_versions_and_steps_and_repetitions_count_once():
    late = measured(np.array([[5.0], [1.0]]))  # step 1 is measured first, here after step 2
    swapped = [late[1], late[0].model_copy(update={"created": BEGAN + timedelta(days=9)})]
    assert [one.first.step for one in judge(swapped)] == [1, 2]
    again = [*late, late[1].model_copy(update={"attempt": "a1-2", "created": BEGAN + timedelta(days=1)})]
    assert [one.first.attempt for one in judge(again)] == ["a0", "a1-2"]
    versions = [one.model_copy(update={"version": 2 - i, "step": None}) for i, one in enumerate(late)]
    assert [one.place for one in judge(versions)] == ["version 1", "version 2"]


def test_versions_and_steps_are_sequences_of_their_own(tmp_path):
    """A run that became worse is seen though its name has versions, which have no place among steps; and so is a
    training that was begun anew and has fewer steps."""
    runs = measured(np.array([[1.0], [9.0]]))
    version = figure("m0", 0.0, version=3, step=9, attempt="v", created=BEGAN, standard_error=1.0, samples=100_000)
    for one in (*runs, version):
        results.append(tmp_path, [one])
    found = trends.read(tmp_path, "small")
    assert {name: kinds(ones) for name, ones in found.items()} == {
        "nightly, versions": [["first"]],
        "nightly, steps": [["first"], ["worse"]],
    }
    anew = {"attempt": "anew", "value": 8.0, "weights_hash": "anew", "created": BEGAN + timedelta(days=1)}
    results.append(tmp_path, [runs[0].model_copy(update=anew)])
    judged = trends.read(tmp_path, "small")["nightly, steps"]
    assert [one.first.attempt for one in judged] == ["a0", "anew", "a1"]
    newest = trends.newest(judged)
    assert (newest.first.attempt, newest.place, kinds([newest])) == ("anew", "step 1", [["worse"]])


def test_it_says_which_name_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"there are no results in .*: md4 evaluate RUN --suite FILE"):
        trends.models(tmp_path)
    results.append(tmp_path, [figure()])
    results.append(tmp_path, [figure(attempt="b", model="other", suite="weekly")])
    assert trends.models(tmp_path, "weekly") == ["other"]
    with pytest.raises(UserError, match=r"no results of a suite 'nightli' in .*; there are those of nightly, weekly"):
        trends.models(tmp_path, "nightli")
    with pytest.raises(UserError, match=r"of model 'small' of a suite 'weekly' in .*; its suites are nightly"):
        trends.read(tmp_path, "small", "weekly")
    with pytest.raises(UserError, match=r"of model 'smal' in .*; there are those of other, small"):
        trends.read(tmp_path, "smal", "weekly")


@pytest.mark.parametrize(
    ("p", "alpha", "expected"),
    [
        ([0.004, 0.03, 0.01], 0.05, [True, True, True]),  # 0.05 / 3, 0.05 / 2, 0.05
        ([0.004, 0.03, 0.01], 0.02, [True, False, True]),
        ([0.02, 0.02, 0.02], 0.05, [False, False, False]),
        ([], 0.05, []),
    ],
)
def test_holm(p, alpha, expected):
    assert holm(p, alpha) == expected


def test_rows_are_taken_from_the_table(tmp_path):
    random = np.random.default_rng(1)
    hard = random.normal(3, 1, 64)
    for i, shift in enumerate((0.0, 0.05)):
        kept = Contributions.of_mean(hard + shift + random.normal(0, 0.01, 64))
        one = figure("m", kept.values.mean(), standard_error=kept.standard_error, samples=64, step=i, attempt=f"a{i}")
        results.append(tmp_path, [one], {"m": kept})
    (judged,) = trends.read(tmp_path, "small").values()
    (verdict,) = judged[1].of("worse")
    assert verdict.difference is not None
    assert verdict.difference.paired
    with pytest.raises(UserError, match=r"no results of model 'smal' in .*; there are those of small"):
        trends.read(tmp_path, "smal")
    with pytest.raises(UserError, match="alpha is 2"):
        trends.read(tmp_path, "small", alpha=2)
