"""The weights of a mixture as integers, all of which every cycle of rows can honour exactly. (No torch: configuration
reads this, and so do the tasks of the preparation.)"""

from collections.abc import Sequence

import numpy as np

from md4.errors import UserError

CYCLE = 1024  # what the integer weights sum to


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Integer weights that sum to 1024, by largest remainder. UserError for a positive weight that becomes 0."""
    exact = np.array(weights) / sum(weights) * CYCLE
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: CYCLE - whole.sum()]] += 1
    if 0 in whole:
        small = weights[int(np.argmin(whole))]
        raise UserError(
            f"a weight of {small:g} out of {sum(weights):g} is too small: shares are multiples of 1/{CYCLE}, "
            f"the least that counts is {sum(weights) / CYCLE / 2:.3g}"
        )
    return tuple(whole.tolist())
