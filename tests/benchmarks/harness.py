"""One small harness for every benchmark: variants interleaved in one run, medians and ranges, JSON.

Machines are shared and noisy, so absolute figures drift by a factor of two within minutes. Variants are therefore
run A B C A B C ..., each round starting with another one, and what counts is the ratio of a variant to the baseline
*within a round*.

A benchmark is a module `bench_NAME.py` with a `main()` that fills a `Benchmark` and calls `report()`. The JSON goes to
`tests/benchmarks/results/NAME.json`; what is committed there are the figures that the documentation quotes.
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Benchmark:
    """Figures of several variants, measured in interleaved rounds."""

    def __init__(self, name: str, unit: str, baseline: str, higher_is_better: bool = True):
        self.name, self.unit, self.baseline, self.higher_is_better = name, unit, baseline, higher_is_better
        self.rounds: list[dict[str, float]] = []
        self.notes: dict[str, Any] = {}
        self.goals: dict[str, tuple[str, float]] = {}

    def goal(self, variant: str, at_least: float, against: str | None = None) -> None:
        """Ask that `variant` reach `at_least` times `against` (the baseline)."""
        self.goals[variant] = (against or self.baseline, at_least)

    def run(self, variants: Mapping[str, Callable[[], float]], rounds: int) -> None:
        """Measure every variant once a round; each returns its figure."""
        names = list(variants)
        for number in range(rounds):
            start = number % len(names)
            figures = {}
            for name in names[start:] + names[:start]:
                figures[name] = variants[name]()
                print(
                    f"round {number + 1}/{rounds}  {name}: {figures[name]:,.1f} {self.unit}",
                    file=sys.stderr,
                    flush=True,
                )
            self.rounds.append(figures)

    def ratio(self, variant: str, against: str | None = None) -> list[float]:
        """Figure of `variant` over that of `against`, round by round."""
        return [figures[variant] / figures[against or self.baseline] for figures in self.rounds]

    def summary(self) -> dict[str, Any]:
        variants = {}
        for name in self.rounds[0]:
            figures = [figures[name] for figures in self.rounds]
            against, goal = self.goals.get(name, (self.baseline, None))
            ratios = self.ratio(name, against)
            variants[name] = {
                "median": statistics.median(figures),
                "min": min(figures),
                "max": max(figures),
                "ratio": {"to": against, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "goal": goal,
            }
        return {
            "benchmark": self.name,
            "unit": self.unit,
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python -m tests.benchmarks.bench_{self.name}",
            "machine": machine(),
            "rounds": self.rounds,
            "variants": variants,
            "notes": self.notes,
        }

    def report(self) -> None:
        """Print the table and write the JSON."""
        summary = self.summary()
        table = Table(title=f"{self.name} ({self.unit})")
        for column in ("variant", "median", "range", "ratio", "to", "goal"):
            table.add_column(column, justify="left" if column in ("variant", "to") else "right")
        for name, facts in summary["variants"].items():
            ratio = facts["ratio"]
            table.add_row(
                name,
                f"{facts['median']:,.1f}",
                f"{facts['min']:,.1f} .. {facts['max']:,.1f}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})",
                ratio["to"],
                "" if facts["goal"] is None else f">= {facts['goal']}",
            )
        console = Console(width=140)
        console.print(table)
        for key, value in self.notes.items():
            console.print(f"{key}: {value}", highlight=False)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
