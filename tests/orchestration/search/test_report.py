"""Ranking, significance, winner and pictures, from records and metrics as trials leave them."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from md4 import noise
from md4.errors import Failed
from md4.likelihood import mean_and_error, nelbo
from md4.model import ModelConfig, build
from md4.objectives import bits_per_token
from md4.schedules import parse_schedule
from orchestration.config import load
from orchestration.events import Events
from orchestration.runs import Run
from orchestration.search.ranking import difference, rank
from orchestration.search.report import write_report
from orchestration.search.run import _finish
from orchestration.search.study import Begin, Study
from orchestration.search.table import Table
from orchestration.search.trial import _told

SPACE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}, "model.schedule": ["linear", "cosine", "poly2"]}
# Of each trial: the bounds after its rounds, and how it ended.
TOLD = [
    ([4.0, 3.5, 3.20], "finished"),
    ([4.1, 3.4, 3.10], "finished"),
    ([4.5, 3.9, 3.13], "finished"),
    ([4.6], "stopped"),
    ([4.4, 4.0], "stopped"),
    ([], "failed"),
]


def write_trial(study: Study, number: int, bounds: list[float], how: str) -> None:
    trial = study.trials[number]
    record = trial.begin(study.space.point(number))
    if how != "failed":
        run = Run.create(trial.config(record.segments[0]))
        every = run.config.evaluation.every
        rows = [
            {"kind": "evaluation", "step": every * place, "time": 0.0, "bits_per_token": value, "standard_error": 0.02}
            for place, value in enumerate([4.755, *bounds, *([3.0] if how == "stopped" else [])])
        ]
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial.end(how, None if how == "finished" else "the reason", len(bounds) if how == "stopped" else None)


@pytest.fixture
def study(planned):
    plan = planned(SPACE, {"trials": 6})
    study = Study.create(plan.folder, plan.preset, plan.base, plan.space)
    for number, (bounds, how) in enumerate(TOLD):
        write_trial(study, number, bounds, how)
    return study


def test_trials_are_ranked_and_differences_judged(study):
    ranked = rank(study)
    assert [one.record.number for one in ranked] == [1, 2, 0, 4, 3, 5]
    assert [one.significant for one in ranked] == [None, False, True, None, None, None]
    assert ranked[1].behind == pytest.approx(0.03)
    assert ranked[1].behind_error == pytest.approx(0.02 * 2**0.5)
    assert [one.bits for one in ranked] == [3.10, 3.13, 3.20, 4.0, 4.6, None]  # what came after a stop does not count
    assert difference(3.0, 0.03, 2.9, 0.04) == (pytest.approx(0.1), pytest.approx(0.05))


def test_pictures_say_the_unit(study, monkeypatch):
    labels = []

    def kept(figure: Figure, path: Path) -> None:
        (axes,) = figure.axes
        labels.extend([axes.get_ylabel(), axes.get_xticklabels()[-1].get_text()])

    monkeypatch.setattr(Figure, "savefig", kept)
    write_report(study)
    assert labels[0] == "validation bound, bits per token"
    assert labels[-1] == "bound,\nbits per token"


def test_the_report_the_winner_and_the_pictures(study):
    said = write_report(study)
    assert said[0].startswith("best: trial 001, <= 3.1000 +- 0.0200 bits/token, ")
    assert said[1] == "1 other trial(s) within 2 standard errors of it"
    text = (study.path / "report.md").read_text()
    assert "| 1 | 001 | finished | 6,144 | 3.1000 ± 0.0200 | - |" in text
    assert "| 3 | 000 | finished | 6,144 | 3.2000 ± 0.0200 | **+0.1000 ± 0.0283** |" in text
    assert "| 4 | 004 | stopped | 4,096 | 4.0000 ± 0.0200 | - |" in text
    assert "Trial 005 failed: the reason" in text
    assert "the bound is the same under every schedule" in text
    facts = json.loads((study.path / "report.json").read_text())
    assert [one["significantly_worse"] for one in facts["trials"]] == [None, False, True, None, None, None]
    assert [one["tokens"] for one in facts["trials"][0]["rounds"]] == [2048, 4096, 6144]
    best = study.space.point(1)
    winner = load(str(study.path / "winner.yaml"))
    assert winner.model.schedule == best["model.schedule"]
    assert winner.optimizer.learning_rate == best["optimizer.learning_rate"]
    assert (winner.train.steps, winner.runs, winner.checkpoint.every) == (12, "runs", 200)
    assert winner.evaluation.every == load("pydocs-tiny").evaluation.every
    for picture in ("curves.png", "parallel.png"):
        assert (study.path / picture).stat().st_size > 10_000


@pytest.mark.parametrize("bound", [math.nan, math.inf])
def test_a_bound_that_is_no_number_is_last_and_the_report_appears(planned, bound):
    plan = planned(SPACE, {"trials": 6})
    study = Study.create(plan.folder, plan.preset, plan.base, plan.space)
    for number, (bounds, how) in enumerate([([4.0, bound, bound], "finished"), *TOLD[1:]]):
        write_trial(study, number, bounds, how)
    ranked = rank(study)
    assert [one.record.number for one in ranked] == [1, 2, 4, 3, 0, 5]
    assert (ranked[-2].behind, ranked[-2].significant) == (None, None)
    said: list[str] = []
    _finish(study, said.append)
    assert said[1].startswith("best: trial 001, <= 3.1000")
    last = json.loads((study.path / "report.json").read_text())["trials"][-2]
    assert (last["trial"], last["bits"], [one["bits"] for one in last["rounds"]]) == (0, None, [4.0, None, None])
    table = Table(Console(file=io.StringIO(), force_terminal=True))
    with table.showing(study):
        for number, bits in ((0, bound), (1, 3.2), (2, bound), (3, 3.1)):
            told = {"round": 1, "tokens": 2048, "bits_per_token": bits, "standard_error": 0.0, "replayed": True}
            table.measured(number, told)
        assert list(table._grid().columns[0].cells) == ["003", "001", "000", "002", "004", "005"]
    assert _told(study.trials[0].rounds()[-1])["bits_per_token"] == math.inf


def test_without_a_finite_bound_there_is_nothing_to_rank(planned):
    plan = planned(SPACE, {"trials": 2})
    study = Study.create(plan.folder, plan.preset, plan.base, plan.space)
    write_trial(study, 0, [4.0, 3.0, math.nan], "finished")
    write_trial(study, 1, [4.0], "stopped")
    with pytest.raises(Failed, match="came to its end with a finite bound: there is nothing to rank"):
        _finish(study, print)


def test_a_trial_that_went_on_from_another_has_the_rounds_of_both_runs(study):
    trial = study.trials[3]
    begins = Begin(trial=1, round=1, checkpoint="/somewhere/step-00000004-abcdef")
    trial.reopen()
    record = trial.fork({"optimizer.learning_rate": 0.05, "model.schedule": "cosine"}, begins)
    assert record.segments[1].run == "003.1"
    assert trial.config(record.segments[1]).train.start_from == begins.checkpoint
    run = Run.create(trial.config(record.segments[1]))
    rows = [
        {"kind": "evaluation", "step": 4 * n, "time": 0.0, "bits_per_token": 5.0 - n, "standard_error": 0.02}
        for n in (2, 3)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial.end("finished")
    assert [(one.number, one.bits, one.run) for one in trial.rounds()] == [
        (1, 4.6, "003"), (2, 3.0, "003.1"), (3, 2.0, "003.1"),
    ]  # fmt: skip
    write_report(study)
    assert "trial 003 went on from trial 001 after round 1 as run `003.1`" in (study.path / "report.md").read_text()
    assert "Its values changed while it trained" in (study.path / "winner.yaml").read_text()
    assert Events(run.path).read() == []


def test_the_bound_of_a_network_without_time_is_the_same_under_every_schedule():
    """What the report says of schedules: one network, whose predictions depend on what is visible, under four of them.

    Each bound is a mean over 512 rows of 32 stratified draws, known to about 0.04 bits; they agree with each other and
    with the count of masks, which knows no schedule, within 4 standard errors and 0.01 bits for what lies beyond eps.
    False alarm about 1e-3 (draws of the linear schedule have a long tail), the seed is fixed. With time input they
    would not have to."""
    network = {"time_input": False, "feature_dim": 16, "heads": 2, "layers": 2}
    model = build(ModelConfig.model_validate({"vocab_size": 27, "length": 16, "network": network}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    ids = torch.arange(512)
    tokens = noise.bits(noise.derive(noise.key(3, "rows"), ids)[:, None], torch.arange(16)).remainder(27)
    found = {}
    for name in ("linear", "cosine", "poly2", "poly3"):
        model.schedule = parse_schedule(name)
        nats = nelbo(model, tokens, draws=32, seed=len(found), ids=ids, estimator="continuous")
        found[name] = mean_and_error(bits_per_token(nats.mean(1), 16))
    for name, (mean, error) in found.items():
        behind, its_error = difference(mean, error, *found["linear"])
        assert abs(behind) < 4 * its_error + 0.01, name
    counted = nelbo(model, tokens, draws=32, seed=9, ids=ids)
    mean, error = mean_and_error(bits_per_token(counted.mean(1), 16))
    for name, one in found.items():
        behind, its_error = difference(mean, error, *one)
        assert abs(behind) < 4 * its_error + 0.01, name


def test_the_live_table_and_the_plain_lines_say_the_same(study, capsys):
    told = {"round": 2, "tokens": 4096, "bits_per_token": 3.25, "standard_error": 0.011, "replayed": False}
    screen = io.StringIO()
    for console in (Console(file=screen, force_terminal=True, width=160, height=40), Console(width=160)):
        table = Table(console)
        with table.showing(study):
            table.began(3)
            table.measured(1, told)
            table.ended(3)
    drawn, plain = screen.getvalue(), capsys.readouterr().out
    row = next(line for line in reversed(drawn.splitlines()) if "001" in line)
    for part in ("2/3", "4,096", "3.2500", "± 0.0110", str(study.space.point(1)["optimizer.learning_rate"])):
        assert part in row
    assert "trial 001 round 2/3  4,096 tokens  <= 3.2500 +- 0.0110" in plain
    assert "\x1b" not in plain
