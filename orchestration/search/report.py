"""What a study found: a report in words, as JSON and in pictures, and the winner as a preset file."""

import json
import math
from typing import Any

import yaml

from orchestration.search.pictures import draw_curves, draw_parallel
from orchestration.search.ranking import SIGNIFICANT, Ranked, rank
from orchestration.search.study import Study
from pipelines.storage import write_atomically

CURVES, PARALLEL, WINNER = "curves.png", "parallel.png", "winner.yaml"
WHAT_A_SCHEDULE_CHANGES = """\
## What a schedule can change, and what it cannot

MD4's bound in continuous time is an integral over the masked share 1 - alpha: another masking schedule walks through
the same values at another pace, and their integral stays (arXiv 2406.04329, section 4). So for one trained MD4 network
without time input the bound is the same under every schedule, up to what happens beyond eps = 1e-4 at both ends, and
choosing the schedule of a trained network by its bound would be choosing noise. What schedule and density of times do
change:

- *the variance of the gradient*: they decide how often training looks at each masked share. Differences between trials
  below are what networks learned within the same tokens under different noise;
- *samples in few steps*: where the steps of a sampler lie on the way from all hidden to all shown;
- *GenMD4's bound*: its schedules differ between tokens, and the bound depends on them; they are learned by it.

The density of times (`model.times`) changes the variance alone: the loss is divided by it.
"""


def write_report(study: Study) -> list[str]:
    """Write everything into the study's folder, `report.md` last; returns the lines that a person reads first."""
    ranked = rank(study)
    unit = _unit(study).replace("/", " per ")
    draw_curves(study, ranked, unit, study.path / CURVES)
    draw_parallel(study, ranked, unit, study.path / PARALLEL)
    write_atomically(study.path / WINNER, winner(study, ranked).encode())
    facts = json.dumps(_plain(_facts(study, ranked)), indent=1, allow_nan=False) + "\n"
    write_atomically(study.path / "report.json", facts.encode())
    write_atomically(study.path / "report.md", _markdown(study, ranked).encode())
    best = ranked[0]
    near = [one for one in ranked[1:] if one.significant is False]
    return [
        f"best: trial {best.record.number:03d}, <= {best.bits:.4f} +- {best.error:.4f} {_unit(study)}, {_values(best)}",
        f"{len(near)} other trial(s) within {SIGNIFICANT:g} standard errors of it",
        f"report: {study.path / 'report.md'}",
        f"winner: md4 train {study.path / WINNER}",
    ]


def winner(study: Study, ranked: list[Ranked]) -> str:
    """The best trial's configuration, as a preset that `md4 train` takes; what the study says of its trials' runs is
    put back to what it was."""
    best = ranked[0]
    config = study.trials[best.record.number].config(best.record.segments[-1])
    tree = config.model_dump(mode="json")
    base = study.base
    tree["name"] = f"{study.name}-winner"
    tree["runs"] = base.get("runs", "runs")
    tree["train"]["start_from"] = None
    for part, names in {
        "train": ("spare",),
        "checkpoint": ("every", "seconds", "directory", "keep", "keep_every", "keep_best"),
        "evaluation": ("every", "suite"),
        "tracking": ("prometheus_port",),
    }.items():
        given = base.get(part) or {}
        for name in names:
            tree[part].pop(name)
            if name in given:
                tree[part][name] = given[name]
    head = (
        f"# The best of {len(ranked)} trials of study {study.name}: trial {best.record.number:03d}, "
        f"<= {best.bits:.4f} +- {best.error:.4f} {_unit(study)}\n"
        f"# after {best.tokens:,} tokens. Searched: {_values(best)}.\n"
        f"# train.steps is the study's budget: raise it to train for longer.\n"
    )
    if len(best.record.segments) > 1:
        head += (
            "# Its values changed while it trained (population based training); these are the last ones, and training "
            "with\n# them from the beginning is another run: its own weights are in the study's "
            f"trials/{best.record.segments[-1].run}.\n"
        )
    return head + yaml.safe_dump(tree, sort_keys=False)


def _values(one: Ranked) -> str:
    return ", ".join(f"{key}={value}" for key, value in one.record.values.items())


