"""One token's law: temperature, then top-k, then top-p, of logits that lean towards a class."""

from functools import partial

import torch
from torch import Tensor

from md4.samplers import SamplingConfig
from md4.samplers.draws import filter_top_k, filter_top_p, log_weights
from md4.samplers.first_hitting import FirstHitting
from md4.samplers.rows import Rows
from md4.samplers.sampler import Sight
from tests.oracle.laws import tempered
from tests.oracle.proof import Proof, law_proof
from tests.oracle.sampling import Draws
from tests.oracle.toys import Fixed

LOGITS = [0.0, 2.1, -1.3, 0.9, 1.4, -3.0, 0.3, 1.9, -0.5, 0.6, -6.0, -2.0]
CLASSES = [LOGITS, LOGITS[5:] + LOGITS[:5], LOGITS[::-1]]  # two classes, and none in particular


class NucleusFirst(FirstHitting):
    """Mutant: top-p before the temperature."""

    def log_weights(self, rows: Rows, sight: Sight) -> Tensor:
        cut = filter_top_p(sight.logits, rows.top_p[sight.row])
        return filter_top_k(log_weights(cut, rows.temperature[sight.row]), rows.top_k[sight.row])


class CountLast(FirstHitting):
    """Mutant: top-k after top-p."""

    def log_weights(self, rows: Rows, sight: Sight) -> Tensor:
        weights = log_weights(sight.logits, rows.temperature[sight.row])
        return filter_top_k(filter_top_p(weights, rows.top_p[sight.row]), rows.top_k[sight.row])


def _one_token(logits: list, label: int | None = None, **settings) -> Draws:
    model = Fixed(torch.tensor(logits)).model()
    canvas = torch.tensor([model.mask_id])
    return Draws(model, SamplingConfig(sampler="first_hitting", **settings), canvas, label)


def _guided(guidance: float, label: int = 0) -> list[float]:
    """null + g (class - null)."""
    return [none + guidance * (own - none) for own, none in zip(CLASSES[label], CLASSES[-1], strict=True)]


def proofs() -> list[Proof]:
    found = []
    for name, settings, mutants in (
        ("as the network says", {}, {"a temperature of 1.05": {"temperature": 1.05}}),
        ("at temperature 0.6", {"temperature": 0.6}, {"a temperature of 0.63": {"temperature": 0.63}}),
        ("at temperature 1.7", {"temperature": 1.7}, {"a temperature of 1.6": {"temperature": 1.6}}),
        ("top-k 5", {"top_k": 5}, {"top-k 4": {"top_k": 4}, "top-k 6": {"top_k": 6}}),
        ("top-p 0.7", {"top_p": 0.7}, {"top-p 0.5": {"top_p": 0.5}, "top-p 0.9": {"top_p": 0.9}}),
    ):
        draw = _one_token(LOGITS, **settings)
        wrong = {word: draw.set(**change) for word, change in mutants.items()}
        found.append(law_proof(f"one token, {name}", draw, partial(tempered, LOGITS, **settings), wrong))

    hot = {"temperature": 1.6, "top_p": 0.8}
    found.append(
        law_proof(
            "one token, temperature before top-p",
            _one_token(LOGITS, **hot),
            partial(tempered, LOGITS, **hot),
            {"top-p first": _one_token(LOGITS, **hot).but(sampler=NucleusFirst)},
        )
    )
    both = {"top_k": 4, "top_p": 0.72}
    found.append(
        law_proof(
            "one token, top-p of what top-k left",
            _one_token(LOGITS, **both),
            partial(tempered, LOGITS, **both),
            {"top-k last": _one_token(LOGITS, **both).but(sampler=CountLast)},
        )
    )
    for guidance, label in ((0.0, 0), (1.0, 1), (1.6, 0)):
        draw = _one_token(CLASSES, label, guidance=guidance)
        found.append(
            law_proof(
                f"guidance {guidance} towards class {label}",
                draw,
                partial(tempered, _guided(guidance, label)),
                {
                    "class + g (class - null)": draw.set(guidance=guidance + 1),
                    "a tenth more": draw.set(guidance=guidance + 0.1),
                },
            )
        )
    mixed = {"temperature": 1.4, "top_p": 0.9}
    draw = _one_token(CLASSES, 1, guidance=1.8, **mixed)
    found.append(
        law_proof(
            "guidance, then temperature and top-p",
            draw,
            partial(tempered, _guided(1.8, 1), **mixed),
            {"top-p first": draw.but(sampler=NucleusFirst), "no guidance": draw.set(guidance=1.0)},
        )
    )
    return found
