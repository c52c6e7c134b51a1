"""The command line: `python -m tests.golden FOLDER`."""

import argparse
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from md4.errors import UserError
from tests.golden.checks import Unsupported, Vectors
from tests.golden.compare import Comparisons
from tests.golden.kinds import kind_of


class Verdict(NamedTuple):
    """What became of one file."""

    outcome: Literal["PASS", "FAIL", "SKIP"]
    reason: str


def check(path: Path) -> Verdict:
    """Check one file. Whatever is wrong with it, or with this code, ends in a verdict."""
    compare = Comparisons()
    try:
        file = Vectors.read(path)
        kind_of(file).check(file, compare)
        worst = compare.worst
    except Unsupported as reason:
        return Verdict("SKIP", str(reason))
    except UserError as error:
        return Verdict("FAIL", str(error))
    except Exception as error:  # one bad file must not hide the verdict on the others
        return Verdict("FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}")
    reason = "; ".join([f"{worst}; {len(compare.done)} arrays", *compare.remarks])
    return Verdict("PASS" if worst.error <= worst.tolerance else "FAIL", reason)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with vectors of the reference, *.npz")
    folder: Path = parser.parse_args(arguments).folder
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        why = "holds no *.npz file" if folder.is_dir() else "is not a folder"
        print(f"{folder} {why}: nothing to check", file=sys.stderr)
        return 2
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    width = max(len(path.name) for path in paths)
    for path in paths:
        outcome, reason = check(path)
        counts[outcome] += 1
        print(f"{outcome}  {path.name:{width}}  {reason}", flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
