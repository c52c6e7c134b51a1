"""A part of a text to its rows: documents (`pipelines.texts`) are dealt out to splits, encoded and packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines import cleaning, duplicates, packing, rejects, windows
from pipelines.config import DataConfig
from pipelines.documents import EXCERPT_CHARS, Rejected
from pipelines.manifest import SPLITS, Split
from pipelines.packing import Packed
from pipelines.part_records import LARGEST_HISTOGRAM, LONGEST, Job, PartRecord, Tally, Whole, listed, packed_counts
from pipelines.part_shards import assign, write_shards
from pipelines.texts import Text, read_texts
from pipelines.units import Unit
from pipelines.vocabularies import Vocabulary, token_dtype


@dataclass(frozen=True)
class _Piece:
    """What is encoded as one: a document, or what a long one was cut to."""

    place: bytes  # in the shuffled order
    text: str
    document: Text


def prepare_text(job: Job, number: int, part: Sequence[Unit]) -> PartRecord:
    """Write the shards and the side file of a part, and return its record."""
    config, words = job.config, job.config.tokens
    found = read_texts(part, config, cleaning.unpickled(job.hooks))
    texts, rejected = found.texts, found.rejected
    left_out = duplicates.left_out(job.root, number, job.buckets)
    equal = {number: first for number, *first in left_out.tolist()}
    for text in texts:
        if text.number in equal:
            part_of_first, first, held_out = equal[text.number]
            reason = "duplicate of a held-out document" if held_out else "duplicate"
            detail = f"of document {first} of part {part_of_first}"
            rejected.append(Rejected(text.name, reason, detail, text.text[:EXCERPT_CHARS]))
    texts = [text for text in texts if text.number not in equal]

    splits, sizes, counts = {}, dict.fromkeys((text.number for text in texts), 0), ""
    for name, pieces in _dealt(texts, config, job.whole).items():
        encoded = words.encode_documents([piece.text for piece in pieces])
        bare = 0 if words.end_of_text is None and config.packing == "document" else 1  # the separator
        for piece, tokens in zip(pieces, encoded, strict=True):
            sizes[piece.document.number] += len(tokens) - bare
        if name == "train" and encoded and words.size <= LARGEST_HISTOGRAM:
            counts = packed_counts(np.bincount(np.concatenate(encoded), minlength=words.size))
        packed = _packed(encoded, name, config, words)
        for index in packed.too_long:
            detail = f"{len(encoded[index]) - 1:,} tokens, and a row has {config.length:,}"
            text = pieces[index].document
            rejected.append(Rejected(text.name, "longer than a row", detail, text.text[:EXCERPT_CHARS]))
        too_long = set(packed.too_long)
        kept = [piece for index, piece in enumerate(pieces) if index not in too_long]
        splits[name] = Split(
            documents=len(kept),
            characters=sum(len(piece.text) for piece in kept),
            tokens=packed.tokens,
            dropped_tokens=packed.dropped,
            padding_tokens=packed.padding,
            rows=len(packed.rows)
            if packed.stream is None
            else windows.count(packed.stream, config.length, config.stride),
            streams=[] if packed.stream is None else [packed.stream],
            shards=write_shards(job.root, name, number, packed.rows, config),
        )
    return PartRecord(
        config=job.digest,
        units=listed(part),
        source_sha256=found.source_sha256,
        splits=splits,
        rejects=rejects.write(job.root, number, rejected),
        tally=_tally(texts, sizes, counts),
        duplicates=duplicates.digest(left_out),
    )


def _dealt(texts: list[Text], config: DataConfig, whole: Whole) -> dict[str, list[_Piece]]:
    """The pieces of each split, in the order of its rows."""
    shares = {name: 0.0 if name in whole.own_splits else getattr(config, name) for name in ("validation", "test")}
    dealt: dict[str, list[_Piece]] = {name: [] for name in SPLITS}
    for text in texts:
        for piece in cut(text.text, config.document_chars) if config.packing == "concat" else [text.text]:
            split, place = assign(piece, **shares)
            dealt[split if text.own in (None, "train") else text.own].append(_Piece(place, piece, text))
    if config.packing != "windows":  # whose documents stay in the order of the corpus
        for pieces in dealt.values():
            pieces.sort(key=lambda piece: (piece.place, piece.text))  # a shuffle that depends on the documents alone
    return dealt


def _packed(encoded: list[np.ndarray], split: str, config: DataConfig, words: Vocabulary) -> Packed:
    length, dtype, end = config.length, token_dtype(words.size), words.end_of_text
    if config.packing == "document":
        assert end is not None  # `config.check_packing`
        return packing.one_a_row([tokens[:-1] for tokens in encoded], length, end, config.long, dtype)
    closed = end is not None  # a separator that is no token of its own does not end the last document
    if config.packing == "windows" and split == "train":
        return packing.streamed(encoded, length, config.stride, end or 0, dtype, closed)
    return packing.concatenated(encoded, length, dtype, closed)


def _tally(texts: list[Text], sizes: dict[int, int], counts: str) -> Tally:
    names = {text.number: text.name for text in texts}
    lengths = np.bincount([size.bit_length() for size in sizes.values()]).tolist() if sizes else []
    longest = sorted(((size, names[number]) for number, size in sizes.items()), key=lambda pair: (-pair[0], pair[1]))
    return Tally(
        lengths=lengths,
        longest=longest[:LONGEST],
        truncated=sum(text.truncated for text in texts),
        tokens=counts,
    )


def cut(text: str, most: int) -> list[str]:
    """Pieces of a normalised document of at most `most` characters, cut at spaces (a longer word stays whole)."""
    pieces = []
    start = 0
    while len(text) - start > most:
        end = text.rfind(" ", start, start + most + 1)
        if end < 0:
            end = text.find(" ", start)
        if end < 0:
            break
        pieces.append(text[start:end])
        start = end + 1
    return [*pieces, text[start:]] if text else []
