"""`md4`: one command with verbs. Each verb resolves the configuration, then calls the one function that does the work.

A user's mistake ends in one message and exit code 2, without a stack trace. Heavy imports (torch, Ray, DeepSpeed)
happen inside the verbs, so that help and mistakes answer at once.
"""

import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from md4.errors import UserError
from orchestration import data_cli, tokenizer_cli

if TYPE_CHECKING:
    from orchestration.serving.batch_jobs import BatchJob

app = typer.Typer(
    help="Masked diffusion on discrete data: prepare, train, evaluate, sample, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_cli.app, name="data")
app.add_typer(tokenizer_cli.app, name="tokenizer")
_console = Console(highlight=False, soft_wrap=True)

Preset = Annotated[str, typer.Argument(help="name of a preset, or a .yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value, e.g. train.steps=100")]
File = Annotated[Path | None, typer.Option("--config", help="a .yaml file laid over the preset")]
RunFolder = Annotated[Path, typer.Argument(help="folder of a run, e.g. runs/demo")]
Seed = Annotated[int | None, typer.Option(help="seed of the draws")]


def say(text: str) -> None:
    _console.print(text, markup=False)


@app.command()
def prepare(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Turn documents into shards of tokens, resumably."""
    from orchestration.cluster import cluster
    from orchestration.config import load
    from pipelines.config import check
    from pipelines.prepare import prepare as run

    settings = load(preset, overrides or (), config)
    check(settings.data)
    with cluster(num_cpus=os.cpu_count() or 1):
        for path in [run(one, say) for _, one in settings.data.sets()]:
            say(f"prepared: {path}")


@app.command()
def train(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run from its newest sound checkpoint")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the settings, start nothing")
    ] = False,
) -> None:
    """Train on Ray: N workers, DeepSpeed ZeRO, checkpoints, evaluation on the way."""
    from orchestration.config import load
    from orchestration.train import check
    from orchestration.train import train as run

    settings = load(preset, overrides or (), config)
    if dry_run:
        check(settings, resume, say)
        say(settings.to_yaml())
        say("nothing was started (--dry-run)")
        return
    try:
        outcome = run(settings, resume=resume, report=say)
    except KeyboardInterrupt:
        say("stopped: the same command with --resume continues from the last checkpoint")
        raise
    say(f"done: step {outcome.step} after {outcome.seconds:.0f} s; {outcome.run.path}")


@app.command()
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """How a run is doing: step, loss, speed, goodput, restarts, the last checkpoint, the last events."""
    from orchestration.status import status as read
    from orchestration.status import table

    found = read(run)
    print(found.to_json()) if as_json else _console.print(table(found), soft_wrap=False)


@app.command()
def watch(
    run: RunFolder,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
) -> None:
    """The same, live, with the curve of the loss, until the run is over; it may run anywhere, and be restarted."""
    from orchestration.watch import watch as show

    show(run, every, _console)


@app.command()
def config(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Print the resolved settings and the size of the network."""
    from md4.model import count_parameters
    from orchestration.config import load

    settings = load(preset, overrides or (), config)
    say(settings.to_yaml() + f"# parameters: {count_parameters(settings.model):,}")


@app.command()
def plan(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    memory: Annotated[str | None, typer.Option(help="of one device: 80GB, 141GiB; else what is found here")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of one device for an hour; needs --throughput")] = None,
    throughput: Annotated[float | None, typer.Option(min=1e-9, help="tokens/s of one device, measured")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON, and nothing else")] = False,
) -> None:
    """State the memory that training needs of each device, for every ZeRO stage; settings may include gpus=1,2,4."""
    from orchestration.plan_report import run

    if price is not None and throughput is None:
        raise UserError("--price needs --throughput: without it the duration is not known")
    counts = [text.removeprefix("gpus=") for text in overrides or () if text.startswith("gpus=")]
    settings = [text for text in overrides or () if not text.startswith("gpus=")]
    run(preset, settings, config, counts[-1] if counts else None, memory, price, throughput, as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run, or of an exported model")],
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
    seed: Seed = 0,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
) -> None:
    """The negative ELBO in bits per token, character or dimension, with its standard error, as a report in reports/."""
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
    for report in measure(run, wanted, say):
        say(report.headline())


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


@app.command()
def sample(
    run: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(help="sampling settings as key=value, e.g. sampler=first_hitting steps=64")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="text with _ for each token to fill, _{12} for twelve; may be repeated")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="image of which a part is to be filled")] = None,
    hide: Annotated[
        list[str] | None, typer.Option(help="part to fill, x0,y0,x1,y1 in pixels from the upper left; may be repeated")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="image that is white where --image is to be filled")] = None,
    count: Annotated[int, typer.Option(help="samples of each prompt")] = 1,
    length: Annotated[int | None, typer.Option(help="tokens of a sample; more than the model's need block=N")] = None,
    stop: Annotated[
        str | None, typer.Option(help="one token that ends a text; of models of single documents <|endoftext|>")
    ] = None,
    seed: Seed = None,
    label: Annotated[int | None, typer.Option(help="class of the samples, of class-conditional models")] = None,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole report as JSON")] = False,
    requests: Annotated[
        Path | None,
        typer.Option("--input", help="many requests: .jsonl or .parquet, each with fields of POST /v1/samples"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="of --input: file of the records, .jsonl or .parquet")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an --output that was interrupted")] = False,
) -> None:
    """Draw samples, or fill the holes of a prompt or an image; written to the run's samples/.

    Or answer a file of requests, --input, as a job: the other options are for those that don't say otherwise.
    """
    if requests is not None or output is not None or resume:
        if requests is None or output is None:
            raise UserError("a job needs --input FILE and --output FILE")
        for name, value in {"prompt": prompt, "image": image, "hide": hide, "mask": mask, "json": as_json}.items():
            if value:
                raise UserError(f"--{name} does not go with --input: what is wanted stands in the file's requests")
        from orchestration.serving.batch_jobs import BatchJob

        _answer_file(run, BatchJob(requests, output, resume, count, length, label, stop, seed), settings or (), ema)
        return
    if image is None and (hide or mask):
        raise UserError("--hide and --mask say which part of an --image is to be filled: name that, too")
    if image is not None and prompt:
        raise UserError("give a --prompt or an --image, not both")
    from orchestration.infilling import read_holes
    from orchestration.runs import Run, load_model
    from orchestration.sampling import sample as draw
    from orchestration.sampling_settings import read_settings

    config = Run(run).config
    chosen = read_settings(config.sampling, settings or ())
    holes = None if image is None else read_holes(config, image, hide or (), mask)
    loaded = load_model(run, ema=ema, report=say)
    prompts = list(prompt or ()) if holes is None else [loaded.vocabulary.decode(holes.canvas)]
    report = draw(
        loaded, prompts=prompts, count=count, length=length, seed=seed, label=label, settings=chosen, stop=stop
    )
    file = run / "samples" / f"step-{loaded.step:08d}-seed-{report.samples[0].seed}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        say(report.model_dump_json(indent=1))
    if config.data.has_images:
        from orchestration.pictures import draw_filled, draw_samples

        picture, texts = file.with_suffix(".png"), [sample.text for sample in report.samples]
        if holes is None:
            draw_samples(texts, loaded, picture)
        else:
            draw_filled(holes.given, holes.canvas, texts, loaded, picture)
        if not as_json:
            notes = "" if holes is None or not holes.notes else f" (the image was changed: {holes.notes})"
            say(f"{report.headline()}\nwritten: {picture}, {file}{notes}")
    elif not as_json:
        say(f"{report.text()}\nwritten: {file}")


def _answer_file(run: Path, job: "BatchJob", settings: Sequence[str], ema: bool) -> None:
    """Do a job of `md4 sample --input`, on the GPU if there is one."""
    import torch

    from orchestration.runs import Loaded, Run, load_model
    from orchestration.sampling_settings import read_settings
    from orchestration.serving.batch_jobs import run as answer

    def load() -> Loaded:
        loaded = load_model(run, ema=ema, report=say)
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return loaded

    job = replace(job, settings=read_settings(Run(run).config.sampling, settings))
    try:
        outcome = answer(job, load, say)
    except KeyboardInterrupt:
        say("stopped: the same command with --resume goes on")
        raise
    say(f"{outcome.answered:,} answered, {outcome.refused:,} refused; written: {job.output}")
    if outcome.refused and not outcome.answered:
        raise UserError(f"no request could be answered; the first: {outcome.problem}")


@app.command("grid")
def search_grid(
    run: RunFolder,
    steps: Annotated[int, typer.Option(help="steps of the grid")] = 32,
    rows: Annotated[int, typer.Option(help="rows of the validation split to search with, and as many to check")] = 64,
    draws: Annotated[int, typer.Option(help="masks of each row at each time")] = 1,
    points: Annotated[int, typer.Option(help="times to choose from")] = 128,
    seed: Seed = 0,
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
) -> None:
    """Search the times of a sampler's steps that make its bound smallest; written to the run's reports/."""
    from orchestration.grids import Search
    from orchestration.grids import run as search

    report, file = search(run, Search(steps, rows, draws, points, seed or 0, ema), say)
    say(f"{report.table()}\nwritten: {file}\nnext: md4 sample {run} grid={file}")


@app.command()
def serve(
    run: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(help="serving settings as key=value, e.g. replicas=2 min_replicas=0")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port")] = None,
    model: Annotated[list[str] | None, typer.Option(help="a further model, NAME=RUN; may be repeated")] = None,
    write: Annotated[
        Path | None, typer.Option(help="write the file with which `serve deploy` does it on a cluster, and end")
    ] = None,
) -> None:
    """Answer sampling requests over HTTP until interrupted."""
    from orchestration.config import override, read_assignments
    from orchestration.runs import Run

    given = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    tree = read_assignments([f"serving.{setting}" for setting in settings or ()])
    config = override(override(Run(run).config, tree), {"serving": given}).serving
    models = {}
    for one in model or ():
        name, equals, folder = one.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--model {one!r} is not of the form NAME=RUN")
        models[name] = Run(folder).path

    from orchestration.cluster import cluster  # after the settings: importing Ray Serve takes seconds
    from orchestration.serving.app import describe_deployment, free_port, named, serve_run

    if write is not None:
        write.write_text(describe_deployment(named(run, models), config), encoding="utf-8")
        say(f"written: {write}; next: serve deploy {write}")
        return
    free_port(config.host, config.port)  # said at once, not after half a minute
    # As many logical CPUs as the replicas ask for; Serve's own actors and gateways ask for none.
    with cluster(num_cpus=max(os.cpu_count() or 1, math.ceil(config.replicas * config.num_cpus))) as own:
        server = serve_run(run, config, models)
        say(
            f"serving {', '.join([str(run), *models])} at {server.url} (a page; POST /v1/samples, described at "
            f"{server.url}/docs; metrics at {server.metrics_url}); Ctrl-C ends it"
        )
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        say("stopping")
        server.stop(cluster_ends=own)


@app.command("key")
def make_key(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    file: Annotated[Path, typer.Option(help="file of keys, to which the line of the new one is added")] = Path("keys"),
) -> None:
    """Make an API key for the service; it is shown once, the file keeps its hash."""
    from orchestration.serving.keys import Keys, new

    key, line = new(name)
    if file.exists():
        Keys(file).make_sure_is_new(name)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{line}\n")
    file.chmod(0o600)
    say(f"{key}\nnoted: {file}; next: md4 serve RUN keys={file}")


@app.command()
def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="new folder for the model")],
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
) -> None:
    """Write a run's model to a folder of safetensors and JSON that `md4.load` reads."""
    from orchestration.runs import export as write

    path = write(run, folder, ema=ema, report=say)
    say(f"written: {path}; in Python: md4.load({str(path)!r}).sample(3)")


def main() -> None:
    """Entry point of the console command."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|ray)\b.*")
    try:
        _check_packages()
        app(standalone_mode=False)
    except UserError as error:
        print(f"md4: {error}", file=sys.stderr)
        sys.exit(2)
    except typer._click.exceptions.ClickException as error:  # type: ignore[attr-defined]
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("md4: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_packages() -> None:
    """`pipelines` and `orchestration` are names that others use too: a stranger found first must not be run."""
    import md4
    import orchestration
    import pipelines

    home = Path(md4.__file__).resolve().parents[1]
    for package in (pipelines, orchestration):
        found = Path(package.__file__ or "").resolve().parents[1]
        if found != home:
            raise UserError(
                f"package {package.__name__!r} comes from {found}, not from {home} beside md4: remove it from the path"
            )
