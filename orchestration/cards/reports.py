"""Figures for a card, from the reports in a folder: only those on the card's own weights."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from md4.errors import UserError
from orchestration.cards.facts import FigureFact
from pipelines.storage import Folder

_QUALITY = (
    ("text", "perplexity", "perplexity_error", "perplexity of samples under the judge", ""),
    ("text", "entropy", "entropy_error", "entropy of a sample's tokens", "nats"),
    ("mauve", "mauve", None, "MAUVE", ""),
    ("images", "fid", None, "FID", ""),
    ("images", "kid", None, "KID", ""),
)


def read(place: Folder, *folders: str) -> dict[str, dict[str, Any]]:
    """All JSON reports right in some folders below a place, by path from there; what is no report is passed over."""
    return {
        name: tree
        for folder in folders
        for name, tree in trees(place, folder)
        if isinstance(tree.get("kind"), str) and isinstance(tree.get("model"), dict)
    }


def trees(place: Folder, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON files right in a folder that hold mappings, by path; torn and other ones are passed over."""
    for name in place.list(folder):
        if name.count("/") != 1 or not name.endswith(".json"):
            continue
        with suppress(ValueError):
            if isinstance(tree := json.loads(place.read(name)), dict):
                yield name, tree


def on(reports: Mapping[str, dict[str, Any]], hashes: Collection[str | None]) -> dict[str, dict[str, Any]]:
    """Those on weights with one of these hashes."""
    return {name: tree for name, tree in reports.items() if tree["model"].get("weights_hash") in hashes}


def figures(reports: Mapping[str, dict[str, Any]]) -> Iterator[FigureFact]:
    """The figures of reports of kinds that have such, kind after kind.

    Raises `UserError` for a report without the facts that its kind has.
    """
    for source, tree in sorted(reports.items(), key=_place):
        with _told(source):
            if tree["kind"] == "likelihood":
                yield _likelihood(tree, source)
            elif tree["kind"] == "quality":
                yield from _quality(tree, source)
            elif tree["kind"] == "grid":
                yield _grid(tree, source)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """What a report lacks as a `UserError` that names it."""
    try:
        yield
    except (KeyError, TypeError) as error:
        lacks = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is not a whole report ({lacks}): measure it again, or take it away") from None


def _place(item: tuple[str, Mapping[str, Any]]) -> tuple[int, int, str]:
    source, tree = item
    kinds = ("likelihood", "quality", "grid")
    return kinds.index(tree["kind"]) if tree["kind"] in kinds else len(kinds), tree.get("steps") or 0, source


def findings(reports: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """What reports found that is no figure."""
    for source, tree in reports.items():
        with _told(source):
            if tree["kind"] == "sampler-frontier":
                yield from _winners(tree, source)
            elif tree["kind"] == "frontier":
                judge = tree["judge"]["judge"]
                yield f"{len(tree['points'])} settings of temperature and steps measured under {judge} ({source})."


def _winners(tree: Mapping[str, Any], source: str) -> Iterator[str]:
    for winner in tree["winners"]:
        words = " ".join(f"{name}={value}" for name, value in winner["settings"].items())
        again = winner["again"]
        yield (
            f"Best of {len(tree['points'])} settings for {winner['calls']} network calls: {words} "
            f"({tree['score']}: {again['value']:.4g} ± {again['standard_error']:.2g}, {tree['samples']:,} "
            f"samples; {source})."
        )


def _likelihood(tree: Mapping[str, Any], source: str) -> FigureFact:
    foreign = tree.get("zero_shot")
    if tree.get("bits_per_dimension") is not None:
        value, error, unit = tree["bits_per_dimension"], tree.get("bits_per_dimension_error"), "bits per dimension"
    elif tree.get("bits_per_character") is not None:
        value, error, unit = tree["bits_per_character"], tree.get("bits_per_character_error"), "bits per character"
    else:
        value, error, unit = tree["bits_per_token"], tree["standard_error"], "bits per token"
    if foreign is not None:
        value, error, unit = tree["perplexity"], tree["perplexity_error"], "perplexity per token"
    data = foreign["data_set"] if foreign else tree.get("data_set")
    protocol = f", protocol {foreign['protocol']}" if foreign else ""
    return FigureFact(
        metric="negative ELBO (upper bound)",
        value=value,
        standard_error=error,
        unit=unit,
        data=" ".join(filter(None, (data, tree["split"]))),
        how=f"{tree['estimator']}, {tree['rows']:,} rows, {tree['draws']} draws each{protocol}",
        source=source,
    )


def _quality(tree: Mapping[str, Any], source: str) -> Iterator[FigureFact]:
    settings = tree["settings"]
    shown = {**settings, **({"grid": "its times"} if isinstance(settings.get("grid"), list) else {})}
    words = " ".join(f"{name}={value}" for name, value in shown.items() if name != "leftovers")
    for part, name, error, metric, unit in _QUALITY:
        value = (tree.get(part) or {}).get(name)
        if value is None:
            continue
        by = {"text": (tree.get("judge") or {}).get("judge") if name == "perplexity" else None}.get(part)
        network = tree["images"]["features"] if part == "images" else None
        how = ", ".join(filter(None, (f"{tree['samples']:,} samples", words, by or network)))
        spread = None if error is None else tree[part].get(error)
        yield FigureFact(
            metric=metric, value=value, standard_error=spread, unit=unit, data=tree["split"], how=how, source=source
        )


def _grid(tree: Mapping[str, Any], source: str) -> FigureFact:
    return FigureFact(
        metric=f"negative ELBO of {tree['steps']} sampling steps, grid {tree.get('grid', 'searched')}",
        value=tree["found"]["checked"],
        standard_error=tree["found"]["standard_error"],
        unit="bits per token",
        data=tree["split"],
        how=f"{tree['rows']:,} rows that the search didn't see, {tree['draws']} draws each",
        source=source,
    )
