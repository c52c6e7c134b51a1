"""Whether the answer to a text with holes tells anything: it may come out, and it may not."""

from itertools import groupby
from typing import NoReturn

import numpy as np

from md4.errors import UserError
from pipelines.vocabularies import Vocabulary


def check(words: Vocabulary, prompt: np.ndarray, length: int, answer: str) -> None:
    """UserError with the reason for an answer that can never come out, or that says nothing of a hole in the text.

    prompt: ids `[n]`, `words.size` being a hole. length: tokens of the canvas, which behind the prompt has nothing but
    holes. answer: normalised; what begins with it is right.
    """
    parts, tail = _parts(words, prompt)
    behind = length - len(prompt)
    if not parts and tail.startswith(answer):
        raise UserError(f"the answer {answer!r} always comes out: the text itself begins with it")
    at = {0}  # where in the answer the next part may begin: tokens of many lengths may fill a hole
    for place, (given, holes) in enumerate(parts):
        begins = {start + len(given) for start in at if answer.startswith(given, start)}
        if not begins:
            _refuse(words, answer, length, given, any(given.startswith(answer[start:]) for start in at))
        last = place + 1 == len(parts)
        after = tail if last else parts[place + 1][0]
        most = holes if tail or not last else holes + behind
        at = {
            end
            for begin in begins
            for end in range(begin + 1, len(answer) + 1)
            if after.startswith(answer[end : end + len(after)]) and _fits(words, answer[begin:end], holes, most)
        }
        if not at:
            _refuse(words, answer, length, after, any(_fits(words, answer[begin:], 0, holes) for begin in begins))
    room = behind if tail else 0  # without a tail the last holes have taken it
    for start in at:
        rest = answer[start:]
        if tail.startswith(rest) or (rest.startswith(tail) and _fits(words, rest[len(tail) :], 0, room)):
            return
    _refuse(words, answer, length, tail, False)


def _parts(words: Vocabulary, prompt: np.ndarray) -> tuple[list[tuple[str, int]], str]:
    """What is given before holes, and how many these are, in turn; and what is given behind the last one."""
    parts, given = [], ""
    for hole, run in groupby(prompt.tolist(), lambda token: token == words.size):
        tokens = list(run)
        if hole:
            parts.append((given, len(tokens)))
        given = "" if hole else words.decode(np.array(tokens))
    return parts, given


def _fits(words: Vocabulary, text: str, least: int, most: int) -> bool:
    """Can holes be filled with it? Each takes at least a byte, and no more are needed than its tokens."""
    return least <= len(text.encode()) and (not text or len(words.encode(text)) <= most)


def _refuse(words: Vocabulary, answer: str, length: int, given: str, short: bool) -> NoReturn:
    if short:
        raise UserError(f"the answer {answer!r} ends before the last hole: give the whole text as it should come out")
    count = len(words.encode(answer))
    if count > length:
        raise UserError(f"the answer {answer!r} can never come out: it has {count} tokens, the text {length}")
    why = f"it doesn't go with {given!r}, which is given" if given else "it doesn't go into the holes"
    raise UserError(f"the answer {answer!r} can never come out: {why}")
