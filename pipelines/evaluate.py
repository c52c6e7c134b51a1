"""How well a model knows a set of examples: its likelihood bound, with everything needed to repeat it.

`evaluate` gives a report (`pipelines.reports`). A number never stands without its estimator, the number of draws and
its standard error (contract C7).

The set is a split of a prepared set, a data set under a zero-shot protocol (`pipelines.zero_shot`), or an array. With
`workers`, Ray Data deals batches out to that many actors, each with the model in its memory; without, the same
`_Scorer` works in this process. A row's estimates depend on nothing but the weights, the row and the seed, so the
result is the same for any number of workers and any batch size: bit by bit in float32 on CPUs of one kind with one
thread each, to rounding elsewhere.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from md4 import documents
from md4.errors import UserError
from md4.likelihood import estimator_name, nelbo, ratio_and_error
from md4.objectives import MaskedDiffusion
from pipelines.reports import LikelihoodReport, Provenance, ZeroShotFacts
from pipelines.shards import ShardSet
from pipelines.zero_shot import ZeroShotSet


@dataclass(frozen=True)
class Estimates:
    """What the rows of a set contributed to a report: N rows, evenly spaced over the set."""

    nats: np.ndarray  # [N] the bound of each, the mean over its draws
    tokens: np.ndarray  # [N] how many of its tokens count
    clusters: np.ndarray  # [N] ids: of the document that it is from, of the row itself where documents aren't known


def evaluate(model: MaskedDiffusion, data: ShardSet | ZeroShotSet | np.ndarray, **options: Any) -> LikelihoodReport:
    """The report of `evaluate_rows`, which says what the options are."""
    return evaluate_rows(model, data, **options)[0]


def evaluate_rows(
    model: MaskedDiffusion,
    data: ShardSet | ZeroShotSet | np.ndarray,
    *,
    draws: int = 16,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: str = "mask_count",
    timesteps: int | None = None,
    workers: int = 0,
    load: Callable[[], MaskedDiffusion] | None = None,
    provenance: Provenance | None = None,
    vocabulary: str = "unknown",
    progress: bool = True,
) -> tuple[LikelihoodReport, Estimates]:
    """Estimate the bound on the rows of a prepared split, of a zero-shot set, or of an array of tokens `[N, L]`.

    limit: evaluate this many rows, evenly spaced over the set; all if None. batch_size: rows that go through the
    network at once; doesn't change the result. timesteps: T of the estimator `discrete`. workers: actors of Ray Data,
    which must be running; 0 = work in this process. load: how an actor gets the model, for instance from the folder of
    a run that all machines see; by default `model` itself is sent. vocabulary: named in the report where `data` is an
    array.

    A row's noise depends on the seed and the row's id alone. Raises `UserError` for an empty set, tokens or labels that
    the model doesn't know, numbers below 1, an estimator that is unknown or that the model doesn't have, or a network
    whose answer is not finite.
    """
    began = perf_counter()
    source = _open(data, vocabulary)
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; at least {least} is needed")
    if source.facts.rows == 0:
        raise UserError(f"the {source.facts.split} split has no rows to evaluate")
    name = estimator_name(model, estimator, timesteps)
    options = _Options(
        rows=source.facts.rows if limit is None else min(limit, source.facts.rows),
        draws=draws,
        seed=seed,
        estimator=estimator,
        timesteps=timesteps,
    )
    spans = [
        {"start": start, "stop": min(start + batch_size, options.rows)} for start in range(0, options.rows, batch_size)
    ]
    if workers:
        answers = _on_ray(model if load is None else load, source, options, spans, workers)
    else:
        scorer = _Scorer(lambda: model, lambda: source, options)
        answers = (scorer({key: np.array([value]) for key, value in span.items()}) for span in spans)
    found = _collect(answers, options.rows, progress)

    ids = _spread(np.arange(options.rows), options.rows, source.facts.rows)
    clusters = ids if source.facts.documents is None else source.facts.documents[ids]
    tokens = int(found["tokens"].sum())
    nats, error = ratio_and_error(*(torch.from_numpy(a) for a in (found["nats"], found["tokens"], clusters)))
    bits, bits_error = nats / math.log(2), error / math.log(2)
    length = source.facts.characters_per_token
    report = LikelihoodReport(
        created=datetime.now(UTC),
        model=provenance or Provenance(),
        data_fingerprint=source.facts.fingerprint,
        split=source.facts.split,
        vocabulary=source.facts.vocabulary,
        seed=seed,
        seconds=perf_counter() - began,
        zero_shot=source.facts.zero_shot,
        estimator=name,
        draws=draws,
        rows=options.rows,
        rows_available=source.facts.rows,
        clusters=len(np.unique(clusters)),
        tokens=tokens,
        window=source.facts.window,
        bits_per_token=bits,
        standard_error=bits_error,
        perplexity=math.exp(nats),
        perplexity_error=math.exp(nats) * error,
        characters_per_token=length,
        bits_per_character=bits / length if length else None,
        bits_per_character_error=bits_error / length if length else None,
        bits_per_dimension=bits if source.facts.images else None,
        bits_per_dimension_error=bits_error if source.facts.images else None,
    )
    return report, Estimates(found["nats"], found["tokens"], clusters)


# -- where rows come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What a report says of a set of rows."""

    rows: int
    window: int
    split: str
    fingerprint: str
    vocabulary: str
    images: bool = False
    characters_per_token: float | None = None
    documents: np.ndarray | None = None  # [rows], where it is known which rows belong together
    zero_shot: ZeroShotFacts | None = None
    end_of_text: int | None = None  # behind the first of these a row is padding; None: there is no padding


