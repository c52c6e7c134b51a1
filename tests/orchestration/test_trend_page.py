"""The trend page and its verbs: everything in one file, in the page's own colours, on any width; what became worse."""

import json
import os
import re
import shutil
import sys
from datetime import timedelta
from xml.etree import ElementTree

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from orchestration import results, trends
from orchestration.cli import main
from orchestration.results import Contributions
from orchestration.suites.page import against, render
from orchestration.suites.pictures import Axis, _view
from orchestration.trends import judge
from tests.orchestration.test_results import BEGAN, figure
from tests.orchestration.test_trends import measured

CHROMIUM = os.environ.get("MD4_CHROMIUM") or shutil.which("chromium")
PICTURES = "[...document.querySelectorAll('.card svg')].map(e => e.getBoundingClientRect().height)"


@pytest.fixture
def table(tmp_path):
    """Six evaluations of a bound and an entropy; in the last the bound is worse, row by row beyond doubt."""
    random = np.random.default_rng(0)
    hard, report = random.normal(3, 1, 64), tmp_path / "report.json"
    texts = [("a_c", "a<c", None), ("a_c", "abc", True)]
    fillings = [{"prompt": prompt, "text": text, "right": right} for prompt, text, right in texts]
    report.write_text(json.dumps({"fillings": fillings}))
    for i in range(6):
        shift = -i if i < 5 else -3.9
        kept = Contributions.of_mean(hard + shift + random.normal(0, 0.02, 64))
        common = {"attempt": f"a{i}", "step": 100 * (i + 1), "samples": 64}
        rows = [
            figure("likelihood/pydocs/validation", kept.values.mean(), standard_error=kept.standard_error, **common),
            figure("quality/distinct_2", 0.1 * i, standard_error=None, better="neither", unit="share", **common),
            figure("prompts/entropy", 1.0, better="neither", unit="nats", report=str(report), **common),
        ]
        results.append(tmp_path / "table", rows, {rows[0].metric: kept})
    return tmp_path / "table"


def page(table, model: str = "small") -> str:
    return render(model, trends.read(table, model), str(table), 0.01)


def test_it_says_what_became_worse(table):
    html = page(table)
    assert re.search(r"1 of 3 figures\s+is\s+worse than before", html)
    link = re.search(r'<a href="#([^"]*)">likelihood/pydocs/validation</a>: (.*?)</li>', html)
    assert link is not None
    assert f'id="{link[1]}"' in html
    assert re.fullmatch(r"\+0\.10\d\d ± 0\.00\d\d \(z \+\d+\.\d\) against step 500, row by row", link[2])
    assert "at most 1 %" in html
    only = [one for one in results.read(table) if (one.step or 0) < 600]
    calm = render("small", {"nightly": judge(only)}, str(table), 0.01)
    assert re.search(r"None of 3 figures\s+is worse", calm)


def test_what_the_newest_lacks_is_marked_and_not_counted(table):
    """The page and the command line mean the same evaluation: that which was measured last."""
    later = BEGAN + timedelta(days=1)
    results.append(table, [figure("prompts/entropy", 1.0, better="neither", attempt="b", step=700, created=later)])
    html = page(table)
    assert re.search(r"None of 1 figures\s+is worse", html)
    assert re.search(r'<article class="card older" id="nightly-likelihood-pydocs-validation">', html)
    assert "last measured at step 600: +0.1" in html
    assert html.index('id="nightly-prompts-entropy"') < html.index('id="nightly-likelihood')


def test_it_is_complete_in_itself_and_takes_its_colours_from_the_page(table):
    html = page(table)
    assert not re.search(r"<script|<link|<img|@import|url\(http|src=", html)
    assert "prefers-color-scheme: dark" in html
    pictures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert "evaluations by step" in (root.get("aria-label") or "")
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "#0102" not in picture
        assert "var(--accent)" in picture
    assert "var(--wrong)" in pictures[0]
    assert "var(--wrong)" not in pictures[1]
    assert page(table) == html or re.sub(r"\d\d:\d\d UTC", "", page(table)) == re.sub(r"\d\d:\d\d UTC", "", html)


