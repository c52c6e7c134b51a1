"""webdataset's tars: samples of an image and its label. What is refused in them is said in `pipelines.archives`."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from md4.errors import UserError
from pipelines.archives import DAMAGED, members
from pipelines.images.records import IMAGE_SUFFIXES, Record, Rejected, files_below
from pipelines.roots import Root, opened
from pipelines.units import Unit, pieces

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def list_tars(root: Root) -> list[Unit]:
    """A unit for each tar; UserError if there are none."""
    units = []
    for file, split in files_below(root, TAR_SUFFIXES, "tars"):
        units += pieces("webdataset", file, piece=2**62, split=split)
    if not units:
        raise UserError(f"the tars in {str(root)!r} are empty")
    return units


def tar_records(unit: Unit) -> Iterator[Record]:
    """The samples of a tar; UserError for one without an image or with a label that is no number.

    What must not be used comes as a record that says so.
    """
    from webdataset.tariterators import group_by_keys

    aside: list[Record] = []
    with opened(unit.file) as file:
        try:
            for sample in group_by_keys(_members(unit.file, file, aside)):
                yield from _drained(aside)
                if None not in sample.values():  # else it has been said already why it is left out
                    yield _record(f"{unit.file}: {sample['__key__']}", sample)
        except DAMAGED as error:
            what = str(error.args[0] if error.args else error)
            yield from _drained(aside)
            yield Record(unit.file, Rejected("damaged archive", f"it is not a sound tar: {what}"), None)
    yield from _drained(aside)


def _drained(aside: list[Record]) -> Iterator[Record]:
    yield from aside
    aside.clear()


def _members(name: str, file: BinaryIO, aside: list[Record]) -> Iterator[dict[str, Any]]:
    """The files in an archive as webdataset groups them: `fname` and `data`.

    A member that must not be used goes to `aside`, and has the data None.
    """
    for member in members(file):
        if member.refused is not None:
            refused = Rejected(member.refused.reason, str(member.refused))
            aside.append(Record(f"{name}: {member.name}", refused, None))
        yield {"fname": member.name, "data": member.data, "__url__": name}


def _record(name: str, sample: dict[str, Any]) -> Record:
    key = next((key for key in sample if "." + key.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    if key is None:
        fields = ", ".join(key for key in sample if not key.startswith("__")) or "none"
        raise UserError(f"sample {name!r} has no image: its fields are {fields}")
    return Record(f"{name}.{key}", sample[key], _label(name, sample))


def _label(name: str, sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        facts = json.loads(sample.get("json", b"{}"))
        return int(facts["label"]) if isinstance(facts, dict) and "label" in facts else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"sample {name!r}: its label is not a number ({error})") from error
