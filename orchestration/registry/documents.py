"""The small JSON files of the registry: read as what they are, and replaced by nobody else's bytes between."""

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from md4.errors import UserError
from pipelines.storage import Folder

D = TypeVar("D", bound=BaseModel)


def parse(kind: type[D], data: bytes, origin: str) -> D:
    """A document; UserError that names the file if it is damaged, or of a later version of this program."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{origin} is damaged ({where + ': ' if where else ''}{problem['msg']})") from None


def dump(document: BaseModel) -> bytes:
    return (document.model_dump_json(indent=1) + "\n").encode()


def read(kind: type[D], folder: Folder, file: str) -> D | None:
    """A document, None if it is not there."""
    try:
        data = folder.read(file)
    except FileNotFoundError:
        return None
    return parse(kind, data, folder.path(file))


def update(kind: type[D], folder: Folder, file: str, change: Callable[[D | None], D | None]) -> D | None:
    """Replace a document by `change(it, or None)` by compare-and-swap; None keeps it. Returns what is there then.

    `change` may be called several times, and after its own result was written: an answer of S3's can be lost.
    """
    last: list[D | None] = [None]

    def replace(data: bytes | None) -> bytes | None:
        found = None if data is None else parse(kind, data, folder.path(file))
        new = change(found)
        last[0] = found if new is None else new
        return None if new is None else dump(new)

    folder.update(file, replace)
    return last[0]
