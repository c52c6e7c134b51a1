"""Rules as YAML, and what they come to, requirement by requirement."""

import numpy as np
import pytest

from md4.errors import UserError
from orchestration.registry import promotion, rules
from orchestration.registry.judgement import Finding
from pipelines.storage import Folder
from tests.orchestration.registry.conftest import BITS, ENTROPY

NOISE = np.random.default_rng(0).normal(0, 1, 400)  # of rows: the same for all versions


def test_the_example_of_the_documentation():
    text = "\n".join(line for line in (rules.__doc__ or "").splitlines() if line.startswith("    "))
    (rule,) = rules.parse(text, "the docstring")
    assert (rule.name, rule.after, rule.max_age_days) == ("production", "staging", 30)
    assert [str(one) for one in rule.require] == ["better by 2 s.e.", "not worse by 1 s.e.", "within [4, 6]"]
    again = rules.parse(repr([rule.facts()]), "as the history has it")
    assert again == [rule]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: production\nrequires: []", "requires is no key of a rule; did you mean require?"),
        (
            "name: production\nrequire: [{metric: a, beter_by: 2}]",
            "require.1.beter_by is no key.* did you mean better_by?",
        ),
        (
            "name: production\nrequire: [{metric: a, better_by: -1}]",
            "require.1.better_by is -1: .*greater than or equal",
        ),
        ("name: production\nrequire: [{metric: a}]", "one of better_by, not_worse_by and within"),
        ("name: production\nrequire: [{metric: a, better_by: 1, not_worse_by: 1}]", "one of better_by"),
        ("name: production\nrequire: [{metric: a, within: [2, 1]}]", "first number must not be above"),
        ("name: production\nrequire: [{metric: a, within: 5}]", "two numbers such as .* or a percentage"),
        ("name: production\nrequire: [{metric: a, within: 5 per cent}]", "a percentage such as 5 %"),
        ("name: production\nrequire: [{metric: a, better_by: .nan}]", "require.1.better_by is nan"),
        ("name: production\nrequire: {metric: a, better_by: 1}", r"require is \{'metric.*: a list is allowed"),
        ("name: production\nrequire: [likelihood/a]", "require.1 is 'likelihood/a': a mapping is allowed"),
        ("name: production", "the rule for production requires nothing"),
        ("name: 7\nfrom: staging", "name '7'"),
        ("name: production\nfrom: latest", "'latest' is taken"),
        ("name: production\nfrom: staging\nmax_age_days: 0", "max_age_days is 0"),
        ("- {name: a, from: b}\n- {name: a, from: c}", "two rules for a"),
        ("- {name: a, from: b}\n- {name: c, form: d}", "rule 2: form is no key .* did you mean from?"),
        ("just words", "a rule is a mapping"),
        ("", "a rule is a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(text, expected):
    with pytest.raises(UserError, match=f"^here.*{expected}"):
        rules.parse(text, "here")


# -- judged ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def findings(three, tmp_path):
    """`findings(*requirements, **rule)`: what becomes of them if version 2 is to follow version 1."""
    three.promote("small", 1, "production")

    def judge(*require: str, **rule: object) -> tuple[Finding, ...]:
        file = tmp_path / "rules.yaml"
        rest = "".join(f"{key}: {value}\n" for key, value in rule.items())
        file.write_text(f"name: production\n{rest}require:\n" + "".join(f"- {{{one}}}\n" for one in require))
        wanted = promotion.Wanted(three.version("small", 2), "production", rules=file)
        decision = promotion.promote(three, wanted, Folder(tmp_path / "results"), dry_run=True)
        assert decision.allowed == (not decision.unmet)
        return decision.verdicts[0].findings

    return judge


@pytest.mark.parametrize(
    ("value", "requirement", "met", "why"),
    [
        (2.0 - 0.0425, "better_by: 3", True, "3.0 s.e. better"),  # its error is 0.01 * sqrt 2
        (2.0 - 0.0424, "better_by: 3", False, "3.0 s.e. better"),
        (2.0 + 0.0141, "not_worse_by: 1", True, "1.0 s.e. worse"),
        (2.0 + 0.0142, "not_worse_by: 1", False, "1.0 s.e. worse"),
        (2.0, "not_worse_by: 0", True, "no difference"),
        (2.0, "better_by: 0.1", False, "no difference"),
        (2.1, "within: 5 %", True, "inside"),
        (2.11, "within: 5 %", False, "above 2.1"),
        (1.89, "within: 5 %", False, "below 1.9"),
        (1.5, "'within': [1.5, 2]", True, "inside"),
        (1.49, "'within': [1.5, 2]", False, "below 1.5"),
    ],
)
def test_numbers(measured, findings, value, requirement, met, why):
    measured(1, 2.0)
    measured(2, value)
    (found,) = findings(f"metric: {BITS}, {requirement}")
    assert (found.met, found.why) == (met, why)


def test_higher_can_be_better(measured, findings):
    for version, value in ((1, 0.5), (2, 0.6)):
        measured(version, value, metric="prompts/exact", better="higher")
    assert findings("metric: prompts/exact, better_by: 2")[0].met
    measured(2, 0.4, metric="prompts/exact", better="higher")  # the newest counts
    (found,) = findings("metric: prompts/exact, not_worse_by: 1")
    assert not found.met


def test_rows_in_common_sharpen_the_difference(measured, findings):
    """0.02 apart with errors of 0.05 each says nothing; with the same rows in both it does."""
    for version, value in ((1, 2.0), (2, 1.98)):
        measured(version, value, rows=NOISE * (1 + version / 1000), standard_error=0.05)
    (found,) = findings(f"metric: {BITS}, better_by: 2")
    assert found.met
    assert found.difference is not None
    assert found.difference.paired
    assert found.difference.standard_error < 0.001


def test_a_pattern_means_what_either_was_measured_by(measured, findings):
    for version, metrics in ((1, ("likelihood/a", "likelihood/b")), (2, ("likelihood/b", "likelihood/c"))):
        for metric in metrics:
            measured(version, 2.0, metric=metric)
    found = {one.metric: (one.met, one.why) for one in findings("metric: likelihood/*, not_worse_by: 1")}
    assert found == {
        "likelihood/a": (False, "version 2 has no result of it"),
        "likelihood/b": (True, "no difference"),
        "likelihood/c": (False, "version 1, the present production, has no result of it"),
    }
    (nothing,) = findings("metric: zero_shot/*, not_worse_by: 1")
    assert (nothing.met, nothing.why) == (False, "version 2 has no result of it")


@pytest.mark.parametrize(
    ("unlike", "why"),
    [
        ({"settings": "s2"}, "not measured alike: settings s2 and s1"),
        ({"data_fingerprint": "d2"}, "not measured alike: data d2 and d1"),
        ({"unit": "nats"}, "not measured alike: unit nats and bits per character"),
    ],
)
@pytest.mark.parametrize("requirement", ["not_worse_by: 1", "better_by: 1", "within: 5 %"])
def test_what_was_not_measured_alike_is_not_compared(measured, findings, unlike, why, requirement):
    measured(1, 2.0)
    measured(2, 1.0, **unlike)
    (found,) = findings(f"metric: {BITS}, {requirement}")
    assert (found.met, found.why) == (False, why)
    measured(2, 1.99)  # an older one that is comparable is used, too
    measured(2, 1.0, **unlike)
    assert findings(f"metric: {BITS}, {requirement}")[0].new.value == 1.99


def test_without_errors_or_direction_there_is_only_within(measured, findings):
    for version in (1, 2):
        measured(version, 2.0, standard_error=None)
        measured(version, 5.0, metric=ENTROPY, better="neither")
    (found,) = findings(f"metric: {BITS}, not_worse_by: 9")
    assert not found.met
    assert "has no standard error" in found.why
    (found,) = findings(f"metric: {ENTROPY}, not_worse_by: 9")
    assert (found.met, found.why) == (False, "neither lower nor higher is better: ask for within")
    assert all(one.met for one in findings(f"metric: {BITS}, within: 1 %", f"metric: {ENTROPY}, within: 1 %"))


def test_old_results_count_as_none(measured, findings, clock):
    measured(1, 2.0)
    measured(2, 1.0)
    clock.advance(days=31)
    (found,) = findings(f"metric: {BITS}, better_by: 2", max_age_days=30)
    assert (found.met, found.why) == (False, "its newest result is 31 days old, at most 30 are allowed")
    measured(2, 1.0)  # the present version's may be old: its weights are the same
    assert findings(f"metric: {BITS}, better_by: 2", max_age_days=30)[0].met


def test_signed_off_before(three, measured, findings):
    measured(1, 2.0)
    measured(2, 1.0)
    requirement = f"metric: {BITS}, better_by: 2"

    def came() -> tuple[bool, str]:
        first = findings(requirement, **{"from": "staging"})[0]
        return first.met, first.why

    assert came() == (False, "version 2 was never staging")
    three.promote("small", 1, "staging")
    three.promote("small", 2, "staging", share=0.1)
    assert came() == (False, "version 2 was never staging")  # only tried
    three.confirm("small", "staging", 2)
    assert came() == (True, "it was")
    three.promote("small", 3, "staging")
    assert came() == (True, "it was")  # before
    three.promote("small", 2, "staging")
    three.rollback("small", "staging", "it lies")
    assert came() == (False, "taken back there 2026-03-01: it lies")
