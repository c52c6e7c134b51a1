"""Prepared sets looked at and put together by a person: what is in one, some of its rows, two joined to a third."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from md4.errors import UserError
from pipelines import images, ngrams, pixels, prepare_report, shards
from pipelines.manifest import FORMAT, MANIFEST, VERSION, Manifest, NGrams, PixelFacts, Shard, SourceFacts, Split
from pipelines.part_records import summed
from pipelines.shards import ShardSet
from pipelines.storage import Folder, Place
from pipelines.vocabularies import keep, vocabulary

# -- one set ---------------------------------------------------------------------------------------------------------


def describe(root: Place) -> str:
    """What the manifest says, for reading; UserError if there is none that can be trusted."""
    manifest = Manifest.load(root)
    source = manifest.source
    facts = [
        ("prepared set", str(root)),
        ("source", f"{source.kind} {source.identity}: {source.units:,} units, {source.bytes:,} bytes"),
        ("source sha256", source.sha256),
        ("vocabulary", f"{manifest.vocabulary}, {manifest.vocabulary_size:,} tokens"),
        ("rows", f"{manifest.length:,} tokens each, in row groups of {manifest.rows_per_group:,}"),
        ("packing", _packing(manifest)),
        ("format", f"{manifest.format} {manifest.version}, {_formats(manifest)}"),
        ("fingerprint", manifest.fingerprint),
    ]
    if manifest.ngrams:
        bits = manifest.ngrams
        facts.append(
            (
                "entropies",
                f"unigram {bits.unigram:.4f}, bigram {bits.bigram:.4f}, trigram {bits.trigram:.4f} bits/token",
            )
        )
    if manifest.pixels:
        facts += _about_images(manifest.pixels)
    lines = [f"{name:<14}{value}" for name, value in facts]
    unit = "images" if manifest.pixels else "documents"
    columns = ["split", "rows", unit, "tokens", "left over", "shards", "bytes"]
    table = [columns] + [
        [name, *(f"{n:,}" for n in (s.rows, s.documents, s.tokens, s.dropped_tokens, len(s.shards), _bytes(s)))]
        for name, s in manifest.splits.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if manifest.rejected:
        lines.append(f"{'rejected':<14}{', '.join(f'{n:,} {reason}' for reason, n in manifest.rejected.items())}")
    lines += prepare_report.brief(prepare_report.load(root))
    lines.append("")
    for row in table:
        first, *others = (f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)))
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def _packing(manifest: Manifest) -> str:
    if manifest.packing != "windows":
        return manifest.packing
    stored = manifest.splits["train"].stored_rows
    return f"windows: a training row begins at every {_nth(manifest.stride)}token of {stored:,} stored rows"


def _nth(stride: int) -> str:
    return "" if stride == 1 else f"{stride}th "


def _formats(manifest: Manifest) -> str:
    """Of the shards: parquet or webdataset, or both in a merged set."""
    paths = [shard.path for split in manifest.splits.values() for shard in split.shards]
    return " and ".join(name for name, suffix in shards.SUFFIXES.items() if any(p.endswith(suffix) for p in paths))


def _bytes(split: Split) -> int:
    return sum(shard.bytes for shard in split.shards)


def _about_images(facts: PixelFacts) -> list[tuple[str, str]]:
    height, width, channels = facts.shape
    labels = "without labels" if facts.classes is None else f"{facts.classes} classes"
    about = [
        ("images", f"{height} x {width} x {channels}, {facts.levels} levels, {labels}"),
        ("entropies", f"histogram {facts.histogram_bits:.4f}, by place {facts.independent_bits:.4f} bits/dim"),
    ]
    for name, counts in (("converted", facts.converted), ("left out", facts.rejected)):
        if counts:
            about.append((name, ", ".join(f"{count:,} {kind}" for kind, count in counts.items())))
    return about


def rows(shards: ShardSet, ids: np.ndarray) -> list[str] | Image.Image:
    """The rows of ids `[n]`, decoded: texts, or one picture of all of them side by side.

    UserError for an id that the split does not have.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < shards.rows:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise UserError(f"row {wrong}: the split {shards.split!r} of {str(shards.root)!r} has 0..{shards.rows - 1}")
    tokens = shards.read(ids)
    if shards.manifest.pixels is None:
        words = shards.vocabulary
        return [words.decode(row) for row in tokens]
    height, width, channels = shards.manifest.pixels.shape
    pictures = images.brightness(tokens, shards.manifest.pixels.levels).reshape(-1, height, width, channels)
    across = int(np.ceil(np.sqrt(len(ids))))
    sheet = np.full((-(-len(ids) // across) * (height + 1) - 1, across * (width + 1) - 1, channels), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // across * (height + 1), number % across * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def some_rows(shards: ShardSet, count: int, seed: int) -> np.ndarray:
    """Ids `[count]` of different rows drawn with `seed`, in their order; UserError if the split has fewer."""
    if not 1 <= count <= shards.rows:
        raise UserError(
            f"{count} rows: the split {shards.split!r} of {str(shards.root)!r} has {shards.rows}; at least 1"
        )
    return np.sort(np.random.default_rng(seed).choice(shards.rows, count, replace=False))


# -- two sets --------------------------------------------------------------------------------------------------------


def merge(
    first: Place,
    second: Place,
    target: Place,
    report: Callable[[str], None] = print,
    advance: Callable[[int], object] = lambda _: None,
) -> Manifest:
    """Copy the shards of two sets into the new folder `target`, those of `first` first, and write its manifest last.

    Every shard is compared with its sha256 on the way. Done again after an interruption, it copies what is missing.
    UserError for sets that do not fit together, a damaged shard, or a target that is a set already.

    advance: told of the bytes of each shard that is there.
    """
    sets = [(Folder(place), Manifest.load(place)) for place in (first, second)]
    into = Folder(target)
    if into.exists(MANIFEST):
        raise UserError(f"{str(into)!r} is a prepared set already: name a new folder")
    _check_fit(sets, report)
    taken = 1 + max((_number(shard)[0] for split in sets[0][1].splits.values() for shard in split.shards), default=-1)
    splits = {}
    for name in dict.fromkeys(name for _, manifest in sets for name in manifest.splits):
        parts = []
        for (folder, manifest), offset in zip(sets, (0, taken), strict=True):
            if name in manifest.splits:
                split = manifest.splits[name]
                copies = [_copy(folder, into, shard, name, offset, advance) for shard in split.shards]
                parts.append(split.model_copy(update={"shards": copies}))
        splits[name] = Split.joined(parts)
    manifest = _merged(sets, splits, into)
    keep(vocabulary(sets[0][1].vocabulary, sets[0][0]), into)
    into.write(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def _check_fit(sets: list[tuple[Folder, Manifest]], report: Callable[[str], None]) -> None:
    def facts(manifest: Manifest) -> dict[str, Any]:
        found = manifest.pixels
        return {
            "vocabulary": manifest.vocabulary,
            "vocabulary size": manifest.vocabulary_size,
            "digest of the vocabulary": manifest.vocabulary_digest or "none",
            "packing": manifest.packing,
            "stride": manifest.stride,
            "length of a row": manifest.length,
            "rows of a row group": manifest.rows_per_group,
            "shape": None if found is None else list(found.shape),
            "labels": "none" if found is None or found.classes is None else found.class_names or "numbers",
        }

    (one, first), (other, second) = sets
    if first.fingerprint == second.fingerprint:
        raise UserError(f"{str(one)!r} and {str(other)!r} hold the same rows (fingerprint {first.fingerprint})")
    for name, value in facts(first).items():
        if value != facts(second)[name]:
            raise UserError(
                f"{str(one)!r} and {str(other)!r} do not fit together: {name} is {value} and {facts(second)[name]}"
            )
    for name in ("validation", "test"):
        shares = [manifest.config.get(name) for _, manifest in sets]
        if shares[0] != shares[1]:
            report(
                f"data: the shares of the split {name} differ ({shares[0]} and {shares[1]}): what both sets have may "
                "be in it and in train"
            )


def _number(shard: Shard) -> tuple[int, int, str]:
    found = re.search(r"(\d+)-(\d+)(\.parquet|\.tar)$", shard.path)
    if found is None:
        raise UserError(f"shard {shard.path!r} is not called like train/00000-0000.parquet")
    return int(found[1]), int(found[2]), found[3]


def _copy(
    source: Folder, target: Folder, shard: Shard, split: str, offset: int, advance: Callable[[int], object]
) -> Shard:
    part, index, suffix = _number(shard)
    copy = shard.model_copy(update={"path": f"{split}/{part + offset:05d}-{index:04d}{suffix}"})
    if not shards.is_sound(target, copy):
        target.write(copy.path, shards.read_bytes(source, shard))
    advance(shard.bytes)
    return copy


def _merged(sets: list[tuple[Folder, Manifest]], splits: dict[str, Split], root: Folder) -> Manifest:
    first = sets[0][1]
    sources = [manifest.source for _, manifest in sets]
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        vocabulary=first.vocabulary,
        vocabulary_size=first.vocabulary_size,
        vocabulary_digest=first.vocabulary_digest,
        length=first.length,
        rows_per_group=first.rows_per_group,
        packing=first.packing,
        stride=first.stride,
        source=SourceFacts(
            kind="merged",
            identity=" + ".join(source.identity for source in sources),
            units=sum(source.units for source in sources),
            bytes=sum(source.bytes for source in sources),
            sha256=hashlib.sha256("".join(source.sha256 for source in sources).encode()).hexdigest(),
        ),
        config={"merged": [{"fingerprint": manifest.fingerprint, **manifest.config} for _, manifest in sets]},
        splits=splits,
        ngrams=_ngrams(root, splits, first) if first.pixels is None else None,
        pixels=_pixels(root, splits, first.length, [found for _, m in sets if (found := m.pixels)]),
        rejected=summed(manifest.rejected for _, manifest in sets),
        fingerprint="",
    )
    return manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})


def _ngrams(root: Folder, splits: dict[str, Split], first: Manifest) -> NGrams | None:
    if first.vocabulary_size > ngrams.LARGEST_VOCABULARY or "train" not in splits:
        return None
    blocks = shards.blocks(root, splits["train"], first.length)
    return NGrams(**ngrams.entropies(ngrams.count_trigrams(blocks, first.vocabulary_size)))


def _pixels(root: Folder, splits: dict[str, Split], length: int, facts: list[PixelFacts]) -> PixelFacts | None:
    if not facts:
        return None
    blocks = (shards.read_shard(root, shard) for shard in splits["train"].shards)
    classes = [found.classes for found in facts if found.classes is not None]
    return PixelFacts(
        shape=facts[0].shape,
        levels=facts[0].levels,
        classes=max(classes) if classes else None,
        class_names=facts[0].class_names,
        **pixels.entropies(pixels.count_positions(blocks, length, facts[0].levels)),
        converted=summed(found.converted for found in facts),
        rejected=summed(found.rejected for found in facts),
        rejected_examples=[name for found in facts for name in found.rejected_examples][: images.EXAMPLES],
    )
