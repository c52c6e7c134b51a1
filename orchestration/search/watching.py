"""What the driver notes and shows of trials as Tune tells it."""

from typing import Any

from ray import PlacementGroupID  # type: ignore[attr-defined]
from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from orchestration.events import Events
from orchestration.search.study import Study, Trial
from orchestration.search.table import Table
from orchestration.search.trial import METRIC, TIME


class Watcher(Callback):
    """Tells the table, and the record of a trial that a scheduler ended or that broke."""

    def __init__(self, study: Study, table: Table):
        self._study, self._table = study, table

    def __reduce__(self) -> Any:
        """Tune keeps a copy for a resumption of its own, which a study has no use for; a terminal can't be kept."""
        return Callback, ()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        self._table.began(int(str(trial)))

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        if TIME in result and METRIC in result:
            self._table.measured(int(str(trial)), result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """Its process has said that it finished, or a scheduler has ended it: then here is where that is noted."""
        number, last = int(str(trial)), trial.last_result.get(TIME, 0)
        one, rounds = self._study.trials[number], self._study.space.search.rounds
        if last < rounds:
            why = f"after round {last} of {rounds}, below the cut of its rung"
            one.end("stopped", why, last)
            record = one.record()
            if record is not None and not trial.last_result.get("replayed"):
                Events(one.run_of(record.segments[-1])).add(
                    "stopped", step=_step(one, last), reason=f"the study: {why}"
                )
        self._table.ended(number)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """It broke, maybe before it could make its record."""
        number, space = int(str(trial)), self._study.space
        one = self._study.trials[number]
        if one.record() is None:
            one.begin({key: trial.config[key] for key in space.space if key in trial.config} or space.point(number))
        error = trial.get_pickled_error() or trial.get_error()
        text = (str(error).strip().splitlines() or ["its process died"])[-1]
        one.end("failed", text[:500])
        give_back(one)
        self._table.ended(number)


def give_back(trial: Trial) -> None:
    """Free the place of the workers of a trial that is over, if it is still taken: its process may have died, or been
    ended before it could (Tune waits for seconds alone when all trials are over), and nobody else would."""
    record = trial.record()
    for segment in record.segments if record else ():
        for event in Events(trial.run_of(segment)).read("placed")[-1:]:
            group = PlacementGroup(PlacementGroupID(bytes.fromhex(event["placement_group"])))
            if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
                remove_placement_group(group)


def _step(trial: Any, round: int) -> int:
    return next((one.step for one in trial.rounds() if one.number == round), 0)
