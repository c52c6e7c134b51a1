"""A search from its settings to its report: checked and stated first, then run by Tune, resumed from its folder."""

import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md4.errors import Failed, UserError
from orchestration import train
from orchestration.cluster import address, cluster, set_environment
from orchestration.config import NAME, PRESETS, Config, load_tree, read_assignments
from orchestration.search import space as spaces
from orchestration.search.budget import Budget, budget
from orchestration.search.packing import Packing, cluster_room, local_room, pack
from orchestration.search.ranking import rank
from orchestration.search.report import write_report
from orchestration.search.space import PREFIX, Space
from orchestration.search.study import FOLLOWS, Study, Trial, trial_config
from orchestration.search.table import Table

Report = Callable[[str], None]
SPACES = PRESETS / "spaces"
_OF_A_NODE = 1e-3  # of the mark that each node has in Ray: logical CPUs are for workers


@dataclass(frozen=True)
class Plan:
    """What a search will do, before it does anything."""

    preset: str
    base: dict[str, Any]  # settings of all trials, as given
    space: Space
    folder: Path  # of the study
    points: list[dict[str, Any]] | None  # the trials' values, where they are known before
    configs: list[Config]  # of the trials, or of those that stand for them
    packing: Packing | None  # None: the cluster is not known before it is joined

    def budgets(self) -> list[Budget]:
        """Of `configs`."""
        return [budget(one, self.space.search) for one in self.configs]

    def lines(self) -> list[str]:
        """In words."""
        search, budgets = self.space.search, self.budgets()
        ends = {"asha": "asha", "pbt": "pbt", "none": "no scheduler"}[search.scheduler]
        if search.scheduler == "asha":
            ends += f" (of {search.reduction:g} trials one goes on after round {', '.join(map(str, search.rungs))})"
        if search.scheduler == "pbt":
            ends += f" (every {search.perturb_every} round(s) the worst {search.quantile:.0%} copy the best)"
        told = [
            f"study {self.folder}: {self.space.trials} trials of {self.preset} by {search.algorithm}, {ends}, "
            f"{search.rounds} rounds of {search.budget // search.rounds:,} tokens, at most "
            f"{self.space.trials * search.budget:,} in all"
        ]
        if self.packing is not None:
            told.append(f"packing: {self.packing.describe()}")
        if self.points is None:
            told.append("values: as optuna suggests, from " + ", ".join(self.space.space))
            return told
        for number, (values, given) in enumerate(zip(self.points, budgets, strict=True)):
            what = "  ".join(f"{key}={value}" for key, value in values.items())
            told.append(f"trial {number:03d}: {given.steps:,} steps, {given.tokens(given.rounds):,} tokens  {what}")
        return told


def find_space(given: Path | None) -> Path:
    """The file: one that is there, or one that comes with md4, by its name. UserError if there is neither."""
    known = {path.stem: path for path in sorted(SPACES.glob("*.yaml"))}
    if given is not None and given.suffix in (".yaml", ".yml"):
        return given
    if given is not None and str(given) in known:
        return known[str(given)]
    said = f"--space {given}" if given is not None else "--space is missing"
    raise UserError(f"{said}: give a .yaml file, or one of {', '.join(known)}")