def test_texts_are_shown_as_texts(table):
    html = page(table)
    assert "a&lt;c" in html
    assert "a<c" not in html
    assert '<span class="right">abc</span>' in html
    odd = [one.model_copy(update={"model": "<b>", "metric": "m/<i>"}) for one in measured(np.zeros((2, 1)))]
    html = render("<b>", {"nightly": judge(odd)}, "here", 0.01)
    assert "<b>" not in html
    assert "<i>" not in html


def test_what_was_measured_last_is_in_the_picture():
    """Though it is of an early step, and far from the last ones."""
    verdicts = [one.verdicts[0] for one in judge(measured(np.array([[90.0], [2.0], [1.0], [0.9], [0.8], [0.7]])))]
    assert _view(verdicts, verdicts[-1])[1] < 90 < _view(verdicts, verdicts[0])[1]


def test_axes():
    one = judge(measured(np.zeros((3, 1))))
    verdicts = [evaluation.verdicts[0] for evaluation in one]
    assert Axis.of(verdicts) == Axis("step", [1.0, 2.0, 3.0])
    assert (Axis("step", []).label(400_000), Axis("step", []).label(1500)) == ("400k", "1,500")
    timed = [trends.Verdict(v.result.model_copy(update={"step": None}), v.kind) for v in verdicts]
    assert Axis.of(timed).name == "time"
    assert Axis("time", []).label(timed[0].result.created.timestamp()).startswith("Mar 0")
    assert against(verdicts[0]) == "nothing to compare with yet"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium`, or its path in MD4_CHROMIUM")
def test_in_a_browser(table, tmp_path):
    """On a phone and a desk, light and dark: nothing wider than the screen, and no complaint of axe's."""
    file = tmp_path / "page.html"
    file.write_text(page(table).replace("<details>", "<details open>"), encoding="utf-8")
    with sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        for width, scheme in ((360, "light"), (1280, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            view.goto(f"file://{file}")
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            heights = view.evaluate(PICTURES)
            assert len(heights) == 3
            assert all(100 < height < 220 for height in heights)
            found = Axe().run(view)
            assert found.violations_count == 0, found.generate_report()
            view.close()
        browser.close()


def test_the_verbs(table, monkeypatch, capsys):
    def md4(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["md4", "results", *arguments, "--results", str(table)])
        main()
        return capsys.readouterr().out

    said = md4("show", "--metric", "prompts/entropy")
    assert said.count("prompts/entropy") == 6
    rows = [json.loads(line) for line in md4("show", "--json", "--model", "small").splitlines()]
    assert len(rows) == 18
    assert {row["attempt"] for row in rows} == {f"a{i}" for i in range(6)}
    assert "no such results" in md4("show", "--model", "other")
    said = md4("trend")
    assert re.search(r"likelihood/pydocs/validation .* worse .* against step 500, row by row", said)
    assert "worse than before in the newest evaluations: 1 (small, nightly: step 600)" in said
    assert (table / "_trends" / "small.html").is_file()
    assert len(results.read(table)) == 18  # pages are no part of the table
    with pytest.raises(SystemExit) as left:
        md4("trend", "--check", "--out", str(table.parent / "pages"))
    assert left.value.code == 1
    assert (table.parent / "pages" / "small.html").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        md4("trend", "--model", "smal")
    assert left.value.code == 2
    assert "there are those of small" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        md4("trend", "--suite", "nightli")
    assert "no results of a suite 'nightli'" in capsys.readouterr().err


def test_the_check_is_about_versions_and_steps_alike(table, monkeypatch, capsys):
    """What is worse in the run is found though a version of the same name stands behind it, and was measured later."""
    later = BEGAN + timedelta(days=1)
    results.append(table, [figure("likelihood/pydocs/validation", 9.0, attempt="v", version=1, created=later)])
    monkeypatch.setattr(sys, "argv", ["md4", "results", "trend", "--check", "--results", str(table)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().out
    assert left.value.code == 1
    assert "small, nightly, versions: version 1, measured 2026-03-02 00:00, the newest of 1" in said
    assert "worse than before in the newest evaluations: 1 (small, nightly, steps: step 600)" in said
