"""`md4 evaluate | quality | grid | card`: what a trained model is worth."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from md4.errors import UserError
from orchestration.commands.arguments import RunFolder, Seed, group, say

app = group()

ModelFolder = Annotated[
    str, typer.Argument(help="folder of a run (a path or s3://...) or of an exported model; MODEL@REF in the registry")
]
RegistryPlace = Annotated[
    str | None, typer.Option(help="folder of the registry, of MODEL@REF; else MD4_REGISTRY, else registry/")
]


@app.command()
def evaluate(
    run: ModelFolder,
    split: Annotated[str | None, typer.Option(help="validation (default), test or train")] = None,
    rows: Annotated[int | None, typer.Option(help="rows, evenly spaced over the split; all if not given")] = None,
    draws: Annotated[int | None, typer.Option(help="Monte Carlo draws a row")] = None,
    estimator: Annotated[str | None, typer.Option(help="mask_count, continuous or discrete")] = None,
    timesteps: Annotated[int | None, typer.Option(help="steps of the estimator discrete")] = None,
    sets: Annotated[
        str | None,
        typer.Option("--set", help="of a run's data.mixture: the name of a set, or all; the first if not given"),
    ] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(
            help="other data sets instead of a split: lambada, wikitext2, wikitext103, ptb, lm1b; with commas"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="another prepared set, a path or s3://...; with --zero-shot, the folder that its files lie below"
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="of zero-shot sets: md4 (default) or mdlm; never mix them")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="new tokens of a sliding window (mdlm); half of it by default")
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="each zero-shot document in windows of its own")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="GPT-2's vocabulary: a folder or a name on the hub; else MD4_GPT2 says where")
    ] = None,
    workers: Annotated[int, typer.Option(help="actors that share the work; 0 = in this process")] = 0,
    batch_size: Annotated[int, typer.Option(help="rows through the network at once; doesn't change the result")] = 64,
    seed: Seed = None,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
    suite: Annotated[
        str | None,
        typer.Option(help="all that a suite says, and its figures to a table: a .yaml file, or pydocs"),
    ] = None,
    results: Annotated[
        str | None, typer.Option(help="that table: a folder or s3://...; else MD4_RESULTS, else results/")
    ] = None,
    step: Annotated[int | None, typer.Option(help="of the run's checkpoint; the newest if not given")] = None,
    model: Annotated[str | None, typer.Option(help="its name in the table; what the folder says if not given")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure what the table has already")] = False,
    registry: RegistryPlace = None,
) -> None:
    """The negative ELBO in bits per token, character or dimension, with its standard error, as a report in reports/."""
    from orchestration.registry.references import folder

    if suite is not None:
        single = {
            "split": split, "rows": rows, "draws": draws, "estimator": estimator, "timesteps": timesteps, "set": sets,
            "zero-shot": zero_shot, "data": data, "protocol": protocol, "stride": stride, "seed": seed,
            "separate": separate or None, "tokenizer": tokenizer,
        }  # fmt: skip
        for name, value in single.items():
            if value is not None:
                raise UserError(f"--{name} is said in the suite: leave it out, or leave out --suite")
        _suite(folder(run, registry), suite, results, step, model, again, workers, batch_size, ema)
        return
    for name, value in {"results": results, "step": step, "model": model, "again": again or None}.items():
        if value is not None:
            raise UserError(f"--{name} is about suites: it needs --suite FILE")
    if zero_shot is None:
        given = {"protocol": protocol, "stride": stride, "separate": separate or None, "tokenizer": tokenizer}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name} is about zero-shot data sets: it needs --zero-shot NAMES")
    from orchestration.evaluation import Evaluation, ZeroShot
    from orchestration.evaluation import run as measure

    foreign = None
    if zero_shot is not None:
        names = tuple(name.strip() for name in zero_shot.split(",") if name.strip())
        foreign = ZeroShot(names, protocol or "md4", stride, separate, tokenizer)
    wanted = Evaluation(
        data, split, rows, draws, estimator, timesteps, seed or 0, batch_size, workers, ema, foreign, sets
    )
    for report in measure(folder(run, registry), wanted, say):
        say(report.headline())


def _suite(
    path: str,
    suite: str,
    table: str | None,
    step: int | None,
    model: str | None,
    again: bool,
    workers: int,
    batch_size: int,
    ema: bool,
) -> None:
    from orchestration import results
    from orchestration.suites.reports import text_table
    from orchestration.suites.run import Options
    from orchestration.suites.run import run as measure
    from orchestration.suites.settings import load

    options = Options(step, ema, again, workers, batch_size, model)
    outcome = measure(path, load(suite), results.place(table), options, say)
    say(text_table(outcome.results))


@app.command()
def quality(
    run: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(help="sampling settings as key=value, e.g. top_p=0.9 grid=uniform")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="causal language model that gives the perplexity: a folder, or a name on the hub")
    ] = None,
    count: Annotated[int, typer.Option(help="samples of each setting")] = 64,
    temperatures: Annotated[str | None, typer.Option(help="with commas: 0.8,1.0,1.2")] = None,
    steps: Annotated[str | None, typer.Option(help="with commas: 32,128")] = None,
    mauve: Annotated[bool, typer.Option("--mauve", help="MAUVE in the judge's features")] = False,
    features: Annotated[
        Path | None, typer.Option(help="images: network for FID and KID, a file of TorchScript")
    ] = None,
    kid_subset: Annotated[int | None, typer.Option(help="images in a subset of KID; half of them by default")] = None,
    references: Annotated[int | None, typer.Option(help="real rows to compare with; as many as samples")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of a sample")] = None,
    data: Annotated[Path | None, typer.Option(help="another prepared set than the run's own")] = None,
    split: Annotated[str, typer.Option(help="of the real rows: validation, test or train")] = "validation",
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="samples made at once; doesn't change them")] = 64,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the reports as JSON, and nothing else")] = False,
) -> None:
    """Measure samples: perplexity with entropy, distinct n-grams, MAUVE; of images FID and KID; to reports/."""
    from orchestration.quality import Wanted, numbers
    from orchestration.quality import run as measure
    from orchestration.sampling_settings import read_changes

    wanted = Wanted(
        settings=read_changes(settings or ()),
        temperatures=numbers(temperatures, float, "--temperatures"),
        steps=numbers(steps, int, "--steps"),
        count=count,
        references=references,
        length=length,
        seed=seed or 0,
        batch_size=batch_size,
        judge=judge,
        mauve=mauve,
        features=features,
        kid_subset=kid_subset,
        data=data,
        split=split,
        ema=ema,
    )
    found = measure(run, wanted, (lambda text: print(text, file=sys.stderr)) if as_json else say)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    for report in (*found.reports, *([found.frontier] if found.frontier else [])):
        say(report.headline())


@app.command("grid")
def search_grid(
    run: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(help="--frontier: settings of all samplers as key=value, e.g. temperature=0.9")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="steps of the grids, with commas; 32, with --frontier 8,16,32,64")
    ] = None,
    rows: Annotated[int, typer.Option(help="rows of the validation split to search with, and as many to check")] = 64,
    draws: Annotated[int, typer.Option(help="masks of each row at each time")] = 1,
    points: Annotated[
        int | None, typer.Option(help="times to choose from: 512 for rows of up to 256 tokens, else 128")
    ] = None,
    name: Annotated[str, typer.Option(help="of the grids that are kept: searched, searched-NAME")] = "searched",
    frontier: Annotated[
        bool, typer.Option("--frontier", help="then sample with every sampler and grid: which is best for these calls?")
    ] = False,
    samplers: Annotated[str | None, typer.Option(help="--frontier: names with commas; all that the model has")] = None,
    count: Annotated[int | None, typer.Option(help="--frontier: samples of each setting, 256")] = None,
    judge: Annotated[str | None, typer.Option(help="--frontier: language model that scores texts")] = None,
    features: Annotated[Path | None, typer.Option(help="--frontier: network of TorchScript that sees images")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="--frontier: keep the best settings with the run, as sampler=best")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="--frontier: samples made at once, 64")] = None,
    seed: Seed = 0,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
) -> None:
    """Search the times of a sampler's steps that make its bound smallest; kept with the run, reports in reports/."""
    from orchestration.grids import Search
    from orchestration.grids import run as search
    from orchestration.quality import numbers

    wanted = Search(
        numbers(steps or ("8,16,32,64" if frontier else "32"), int, "--steps"),
        rows, draws, points, seed or 0, ema, name=name,
    )  # fmt: skip
    if not frontier:
        given = {"samplers": samplers, "count": count, "judge": judge, "features": features, "save": save or None}
        for option, value in {**given, "batch-size": batch_size}.items():
            if value is not None:
                raise UserError(f"--{option} is about samples: it needs --frontier")
        if settings:
            raise UserError(f"{settings[0]} is a setting of samplers: it needs --frontier")
        for report, file in search(run, wanted, say):
            say(f"{report.table()}\nwritten: {file}\nnext: md4 sample {run} grid={name} steps={report.steps}")
        return
    from orchestration import sampler_frontier
    from orchestration.sampling_settings import read_changes

    names = tuple(part.strip() for part in (samplers or "").split(",") if part.strip())
    trial = sampler_frontier.Wanted(
        wanted, read_changes(settings or ()), names, 256 if count is None else count, judge, features,
        64 if batch_size is None else batch_size, save,
    )  # fmt: skip
    found, _, written = sampler_frontier.run(run, trial, say)
    say(f"{found.headline()}\nwritten: {', '.join(written[1:])}")
    if save and found.winners:
        say(f"next: md4 sample {run} sampler=best steps={found.winners[0].calls}")


@app.command()
def card(
    model: ModelFolder,
    out: Annotated[
        Path | None, typer.Option(help="folder that gets card.md, card.html and card/*.png; else Markdown is printed")
    ] = None,
    weights_licence: Annotated[str | None, typer.Option(help="of the weights; else card.weights_licence")] = None,
    data_licence: Annotated[str | None, typer.Option(help="of the data; else card.data_licence")] = None,
    about: Annotated[str | None, typer.Option(help="what it is for; else card.about")] = None,
    registry: RegistryPlace = None,
) -> None:
    """The model card: data, training, figures of reports on these weights, samples, limits, licences, lineage."""
    from orchestration import cards
    from orchestration.registry.references import folder

    licences = cards.Licences(weights=weights_licence, data=data_licence)
    facts = cards.of(folder(model, registry), licences=licences, about=about)
    if out is None:
        print(cards.markdown(facts), end="")
        return
    say("\n".join(f"written: {file}" for file in cards.write(out, facts)))
