"""Space files: what they mean, what is refused, and that values are a function of seed, number and key."""

import json
import math

import pytest
import yaml

from md4.errors import UserError
from orchestration.search import space as spaces
from orchestration.search.run import SPACES
from orchestration.search.space import Range, Space


def made(space: dict, **search) -> Space:
    return spaces.validate({"space": space, "search": {"budget": 10**6, **search}}, "file.yaml")


def test_ranges_have_the_values_that_they_say():
    assert Range.model_validate([1, "a", None]).values == (1, "a", None)
    assert Range.model_validate({"int": [2, 6], "step": 2}).values == range(2, 7, 2)
    assert Range.model_validate({"int": [1, 3]}).values == range(1, 4)
    assert Range.model_validate({"uniform": [0.4, 1], "step": 0.2}).values == (0.4, 0.6, 0.8, 1.0)
    assert Range.model_validate({"uniform": [0, 1], "step": 0.3}).values == (0.0, 0.3, 0.6, 0.9)
    one = Range.model_validate({"loguniform": [1e-4, 1e-2]})
    assert one.values is None
    assert one.at(0.5) == pytest.approx(1e-3)
    assert (one.clipped(1.0), one.clipped(0.0)) == (0.01, 0.0001)
    assert one.place(1e-3) == pytest.approx(0.5)
    even = Range.model_validate({"int": [2, 6], "step": 2})
    assert [even.clipped(value) for value in (4.9, 5, 5.1, 0, 99)] == [4, 4, 6, 2, 6]
    assert Range.model_validate({"uniform": [1, 3]}).at(0.25) == 1.5


def test_values_depend_on_seed_number_and_key_alone():
    keys = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}, "model.network.dropout": {"uniform": [0, 0.5]}}
    one, more = made(keys, trials=4), made({**keys, "model.schedule": ["linear", "cosine"]}, trials=9)
    for number in range(4):
        assert one.point(number).items() <= more.point(number).items()
    assert one.points() != made(keys, trials=4, seed=1).points()
    assert len({point["optimizer.learning_rate"] for point in more.points()}) == 9