class _Rows(NamedTuple):
    """Some rows: tokens `[n, L]`, labels `[n]`, and which tokens count `[n, L]`; None for no labels, and for all."""

    tokens: np.ndarray
    labels: np.ndarray | None = None
    scored: np.ndarray | None = None


@dataclass(frozen=True)
class _Source:
    """Rows to evaluate, by id. Sent to another process, a prepared set is opened there."""

    facts: _Facts
    data: ShardSet | ZeroShotSet | np.ndarray

    def read(self, ids: np.ndarray) -> _Rows:
        if isinstance(self.data, ShardSet):
            return _Rows(*self.data.read_labelled(ids))
        if isinstance(self.data, ZeroShotSet):
            return _Rows(self.data.windows.tokens[ids], scored=self.data.windows.scored[ids])
        return _Rows(self.data[ids])


def fingerprint(data: ShardSet | ZeroShotSet) -> str:
    """Of the set as it is evaluated: what a report on it will say."""
    return data.fingerprint if isinstance(data, ShardSet) else data.windows.fingerprint


def _open(data: ShardSet | ZeroShotSet | np.ndarray, vocabulary: str) -> _Source:
    if isinstance(data, ShardSet):
        shards = ShardSet(data.root.absolute(), data.split)  # an actor may have another working directory
        split = shards.manifest.splits[shards.split]
        facts = _Facts(
            rows=shards.rows,
            window=shards.length,
            split=shards.split,
            fingerprint=shards.fingerprint,
            vocabulary=shards.vocabulary.name,
            images=shards.shape is not None,
            characters_per_token=None
            if shards.shape
            else _ratio(split.characters, split.tokens, shards.vocabulary.name),
            end_of_text=shards.end_of_rows,
        )
        return _Source(facts, shards)
    if isinstance(data, ZeroShotSet):
        cut = data.windows
        facts = _Facts(
            rows=len(cut.tokens),
            window=cut.tokens.shape[1],
            split=data.split,
            fingerprint=cut.fingerprint,
            vocabulary=data.vocabulary,
            characters_per_token=_ratio(data.characters, int(cut.scored.sum()) + cut.dropped, data.vocabulary),
            documents=cut.documents,
            zero_shot=ZeroShotFacts(
                data_set=data.name,
                protocol=data.rule.name,
                detokenizer=data.detokenizer,
                stride=data.rule.stride,
                separate_documents=data.rule.separate,
                dropped_tokens=cut.dropped,
            ),
        )
        return _Source(facts, data)
    if data.ndim != 2:
        raise UserError(f"rows have the shape [N, L], not {list(data.shape)}")
    facts = _Facts(
        rows=len(data),
        window=data.shape[1],
        split="array",
        fingerprint=hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest(),
        vocabulary=vocabulary,
    )
    return _Source(facts, data)


def _ratio(characters: int, tokens: int, vocabulary: str) -> float | None:
    """Characters per token; exactly 1 where tokens are characters, some of which stand between the documents."""
    if vocabulary == "text8":
        return 1.0
    return characters / tokens if characters and tokens else None


# -- scoring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    rows: int  # to evaluate
    draws: int
    seed: int
    estimator: str
    timesteps: int | None


def _spread(places: np.ndarray, count: int, rows: int) -> np.ndarray:
    """The ids of the rows at `places` among `count` that are evenly spaced over `rows`."""
    return places.astype(np.int64) * rows // count


