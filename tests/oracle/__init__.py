"""Proofs that the samplers follow the laws they claim (tests/oracle): chi-square against laws that are enumerated.

    python -m tests.oracle [--long] [--seed N] [--samples N] [--only WORDS]

prints one line for each proof and `N passed, M failed` at the end; exit code 1 if something failed, 2 if no proof was
selected. A known law, small enough to enumerate, plays the network. Every proof comes with mutants, samplers with a
fault that it must reject: one that isn't rejected makes it fail too.

The fast form fixes the seeds by the proofs' names and rejects a correct sampler with probability 1e-3 in each proof.
`--long` draws ten times as many samples from a fresh seed, which it prints; then it is all proofs together that reject
a correct sampler with probability 1e-3 (Holm), and one that fails is repeated with four times the samples before it
counts.
"""
