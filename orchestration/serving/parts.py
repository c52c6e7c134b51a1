"""A network call that failed, made again for half of its rows each, and so on: only who fails alone has failed."""

from collections.abc import Sequence

import torch

from md4.samplers import Batch


def words(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether fewer rows may succeed for that reason. (On CPUs torch has no class for it.)"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def advance_in_parts(batch: Batch, numbers: Sequence[int]) -> dict[int, str]:
    """One call for each of these rows, in as few calls as succeed; what the network said of those that fail alone.

    Those stay in the batch as they were. Raises what means that the device answers nothing any more.
    """
    failed: dict[int, str] = {}
    done: list[tuple[Sequence[int], Batch]] = []
    parts = [numbers]
    while parts:
        part, aside, failure = parts.pop(), Batch(batch.model), None
        batch.move(part, aside)
        try:
            aside.advance()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            failure = words(error)
        if failure is None:
            done.append((part, aside))  # not back yet: the others are still to make this call
            continue
        aside.move(part, batch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(part) > 1:
            parts += [part[len(part) // 2 :], part[: len(part) // 2]]
        else:
            failed[part[0]] = failure
    for part, aside in done:
        aside.move(part, batch)
    return failed