class _Scorer:
    """Estimates rows: the class of Ray Data's actors, and what `evaluate` calls without Ray.

    A call takes the first place and the one after the last, `[1]` each, and gives for every place its `place`, its
    `nats` (the mean over its draws) and its `tokens` scored. A user's mistake is an answer too, in `error`: it is not
    a failure that Ray should try again or wrap in traces.
    """

    def __init__(self, load: Callable[[], MaskedDiffusion], open_source: Callable[[], _Source], options: _Options):
        self.load, self.options, self.source = load, options, open_source()

    @cached_property
    def model(self) -> MaskedDiffusion:
        """Loaded by the first call, which can answer with a mistake; a constructor can't."""
        return self.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = np.arange(int(batch["start"][0]), int(batch["stop"][0]))
        try:
            nats, tokens = self._estimate(_spread(places, self.options.rows, self.source.facts.rows))
            error = ""
        except UserError as mistake:
            nats, tokens, error = np.zeros(len(places)), np.zeros(len(places), np.int64), str(mistake)
        return {"place": places, "nats": nats, "tokens": tokens, "error": np.full(len(places), error, object)}

    def _estimate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, options, end = self.source.read(ids), self.options, self.source.facts.end_of_text
        tokens = torch.from_numpy(rows.tokens.astype(np.int64))
        if tokens.max() >= self.model.vocab_size:
            raise UserError(f"the set holds token {int(tokens.max())}, the model knows 0..{self.model.vocab_size - 1}")
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        nats = nelbo(
            self.model,
            tokens.to(device),
            draws=options.draws,
            seed=options.seed,
            ids=torch.from_numpy(ids),
            estimator=options.estimator,
            labels=self._labels(rows.labels, device),
            scored=None if rows.scored is None else torch.from_numpy(rows.scored),
            real=None if end is None else documents.no_padding(tokens, end),
            timesteps=options.timesteps,
        )
        if end is not None:
            counts = documents.no_padding(tokens, end).sum(1).numpy()
        else:
            counts = np.full(len(ids), tokens.shape[1]) if rows.scored is None else rows.scored.sum(axis=1)
        return nats.mean(dim=1).cpu().numpy(), counts

    def _labels(self, labels: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
        """Classes `[n]` for a class-conditional model; a label of -1 is no class in particular."""
        classes: int = getattr(getattr(self.model.network, "conditioning", None), "classes", 0)
        if not classes:
            return None
        if labels is None:
            raise UserError(f"the model is told one of {classes} classes, but the rows have no labels")
        if labels.max() >= classes:
            raise UserError(f"the set holds label {labels.max()}, the model knows 0..{classes - 1}")
        return torch.from_numpy(labels.astype(np.int64)).to(device)


def _on_ray(
    model: MaskedDiffusion | Callable[[], MaskedDiffusion],
    source: _Source,
    options: _Options,
    spans: list[dict[str, int]],
    workers: int,
) -> Iterable[dict[str, np.ndarray]]:
    """The answers of `workers` actors, in whatever order they come."""
    import ray.data

    from pipelines.ray_data import quiet

    workers = min(workers, len(spans))
    data = ray.put(source)
    if isinstance(model, MaskedDiffusion):
        weights = ray.put(model)
        load: Callable[[], MaskedDiffusion] = lambda: _placed(ray.get(weights))  # noqa: E731
    else:
        load = lambda: _placed(model())  # noqa: E731
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / workers)
    dataset = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        _Scorer,
        fn_constructor_args=(load, lambda: ray.get(data), options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    return cast(Any, quiet(dataset).iter_batches(batch_size=None, prefetch_batches=0))


def _placed(model: MaskedDiffusion) -> MaskedDiffusion:
    """The model on the actor's GPU, if Ray gave it one."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _collect(answers: Iterable[dict[str, np.ndarray]], rows: int, progress: bool) -> dict[str, np.ndarray]:
    """All answers in the order of their places; UserError for the first mistake."""
    found = {"nats": np.full(rows, np.nan), "tokens": np.zeros(rows, np.int64)}
    with _progress(rows, progress) as advance:
        for answer in answers:
            for error in answer["error"]:
                if error:
                    raise UserError(str(error))
            for column, values in found.items():
                values[answer["place"]] = answer[column]
            advance(len(answer["place"]))
    if np.isnan(found["nats"]).any():
        raise RuntimeError(f"{np.isnan(found['nats']).sum()} of {rows} rows came back without an answer")
    return found


@contextmanager
def _progress(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; gives the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.advance(task, amount)
