"""Side files of what gave no row: `rejects/00007.jsonl.zst` beside the shards, one line for each record of part 7.

A line has the record's name, the reason (a few words, by which records are counted), the detail, and an excerpt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipelines.documents import Rejected
from pipelines.storage import Folder

EXAMPLES = 3  # of each reason that are named in reports


class Rejects(BaseModel):
    """What a part's record says of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    counts: dict[str, int] = {}  # by reason
    examples: dict[str, list[str]] = {}  # by reason: the first few
    sha256: str = ""  # of the side file; empty without one


def path(number: int) -> str:
    """Where the records of a part lie in the folder of a prepared set."""
    return f"rejects/{number:05d}.jsonl.zst"


def write(root: Folder, number: int, rejected: Sequence[Rejected]) -> Rejects:
    """Write the side file of a part, if there is anything to write."""
    if not rejected:
        return Rejects()
    lines = "".join(json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in rejected)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(lines.encode(errors="backslashreplace"))  # an excerpt may have half of a character
    data = sink.getvalue().to_pybytes()
    root.write(path(number), data)
    counts = Counter(record.reason for record in rejected)
    return Rejects(
        counts=dict(sorted(counts.items())),
        examples=joined_examples({record.reason: [f"{record.name}: {record.detail}"]} for record in rejected),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def joined_examples(some: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    """The first few examples of each reason, the reasons sorted."""
    found: dict[str, list[str]] = {}
    for examples in some:
        for reason, names in examples.items():
            room = EXAMPLES - len(found.setdefault(reason, []))
            found[reason] += names[: max(0, room)]
    return dict(sorted(found.items()))


def read(root: Folder, number: int) -> list[Rejected]:
    """The records of a part; none where it has no side file."""
    try:
        data = root.read(path(number))
    except FileNotFoundError:
        return []
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as opened:
        return [Rejected(**json.loads(line)) for line in opened.read().decode().split("\n")[:-1]]


def is_sound(root: Folder, number: int, rejects: Rejects) -> bool:
    """Is the side file the recorded one?"""
    if not rejects.sha256:
        return True
    try:
        return hashlib.sha256(root.read(path(number))).hexdigest() == rejects.sha256
    except FileNotFoundError:
        return False
