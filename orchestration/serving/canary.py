"""A version that is tried with a share of the requests: which ones it gets, what is to become of it. Pure functions.

**Which.** A request goes to the candidate if a hash of it (`key`: its seed, and what it asks for) lies below the share.
So the same request always gets the same version, in every replica, and who gets which is as good as drawn by lot.

**Errors.** If the version made no difference, each error would be the candidate's with probability `share`, whatever
makes requests fail, and independently of the others: a repeated request counts once, whichever replicas it failed in,
and one that fails with the present version, too, is not counted. Against that stands that the candidate's part is
larger, any value above the share being equally likely. The ratio of the two likelihoods is an e-value: under the first
its mean is 1 however often and whenever it is looked at, so that it ever reaches 1/alpha in at most alpha of all trials
(Ville's inequality). Nothing needs to be known of how often requests fail at all. At a share of 10 % three errors of
the candidate and none of the present version are enough, at 50 % nine.

**Quality.** Both versions score the same held-out texts with the same noise. The candidate is dropped if the mean
difference lies above `quality_margin` by more than its standard error allows (Student's t, one-sided). Once: these
figures don't change. And when it has answered enough, the mean entropy within its samples is compared with that of the
present version's, one look, two-sided: collapsed models repeat themselves.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from scipy import special

from orchestration.sampling import Answer, Request
from orchestration.serving.config import CanaryConfig


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Part):
    """What one of the two versions did with requests that came by lot. In one replica, repeated ones count once."""

    answered: int = 0
    errors: int = 0
    seconds: float = Field(default=0.0, description="from arrival to answer, summed over those that were answered")
    calls: int = Field(default=0, description="network calls, summed over them")
    entropy: float = Field(default=0.0, description="bits within their samples, summed over them")
    entropy_squares: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(**{name: getattr(self, name) + getattr(other, name) for name in Figures.model_fields})

    @classmethod
    def of(cls, answer: Answer, seconds: float) -> "Figures":
        """An answer."""
        bits = sum(entropy(sample.text) for sample in answer.samples) / len(answer.samples)
        calls = sum(sample.calls for sample in answer.samples)
        return cls(answered=1, seconds=seconds, calls=calls, entropy=bits, entropy_squares=bits * bits)

    def mean_entropy(self) -> tuple[float, float] | None:
        """Bits and their squared standard error; None of fewer than two answers."""
        if (n := self.answered) < 2:
            return None
        mean = self.entropy / n
        return mean, max(0.0, self.entropy_squares / n - mean * mean) / (n - 1)


FAILED = Figures(errors=1)


class Quality(_Part):
    """How the candidate scores the held-out texts, beside the present version."""

    texts: int
    difference: float = Field(description="candidate less present version, mean over texts, bits per token")
    standard_error: float

    @classmethod
    def of(cls, differences: list[float]) -> "Quality":
        """Of the texts' differences, at least two."""
        n = len(differences)
        mean = sum(differences) / n
        squares = sum((one - mean) ** 2 for one in differences)
        return cls(texts=n, difference=mean, standard_error=math.sqrt(squares / (n - 1) / n))


@dataclass(frozen=True)
class Verdict:
    """What is to become of the candidate, and why, in words for the name's history."""

    action: Literal["wait", "confirm", "rollback"]
    why: str = ""


def key(request: Request) -> int:
    """64 bits that are the same for the same request."""
    asked = request.group or repr((request.seed, request.prompt, request.tokens, request.suffix, request.label))
    return int.from_bytes(hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def chosen(key: int, share: float, lot: str) -> bool:
    """Does the candidate get that request? lot: another one for each candidate. With a larger share none is lost."""
    drawn = hashlib.blake2b(f"{lot} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < share * 2**64


def entropy(text: str) -> float:
    """Bits of the histogram of a text's characters; of an image's levels, which have spaces between them."""
    words = text.split(" ")
    symbols = words if all(word.isdecimal() for word in words) else text
    n = len(symbols)
    return sum(-count / n * math.log2(count / n) for count in Counter(symbols).values()) if n else 0.0


def log_evidence(errors: int, of: int, share: float) -> float:
    """ln of the e-value that more than `share` of all errors are the candidate's: `errors` of `of` are.

    The likelihood of that many under a part drawn evenly from [share, 1], over that under `share` itself.
    """
    c, n = errors, of
    log_binomial = (
        special.gammaln(n + 1)
        - special.gammaln(c + 1)
        - special.gammaln(n - c + 1)
        + special.xlogy(c, share)
        + special.xlog1py(n - c, -share)
    )
    # The integral of the beta density from `share` to 1 is the chance of at most c in n + 1.
    log_upper = math.log(max(float(special.bdtr(c, n + 1, share)), 1e-300))
    return float(log_upper - math.log((n + 1) * (1 - share)) - log_binomial)


def fails_more(present: Figures, candidate: Figures, share: float, alpha: float) -> bool:
    """Is it established that the candidate fails more often?"""
    return log_evidence(candidate.errors, candidate.errors + present.errors, share) >= -math.log(alpha)


def judge(
    present: Figures,
    candidate: Figures,
    quality: Quality | None,
    config: CanaryConfig,
    *,
    share: float,
    seconds: float,
) -> Verdict:
    """What the figures of all replicas, after so many seconds, say."""
    rest = present.errors + present.answered
    if fails_more(present, candidate, share, config.error_alpha):
        return Verdict(
            "rollback",
            f"errors: {candidate.errors} of {candidate.errors + candidate.answered} requests failed, "
            f"{present.errors} of {rest} of the present version",
        )
    if quality is not None:
        bound = float(special.stdtrit(quality.texts - 1, 1 - config.quality_alpha)) * quality.standard_error
        if quality.difference - bound > config.quality_margin:
            return Verdict(
                "rollback",
                f"quality: {quality.difference:+.4f} ± {quality.standard_error:.4f} bits per token on {quality.texts} "
                f"held-out texts; allowed are {config.quality_margin:+g}",
            )
    lacking = None
    if candidate.answered < config.min_requests:
        lacking = f"{candidate.answered} of {config.min_requests} requests"
    elif config.texts is not None and quality is None:
        lacking = "the held-out texts are not scored"
    if lacking is not None:
        late = config.max_seconds is not None and seconds > config.max_seconds
        return Verdict("rollback", f"time: {lacking} in {seconds:,.0f} s") if late else Verdict("wait", lacking)
    one, other = candidate.mean_entropy(), present.mean_entropy()
    if config.entropy_margin is not None and one is not None and other is not None:
        difference, error = one[0] - other[0], math.sqrt(one[1] + other[1])
        bound = float(special.ndtri(1 - config.quality_alpha / 2)) * error
        if abs(difference) - bound > config.entropy_margin:
            return Verdict(
                "rollback",
                f"entropy: {one[0]:.3f} bits within samples, {other[0]:.3f} of the present version's "
                f"(± {error:.3f}); allowed is a difference of {config.entropy_margin:g}",
            )
    return Verdict("confirm", f"{candidate.answered} requests answered, {candidate.errors} errors")
