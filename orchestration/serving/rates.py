"""How much one client may ask for in a minute: requests, and tokens to be written.

A window of a minute slides over the requests (the library `limits`, whose storage may be shared by several servers).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from limits import RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.storage.base import SlidingWindowCounterSupport
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from md4.errors import UserError
from orchestration.serving.errors import Refused

_WINDOW_S = 60


@dataclass(frozen=True)
class Window:
    """What a sliding window holds: counts of the last full minute and of the present one, and how long each counts."""

    previous: int
    previous_s: float
    present: int
    present_s: float  # until nothing of it counts any more

    @property
    def count(self) -> float:
        """What counts now: the last minute as far as it is still in the window."""
        return self.previous * self.previous_s / _WINDOW_S + self.present

    @property
    def empty_in_s(self) -> float:
        return max(self.previous_s if self.previous else 0, self.present_s if self.present else 0)

    def wait_s(self, most: float) -> float:
        """Seconds until the count is down at `most` (at least 0), if nothing is added."""
        if self.count <= most:
            return 0.0
        if self.present <= most:
            return self.previous_s - (most - self.present) * _WINDOW_S / self.previous
        # The present minute ends and then slides out of the window.
        return self.present_s - _WINDOW_S + _WINDOW_S * (1 - most / self.present)


class Rates:
    """The limits of each client. None: no limit.

    storage: where counts are kept, a URI of `limits`; several servers share one of Redis or memcached.
    """

    def __init__(self, requests: int | None, tokens: int | None, storage: str) -> None:
        asked = {"requests": requests, "tokens": tokens}
        self.limits = {kind: RateLimitItemPerMinute(most) for kind, most in asked.items() if most is not None}
        try:
            kept = storage_from_string(storage)
        except (ConfigurationError, ImportError) as error:
            raise UserError(f"serving.rate_storage={storage!r}: {error}") from None
        if not isinstance(kept, Storage) or not isinstance(kept, SlidingWindowCounterSupport):
            raise UserError(f"serving.rate_storage={storage!r}: wanted is an async one, such as async+memory://")
        self._storage = cast(SlidingWindowCounterSupport, kept)
        self._limiter = SlidingWindowCounterRateLimiter(kept)

    async def take(self, who: str, kind: str, cost: int) -> Mapping[str, str]:
        """Count `cost` of a kind, "requests" or "tokens", for a client; the headers that tell what is left.

        Raises Refused: 429 with the time to wait, or 422 for more than a minute can ever have.
        """
        limit = self.limits.get(kind)
        if limit is None:
            return {}
        if cost > limit.amount:
            raise Refused(422, f"the request asks for {cost:,} {kind}; allowed are {limit.amount:,} a minute")
        taken = await self._limiter.hit(limit, who, kind, cost=cost)
        window = Window(*await self._storage.get_sliding_window(limit.key_for(who, kind), limit.get_expiry()))
        headers = {
            f"x-ratelimit-limit-{kind}": str(limit.amount),
            f"x-ratelimit-remaining-{kind}": str(max(0, limit.amount - math.floor(window.count))),
            f"x-ratelimit-reset-{kind}": f"{math.ceil(window.empty_in_s)}s",
        }
        if not taken:
            wait = max(1, math.ceil(window.wait_s(limit.amount - cost)))
            detail = f"more than {limit.amount:,} {kind} a minute were asked for; the next ones in {wait} s"
            headers["retry-after"] = str(wait)
            raise Refused(429, detail, code="rate_limit_exceeded", headers=headers)
        return headers
