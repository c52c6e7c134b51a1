"""Names: splits that files tell, and how a rejected record is shown."""

from pipelines.documents import EXCERPT_CHARS
from pipelines.roots import File, Root
from pipelines.units import split_in_name


def splits_of(files: list[File], root: Root) -> dict[str, str | None]:
    """The split of each file by name, if all of them tell one: among other names, "test" is a word like any."""
    told = {file.name: split_in_name(file.name) for file in files}
    alone = len(files) == 1 and files[0].place == root.url  # one file is the whole set, whatever it is called
    return dict.fromkeys(told) if alone or None in told.values() else told


def excerpt(data: bytes | str) -> str:
    """The beginning of a record."""
    text = data[: 4 * EXCERPT_CHARS].decode(errors="replace") if isinstance(data, bytes) else data
    return text[:EXCERPT_CHARS]
