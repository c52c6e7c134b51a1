"""The loss without the big tensor (`md4.masked_loss`) against the plain one, at the size of GPT-2's vocabulary.

    python -m tests.benchmarks.bench_loss_memory [ROUNDS]

Head and loss alone, forward and backward, V = 50257, L = 1024, D = 768, at stratified times of the linear schedule;
then whole training passes of a transformer of two blocks. On a GPU where there is one, else on all CPU cores. Goals: a
peak of head and loss at least 3 times lower, and a time no worse.

The peak is of memory allocated during the pass, gradients of the weights included, weights and inputs left out: the
CUDA allocator's own figure, or the largest sum of the CPU allocations that PyTorch's profiler sees, those inside of
operations included.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from md4 import masked_loss
from md4.masked_loss import IGNORED, Head, Hidden, Scores, plain_scores, spread
from md4.model import ModelConfig, build
from md4.networks import transformer
from md4.networks.transformer import TransformerConfig
from tests.benchmarks.harness import Benchmark

V, LENGTH, WIDTH = 50257, 1024, 768
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 16 if DEVICE.type == "cuda" else 2
WARM, REPEATS = (3, 10) if DEVICE.type == "cuda" else (0, 1)
MIB = 2**20


def timed(work: Callable[[], None]) -> float:
    """Tokens/s of `work`, which is one pass over a batch."""
    for _ in range(WARM):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return ROWS * LENGTH * REPEATS / (time.perf_counter() - began)


def peak(work: Callable[[], None]) -> float:
    """MiB allocated at once, at most, during `work`."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    now = highest = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest / MIB


class Loss:
    """Head and loss alone."""

    def __init__(self, model, tokens: Tensor, z: Tensor):
        draw = torch.Generator().manual_seed(1)
        self.head = Head(WIDTH, V).to(DEVICE)
        self.x = torch.randn(ROWS, LENGTH, WIDTH, generator=draw).to(DEVICE).requires_grad_()
        self.targets = torch.where(z == model.mask_id, tokens, IGNORED)
        self.powers = torch.rand(V, generator=draw).to(DEVICE).requires_grad_()

    def run(self, chunked: bool, powers: bool = False) -> None:
        scores = self._scores(chunked, self.powers if powers else None)
        total = -scores.log_likelihood.sum()
        if scores.power is not None:
            total = total + scores.power.sum()
        total.backward()
        self.head.weight.grad = self.x.grad = self.powers.grad = None

    def _scores(self, chunked: bool, powers: Tensor | None) -> Scores:
        if not chunked:
            return plain_scores(self.head(self.x), self.targets, powers)
        rows = Hidden(self.targets).rows()
        pair = self.head(self.x.flatten(0, 1).index_select(0, rows), self.targets.flatten()[rows], powers)
        return spread(pair, rows, self.targets)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(os.cpu_count() or 1)
    network = TransformerConfig(feature_dim=64, heads=12, layers=2, outside_embed=False)
    model = build(ModelConfig(vocab_size=V, length=LENGTH, network=network)).to(DEVICE)
    tokens = torch.randint(0, V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    drawn = model.noise(0, 0, torch.arange(ROWS, device=DEVICE), ROWS, 1, LENGTH)
    loss = Loss(model, tokens, model.corrupt(tokens, drawn["t"], drawn["uniforms"]))

    def step(chunked: bool) -> None:
        transformer.PLAIN_UP_TO = masked_loss.PLAIN_UP_TO if chunked else V
        model(tokens, **drawn).optimised.mean().backward()
        model.zero_grad(set_to_none=True)

    variants: dict[str, Callable[[], None]] = {
        "plain": lambda: loss.run(False),
        "masked, chunked": lambda: loss.run(True),
        "plain, with powers": lambda: loss.run(False, powers=True),
        "masked, chunked, with powers": lambda: loss.run(True, powers=True),
        "whole pass, plain": lambda: step(False),
        "whole pass, masked, chunked": lambda: step(True),
    }
    benchmark = Benchmark("loss_memory", "tokens/s", baseline="plain")
    peaks = {name: peak(work) for name, work in variants.items()}
    benchmark.run({name: lambda work=work: timed(work) for name, work in variants.items()}, rounds)
    for name in ("", ", with powers"):
        benchmark.goal(f"masked, chunked{name}", 1.0, against=f"plain{name}")
    benchmark.goal("whole pass, masked, chunked", 1.0, against="whole pass, plain")
    benchmark.notes["shape"] = f"{ROWS} rows of {LENGTH}, {V} tokens, width {WIDTH}, float32, {DEVICE.type}"
    benchmark.notes["hidden positions"] = int((loss.targets != IGNORED).sum())
    for name, value in peaks.items():
        benchmark.notes[f"peak, {name}, MiB"] = round(value, 1)
    for name in ("", ", with powers"):
        ratio = peaks[f"plain{name}"] / peaks[f"masked, chunked{name}"]
        benchmark.notes[f"peak of plain{name} over masked (goal >= 3)"] = round(ratio, 2)
    benchmark.report()


if __name__ == "__main__":
    main()
