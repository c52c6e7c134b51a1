"""What a version must have in common with the one whose place it is to take, and the texts that both have to score."""

from typing import TYPE_CHECKING, Any

from md4.errors import UserError
from orchestration.serving.config import ServingConfig
from pipelines.storage import Folder

if TYPE_CHECKING:
    from orchestration.runs import Loaded


def read_texts(config: ServingConfig) -> list[str]:
    """The held-out texts that candidates have to score."""
    file, most = config.canary.texts, config.canary.max_texts
    if file is None:
        return []
    folder, slash, name = file.rpartition("/")
    try:
        lines = Folder(folder or slash or ".").read(name).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serving.canary.texts={file!r} can't be read: {error}") from None
    texts = [line for line in lines if line.strip()][:most]
    if len(texts) < 2:
        raise UserError(f"serving.canary.texts={file!r} has {len(texts)} texts, a line each; at least 2 are needed")
    return texts


def difference(present: "Loaded", other: "Loaded") -> str | None:
    """In what a client would notice that it is another model; None if in nothing. The network may be another one."""
    one, two = present.config.model, other.config.model
    facts: dict[str, tuple[Any, Any]] = {
        "vocabulary": (present.vocabulary.name, other.vocabulary.name),
        "length": (one.length, two.length),
        "shape": (present.config.data.shape, other.config.data.shape),
        "classes": (one.classes, two.classes),
        "objective": (one.objective, two.objective),
    }
    for what, (old, new) in facts.items():
        if old != new:
            return f"its {what} is {new}, not {old}"
    return None
