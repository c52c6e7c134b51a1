"""From prompts to texts, as the command line asks for them, on a run's folder as it lies on disk."""

import numpy as np
import pytest
import torch

from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration.runs import load_model
from orchestration.sampling import SEED_LIMIT, Answer, Request, SampleReport, answer, override, prepare, sample
from tests.orchestration.small_run import LENGTH, write_run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(write_run(tmp_path_factory.mktemp("runs")))


def test_free_samples(loaded):
    report = sample(loaded, count=3, seed=5)
    assert [s.seed for s in report.samples] == [5, 6, 7]
    assert len({s.text for s in report.samples}) == 3
    for one in report.samples:
        assert len(one.text) == LENGTH
        assert set(one.text) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert 1 <= one.calls <= report.network_calls
    assert report.settings == loaded.config.sampling
    assert (report.mode, report.draws, report.step) == ("exact", 3 * LENGTH, 7)
    assert SampleReport.model_validate_json(report.model_dump_json()) == report


def test_a_samples_seed_gives_it_again(loaded):
    first = sample(loaded, prompts=["a _ b"], count=4, seed=20)
    again = sample(loaded, prompts=["a _ b"], count=1, seed=22)
    assert again.samples[0].text == first.samples[2].text
    chosen = sample(loaded)
    assert sample(loaded, seed=chosen.samples[0].seed).samples == chosen.samples


def test_prompts_stand_and_holes_are_filled(loaded):
    prompts = ["the ____ of", "Once upon", "_" * LENGTH, "x" * LENGTH]
    report = sample(loaded, prompts=prompts, count=2, seed=0)
    assert report.prompts == [p for p in prompts for _ in range(2)]
    assert [s.seed for s in report.samples] == list(range(8))
    for one, prompt in zip(report.samples, report.prompts, strict=True):
        assert len(one.text) == LENGTH
        assert "_" not in one.text
        assert all(p in ("_", t) for p, t in zip(prompt.lower(), one.text, strict=False))
    assert [s.calls for s in report.samples[-2:]] == [0, 0]


def test_length_and_settings(loaded):
    settings = SamplingConfig(steps=3, temperature=0.7, leftovers="argmax")
    report = sample(loaded, prompts=["ab_"], length=6, seed=1, settings=settings)
    assert len(report.samples[0].text) == 6
    assert report.samples[0].calls <= 4
    assert (report.settings, report.mode) == (settings, "exact, argmax leftovers")


def test_text_of_a_report(loaded):
    report = sample(loaded, prompts=["th_"], count=2, seed=3)
    text = report.text()
    for one in report.samples:
        assert one.text in text
    assert "seed 3" in text
    assert "'th_'" in text


def test_requests_of_any_kind_together(loaded):
    """Mixed lengths, settings and counts in one call: each gets what it gets alone, in its own place."""
    requests = [
        Request(count=2, seed=1),
        Request(prompt="a_", length=5, seed=2, order=True),
        Request(seed=3, settings=SamplingConfig(steps=2, top_p=0.5)),
        Request(prompt="b__", length=5, count=3, seed=4, settings=SamplingConfig(temperature=2)),
    ]
    jobs = [prepare(loaded, request) for request in requests]
    together = answer(loaded, requests, jobs, batch_size=3)
    for request, job, one in zip(requests, jobs, together, strict=True):
        (alone,) = answer(loaded, [request], [job])
        assert isinstance(one, Answer)
        assert isinstance(alone, Answer)
        assert one.samples == alone.samples
    order = together[1].samples[0].order  # type: ignore[union-attr]
    assert order is not None
    assert order[0] == -1
    assert all(step >= 0 for step in order[1:])


def test_a_model_that_answers_nan_spoils_only_what_it_answers(tmp_path):
    broken = load_model(write_run(tmp_path))
    network = broken.model.network

    class Poisoned(torch.nn.Module):
        def forward(self, z, t, labels=None):
            return torch.where((z[:, 0] == 0)[:, None, None], torch.nan, network(z, t, labels))

    requests = [Request(prompt="b", seed=1), Request(prompt="a", seed=1)]
    jobs = [prepare(broken, request) for request in requests]
    sound = answer(broken, requests, jobs)[0]
    broken.model.network = Poisoned()
    found = answer(broken, requests, jobs)
    assert isinstance(sound, Answer)
    assert isinstance(found[0], Answer)
    assert found[0].samples == sound.samples
    assert isinstance(found[1], UserError)
    with pytest.raises(UserError, match="NaN"):
        sample(broken, prompts=["a"], seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"length": 0}, "length is 0; this model writes 1 to 32"),
        ({"length": 33}, "length is 33"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": SEED_LIMIT}, "seed is"),
        ({"label": 2}, "no classes"),
        ({"prompts": ["x" * 33]}, "33 tokens, the canvas only 32"),
        ({"prompts": ["abc"], "length": 2}, "3 tokens, the canvas only 2"),
        ({"prompts": [""]}, "empty"),
        ({"prompts": ["good", "b4d"]}, "'4' at position 1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_mistakes_are_named(loaded, options, message):
    with pytest.raises(UserError, match=message):
        sample(loaded, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: input should be greater than or equal to 1"),
        ({"temperature": -1.0}, "temperature=-1.0: input should be greater than 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, "top_p=1.5: input should be less than or equal to 1"),
        ({"grid": "sine"}, "grid='sine'"),
        ({"stepz": 3}, "stepz: extra inputs"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        override(SamplingConfig(), changes)


def test_settings_that_are_not_given_stay():
    base = SamplingConfig(steps=9, top_p=0.5)
    assert override(base, {"steps": None, "temperature": 0.5}) == SamplingConfig(steps=9, top_p=0.5, temperature=0.5)


def test_prompt_becomes_a_canvas(loaded):
    job = prepare(loaded, Request(prompt="a_z", length=5, count=2))
    assert np.array_equal(job.canvas.numpy(), [[0, 27, 25, 27, 27]] * 2)
