"""Jobs: files of requests, answered as a service answers them, whatever is wrong in them and whenever they end."""

import base64
import datetime
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration import cli
from orchestration.runs import Loaded, load_model
from orchestration.sampling import sample
from orchestration.serving import batch_jobs, job_desk, job_output
from orchestration.serving.batch_jobs import BatchJob
from orchestration.serving.engine import Engine
from orchestration.serving.errors import Refused
from orchestration.serving.job_desk import seed_of
from orchestration.serving.job_facts import Outcome
from orchestration.serving.job_input import LinesInput, open_input
from orchestration.serving.job_output import JobRecord, Lines
from orchestration.serving.messages import Drawn
from tests.orchestration.serving.conftest import Poisoned, Slow
from tests.orchestration.serving.small_model import small_images, small_model
from tests.orchestration.small_run import LENGTH, write_run

ROWS = "serving.engine.max_rows=8"  # of a call; nothing is measured
ANCESTRAL = SamplingConfig(sampler="ancestral", steps=24)  # as the small models have it


def model(**more) -> Loaded:
    return small_model(ROWS, **more)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return model()


def write_lines(path: Path, *requests) -> Path:
    """Lines of objects; bytes as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in requests]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    text = path.read_text("utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.split("\n")[:-1]]


def answer(loaded: Loaded, source: Path, output: Path, **more) -> Outcome:
    job = BatchJob(source, output, **{"seed": 1, "settings": loaded.config.sampling, **more})
    return batch_jobs.run(job, lambda: loaded, lambda _: None)


def texts(record: dict) -> list[str]:
    return [one["text"] for one in record["samples"]]


# --- answers ---


def test_answers_are_those_of_http_and_of_the_library(client, runs, tmp_path):
    requests = [
        {"prompt": "the _{3} of", "count": 3, "seed": 11, "sampling": {"steps": 9, "top_p": 0.9}, "order": True},
        {"length": 12, "seed": 4},
        {"prompt": "a", "seed": 5, "stop": " ", "sampling": {"sampler": "first_hitting", "steps": 6}},
        {"count": 2, "seed": 2**53 - 2, "length": 40, "sampling": {"block": 16, "steps": 8}},
        {"prompt": "_", "count": 99, "sampling": {"steps": 0}},
    ]
    output = tmp_path / "out.jsonl"
    answer(runs["small"], write_lines(tmp_path / "in.jsonl", *requests), output)
    records = read_lines(output)
    assert [list(record) for record in records] == [list(JobRecord.model_fields)] * len(requests)
    for record, request in zip(records[:-1], requests[:-1], strict=True):
        response = client.post("/v1/samples", json=request)
        assert response.status_code == 200, response.text
        found = response.json()
        assert (record["samples"], record["model"], record["error"]) == (found["samples"], found["model"], None)
    assert records[-1]["error"]["detail"] == client.post("/v1/samples", json=requests[-1]).json()["detail"]
    expected = sample(
        runs["small"], prompts=["the ___ of"], count=3, seed=11, settings=ANCESTRAL.changed({"steps": 9, "top_p": 0.9})
    )
    assert texts(records[0]) == [one.text for one in expected.samples]


def test_what_a_line_does_not_say_the_job_says(loaded, tmp_path):
    source = write_lines(
        tmp_path / "in.jsonl",
        {},
        {"count": 1, "length": None, "seed": 7},
        {"sampling": {"temperature": 0.5}, "stop": "a", "length": 20},
    )
    chosen = ANCESTRAL.changed({"steps": 6})
    cooler = chosen.changed({"temperature": 0.5})
    answer(loaded, source, tmp_path / "out.jsonl", count=2, length=10, stop=" ", settings=chosen)
    found = [texts(record) for record in read_lines(tmp_path / "out.jsonl")]
    wanted = [
        {"count": 2, "length": 10, "stop": " ", "seed": seed_of(1, 0)},
        {"count": 1, "stop": " ", "seed": 7},
        {"count": 2, "length": 20, "stop": "a", "seed": seed_of(1, 2), "settings": cooler},
    ]
    assert found == [[one.text for one in sample(loaded, **{"settings": chosen, **w}).samples] for w in wanted]


def test_seeds_follow_from_the_job_and_the_index():
    seeds = [seed_of(job, index) for job in range(2) for index in range(500)]
    assert len(set(seeds)) == len(seeds)
    gaps = torch.tensor(sorted(seeds)).diff()
    assert min(seeds) >= 0
    assert max(seeds) < 2**53 - 2**15
    assert int(gaps.min()) > 64  # samples of different requests share no seed
    assert seed_of(0, 0) == 1_328_151_102_350_261  # it must stay so: jobs are resumed by later versions


def test_images(tmp_path):
    loaded = small_images(ROWS)
    levels = [0] * 32 + [None] * 32
    source = write_lines(
        tmp_path / "in.jsonl", {"pixels": levels, "png": True, "id": "half"}, {"prompt": "0 1 2"}, {"length": 3}
    )
    outcome = answer(loaded, source, tmp_path / "out.parquet", settings=loaded.config.sampling.changed({"steps": 4}))
    first, second, third = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert first["samples"][0]["text"].split()[:32] == ["0"] * 32
    assert base64.b64decode(first["samples"][0]["png"]).startswith(b"\x89PNG")
    assert second["samples"][0]["text"].startswith("0 1 2 ")
    assert "this model makes images of 8 x 8" in third["error"]["detail"]
    assert (outcome.answered, outcome.refused) == (2, 1)


# --- what is wrong in a file ---

BAD = [
    (b"{", 422, "not valid JSON: EOF while parsing an object at character 1"),
    (b"[1]", 422, "a JSON object is wanted"),
    (b'{"prompt": "\xff"}', 422, "not UTF-8: byte 0xff at 12"),
    (b'{"prompt": NaN}', 422, "not valid JSON"),
    (b'{"prompt": "\\ud800"}', 422, "not valid JSON"),
    (b"[" * 1000, 422, "not valid JSON: recursion limit"),
    ({"promt": "a"}, 422, "unknown setting 'promt'; did you mean 'prompt'?"),
    ({"stream": True}, 422, "unknown setting 'stream'"),
    ({"steps": 3}, 422, "steps is a setting of the sampler: it belongs into the object 'sampling'"),
    ({"sampling": {"stepz": 3}}, 422, "did you mean 'steps'"),
    ({"count": "2"}, 422, "count='2': input should be a valid integer"),
    ({"count": 10**6}, 422, "count=1000000: at most 32768 samples"),
    ({"prompt": "é"}, 422, "'é'"),
    ({"prompt": "a" * 40}, 422, "the prompt has 40 tokens"),
    ({"prompt": "a", "pixels": [1]}, 422, "prompt and pixels: only one"),
    ({"label": 3}, 422, "this model has no classes"),
]


def test_a_bad_line_is_a_record_and_no_end(loaded, tmp_path):
    source = write_lines(
        tmp_path / "in.jsonl",
        *[line if isinstance(line, bytes) else {**line, "id": place} for place, (line, _, _) in enumerate(BAD)],
        {"prompt": "good", "id": "é\u2028🙂", "metadata": {"deep": [{"a": None}], "n": 1.5, "big": 10**30}},
    )
    outcome = answer(loaded, source, tmp_path / "out.jsonl")
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["index"] for record in records] == list(range(len(BAD) + 1))
    for place, (record, (line, status, detail)) in enumerate(zip(records, BAD, strict=False)):
        assert record["error"] is not None, line
        assert (record["error"]["status"], record["samples"]) == (status, None)
        assert detail in record["error"]["detail"], record
        assert record["id"] == (None if isinstance(line, bytes) else place)
        assert record["model"] == {"hash": loaded.weights_hash, "step": 7}
    assert records[-1]["id"] == "é\u2028🙂"
    assert records[-1]["metadata"] == {"deep": [{"a": None}], "n": 1.5, "big": 10**30}
    assert texts(records[-1])[0].startswith("good")
    assert (outcome.answered, outcome.refused) == (1, len(BAD))
    assert outcome.problem == records[0]["error"]["detail"]


def test_lines_are_found_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestration.serving.job_input.LONGEST_LINE", 32)
    source = tmp_path / "in.jsonl"
    long = b'{"prompt": "' + b"a" * 100 + b'"}'
    source.write_bytes(b'\xef\xbb\xbf{"seed": 0}\r\n\n  \n' + long + b'\n{"seed": 2}\n' + b" " * 31 + b'\n{"seed": 3}')
    found = LinesInput(source)
    assert found.count == 4
    contents = [row.content for row in found.rows()]
    assert [c if isinstance(c, dict) else c.status for c in contents] == [{"seed": 0}, 413, {"seed": 2}, {"seed": 3}]
    assert [row.content for row in found.rows(2)] == [{"seed": 2}, {"seed": 3}]


def test_a_network_that_answers_nan_fails_each_request_alone(tmp_path):
    loaded = model()
    loaded.model.network = Poisoned(loaded.model.network)
    outcome = answer(loaded, write_lines(tmp_path / "in.jsonl", {}, {"id": 1}), tmp_path / "out.jsonl")
    assert (outcome.answered, outcome.refused) == (0, 2)
    assert [record["error"]["status"] for record in read_lines(tmp_path / "out.jsonl")] == [500, 500]


def test_an_empty_file_has_an_empty_answer(loaded, tmp_path):
    for ending in ("jsonl", "parquet"):
        outcome = answer(loaded, write_lines(tmp_path / "in.jsonl"), tmp_path / f"out.{ending}")
        assert outcome == Outcome(answered=0, refused=0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


# --- tables ---


def test_tables_in_and_out(loaded, tmp_path):
    when = [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=n) for n in range(5)]
    table = pa.table(
        {
            "id": pa.array(when, pa.timestamp("us", "UTC")),
            "prompt": ["the _{3} of", None, "é", "b", "c"],
            "count": pa.array([2.0, None, None, 1.5, None]),  # as data frames write whole numbers with gaps
            "seed": pa.array([5, None, None, None, 9], pa.int32()),
            "sampling": pa.array(
                [{"steps": 3, "sampler": None}, None, None, None, {"steps": None, "sampler": "confidence"}]
            ),
            "metadata": pa.array([[("k", 1)], [], None, [("a", 2), ("b", None)], []], pa.map_(pa.string(), pa.int8())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    outcome = answer(loaded, tmp_path / "in.parquet", tmp_path / "out.parquet", length=10)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == list(JobRecord.model_fields)
    assert found["id"].equals(table["id"])
    assert found["metadata"].equals(table["metadata"])
    assert (outcome.answered, outcome.refused) == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet", "out.parquet.job.json"]
    rows = found.to_pylist()
    expected = [
        sample(loaded, prompts=["the ___ of"], count=2, length=10, seed=5, settings=ANCESTRAL.changed({"steps": 3})),
        sample(loaded, length=10, seed=seed_of(1, 1)),
        None,
        None,
        sample(loaded, prompts=["c"], length=10, seed=9, settings=SamplingConfig(sampler="confidence")),
    ]
    for index, (row, want) in enumerate(zip(rows, expected, strict=True)):
        assert (row["index"], row["model"]["step"]) == (index, 7)
        assert (row["samples"] and texts(row)) == (want and [one.text for one in want.samples])
        assert (row["error"] is None) == (want is not None)
    assert "'é'" in rows[2]["error"]["detail"]
    assert "count=1.5" in rows[3]["error"]["detail"]
    # The same as lines; what JSON has no form for is text.
    answer(loaded, tmp_path / "in.parquet", tmp_path / "out.jsonl", length=10)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["samples"] and texts(line) for line in lines] == [row["samples"] and texts(row) for row in rows]
    assert lines[1]["id"] == "2024-01-02T00:00:00Z"
    assert lines[3]["metadata"] == {"a": 2, "b": None}


def test_lines_become_a_table(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(job_output, "_ROWS", 3)
    requests = [{"id": index, "length": 4, "order": True} for index in range(6)]
    requests += [{"id": "x 🙂", "metadata": {"ü": [1]}, "length": 4}, {"length": 4}]
    answer(loaded, write_lines(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl")
    answer(loaded, tmp_path / "in.jsonl", tmp_path / "out.parquet")
    rows, lines = pq.read_table(tmp_path / "out.parquet").to_pylist(), read_lines(tmp_path / "out.jsonl")
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5", "x 🙂", None]
    assert rows[6]["metadata"] == '{"ü": [1]}'
    for row, line in zip(rows, lines, strict=True):
        for one in row["samples"]:
            one["counted"] = dict(one["counted"])
        for field in ("index", "samples", "model", "error"):
            assert row[field] == line[field]


def test_a_table_has_all_that_a_sample_has():
    assert [field.name for field in job_output._SAMPLE] == list(Drawn.model_fields)


@pytest.mark.parametrize("skip", range(8))
def test_rows_are_skipped_across_row_groups(tmp_path, skip):
    pq.write_table(pa.table({"seed": range(7)}), tmp_path / "in.parquet", row_group_size=3)
    assert [row.content for row in open_input(tmp_path / "in.parquet").rows(skip)] == [
        {"seed": seed} for seed in range(skip, 7)
    ]


def test_a_row_that_is_no_text_is_refused_alone(tmp_path):
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "in.parquet")
    first, second, third = [row.content for row in open_input(tmp_path / "in.parquet").rows()]
    assert (first, third) == ({"prompt": "a"}, {"prompt": "c"})
    assert isinstance(second, Refused)
    assert "can't decode byte 0xff" in second.detail


# --- before anything is started ---


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"promt": ["a"]}, "unknown column 'promt'; did you mean 'prompt'"),
        ({"split": ["dev"]}, "A column of your own can travel inside of 'metadata'"),
    ],
)
def test_columns_are_checked_first(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=expected.replace("'", ".")):
        open_input(tmp_path / "in.parquet")


def test_mistakes_cost_nothing(loaded, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {})
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    (tmp_path / "folder.jsonl").mkdir()
    there = sorted(tmp_path.iterdir())
    for name, output, more, expected in [
        ("absent.jsonl", "out.jsonl", {}, "No such file"),
        ("folder.jsonl", "out.jsonl", {}, "Is a directory"),
        ("bad.parquet", "out.jsonl", {}, "can't read .*bad.parquet"),
        ("in.csv", "out.jsonl", {}, "--input .*in.csv: the name must end in .jsonl, .ndjson, .parquet"),
        ("in.jsonl", "out.json", {}, "--output .*out.json: the name must end in"),
        ("in.jsonl", "in.jsonl", {}, "exists already"),
        ("in.jsonl", "out.jsonl", {"count": 0}, "count=0: input should be greater"),
        ("in.jsonl", "out.jsonl", {"seed": -1}, "seed=-1"),
        ("in.jsonl", "out.jsonl", {"stop": "two words"}, "stop"),
        ("in.jsonl", "out.jsonl", {"label": 2}, "no classes"),
        ("in.jsonl", "out.jsonl", {"settings": SamplingConfig(sampler="race")}, "sampler=race is not for models"),
    ]:
        with pytest.raises(UserError, match=expected):
            answer(loaded, tmp_path / name, tmp_path / output, **more)
    assert sorted(tmp_path.iterdir()) == there
    assert source.read_bytes() == b"{}\n"


# --- resuming ---

REQUESTS = [{"prompt": "ab", "count": 2, "length": 8, "id": "🙂"}, b"{", {"length": 5}, {"length": 5, "seed": 3}]


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory) -> tuple[Path, bytes, bytes]:
    """A job that nothing interrupted: its input, its output, and what tells of what job it is."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_lines(folder / "in.jsonl", *REQUESTS)
    answer(loaded, source, folder / "out.jsonl")
    begun = json.loads((folder / "out.jsonl.job.json").read_bytes())
    return source, (folder / "out.jsonl").read_bytes(), json.dumps({**begun, "outcome": None}).encode()


