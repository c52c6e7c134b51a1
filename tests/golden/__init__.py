"""Parity with the reference implementation: checks this code against vectors that the reference has produced.

    python -m tests.golden FOLDER

prints one line for each *.npz of FOLDER, with the largest error beside its tolerance, and a count at the end. The exit
code is 0 if nothing failed, 1 if something did, 2 if there is nothing to check. What a file holds is told from its
arrays; a handful of such files lie in `vectors/`.
"""

from pathlib import Path

VECTORS = Path(__file__).with_name("vectors")
