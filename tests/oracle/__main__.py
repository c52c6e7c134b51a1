"""The command line: `python -m tests.oracle`."""

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import perf_counter

import torch

from tests import oracle
from tests.oracle.families import examine_named, proofs
from tests.oracle.proof import ALPHA, FAST, LONG, Proof, Result, examine, repeat

FAST_SEED = 0


def _examined(chosen: list[Proof], seed: int, samples: int, level: float, jobs: int) -> Iterator[Result]:
    """Results in the proofs' order, made by as many processes at once."""
    if jobs == 1:
        yield from (examine(proof, seed, samples, level) for proof in chosen)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(examine_named, proof.name, seed, samples, level) for proof in chosen]:
            yield future.result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.oracle", description=oracle.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help=f"{LONG} samples, a fresh seed, Holm, one repetition")
    parser.add_argument("--seed", type=int, help="seed of all noise (fast form: 0; long form: a fresh one)")
    parser.add_argument("--samples", type=int, help=f"samples of a proof ({FAST}; long form: {LONG})")
    parser.add_argument("--only", default="", metavar="WORDS", help="only proofs whose names hold these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (as many as cores)")
    told = parser.parse_args(arguments)
    seed = told.seed if told.seed is not None else secrets.randbits(32) if told.long else FAST_SEED
    samples = told.samples or (LONG if told.long else FAST)
    chosen = proofs(told.only)
    if not chosen:
        print(f"no proof's name holds {told.only!r}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    alarm = f"{ALPHA:g} for all together (Holm), and that twice" if told.long else f"{ALPHA:g} for each"
    print(f"{len(chosen)} proofs, seed {seed}, {samples} samples each; false-alarm rate {alarm}", flush=True)
    began = perf_counter()
    level = ALPHA / len(chosen) if told.long else ALPHA
    results = []
    for result in _examined(chosen, seed, samples, level, told.jobs):
        result.believed = told.long or not result.p < ALPHA
        results.append(result)
        print(result, flush=True)
    if told.long:
        repeat(dict(zip((proof.name for proof in chosen), chosen, strict=True)), results, seed, samples)
        for result in results:
            if result.repeated is not None:
                print(result, flush=True)
    passed = sum(result.passed for result in results)
    print(f"{perf_counter() - began:.0f} s")
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
