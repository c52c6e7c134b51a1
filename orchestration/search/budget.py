"""A fair budget: every trial trains on the same number of tokens, whatever its batch and length."""

from dataclasses import dataclass

from md4.errors import UserError
from orchestration.config import Config
from orchestration.search.space import Settings

TOLERANCE = 0.05  # of the budget, that a trial may miss because rounds are whole steps


@dataclass(frozen=True)
class Budget:
    """What one trial gets: `rounds` times `every` steps of `step_tokens` tokens, an evaluation after each round."""

    rounds: int
    every: int
    step_tokens: int

    @property
    def steps(self) -> int:
        return self.rounds * self.every

    def tokens(self, round: int) -> int:
        """Trained on after so many rounds."""
        return round * self.every * self.step_tokens


def budget(config: Config, search: Settings) -> Budget:
    """Of a trial with this configuration.

    Raises:
        UserError: a round has no whole step, rounding loses more than `TOLERANCE`, or the warm-up never ends.
    """
    train, length = config.train, config.data.length
    step = train.batch_size * length
    each = f"a step has {train.batch_size} x {length} = {step:,} tokens"
    every = search.budget // (search.rounds * step)
    if not every:
        raise UserError(
            f"search.budget={search.budget:,}: too small for search.rounds={search.rounds}: {each}, so a round needs "
            f"that many and the budget at least {search.rounds * step:,}"
        )
    found = Budget(search.rounds, every, step)
    if found.tokens(search.rounds) < (1 - TOLERANCE) * search.budget:
        more = search.rounds * step * (every + 1)
        raise UserError(
            f"search.budget={search.budget:,}: {each}, and {search.rounds} rounds of {every} steps use "
            f"{found.tokens(search.rounds):,} alone: trials would not get the same. Take {more:,}, a larger budget, or "
            "fewer rounds"
        )
    if config.optimizer.warmup >= found.steps:
        raise UserError(
            f"optimizer.warmup={config.optimizer.warmup}: search.budget={search.budget:,} is {found.steps} steps "
            f"({each}), all of them warm-up"
        )
    return found
