"""The table of results: complete files, many writers, read by others' tools; differences with their errors."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch

from md4.errors import UserError
from md4.likelihood import mean_and_error, ratio_and_error
from orchestration import results
from orchestration.results import Contributions, Result
from pipelines.storage import Folder

BEGAN = datetime(2026, 3, 1, tzinfo=UTC)


def figure(metric: str = "likelihood/pydocs/validation", value: float = 2.0, **others) -> Result:
    """A figure, like any other unless told otherwise."""
    facts = {
        "created": BEGAN, "suite": "nightly", "model": "small", "step": 7, "weights_hash": "abc", "unit": "bits",
        "better": "lower", "standard_error": 0.1, "samples": 64, "data_fingerprint": "f00", "settings": "5e7",
        "report": None, "attempt": "a1",
    }  # fmt: skip
    return Result.model_validate({**facts, "metric": metric, "value": value, **others})


@pytest.fixture(params=["local", "s3"])
def table(request, tmp_path):
    """A place for the table: a folder, and a prefix in S3."""
    if request.param == "local":
        return str(tmp_path / "results")
    request.getfixturevalue("s3")
    return "s3://bucket/team/results"


def test_figures_come_back_as_they_were(table):
    first = [figure(), figure("quality/entropy", 3.5, standard_error=None, version=4, report="a/b.json")]
    second = [figure(value=1.9, attempt="b2", created=BEGAN + timedelta(days=1), model="other", step=None)]
    rows = {"quality/entropy": Contributions.of_mean(np.array([3.0, 4.0]))}
    assert results.read(table) == []
    assert results.append(table, second)
    assert results.append(table, first, rows)
    assert results.read(table) == [*first, *second]  # by time, whatever the order of writing
    assert results.read(table, model="small", metric="quality/entropy") == first[1:]
    assert results.read(table, suite="weekly") == []
    (kept,) = results.contributions(table, "a1").values()
    assert kept.values.tolist() == [3.0, 4.0]
    assert results.contributions(table, "b2") == {}


def test_an_evaluation_counts_once(table):
    assert results.append(table, [figure()])
    assert not results.append(table, [figure(value=9.0)])
    assert [one.value for one in results.read(table)] == [2.0]
    with pytest.raises(UserError, match="a1, b2"):
        results.append(table, [figure(), figure(attempt="b2")])
    with pytest.raises(UserError, match="c3 has two figures called likelihood/pydocs/validation"):
        results.append(table, [figure(attempt="c3"), figure("m", attempt="c3"), figure(attempt="c3", value=1.0)])
    assert not results.has(table, "c3")


def test_many_writers(table):
    """Eight at once, four of which make the same evaluation: each evaluation is there once and whole."""
    wanted = [[figure(f"m{i}", attempt=f"a{min(k, 4)}", value=k) for i in range(3)] for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda part: results.append(table, part), wanted))
    assert sum(written) == 5
    assert sorted((one.attempt, one.metric) for one in results.read(table)) == [
        (f"a{k}", f"m{i}") for k in range(5) for i in range(3)
    ]


def test_plain_tools_read_it_as_one_data_set(tmp_path):
    for k in range(3):
        results.append(tmp_path, [figure(attempt=f"a{k}")], {"m": Contributions.of_mean(np.array([1.0, 2.0]))})
    assert ds.dataset(tmp_path, format="parquet").to_table().num_rows == 3
    assert pd.read_parquet(tmp_path)["value"].tolist() == [2.0] * 3


def test_a_damaged_file_is_named(tmp_path):
    results.append(tmp_path, [figure()])
    (tmp_path / "b2.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match=r"b2\.parquet"):
        results.read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"loss": 1.0}, "created is None: Input should be a valid datetime"),
        ({**figure().model_dump(), "value": "much"}, r"it can't be read: .*much"),
        ({**figure().model_dump(), "better": "sideways"}, "better is 'sideways': "),
    ],
)
def test_a_file_that_is_not_ours_is_named(table, columns, why):
    """Whatever else writes parquet into the folder: which file it is, and what to do."""
    results.append(table, [figure()])
    out = io.BytesIO()
    pd.DataFrame([columns]).astype({"version": "Int64"} if "version" in columns else {}).to_parquet(out, index=False)
    Folder(table).write("theirs.parquet", out.getvalue())
    with pytest.raises(UserError, match=rf"theirs\.parquet is no file of a table of results \(.*{why}.*move it"):
        results.read(table)


def test_contributions_give_the_errors_of_the_reports():
    """The same errors as `md4.likelihood` has: of a mean, of a ratio with clusters, and of exp of one."""
    random = np.random.default_rng(0)
    nats, tokens = random.gamma(3.0, size=40), random.integers(1, 9, 40)
    clusters = np.sort(random.integers(0, 12, 40))
    value, error = ratio_and_error(*(torch.from_numpy(part) for part in (nats, tokens, clusters)))
    kept = Contributions.of_ratio(nats, tokens, clusters)
    assert kept.standard_error == pytest.approx(error, rel=1e-12)
    assert len(kept.rows) == len(np.unique(clusters))
    through = kept.through(np.exp, math.exp(value))
    assert through.standard_error == pytest.approx(math.exp(value) * error, rel=1e-12)
    _, error = mean_and_error(torch.from_numpy(nats))
    assert Contributions.of_mean(nats).standard_error == pytest.approx(error, rel=1e-12)
    assert Contributions.of_mean(nats[:1]).standard_error is None


def test_rows_that_are_the_same_make_the_error_small(tmp_path):
    """Two models that find the same rows hard differ by far more than their own errors would tell."""
    random = np.random.default_rng(1)
    hard = random.normal(2.0, 0.5, 200)
    rows = {name: hard + shift + random.normal(0, 0.01, 200) for name, shift in (("a", 0.01), ("b", 0.0))}
    pair = []
    for name, values in rows.items():
        kept = Contributions.of_mean(values)
        pair.append(figure(value=values.mean(), standard_error=kept.standard_error, attempt=name))
        results.append(tmp_path, pair[-1:], {pair[-1].metric: kept})
    alone, paired = results.compare(*pair), results.compare(*pair, table=tmp_path)
    assert (alone.paired, paired.paired) == (False, True)
    assert alone.value == paired.value == pytest.approx(np.mean(rows["a"] - rows["b"]))
    assert paired.standard_error == pytest.approx(np.std(rows["a"] - rows["b"], ddof=1) / math.sqrt(200))
    assert alone.z < 1 < 5 < paired.z
    assert results.compare(pair[0], pair[0], tmp_path).z == 0


@pytest.mark.parametrize("change", [{"settings": "other"}, {"data_fingerprint": "other"}, {"unit": "nats"}])
def test_what_was_not_measured_alike_is_not_compared(change):
    (name,) = change
    with pytest.raises(UserError, match=f"{name} is .* of one, 'other' of the other" if name != "unit" else "unit"):
        results.compare(figure(), figure(**change))
    with pytest.raises(UserError, match="no standard error"):
        results.compare(figure(), figure(standard_error=None))