def _unit(study: Study) -> str:
    config = study.trials[0].study.config(rank_values(study))
    return "bits/dim" if config.data.has_images else "bits/token"


def rank_values(study: Study) -> dict[str, Any]:
    """The values of any trial."""
    return next(record.values for one in study.trials if (record := one.record()) is not None)


def _facts(study: Study, ranked: list[Ranked]) -> dict[str, Any]:
    search = study.space.search
    return {
        "study": study.name,
        "preset": study.preset,
        "search": search.model_dump(mode="json"),
        "space": study.space.model_dump(mode="json", by_alias=True, exclude_none=True)["space"],
        "metric": f"validation bound, {_unit(study)}, lower is better",
        "trials": [
            {
                "place": one.place,
                "trial": one.record.number,
                "state": one.state,
                "why": one.record.ended and one.record.ended.why,
                "values": one.record.values,
                "runs": [segment.model_dump(mode="json") for segment in one.record.segments],
                "tokens": one.tokens,
                "bits": one.bits,
                "standard_error": one.error,
                "behind_best": one.behind,
                "behind_best_standard_error": one.behind_error,
                "significantly_worse": one.significant,
                "rounds": [
                    {"round": r.number, "tokens": r.tokens, "bits": r.bits, "standard_error": r.error, "run": r.run}
                    for r in one.rounds
                ],
            }
            for one in ranked
        ],
    }


def _plain(tree: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _markdown(study: Study, ranked: list[Ranked]) -> str:
    search, unit = study.space.search, _unit(study)
    keys = list(study.space.space)
    config = study.config(ranked[0].record.values)
    lines = [
        f"# Search {study.name}",
        "",
        f"{len(ranked)} trials of `{study.preset}`, proposed by {search.algorithm}, scheduler {search.scheduler}; each "
        f"may train on {search.budget:,} tokens, judged after each of {search.rounds} rounds by the validation bound "
        f"under averaged weights: {config.evaluation.rows} rows, {config.evaluation.draws} draws each, estimator "
        f"`{config.evaluation.estimator}`, the same rows and draws for all. Values are upper bounds in {unit}; ± is "
        "the standard error over rows.",
        "",
        "| place | trial | state | tokens | bound | behind the best | " + " | ".join(f"`{key}`" for key in keys) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(keys),
    ]
    for one in ranked:
        bound = "-" if one.bits is None else f"{one.bits:.4f} ± {one.error:.4f}"
        values = " | ".join(str(one.record.values.get(key, "-")) for key in keys)
        cells = (one.place, f"{one.record.number:03d}", one.state, f"{one.tokens:,}", bound, _behind(one), values)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"**Bold** differences are larger than {SIGNIFICANT:g} standard errors, taken as if evaluations were "
        "independent; they share rows and draws, so the true errors are smaller. They are errors of the *evaluation*: "
        "training with another seed moves a bound, too, which `seed` as a key of the space would show. Trials that "
        "were stopped have the figure of the round they came to, which is not to be compared with those that finished.",
        "",
        f"![learning curves]({CURVES})",
        "",
        f"![values and bounds]({PARALLEL})",
        "",
    ]
    forked = [one for one in ranked if len(one.record.segments) > 1]
    if forked:
        lines += ["## Who went on from whom", ""]
        for one in sorted(forked, key=lambda one: one.record.number):
            for segment in one.record.segments[1:]:
                assert segment.begins is not None
                what = ", ".join(f"{key}={value}" for key, value in segment.values.items())
                lines.append(
                    f"- trial {one.record.number:03d} went on from trial {segment.begins.trial:03d} after round "
                    f"{segment.begins.round} as run `{segment.run}` with {what}"
                )
        lines.append("")
    for one in ranked:
        if one.state == "failed" and one.record.ended:
            lines += [f"Trial {one.record.number:03d} failed: {one.record.ended.why}", ""]
    lines += [f"The best trial's settings: `md4 train {WINNER}` in this folder.", "", WHAT_A_SCHEDULE_CHANGES]
    return "\n".join(lines)


def _behind(one: Ranked) -> str:
    if one.behind is None:
        return "-"
    text = f"{one.behind:+.4f} ± {one.behind_error:.4f}"
    return f"**{text}**" if one.significant else text
