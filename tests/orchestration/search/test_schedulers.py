"""Optuna's suggestions get their numbers; without Tune."""

from ray.tune.search.searcher import Searcher

from orchestration.search.schedulers import Optuna
from orchestration.search.trial import METRIC
from tests.orchestration.search.test_space import made

KEYS = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}, "model.network.layers": {"int": [1, 10**9]}}


def test_trials_that_have_begun_keep_their_numbers_and_the_others_get_the_free_ones():
    space = made(KEYS, algorithm="optuna", trials=5)
    begun = {
        3: {"optimizer.learning_rate": 0.003, "model.network.layers": 3},
        1: {"optimizer.learning_rate": 0.001, "model.network.layers": 1},
    }
    suggests = Optuna(space, begun, {"study": "here"})
    told = [suggests.suggest(f"id{place}") for place in range(6)]
    assert told.pop() == Searcher.FINISHED
    assert [one["number"] for one in told] == [1, 3, 0, 2, 4]
    for one in told[:2]:
        assert one == {**begun[one["number"]], "study": "here", "number": one["number"]}
    assert len({one["optimizer.learning_rate"] for one in told}) == 5


def test_what_trials_measured_before_is_what_optuna_knows():
    space = made(KEYS, algorithm="optuna", trials=3)
    begun = {2: {"optimizer.learning_rate": 0.002, "model.network.layers": 2}}
    suggests = Optuna(space, begun, {})
    again = suggests.suggest("again")
    suggests.on_trial_complete("again", {METRIC: 3.5})
    (known,) = suggests._ot_study.get_trials(states=None)
    assert (again["number"], known.params, known.value) == (2, begun[2], 3.5)
