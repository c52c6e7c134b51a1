"""`md4 sample`: samples, holes filled, files of requests answered."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md4.errors import UserError
from orchestration.commands.arguments import RunFolder, Seed, group, say

if TYPE_CHECKING:
    from orchestration.serving.batch_jobs import BatchJob

app = group()


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
    from orchestration.run_mirror import deliver
    from orchestration.runs import Run, load_model
    from orchestration.sampling import sample as draw
    from orchestration.sampling_settings import read_settings
    from pipelines.storage import write_atomically

    config = Run(run).config
    chosen = read_settings(config.sampling, settings or ())
    holes = None if image is None else read_holes(config, image, hide or (), mask)
    loaded = load_model(run, ema=ema, report=say)
    prompts = list(prompt or ()) if holes is None else [loaded.vocabulary.decode(holes.canvas)]
    report = draw(
        loaded, prompts=prompts, count=count, length=length, seed=seed, label=label, settings=chosen, stop=stop
    )

    def write(folder: Path) -> list[Path]:
        """The report, and of images a picture before it."""
        file = folder / f"step-{loaded.step:08d}-seed-{report.samples[0].seed}.json"
        write_atomically(file, (report.model_dump_json(indent=1) + "\n").encode())
        if not config.data.has_images:
            return [file]
        from orchestration.pictures import draw_filled, draw_samples

        picture, texts = file.with_suffix(".png"), [sample.text for sample in report.samples]
        if holes is None:
            draw_samples(texts, loaded, picture)
        else:
            draw_filled(holes.given, holes.canvas, texts, loaded, picture)
        return [picture, file]

    files = deliver(run, "samples", write)
    if as_json:
        say(report.model_dump_json(indent=1))
    else:
        notes = "" if holes is None or not holes.notes else f" (the image was changed: {holes.notes})"
        shown = report.headline() if config.data.has_images else report.text()
        say(f"{shown}\nwritten: {', '.join(files)}{notes}")


def _answer_file(run: str, job: "BatchJob", settings: Sequence[str], ema: bool) -> None:
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