def make_plan(
    preset: str,
    space_file: Path,
    overrides: Sequence[str],
    config: Path | None,
    name: str | None,
    studies: str | Path,
    elsewhere: bool = False,
) -> Plan:
    """Check the settings of a search, and that its trials fit; `check` checks what they need.

    Args:
        studies: the folder of the studies.
        elsewhere: another machine carries it out, whose cluster is not known here.

    Raises:
        UserError: a wrong key or value anywhere, trials that do not fit the budget or the cluster.
    """
    folder = _folder(name or default_name(preset, space_file), studies)
    own = [text for text in overrides if text.startswith(PREFIX)]
    for text in overrides:
        key = text.partition("=")[0]
        if key in FOLLOWS:
            raise UserError(f"{key}: of a trial it follows from {FOLLOWS[key]}")
    changes = read_assignments([text.removeprefix(PREFIX) for text in own])
    space = spaces.read(space_file, changes)
    base = load_tree(preset, [text for text in overrides if text not in own], config)
    for key in space.space:
        if any(text.partition("=")[0] == key for text in overrides):
            raise UserError(f"{key}: is searched over in {space_file}, and given as an override")
    base.pop("name", None)
    points = space.points()
    configs = [trial_config(base, space, values, folder) for values in points or space.extremes()]
    for one in configs:
        if one.train.least_workers != one.train.most_workers:
            raise UserError(f"train.workers={one.train.workers}: a search needs one number, so that its trials fit")
        if (base.get("evaluation") or {}).get("every", 1) == 0:
            raise UserError("evaluation.every=0: trials are judged by the validation bound, which is never taken then")
    packing = None if elsewhere else _packing_before(space, configs[0])
    return Plan(preset, base, space, folder, points, configs, packing)


def default_name(preset: str, space_file: Path) -> str:
    """Of a study that is given none."""
    return f"{Path(preset).stem}-{space_file.stem}"


def _folder(name: str, studies: str | Path) -> Path:
    if not re.fullmatch(NAME.removesuffix("$"), name):
        raise UserError(
            f"--name {name!r}: a study's name has letters, digits and . _ - alone, and begins with a letter or digit"
        )
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(studies)):
        raise UserError(
            f"--studies {studies}: a study can't lie in {found[1]}: its folder has to be one of this machine, which "
            "all machines of a cluster share"
        )
    return Path(studies) / name


def _packing_before(space: Space, config: Config) -> Packing | None:
    """What will fit the private cluster that the search starts; None where there is one to join."""
    import ray

    if address() is not None or ray.is_initialized():
        return None
    search, population = space.search, space.search.scheduler == "pbt"
    room = local_room(config, search.concurrent, space.trials, population)
    return pack(config, room, search.concurrent, space.trials, population)


def run(plan: Plan, resume: bool, report: Report, table: Table) -> Study:
    """Run a plan to its report; returns the study. With `resume` it goes on from what its folder has.

    Raises:
        UserError: the folder is taken, or is not of this plan; another process runs it.
        Failed: no trial came to its end.
    """
    check(plan, resume)
    make = Study.resume if resume else Study.create
    _set_environment()
    with cluster(num_cpus=int(plan.packing.room.get("CPU", os.cpu_count() or 2)) if plan.packing else 2):
        packing = _packing_now(plan)
        if plan.packing is None:
            report(f"packing: {packing.describe()}")
        _prepare(plan, report)
        study = make(plan.folder, plan.preset, plan.base, plan.space)
        with study.locked(), table.showing(study):
            if not all(_is_over(one) for one in study.trials):
                _tune(study, packing, table)
    return _finish(study, report)


def _is_over(trial: Trial) -> bool:
    record = trial.record()
    return record is not None and record.ended is not None and record.ended.how != "failed"


def check(plan: Plan, resume: bool) -> None:
    """The trials of a new study as `md4 train` would check them; that one to be resumed is there, and is this one.

    Raises:
        UserError: with the first mistake. Nothing is left behind.
    """
    if resume:
        Study(plan.folder).check(plan.preset, plan.base, plan.space)
        return
    if (plan.folder / "study.yaml").exists():
        raise UserError(f"study {plan.folder} exists already: continue it with --resume, or choose another --name")
    for one in plan.configs:
        train.check(one, False, lambda _: None)


def joined_packing(plan: Plan) -> Packing:
    """How many trials fit the cluster that RAY_ADDRESS names; UserError as of `pack`."""
    with cluster(num_cpus=1):
        return _packing_now(plan)


def _packing_now(plan: Plan) -> Packing:
    import ray

    search = plan.space.search
    population = search.scheduler == "pbt"
    return pack(plan.configs[0], cluster_room(ray), search.concurrent, plan.space.trials, population)


