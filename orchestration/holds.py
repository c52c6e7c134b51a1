"""Checkpoints that somebody still needs: none of them is retired before it is released.

    checkpoints/held/step-00000500-3f9a1c

A hold is put before its checkpoint is committed, so that there is no moment at which it could be retired, and outlives
the processes: who continues a run finds what was still to be done with its checkpoints.
"""

from pipelines.storage import Folder, Place

_FOLDER = "held"


def put(directory: Place, name: str) -> None:
    """Hold the checkpoint in the folder `name` of a run's checkpoints."""
    (Folder(directory) / _FOLDER).write(name, b"")


def release(directory: Place, name: str) -> None:
    """Need it no more; it goes with the next checkpoint, unless it is to stay anyway."""
    (Folder(directory) / _FOLDER).remove(name)


def names(directory: Place) -> list[str]:
    """The folders that are held, the oldest first; perhaps of checkpoints that are not committed yet, or never were."""
    return [name for name in (Folder(directory) / _FOLDER).list() if name.startswith("step-") and "." not in name]
