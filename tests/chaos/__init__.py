"""Kills and damage on purpose, and what training makes of them (`tests/chaos`).

    python -m tests.chaos [--seed N] [--kills K] [--only WORDS] [--list]

starts a cluster of several nodes on this machine and runs `md4 train` on it, case by case. Each case brings the run
into a declared state and disturbs it there; the S3 cases do so by holding a request at a proxy until the victim is
dead. What comes out is compared with a run that nothing happened to:

- the ledger, row for row, and the final weights, moving averages and moments: bit for bit where the number of workers
  stays, within a tolerance where it changes;
- no checkpoint that a run told of is lost, and none that was damaged is loaded: every attempt must begin from the
  newest sound one, which each case knows;
- what lies there at the end is sound.

A line for each case: recovery (s from the kill to the next finished step), lost steps (finished before the kill and
made again); `N passed, M failed` at the end, exit code 1 if something failed, 2 if no case was selected.
"""
