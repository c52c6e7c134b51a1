"""What the demos share, and the demo of images from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from orchestration.phases import Demo
from tests.orchestration.small_run import write_run


def test_an_earlier_run_is_kept(tmp_path, capsys):
    path = write_run(tmp_path)
    Demo(path).keep_earlier()
    assert not path.exists()
    (kept,) = tmp_path.iterdir()
    assert (kept / "config.yaml").is_file()
    assert str(kept) in capsys.readouterr().out.replace("\n", "")
    Demo(path).keep_earlier()  # nothing is there any more


def test_phases_take_their_time_and_the_summary_is_written(tmp_path, capsys):
    demo = Demo(write_run(tmp_path))
    (demo.run / "reports").mkdir(exist_ok=True)
    with demo.phase("first", "1. something"):
        pass
    assert list(demo.seconds) == ["first"]
    demo.finish({"answer": 42}, ["a line [not markup]"])
    assert json.loads((demo.run / "reports" / "summary.json").read_text()) == {"answer": 42}
    assert "a line [not markup]" in capsys.readouterr().out


def test_a_failed_command_ends_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        Demo(tmp_path / "run").md4("train", "no-such-preset")
    assert caught.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_of_images(tmp_path):
    """Clearly below what pixels by themselves cost: 0.3 bits per dimension are 15 standard errors."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-m", "orchestration.demo_images"], cwd=tmp_path, env=environment, check=True)
    reports = tmp_path / "runs" / "demo-images" / "reports"
    summary = json.loads((reports / "summary.json").read_text())
    assert summary["bits_per_dimension_before"] == pytest.approx(4.0875, abs=0.001)  # log2(17): the head starts at zero
    assert summary["bits_per_dimension_after"] < summary["independent_bits"] - 0.3
    assert min(Image.open(reports / "story.png").size) > 800