@settings(max_examples=16, deadline=None)
@example(share=0.0, table=False)
@example(share=1.0, table=True)
@given(share=st.floats(0, 1), table=st.booleans())
def test_a_job_that_was_killed_at_any_byte_ends_the_same(loaded, whole, tmp_path_factory, share, table):
    folder = tmp_path_factory.mktemp("cut")
    source, expected, begun = whole
    output = folder / ("out.parquet" if table else "out.jsonl")
    lines = folder / "out.parquet.lines" if table else output
    cut = expected[: round(share * len(expected))]
    lines.write_bytes(cut)
    (folder / f"{output.name}.job.json").write_bytes(begun)
    if table and share == 1:
        output.write_bytes(b"a table that nobody knows to be complete")
    outcome = answer(loaded, source, output, resume=True, seed=None)
    assert (outcome.answered, outcome.refused) == (3, 1)
    if table:
        assert not lines.exists()
        rows = pq.read_table(output).to_pylist()
        wanted = [json.loads(line) for line in expected.splitlines()]
        assert [row["samples"] and texts(row) for row in rows] == [one["samples"] and texts(one) for one in wanted]
    else:
        assert output.read_bytes() == expected
    assert answer(loaded, source, output, resume=True) == outcome  # there is nothing left to do


def test_a_job_is_resumed_only_as_what_it_was(loaded, whole, tmp_path):
    source, expected, begun = whole
    output = tmp_path / "out.jsonl"
    half = expected[: len(expected) // 2]
    output.write_bytes(half)
    with pytest.raises(UserError, match=r"can't be resumed: .*out.jsonl.job.json"):
        answer(loaded, source, output, resume=True)
    (tmp_path / "out.jsonl.job.json").write_bytes(begun)
    with pytest.raises(UserError, match=r"out.jsonl exists already: --resume goes on with it"):
        answer(loaded, source, output)
    other = write_lines(tmp_path / "other.jsonl", *REQUESTS, {})
    for other_model, given_source, more, expected_words in [
        (loaded, source, {"seed": 2}, "seed: the job has 1, given is 2"),
        (loaded, source, {"count": 3}, "defaults.count: the job has 1, given is 3"),
        (loaded, source, {"settings": ANCESTRAL.changed({"steps": 5})}, "settings.steps: the job has 24, given is 5"),
        (loaded, other, {}, "input.sha256: "),
        (model(step=8), source, {}, "model.step: the job has 7, given is 8"),
    ]:
        with pytest.raises(UserError, match=expected_words):
            answer(other_model, given_source, output, resume=True, **more)
    with closing(Lines(output)), pytest.raises(UserError, match="is being written by another job"):
        answer(loaded, source, output, resume=True)
    assert output.read_bytes().startswith(half[: half.rindex(b"\n") + 1])
    output.write_bytes(expected.replace(b'"index":1', b'"index":4'))
    with pytest.raises(UserError, match="line 2 is not what a job has written"):
        answer(loaded, source, output, resume=True)


def test_resuming_what_never_began_begins_it(loaded, whole, tmp_path):
    answer(loaded, whole[0], tmp_path / "out.jsonl", resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole[1]


def test_ctrl_c_leaves_what_is_done(loaded, whole, tmp_path, monkeypatch):
    source, expected, _ = whole
    write = Lines.write

    def interrupted(self, record):
        write(self, record)
        if self.count == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Lines, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                answer(loaded, source, tmp_path / "out.jsonl")
    finally:
        signal.signal(signal.SIGINT, before)
    assert expected.startswith((tmp_path / "out.jsonl").read_bytes())
    answer(loaded, source, tmp_path / "out.jsonl", resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_an_engine_that_fails_ends_the_job_and_no_request(whole, tmp_path):
    class Failing(Slow):
        def forward(self, z, t, labels=None):
            raise torch.AcceleratorError("device-side assert")

    sick = model()
    sick.model.network = Failing(sick.model.network)
    with pytest.raises(UserError, match=r"engine has failed.*0 requests are done, --resume goes on"):
        answer(sick, whole[0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    answer(model(), whole[0], tmp_path / "out.jsonl", resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == whole[1]


# --- order, and what is kept in memory ---


class Counted(LinesInput):
    """Tells how many more requests were read than written."""

    read = written = most = 0

    def rows(self, skip=0):
        for row in super().rows(skip):
            Counted.read += 1
            Counted.most = max(Counted.most, Counted.read - Counted.written)
            yield row


@pytest.fixture
def counted(monkeypatch):
    write = Lines.write

    def noted(self, record):
        write(self, record)
        Counted.written += 1

    Counted.read = Counted.written = Counted.most = 0
    monkeypatch.setattr(batch_jobs, "open_input", Counted)
    monkeypatch.setattr(Lines, "write", noted)
    return Counted


def test_records_come_in_order_and_few_requests_are_in_memory(loaded, tmp_path, counted):
    steps = [1, 20, 3, 9]
    requests = [{"length": 4, "id": n, "sampling": {"steps": steps[n % 4]}} for n in range(500)]
    requests[5::7] = [b"{"] * len(requests[5::7])
    answer(loaded, write_lines(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl")
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["index"] for record in records] == list(range(500))
    assert all(record["id"] == (None if record["error"] else record["index"]) for record in records)
    # Calls take 8 rows of 32 tokens, or 64 of 4: four calls' worth, some that wait for their order, and a few bad ones.
    assert counted.read == counted.written == 500
    assert 32 < counted.most < 600


def test_a_request_that_takes_long_does_not_fill_the_memory(loaded, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(job_desk, "_HELD", 50 * 4200)
    first = {"length": LENGTH, "sampling": {"sampler": "p2", "steps": 100}}
    requests = [first, *[{"length": 4, "sampling": {"steps": 1}}] * 200]
    answer(loaded, write_lines(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl")
    assert 45 < counted.most < 55
    assert len(read_lines(tmp_path / "out.jsonl")) == 201


def test_calls_are_full(tmp_path, monkeypatch):
    engines = []
    monkeypatch.setattr(batch_jobs, "Engine", lambda *a, **k: engines.append(Engine(*a, **k)) or engines[0])
    loaded = model()
    loaded.model.network = Slow(loaded.model.network)
    answer(
        loaded,
        write_lines(tmp_path / "in.jsonl", *[{"sampling": {"sampler": "p2", "steps": 4}}] * 64),
        tmp_path / "o.jsonl",
    )
    stats = engines[0].stats()
    assert stats.rows_of_calls == 4 * 64
    assert stats.calls <= 4 * 64 / 8 + 4
    assert stats.refused == 0


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), ROWS)


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["md4", "sample", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"promt": "b"}, {"count": 1})
    bad, output = write_lines(tmp_path / "bad.jsonl", b"{"), tmp_path / "new" / "out.jsonl"
    wanted = ["--input", source, "--output", output, "steps=5", "--count", 2, "--seed", 3]
    assert command(monkeypatch, folder, *wanted) == 0
    said = capsys.readouterr().out
    assert "3 requests; step 7, seed 3" in said
    assert f"2 answered, 1 refused; written: {output}" in said
    first, _, third = read_lines(output)
    expected = sample(
        load_model(folder), prompts=["a"], count=2, seed=seed_of(3, 0), settings=ANCESTRAL.changed({"steps": 5})
    )
    assert texts(first) == [one.text for one in expected.samples]
    assert len(third["samples"]) == 1
    assert command(monkeypatch, folder, *wanted) == 2
    assert "exists already: --resume goes on" in capsys.readouterr().err
    assert command(monkeypatch, folder, *wanted, "--resume") == 0
    assert "is complete" in capsys.readouterr().out
    for arguments, expected in [
        (["--input", source], "a job needs --input FILE and --output FILE"),
        ([*wanted, "--prompt", "a"], "--prompt does not go with --input"),
        (["--resume"], "a job needs --input"),
        (["--input", bad, "--output", tmp_path / "b.jsonl"], "no request could be answered; the first: not valid JSON"),
    ]:
        assert command(monkeypatch, folder, *arguments) == 2
        assert expected in capsys.readouterr().err


KILLED = """
import os, signal
from orchestration import cli
from orchestration.serving.job_output import Lines

def write_and_die(self, record, write=Lines.write):
    write(self, record)
    if self.count == 7:
        os.kill(os.getpid(), signal.SIGKILL)

Lines.write = write_and_die
cli.main()
"""


def test_a_killed_process_is_resumed(folder, tmp_path, monkeypatch):
    requests = [{"prompt": "ab_{4}", "length": 6, "id": n, "sampling": {"steps": 5 + n % 7}} for n in range(40)]
    source, output = write_lines(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl"
    wanted = ["--input", str(source), "--output", str(output), "--seed", "5"]
    program = [sys.executable, "-c", KILLED, "sample", str(folder), *wanted]
    assert subprocess.run(program, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    left = output.read_bytes()
    assert left.count(b"\n") == 7
    assert command(monkeypatch, folder, *wanted, "--resume") == 0
    assert output.read_bytes().startswith(left)
    answer(load_model(folder), source, tmp_path / "again.jsonl", seed=5)
    assert output.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
