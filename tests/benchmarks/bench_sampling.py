"""How long a text takes: first hitting and ancestral sampling against the plain loop, V = 50257, L = 1024, float32.

    python -m tests.benchmarks.bench_sampling [ROUNDS, 5]          about 5 minutes on two idle cores

The network is small (2 layers of width 64, time input), so that what surrounds it is seen. One *sample* is measured,
1 row and 4 rows at a time.

    plain loop            as published code samples: at every step full logits [B, L, V] and one joint float32 draw over
                          V + 1 classes at every masked position; no step is skipped. Written bare below.
    first hitting         `md4.samplers.run`, one position's logits a call
    ..., full head        the same, but the logits of all L positions are computed in every call, and thrown away
    ancestral, idle free  `md4.samplers.run`, a call only for steps in which something is revealed

Every round measures a few calls of each at a few numbers of masked positions; a run's time is put together from them:
its calls (counted: exactly for the plain loop and first hitting, from the plan for ancestral) times the mean time of a
call. So **all run times are extrapolated**, from the numbers of measured calls that the JSON names; only the short
ones were ever waited for. V = 27 and 256, L = 256, are measured in the same way.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from md4 import inference, samplers
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MD4, MaskedDiffusion
from md4.samplers import Job, SamplingConfig
from md4.samplers.ancestral import reveal_probability
from md4.samplers.draws import categorical
from tests.benchmarks.harness import Benchmark

STEPS = (1000, 2048, 10_000)
SHARES = (0.9, 0.5, 0.1)  # of the positions, masked while a call of the plain loop is measured
CALLS = 8  # of our samplers, measured at each share


@dataclass
class Case:
    """A model and the size of its texts."""

    vocabulary: int
    length: int

    def __post_init__(self) -> None:
        network = TransformerConfig(feature_dim=32, heads=2, layers=2)
        model = build(ModelConfig(vocab_size=self.vocabulary, length=self.length, network=network))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # a fresh head is 0: every prediction would be flat
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        assert isinstance(model, MD4)
        self.model = model.eval()

    def canvas(self, rows: int, masked: int) -> Tensor:
        """`rows` equal texts `[rows, L]`, `masked` positions of which are hidden, at random."""
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(0, self.vocabulary, (self.length,), generator=generator)
        tokens[torch.randperm(self.length, generator=generator)[:masked]] = self.vocabulary
        return tokens.repeat(rows, 1)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- the plain loop ---


@torch.no_grad()
def plain_step(model: MD4, z: Tensor, t: float, s: float) -> Tensor:
    """One step of the plain loop from t to s: z `[B, L]` -> `[B, L]`."""
    logits = model.network(z, torch.full((len(z),), t))
    rho = float(reveal_probability(model.schedule, t, s))
    masked = z == model.mask_id
    mu = rho * logits[masked].softmax(dim=-1)
    chances = torch.cat([mu, torch.full((len(mu), 1), 1 - rho)], dim=1)
    z = z.clone()
    z[masked] = (chances / torch.rand_like(chances).log_().neg_()).argmax(dim=1)
    return z


def plain_call(case: Case, rows: int, steps: int = 1000) -> float:
    """Seconds of a step of the plain loop, the mean over SHARES: masked positions fall evenly from L to 0."""
    total = 0.0
    for share in SHARES:
        z = case.canvas(rows, int(share * case.length))
        total += timed(lambda z=z, share=share: plain_step(case.model, z, share, share - 1 / steps))
    return total / len(SHARES)


# --- ours ---


def our_call(case: Case, rows: int, **settings: Any) -> float:
    """Seconds of a network call of our samplers, its draw and all that surrounds it included."""
    job = Job(case.canvas(rows, CALLS), torch.arange(rows), SamplingConfig(**settings))
    (result,) = samplers.run(case.model, [job], batch_size=rows)
    return result.seconds / result.network_calls


class _FullHead(inference.Prediction):
    """Logits of all positions, of which most are thrown away."""

    def __init__(self, model: MaskedDiffusion, z: Tensor, t: Tensor, labels: Tensor | None = None) -> None:
        super().__init__(model, z, t, labels)
        if self._head is not None:
            with torch.no_grad():
                self._answer, self._head = self._head(self._answer[: len(z)]), None


def full_head_call(case: Case, rows: int) -> float:
    original, samplers.batch.Prediction = samplers.batch.Prediction, _FullHead
    try:
        return our_call(case, rows, sampler="first_hitting")
    finally:
        samplers.batch.Prediction = original


def calls_of(name: str, steps: int, length: int) -> float:
    """Network calls of a whole run of one row; of ancestral the expectation, N (1 - (1 - 1/N)^L)."""
    if name == "plain loop":
        return steps
    return steps * (1 - (1 - 1 / steps) ** length) if name.startswith("ancestral") else length


def parts(case: Case) -> dict[str, float]:
    """Milliseconds of the parts of a call, medians of 5: the network's body, its head, the draws."""
    network: Any = case.model.network
    z, one = case.canvas(1, case.length // 2), torch.full((1,), 0.5)
    with torch.no_grad():
        hidden = network.body(z, one)
        logits = network.head(hidden)[0]
        single = logits[:1]
        keys = torch.arange(1)

        def joint() -> Tensor:
            return (logits.softmax(-1) / torch.rand_like(logits).log_().neg_()).argmax(1)

        work: dict[str, Callable[[], Any]] = {
            "body, 1 row": lambda: network.body(z, one),
            "body, 4 rows": lambda: network.body(z.repeat(4, 1), one.repeat(4)),
            "head, all positions": lambda: network.head(hidden),
            "head, 4 positions": lambda: network.head(hidden[0, :4]),
            "joint float32 draw, all positions": joint,
            "exact draw, 1 position": lambda: categorical(single, keys),
        }
        return {name: round(1000 * sorted(timed(do) for _ in range(5))[2], 3) for name, do in work.items()}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.manual_seed(0)
    benchmark = Benchmark("sampling", "ms/call", baseline="V=50257, 1 row, plain loop")
    variants: dict[str, Callable[[], float]] = {}
    lengths: dict[str, int] = {}
    for vocabulary, length in ((50257, 1024), (256, 256), (27, 256)):
        case = Case(vocabulary, length)
        benchmark.notes[f"V={vocabulary}, L={length}: parts of a call, ms"] = parts(case)
        for rows in (1, 4):
            if rows == 4 and vocabulary == 50257:
                kinds = ("first hitting", "ancestral, idle free")  # four rows of the plain loop are 4 times one
            else:
                kinds = ("plain loop", "first hitting", "first hitting, full head", "ancestral, idle free")
            calls = {
                "plain loop": lambda case=case, rows=rows: plain_call(case, rows),
                "first hitting": lambda case=case, rows=rows: our_call(case, rows, sampler="first_hitting"),
                "first hitting, full head": lambda case=case, rows=rows: full_head_call(case, rows),
                "ancestral, idle free": lambda case=case, rows=rows: our_call(case, rows, steps=1000),
            }
            for kind in kinds:
                name = f"V={vocabulary}, {rows} row{'s' * (rows > 1)}, {kind}"
                variants[name] = lambda work=calls[kind]: 1000 * work()
                lengths[name] = length
    for work in variants.values() if rounds > 1 else ():  # warm up
        work()
    benchmark.run(variants, rounds)
    benchmark.notes["measured calls a round"] = {"plain loop": len(SHARES), "ours": CALLS}
    benchmark.notes["threads"] = torch.get_num_threads()
    for name in variants:
        size, rows, kind = name.split(", ", 2)
        if kind == "plain loop":
            continue
        one, scale = f"{size}, {rows}, plain loop", 1
        if one not in variants:
            one, scale = f"{size}, 1 row, plain loop", 4
        for steps in STEPS:
            ours, theirs = calls_of(kind, steps, lengths[name]), calls_of("plain loop", steps, lengths[name])
            ratios = sorted(scale * r[one] * theirs / (r[name] * ours) for r in benchmark.rounds)
            goal = {1000: 15, 10_000: 100}.get(steps) if (kind, size) == ("first hitting", "V=50257") else None
            benchmark.notes[f"{name}, {steps} steps: times faster than the plain loop"] = {
                "median": round(ratios[len(ratios) // 2], 2),
                "min": round(ratios[0], 2),
                "max": round(ratios[-1], 2),
                "calls": [round(theirs), round(ours)],
                "goal": goal,
            }
    benchmark.report()


if __name__ == "__main__":
    main()
