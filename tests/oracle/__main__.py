"""The command line: `python -m tests.oracle`."""

import argparse
import secrets
import sys
from time import perf_counter

import torch

from tests import oracle
from tests.oracle import ancestral, blocks, draws, first_hitting, refined, rows, times
from tests.oracle.proof import ALPHA, FAST, LONG, Proof, examine, judge_together

# Every family of proofs has a file, and in it a function that lists them.
FAMILIES = (first_hitting, refined, times, ancestral, blocks, draws, rows)
FAST_SEED = 0


def proofs(words: str = "") -> list[Proof]:
    """All proofs whose names hold `words`."""
    return [proof for family in FAMILIES for proof in family.proofs() if words in proof.name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.oracle", description=oracle.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help=f"{LONG} samples, a fresh seed, Holm, one repetition")
    parser.add_argument("--seed", type=int, help="seed of all noise (fast form: 0; long form: a fresh one)")
    parser.add_argument("--samples", type=int, help=f"samples of a proof ({FAST}; long form: {LONG})")
    parser.add_argument("--only", default="", metavar="WORDS", help="only proofs whose names hold these words")
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
    results = []
    for proof in chosen:
        results.append(examine(proof, seed, samples))
        if told.long:
            results[-1].level = ALPHA / len(chosen)
        else:
            results[-1].believed = not results[-1].p < ALPHA
        print(results[-1], flush=True)
    if told.long:
        judge_together(results, seed, samples)
        for result in results:
            if result.repeated is not None:
                print(result, flush=True)
    passed = sum(result.passed for result in results)
    print(f"{perf_counter() - began:.0f} s")
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
