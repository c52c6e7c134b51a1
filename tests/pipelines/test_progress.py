"""Lines that say how far a pass is, by a clock that does not run."""

from pipelines.progress import Lines


def test_a_line_every_ten_seconds():
    now, said = [0.0], []
    lines = Lines("data", 100_000_000, said.append, lambda: now[0])
    for seconds in (1, 9, 10, 15, 20.5, 40):
        now[0] = seconds
        lines.advance(10_000_000)
    assert said == [
        "data: 30.0 of 100.0 MB, 3.00 MB/s, 0:23 left",
        "data: 50.0 of 100.0 MB, 2.44 MB/s, 0:20 left",
        "data: 60.0 of 100.0 MB, 1.50 MB/s, 0:27 left",
    ]
    now[0] = 60
    lines.advance(40_000_000)  # the end is said by others
    assert len(said) == 3
