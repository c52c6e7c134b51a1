"""Which check a file of vectors asks for."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.golden.checks import (
    Unsupported,
    Vectors,
    check_antithetic_times,
    check_backbone,
    check_md4_loss,
    check_sampler,
    check_sampling_grids,
    check_schedules,
    check_timestep_embedding,
    check_topp_mask,
    check_trajectory,
)
from tests.golden.compare import Comparisons
from tests.golden.genmd4 import check_genmd4_loss


@dataclass(frozen=True)
class Kind:
    """A kind of file: how its name starts, how its arrays tell it, and its check."""

    prefix: str
    holds: Callable[[Vectors], bool]
    check: Callable[[Vectors, Comparisons], None]


def _all_of(*names: str) -> Callable[[Vectors], bool]:
    return lambda file: all(name in file for name in names)


def _some(pattern: str) -> Callable[[Vectors], bool]:
    return lambda file: any(re.fullmatch(pattern, name) for name in file.arrays)


# In order: the first whose arrays fit.
KINDS = (
    Kind("train_trajectory", lambda f: bool(f.group("init:") and f.group("final:")), check_trajectory),
    Kind("genmd4_loss", _all_of("xt_1", "xt_2"), check_genmd4_loss),
    Kind("md4_loss", _all_of("x0", "xt", "weight"), check_md4_loss),
    Kind("sampler", _all_of("unmask_prob", "z"), check_sampler),
    Kind("backbone", _all_of("z", "t", "logits"), check_backbone),
    Kind("topp_mask", _some(r"masked_[\d.]+"), check_topp_mask),
    Kind("sampling_grids", _some(r"[a-z]+_\d+_[st]"), check_sampling_grids),
    Kind("timestep_embedding", _some(r"emb_\d+"), check_timestep_embedding),
    Kind("antithetic_times", _some(r"t0_\d+"), check_antithetic_times),
    Kind("schedules", _some(r"[a-z]+[\d.]*:alpha"), check_schedules),
)


def kind_of(file: Vectors) -> Kind:
    """What `file` holds: told from its arrays, or, for one that is incomplete, from its name."""
    for kind in KINDS:
        if kind.holds(file):
            return kind
    for kind in KINDS:
        if file.path.name.startswith(kind.prefix):
            return kind
    raise Unsupported("none of the known kinds of vectors")
