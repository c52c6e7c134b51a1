"""Likelihood of given texts, one network call at a time, so that sampling goes on between them."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from md4 import documents
from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.likelihood import estimator_name, mean_and_error, nelbo_draws
from orchestration.sampling import SEED_LIMIT, check_label, facts, proper
from orchestration.serving.models import Broken, Score

if TYPE_CHECKING:
    from orchestration.runs import Loaded

DRAWS_LIMIT = 4096  # of a text


@dataclass(frozen=True)
class Text:
    """A text as the network is to see it."""

    tokens: Tensor  # [T] int64, filled up with padding where the model learned single documents
    real: Tensor | None  # [T] bool: what is no padding; None: all
    characters: int | None  # None: an image


def read_texts(loaded: "Loaded", texts: Sequence[str], draws: int, seed: int, label: int | None) -> list[Text]:
    """Texts as tokens. Raises `UserError`, which tells the place of the text, for what can't be scored."""
    if not texts:
        raise UserError("there is no text to score")
    if not 1 <= draws <= DRAWS_LIMIT:
        raise UserError(f"draws is {draws}; allowed are 1 to {DRAWS_LIMIT:,}")
    if not 0 <= seed < SEED_LIMIT:
        raise UserError(f"seed is {seed}; it must lie between 0 and {SEED_LIMIT - 1}")
    check_label(loaded, label)
    found = []
    for place, text in enumerate(texts):
        try:
            found.append(_read(loaded, text))
        except UserError as error:
            raise UserError(f"texts[{place}]: {error}") from None
    return found


def _read(loaded: "Loaded", text: str) -> Text:
    length, end = loaded.config.model.length, loaded.config.data.end_of_rows
    image = loaded.config.data.shape is not None
    proper(text, "text")
    # Images are written in the way of prompts: levels with spaces between.
    encoded = loaded.vocabulary.encode_prompt(text) if image else loaded.vocabulary.encode(text)
    tokens = torch.from_numpy(encoded.astype(np.int64))
    if image and (len(tokens) != length or bool((tokens == loaded.model.mask_id).any())):
        raise UserError(f"an image of this model has {length} levels and no holes, not {len(tokens)}")
    if not 1 <= len(tokens) <= length:
        raise UserError(f"it has {len(tokens)} tokens; allowed are 1 to {length:,}")
    real = None
    if end is not None:
        tokens = torch.cat([tokens, torch.full((length - len(tokens),), end)])
        real = documents.no_padding(tokens[None], end)[0]
    return Text(tokens, real, None if image else len(text))


def score(
    loaded: "Loaded", texts: Sequence[Text], draws: int, seed: int, label: int | None, rows: Callable[[int], int]
) -> Generator[int, None, list[Score]]:
    """The scores of texts. Stops after every network call and gives the rows that it had.

    rows: how many of a length a call may have.

    All texts have the same noise, so that a score is a function of text, draws, seed and label. Raises `Broken` for
    a network whose answer is no prediction.
    """
    model = loaded.model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    estimator = "continuous" if isinstance(model, GenMD4) else "mask_count"
    name = estimator_name(model, estimator)
    found: dict[int, Score] = {}
    by_length: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        by_length.setdefault(len(text.tokens), []).append(place)
    for length, places in by_length.items():
        most = rows(length)
        for start in range(0, len(places), most):
            part = places[start : start + most]
            real = [text.real for text in (texts[place] for place in part) if text.real is not None]
            columns = nelbo_draws(
                model,
                torch.stack([texts[place].tokens for place in part]).to(device),
                draws=draws,
                seed=seed,
                ids=torch.zeros(len(part), dtype=torch.int64),
                estimator=estimator,
                labels=None if label is None else torch.full((len(part),), label, device=device),
                real=torch.stack(real).to(device) if real else None,
            )
            drawn = []
            for column in columns:
                drawn.append(column.cpu())
                yield len(part)
            for place, nats in zip(part, torch.stack(drawn, dim=1), strict=True):
                if not bool(torch.isfinite(nats).all()):
                    raise Broken("the network answered with NaN or infinity: the model is damaged")
                found[place] = _in_bits(loaded, texts[place], nats, seed, name)
    return [found[place] for place in range(len(texts))]


def _in_bits(loaded: "Loaded", text: Text, draws: Tensor, seed: int, estimator: str) -> Score:
    """The score of draws `[D]` in nats."""
    nats, error = mean_and_error(draws)
    nats_error = None if math.isnan(error) else error
    tokens = len(text.tokens) if text.real is None else int(text.real.sum())

    def bits(value: float | None, parts: int | None) -> float | None:
        return None if value is None or not parts else value / parts / math.log(2)

    return Score(
        nats=nats,
        nats_error=nats_error,
        bits_per_token=nats / tokens / math.log(2),
        bits_per_token_error=bits(nats_error, tokens),
        bits_per_character=bits(nats, text.characters),
        bits_per_character_error=bits(nats_error, text.characters),
        tokens=tokens,
        characters=text.characters,
        draws=len(draws),
        seed=seed,
        estimator=estimator,
        model=facts(loaded),
    )
