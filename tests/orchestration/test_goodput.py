"""Where a run's time went, from events and progress with known times."""

import json

import pytest

from orchestration import progress
from orchestration.goodput import Goodput, handover
from orchestration.progress import Progress


def spent(train: float, data: float = 0.0) -> dict[str, float]:
    return {"train": train, "data": data, "evaluation": 0.0, "checkpoint": 0.0}


def driver(at: float, did: str = "began") -> dict:
    return {"kind": "driver", "time": at, "did": did}


def test_a_kill_and_a_night_off():
    """Start at 100, first step at 110; killed at 150 with 30 steps, of which 20 are kept; resumed at 1000 by hand."""
    events = [driver(100.0)]
    first = handover(events, None, 0, spent(0), now=110.0)
    assert first == {"lost": 0, "lost_seconds": 0.0, "start_seconds": 10.0, "away_seconds": 0.0}
    events += [{"kind": "workers", "time": 110.0, "workers": 2, **first}]
    noted = {"time": 150.0, "step": 30, "spent": spent(36, 4)}
    automatic = handover(events, noted, 20, spent(25, 3), now=162.0)
    assert automatic == {"lost": 10, "lost_seconds": 12.0, "start_seconds": 12.0, "away_seconds": 0.0}
    events += [driver(155.0, "ended"), driver(1000.0)]
    by_hand = handover(events, noted, 20, spent(25, 3), now=1012.0)
    assert by_hand == {"lost": 10, "lost_seconds": 12.0, "start_seconds": 17.0, "away_seconds": 845.0}
    events += [{"kind": "workers", "time": 1012.0, "workers": 2, **by_hand}]

    account = Goodput.of(events, {"spent": spent(75, 6), "time": 1065.0})
    assert account is not None
    told = account.at(1065.0)
    assert (told["restarts"], told["lost_steps"]) == (1, 10)
    assert told["seconds"]["total"] == 120.0  # 965 s, 845 of which nobody was at it
    assert told["goodput"] == pytest.approx(75 / 120)
    assert sum(v for cause, v in told["seconds"].items() if cause != "total") == pytest.approx(120)


def test_no_workers_no_account():
    assert Goodput.of([driver(1.0)], None) is None


def test_the_last_step_is_known_though_the_note_is_older(tmp_path):
    noting = Progress(tmp_path, 3, lambda: {"phase": "here", "spent": spent(1)})
    assert progress.read(tmp_path)["step"] == 3  # type: ignore[index]
    noting.finished(8)
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 3
    found = progress.read(tmp_path)
    assert found is not None
    assert (found["step"], found["phase"]) == (8, "here")
    noting.close()
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 8


def test_no_progress_and_a_torn_one(tmp_path):
    assert progress.read(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"step": 3')
    assert progress.read(tmp_path) is None