def _prepare(plan: Plan, report: Report) -> None:
    """The data that trials read, before any of them starts."""
    from pipelines.config import prepared_path
    from pipelines.prepare import prepare

    done = set()
    for config in plan.configs:
        for _, one in config.data.sets():
            if (place := str(prepared_path(one))) not in done:
                done.add(place)
                prepare(one, report)


def _set_environment() -> None:
    """Of Tune, before it is imported."""
    for key, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our metrics are in the runs
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the command says how to go on
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_RESULT_BUFFER_LENGTH": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(key, value)
    set_environment()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what a trial failed of is in its record


def _tune(study: Study, packing: Packing, table: Table) -> None:
    """Have Tune run the trials that are not over."""
    from ray import tune
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    from orchestration.search import schedulers
    from orchestration.search.trial import TrialProcess
    from orchestration.search.watching import Watcher, give_back

    notes = study.path / ".tune"
    shutil.rmtree(notes, ignore_errors=True)
    search, space = study.space.search, study.space
    constant = {"study": str(study.path), "here": os.getcwd()}
    settings = [_setting(one, constant) for one in study.trials] if search.algorithm != "optuna" else []
    if search.algorithm == "optuna":
        begun = {one.number: record.values for one in study.trials if (record := one.record()) is not None}
        algorithm: Any = schedulers.Optuna(space, begun, constant)
    else:
        algorithm = schedulers.points(settings, packing.concurrent)
    tuner = tune.Tuner(
        tune.with_resources(TrialProcess, PlacementGroupFactory([on_this_node()])),
        param_space=dict.fromkeys(settings[0]) if settings else {},
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            scheduler=schedulers.scheduler(space),
            num_samples=space.trials,
            max_concurrent_trials=packing.concurrent if search.algorithm == "optuna" else None,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name="notes",
            storage_path=str(notes),
            verbose=0,
            callbacks=[Watcher(study, table)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consider boosting PBT performance")  # a trainer is not to be used twice
        tuner.fit()
    for one in study.trials:
        give_back(one)
    shutil.rmtree(notes, ignore_errors=True)


def on_this_node() -> dict[str, float]:
    """What a trial's process asks for: to be on this process's own node, whose folders it works in."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    (node,) = (one for one in ray.nodes() if one["NodeID"] == own)
    marks = [key for key in node["Resources"] if key.startswith("node:") and not key.startswith("node:__")]
    return dict.fromkeys(marks[:1], _OF_A_NODE)


def _name(trial: Any) -> str:
    """What Tune calls a trial: its number, which it keeps whatever it copies."""
    return f"{trial.config['number']:03d}"


def _setting(trial: Trial, constant: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune is told of a trial: its number; of a population the values, too, which it changes."""
    setting = {**constant, "number": trial.number}
    if trial.study.space.search.scheduler != "pbt":
        return setting
    record = trial.record()
    values = trial.study.space.point(trial.number) if record is None else record.values
    begins = record.segments[-1].begins if record else None
    known = trial.rounds(upto_checkpoint=True)
    done = max([begins.round if begins else 0, *(one.number for one in known)])
    every = trial.study.space.search.perturb_every
    return {**values, **setting, "exchanged": done // every * every}


def _finish(study: Study, report: Report) -> Study:
    """The report, once all trials are over; Failed if none came to its end."""
    records = [one.record() for one in study.trials]
    failed = [one for one in records if one and one.ended and one.ended.how == "failed"]
    for one in failed:
        report(f"trial {one.number:03d} failed: {one.ended and one.ended.why}")
    if not any(one and one.ended and one.ended.how == "finished" for one in records):
        raise Failed(f"no trial of study {study.path} came to its end; --resume tries those that failed again")
    best = rank(study)[0]
    if best.state != "finished" or best.bits is None or not math.isfinite(best.bits):
        raise Failed(f"no trial of study {study.path} came to its end with a finite bound: there is nothing to rank")
    for line in write_report(study):
        report(line)
    return study