def test_a_huge_range_costs_no_more_than_a_small_one():
    one = Range.model_validate({"int": [1, 2**62 - 1], "step": 3})
    assert (one.at(0.0), one.clipped(8), one.clipped(8.6), one.place(1)) == (1, 7, 10, 0)
    assert one.at(1 - 2**-53) in one.values
    space = made({"seed": {"int": [1, 10**18]}, "model.schedule": ["linear", "cosine", "poly2"]}, algorithm="optuna")
    assert [tuple(point.values()) for point in space.extremes()] == [
        (1, "linear"), (10**18, "cosine"), (1, "poly2"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"the grid has 1,000,000,000,000,000,000 points"):
        made({"seed": {"int": [1, 10**18]}}, algorithm="grid")


@pytest.mark.parametrize("seed", range(4))
def test_no_trial_of_a_random_search_is_the_same_as_another(seed):
    keys = {"optimizer.learning_rate": [1e-3, 3e-3], "model.times": [{"a": 0.5}, {"a": 1}, {}]}
    points = made(keys, trials=6, seed=seed).points()
    assert len({json.dumps(point) for point in points}) == 6
    assert made(keys, trials=4, seed=seed).points() == points[:4]
    assert made(keys, trials=6, seed=seed).points() == points


def test_without_a_number_there_are_no_more_trials_than_points():
    assert made({"seed": [1, 2]}).trials == len(made({"seed": [1, 2]}).points()) == 2
    assert made({"seed": list(range(9))}).trials == 8
    with pytest.raises(UserError, match=r"search\.trials=8: no more than \d different points were found in the space"):
        made({"optimizer.eps": {"uniform": [1, 1.000002]}}).points()


def test_random_values_spread_evenly():
    """Of 400, the share below each tenth within 5 standard deviations: false alarm 5e-6, the seed is fixed."""
    space = made({"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}, trials=400)
    shares = [space.space["optimizer.learning_rate"].place(p["optimizer.learning_rate"]) for p in space.points()]
    for tenth in range(1, 10):
        q = tenth / 10
        assert abs(sum(share < q for share in shares) / 400 - q) < 5 * math.sqrt(q * (1 - q) / 400)


def test_a_grid_has_every_point_once():
    space = made({"model.schedule": ["linear", "cosine"], "model.network.layers": {"int": [1, 3]}}, algorithm="grid")
    points = [tuple(point.values()) for point in space.points()]
    assert space.trials == len(points) == len(set(points)) == 6
    assert points[0] == ("linear", 1)


def test_rungs_are_powers_from_the_first_on():
    key = {"seed": [1, 2]}
    assert made(key, rounds=9).search.rungs == [1, 3]
    assert made(key, rounds=10).search.rungs == [1, 3, 9]
    assert made(key, rounds=9, reduction=2, first_rung=2).search.rungs == [2, 4, 8]


RATE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        ({"optimizer.learnin_rate": [1]}, {}, "unknown key; did you mean 'optimizer.learning_rate'?"),
        ({"train.steps": [100, 200]}, {}, r"space\.train\.steps: follows from search\.budget"),
        ({"evaluation.rows": [1, 2]}, {}, r"space\.evaluation\.rows: trials that differ in it are not compared"),
        ({"data.vocabulary": ["text8", "gpt2"]}, {}, r"space\.data\.vocabulary: .*not compared"),
        ({"model.schedule": []}, {}, "choice is empty: there is nothing to choose from"),
        ({"model.schedule": ["cosine", "cosine"]}, {}, "has a value twice"),
        ({"model.schedule": "cosine"}, {}, "must be a list, or one of choice, uniform"),
        ({"model.schedule": {"choose": ["cosine"]}}, {}, r"unknown key .*choose'; did you mean 'choice'\?"),
        ({"optimizer.eps": {"uniform": [1, 0]}}, {}, r"uniform=\[1\.0, 0\.0\]: the first must be below the second"),
        ({"optimizer.eps": {"loguniform": [0, 1]}}, {}, "both must be above 0"),
        ({"optimizer.eps": {"loguniform": [1, 2], "step": 1}}, {}, "step is for uniform and int, not for loguniform"),
        ({"optimizer.eps": {"uniform": [1, 2], "int": [1, 2]}}, {}, "needs one of choice, .*found 2"),
        (RATE, {"algorithm": "grid"}, r"space\.optimizer\.learning_rate: a grid needs a choice"),
        ({"seed": [1, 2]}, {"algorithm": "grid", "trials": 2}, "a grid has as many as it has points"),
        (RATE, {"scheduler": "ashe"}, r"search\.scheduler='ashe': input should be 'asha', 'pbt' or 'none'"),
        (RATE, {"shceduler": "asha"}, r"unknown key 'search\.shceduler'; did you mean 'scheduler'\?"),
        (RATE, {"rounds": 1}, "first_rung=1: asha needs a rung before the last of rounds=1"),
        ({"model.network.layers": [1, 2]}, {"scheduler": "pbt"}, "pbt changes values while a trial runs"),
        (RATE, {"scheduler": "pbt", "trials": 1}, "a population has at least 2"),
        ({"model.times": [{"a": 0.5}, {"a": 1}]}, {"algorithm": "optuna"}, "optuna takes choices of numbers"),
        ({"model.network.dropout": {"uniform": [math.nan, 1]}}, {}, "should be a finite number"),
        ({"model.network.dropout": {"uniform": [0, math.inf]}}, {}, "should be a finite number"),
        ({"model.network.dropout": {"uniform": [0, 1], "step": math.inf}}, {}, "step=inf: .*finite number"),
        ({"model.network.dropout": {"uniform": [0, 1], "step": 1e-9}}, {}, r"more than 10,000 values of uniform=\[0"),
        ({"model.network.dropout": [0, math.inf]}, {}, "choice has a number that is not finite"),
        ({"seed": {"int": [0, 2**63 - 1]}}, {}, r"int=\[0, 9223372036854775807\]: both must be between -2\^62"),
        ({"data.length": {"int": [16, 64]}}, {"algorithm": "optuna"}, r"space\.data\.length: needs a choice"),
        ({"seed": [1, 2]}, {"trials": 3}, r"search\.trials=3: the space has 2 different points, .* take 2 or fewer"),
        ({"optimizer.eps": [1]}, {"scheduler": "pbt"}, "has one point alone, and a population has at least 2 trials"),
        ({}, {}, "space"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(space, search, message):
    with pytest.raises(UserError, match=message) as error:
        made(space, **search)
    assert "Traceback" not in str(error.value)
    assert str(error.value).startswith("file.yaml: ")


def test_a_file_that_is_no_space_is_named(tmp_path):
    with pytest.raises(UserError, match=r"can't read the space .*nowhere"):
        spaces.read(tmp_path / "nowhere.yaml")
    file = tmp_path / "list.yaml"
    file.write_text("[1, 2]")
    with pytest.raises(UserError, match="is a mapping with the keys space and search, found list"):
        spaces.read(file)
    file.write_text("space: {seed: [1, 2]}\nsearch: {}\n")
    with pytest.raises(UserError, match=r"key 'search\.budget' is missing"):
        spaces.read(file)
    assert spaces.read(file, {"budget": 5, "trials": 2}).trials == 2


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_spaces_that_come_with_md4_are_sound(file):
    space = spaces.read(file)
    assert len(list(space.extremes())) >= 2
    assert spaces.validate(yaml.safe_load(yaml.safe_dump(
        space.model_dump(mode="json", by_alias=True, exclude_none=True))), "again") == space  # fmt: skip
