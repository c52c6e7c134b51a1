"""Tune's schedulers and Optuna, as a study needs them.

A study that was interrupted tells a new Tune what its trials had measured before: rounds that are `replayed` fill the
rungs, but end nobody, since it was decided already.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.searcher import Searcher

from orchestration.search.space import MOST_POINTS, Range, Space
from orchestration.search.trial import METRIC, TIME


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        decided = result["replayed"] or result[TIME] >= self._max_t  # who is done needs not be ended
        return TrialScheduler.CONTINUE if decided else decision


class Population(PopulationBasedTraining):
    """Population based training of trials that all run at the same time."""

    def __init__(self, space: Space):
        search = space.search
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            perturbation_interval=search.perturb_every,
            hyperparam_mutations={key: _mutations(one) for key, one in space.space.items()},
            quantile_fraction=search.quantile,
            resample_probability=search.resample,
            custom_explore_fn=lambda values: _within(space, values),
            log_config=False,
        )
        self._rounds = search.rounds

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._trial_state[trial].last_perturbation_time = trial.config["exchanged"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        if result[TIME] >= self._rounds:  # there is nothing left to train
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        # Tune would have a trial wait for another that is about to start: here all have room.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision


def _mutations(one: Range) -> Any:
    """A list: its neighbours are near. A function: a factor is near."""
    few = one.values is not None and len(one.values) <= MOST_POINTS
    return list(one.values or ()) if few else (lambda: one.at(random.random()))


def _within(space: Space, setting: dict[str, Any]) -> dict[str, Any]:
    return {key: space.space[key].clipped(value) if key in space.space else value for key, value in setting.items()}


class Optuna(OptunaSearch):
    """Optuna's suggestions, numbered. Trials that have begun are suggested again first, with the values that they have.

    begun: values by number.
    """

    def __init__(self, space: Space, begun: Mapping[int, Mapping[str, Any]], constant: Mapping[str, Any]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            space={key: _distribution(one) for key, one in space.space.items()},
            metric=METRIC,
            mode="min",
            seed=space.search.seed % 2**32,
            points_to_evaluate=[dict(begun[number]) for number in sorted(begun)],
        )
        self._numbers = [*sorted(begun), *(number for number in range(space.trials) if number not in begun)]
        self._constant = dict(constant)

    def suggest(self, trial_id: str) -> dict | str | None:
        if not self._numbers:
            return Searcher.FINISHED
        values = super().suggest(trial_id)
        if values is None:
            return None
        return {**values, **self._constant, "number": self._numbers.pop(0)}


def _distribution(one: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.choice is not None:
        return CategoricalDistribution(one.choice)
    if one.integer is not None:
        return IntDistribution(*one.integer, step=int(one.step or 1))
    high = one.values[-1] if one.values else one.ends[1]
    return FloatDistribution(one.ends[0], high, log=one.loguniform is not None, step=one.step)


def scheduler(space: Space) -> FIFOScheduler:
    """The one that a study asks for."""
    search = space.search
    random.seed(search.seed)  # Tune's schedulers draw from the global generators
    np.random.seed(search.seed % 2**32)  # noqa: NPY002
    if search.scheduler == "asha":
        return Halving(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            max_t=search.rounds,
            grace_period=search.first_rung,
            reduction_factor=search.reduction,
            stop_last_trials=False,
        )
    return Population(space) if search.scheduler == "pbt" else FIFOScheduler()


def points(settings: Sequence[dict[str, Any]], concurrent: int) -> BasicVariantGenerator:
    """Trials with these settings, in this order."""
    return BasicVariantGenerator(points_to_evaluate=list(settings), max_concurrent=concurrent)
