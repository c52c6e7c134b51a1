"""The learned powers for a reader: that early means early, and nothing is lost."""

import csv
import re

import numpy as np
import torch

from md4 import noise
from md4.schedules import LearnedPolynomial
from orchestration.powers import by_order, table, token_names, write
from pipelines.vocabularies import BytePairs, vocabulary

POWERS = [1.0, 0.25, 4.0, 1.5]


def test_the_order_and_its_figures_are_those_of_simulated_samples():
    """Times at which tokens appear, drawn from the schedule itself: 100,000 of each, to 5 standard deviations (false
    alarm 4e-6, the seed is fixed). A token is visible at t iff its uniform is below alpha(t): it appears where that
    happens first on the way from t = 1 to 0."""
    n = 100_000
    schedule = LearnedPolynomial(len(POWERS), eps=1e-12).double()
    powers = torch.tensor(POWERS, dtype=torch.float64)
    schedule.w.data = torch.log(torch.expm1(powers))
    uniforms = noise.uniform(noise.key(0, "times"), torch.arange(n * len(POWERS))).view(n, -1)
    times = (1 - uniforms) ** (1 / powers)  # alpha(t) = uniform
    assert torch.allclose(schedule.alpha(times, schedule()), uniforms, atol=1e-9)

    order = times.mean(0).argsort(descending=True).tolist()  # large t comes first when sampling
    assert by_order(POWERS) == order == [2, 3, 0, 1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| \S+ \| (\S+) \| (\S+) \| (\S+)% \|$", table(POWERS, str, "x"), re.M)
    assert [int(row[1]) for row in rows] == order
    mean = sum(POWERS) / len(POWERS)
    average = noise.uniform(noise.key(1, "times"), torch.arange(n)) ** (1 / mean)
    for _, token, power, half, before in rows:
        mine = times[:, int(token)]
        assert float(power) == POWERS[int(token)]
        assert abs((mine > float(half)).double().mean() - 0.5) < 5 * (0.25 / n) ** 0.5 + 1e-2  # three digits of t
        assert abs((mine > average).double().mean() - float(before) / 100) < 5 * (0.25 / n) ** 0.5 + 1e-3


def test_table_numbers_and_picture_are_written(tmp_path):
    powers = np.linspace(0.5, 2, 27).tolist()
    files = write(powers, token_names(vocabulary("text8")), "run: powers after 7 steps", tmp_path / "reports")
    assert [file.name for file in files] == ["powers.md", "powers.csv", "powers.png"]
    text = files[0].read_text()
    assert "# run: powers after 7 steps" in text
    assert "| 1 | 26 | ' ' | 2.0000 |" in text
    assert "| 27 | 0 | 'a' | 0.5000 |" in text
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["power"]) for row in rows] == [float(f"{power:.6g}") for power in powers]
    assert rows[3]["token"] == "'d'"
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["powers.csv", "powers.md", "powers.png"]


def test_a_long_vocabulary_is_shown_by_its_ends(tmp_path):
    powers = np.linspace(0.5, 2, 500).tolist()
    files = write(powers, str, "x", tmp_path)
    lines = [line for line in files[0].read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 65
    assert lines[0].startswith("| 1 | 499 ")
    assert lines[-1].startswith("| 500 | 0 ")
    assert "436 more" in lines[32]
    assert len(files[1].read_text().splitlines()) == 501


def test_tokens_without_a_text_are_shown_by_number(tmp_path):
    assert token_names(vocabulary("text8"))(30) == "#30"
    assert token_names(BytePairs(str(tmp_path)))(7) == "#7"
