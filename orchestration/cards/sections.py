"""The parts of a card, in the order in which it tells them; one list for Markdown and HTML."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestration.cards.facts import NOT_STATED, CardFacts, DataFacts, FigureFact, PictureFact, TrainingFacts
from orchestration.status import clock


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Quote:
    """A sample, and how it was made."""

    text: str
    note: str


@dataclass(frozen=True)
class Section:
    """A heading and what is below it, kind after kind."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    items: tuple[str, ...] = ()
    quotes: tuple[Quote, ...] = ()
    pictures: tuple[PictureFact, ...] = field(default=())


def sections(facts: CardFacts) -> list[Section]:
    """All parts, each also if there is nothing to tell: then it says so."""
    return [
        Section("Model", tables=(_model(facts),)),
        _figures(facts),
        _samples(facts),
        _training(facts),
        _data(facts),
        Section("Limits", items=facts.limits),
        Section("Not measured", items=tuple(_capital(one) for one in facts.unmeasured)),
        Section("Licences", tables=(_licences(facts),)),
        Section("Lineage", tables=(_table(facts.lineage),)) if facts.lineage else Section("Lineage", ("Not known.",)),
    ]


def headline(facts: CardFacts) -> str:
    """What it is, in a sentence."""
    model = facts.model
    what = "text" if model.kind == "text" else "images of " + " x ".join(map(str, model.shape or ()))
    of = {"md4": "MD4", "genmd4": "GenMD4"}[model.objective]
    return (
        f"A masked diffusion model ({of}) that makes {what}: {model.parameters:,} parameters, {model.length:,} tokens "
        f"of {model.vocabulary_size:,} kinds{f', {model.classes} classes' if model.classes else ''}."
    )


def _model(facts: CardFacts) -> Table:
    model = facts.model
    return _table(
        {
            "objective": f"{model.objective} (arXiv 2406.04329)",
            "masking schedule": model.schedule,
            "network": _words(model.network),
            "parameters": model.parameters,
            "tokens": f"{model.vocabulary or 'a vocabulary without a name'}, {model.vocabulary_size:,} of them",
            "sampled with": _words(model.sampling),
            "kept with it": ", ".join(facts.kept) or "no settings that were searched for it",
        }
    )


def _figures(facts: CardFacts) -> Section:
    if not facts.figures:
        return Section("Figures", text=("None: there is no report on these weights.", *facts.findings))
    head = ("figure", "value", "on", "how", "from")
    rows = [
        (each.metric, shown(each), each.data, each.how, f"`{each.source}`")
        for each in facts.figures
    ]  # fmt: skip
    note = "Errors are standard errors, as the reports have them; where there is none, none was measured."
    return Section("Figures", text=(note,), tables=(Table(head, rows),), items=facts.findings)


def shown(figure: FigureFact) -> str:
    """A figure with its error, to the digits that the error leaves."""
    unit = f" {figure.unit}" if figure.unit else ""
    if figure.standard_error is None:
        return f"{figure.value:.4g}{unit}"
    return f"{figure.value:.4f} ± {figure.standard_error:.4f}{unit}"


def _samples(facts: CardFacts) -> Section:
    quotes = []
    for one in facts.samples:
        prompt = "" if one.prompt is None else f", prompt {one.prompt!r}"
        quotes.append(Quote(one.text, f"seed {one.seed}{prompt}; {one.how}"))
    pictures = facts.pictures
    text = () if quotes or any(each.name != "loss" for each in pictures) else ("None have been kept.",)
    return Section(
        "Samples", text=text, quotes=tuple(quotes), pictures=tuple(each for each in pictures if each.name != "loss")
    )


def _training(facts: CardFacts) -> Section:
    found, loss = facts.training, tuple(each for each in facts.pictures if each.name == "loss")
    if found is None:
        return Section("Training", text=("Not known: the run is not at hand.",))
    return Section("Training", tables=(_table(_trained(found)),), pictures=loss)


def _trained(found: TrainingFacts) -> dict[str, Any]:
    took = None if found.seconds is None else f"{clock(found.seconds)} ({'h:' if found.seconds >= 3600 else ''}min:s)"
    share = "" if found.productive is None else f", {found.productive:.1%} of it in steps that were not lost"
    operations = None if found.operations is None else f"{found.operations:.3g} floating-point operations"
    speed = None if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f} tokens a second (median)"
    rule = found.optimizer
    return {
        "steps": found.steps,
        "batch": f"{found.batch_size:,} examples",
        "tokens": f"{found.tokens:,}" + ("" if found.epochs is None else f", {found.epochs:.1f} times the data"),
        "optimizer": "AdamW, " + _words(rule),
        "seed": found.seed,
        "workers": found.workers,
        "precision": found.precision,
        "weights": "moving average" if found.averaged else "of the last step",
        "time": None if took is None else took + share,
        "speed": speed,
        "compute": operations,
        "restarts": found.restarts,
        "skipped steps": found.skipped_steps,
        "code version": found.code_version,
        "written": found.ended,
    }


def _data(facts: CardFacts) -> Section:
    if facts.data is None:
        return Section("Data", text=("Not known beyond the lineage: the run is not at hand.",))
    tables = [_set(each) for each in facts.data]
    return Section("Data", tables=tuple(table for pair in tables for table in pair))


def _set(found: DataFacts) -> Iterable[Table]:
    known = {
        "set": found.name,
        "source": found.about,
        "share of a batch": None if found.weight is None else f"{found.weight:g}",
        "fingerprint": found.fingerprint,
        "rows": None if found.packing is None else f"packing {found.packing}",
        **{f"entropy, {name}": f"{bits:.3f} bits a token" for name, bits in found.yardsticks.items()},
    }
    absent = {"fingerprint"} if found.fingerprint is None else set()
    yield _table({name: value for name, value in known.items() if value is not None or name in absent})
    if found.splits is not None:
        rows = [(each.name, f"{each.documents:,}", f"{each.tokens:,}", f"{each.rows:,}") for each in found.splits]
        yield Table(("split", "documents", "tokens", "rows"), rows)


def _licences(facts: CardFacts) -> Table:
    stated = facts.licences
    return _table({"weights": stated.weights or NOT_STATED, "training data": stated.data or NOT_STATED})


def _table(rows: Mapping[str, Any]) -> Table:
    return Table(("", ""), [(name, _value(value)) for name, value in rows.items()])


def _value(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(settings: Mapping[str, Any]) -> str:
    parts = []
    for name, value in settings.items():
        value = f"{len(value)} times" if name == "grid" and isinstance(value, list) else value
        parts.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
