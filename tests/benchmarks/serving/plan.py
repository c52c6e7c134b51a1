"""What a load consists of: which requests, and when each is due. Without torch, so that the load generator is light.

80 % of the requests are short (32 tokens, 8 to 16 steps), 20 % long (128 tokens, 128 to 256 steps), each a single
sample with a seed of its own. They come by a Poisson process, whether or not earlier ones were answered (an open loop);
or, to find out how many a service answers when it always has work, clients ask for one after the other (a closed loop).
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIX = {
    "short": {"share": 0.8, "length": 32, "steps": (8, 16)},
    "long": {"share": 0.2, "length": 128, "steps": (128, 256)},
}


@dataclass(frozen=True)
class Wish:
    """A request that is to be made."""

    kind: str
    body: dict[str, Any]
    due: float = 0.0  # seconds from the beginning


@dataclass(frozen=True)
class Outcome:
    """What came of a wish; seconds from the beginning."""

    kind: str
    due: float
    sent: float
    done: float
    status: int  # of HTTP; 0: the connection failed

    @property
    def latency(self) -> float:
        """Seconds since it was due: what its sender was late counts, too."""
        return self.done - self.due


def wishes(seed: int) -> Iterator[Wish]:
    """Requests of the mix without end, the same for the same seed."""
    draw = random.Random(seed)
    while True:
        kind = draw.choices(list(MIX), [of["share"] for of in MIX.values()])[0]
        steps = draw.randint(*MIX[kind]["steps"])
        body = {"length": MIX[kind]["length"], "seed": draw.randrange(2**31), "sampling": {"steps": steps}}
        yield Wish(kind, body)


def arrivals(rate: float, seconds: float, seed: int) -> list[Wish]:
    """Requests of a Poisson process of `rate` a second."""
    draw, now, found = random.Random(f"arrivals {seed}"), 0.0, []
    for wish in wishes(seed):
        now += draw.expovariate(rate)
        if now >= seconds:
            break
        found.append(Wish(wish.kind, wish.body, now))
    return found


@dataclass(frozen=True)
class Plan:
    """What the load generator is told.

    clients: None for an open loop; else how many ask for one thing after the other, for so many seconds, and whatever
    is under way then is given up.
    """

    path: str
    wishes: list[Wish]
    clients: int | None = None
    seconds: float | None = None  # whole ones

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Plan":
        tree = json.loads(file.read_text("utf-8"))
        return cls(**{**tree, "wishes": [Wish(**wish) for wish in tree["wishes"]]})


def closed(path: str, clients: int, seconds: float, seed: int, most: int = 20_000) -> Plan:
    """A plan for a closed loop; `most`: requests that it will certainly not get through."""
    return Plan(path, list(itertools.islice(wishes(seed), most)), clients, seconds)


def write_outcomes(file: Path, outcomes: Iterable[Outcome]) -> None:
    file.write_text(json.dumps([asdict(one) for one in outcomes]), encoding="utf-8")


def read_outcomes(file: Path) -> list[Outcome]:
    return [Outcome(**one) for one in json.loads(file.read_text("utf-8"))]
