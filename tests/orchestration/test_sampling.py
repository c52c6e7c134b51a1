"""From prompts to texts, as the command line asks for them, on a run's folder as it lies on disk."""

import numpy as np
import pytest
import torch

from md4.errors import UserError
from md4.samplers import SamplingConfig, registry
from md4.samplers.first_hitting import FirstHitting
from orchestration.runs import load_model
from orchestration.sampling import SEED_LIMIT, Answer, Request, SampleReport, answer, prepare, sample
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
    assert report.settings == loaded.config.sampling.resolve("md4")
    assert [s.draws for s in report.samples] == [LENGTH] * 3
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
    assert (report.settings, report.mode) == (settings.resolve("md4"), "exact, argmax leftovers")


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
        ({"length": 0}, "length is 0; allowed are 1 to 65,536"),
        ({"length": 33}, "rows of 33 tokens are longer than the 32"),
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


def test_what_a_sampler_counts_is_reported(loaded, monkeypatch):
    """By row, by request and for the whole run: here the draws, counted by the sampler itself a second time."""

    class Counting(FirstHitting):
        counts = ("reveals",)

        def begin(self, rows, settings):
            return super().begin(rows, settings) | {"reveals": torch.zeros_like(rows.calls)}

        def tell(self, rows, seen):
            super().tell(rows, seen)
            rows.own["reveals"].index_add_(0, seen.row, torch.ones_like(seen.row))

    monkeypatch.setitem(registry._SAMPLERS, ("md4", "first_hitting"), Counting)
    settings = SamplingConfig(sampler="first_hitting")
    report = sample(loaded, prompts=["ab", "abcd"], count=2, seed=0, settings=settings)
    assert [one.counted for one in report.samples] == [{"reveals": LENGTH - known} for known in (2, 2, 4, 4)]
    assert report.counted == {"reveals": report.draws} == {"reveals": 4 * LENGTH - 12}
    assert f"{report.draws:,} reveals" in report.headline()


def test_prompt_becomes_a_canvas(loaded):
    job = prepare(loaded, Request(prompt="a_z", length=5, count=2))
    assert np.array_equal(job.canvas.numpy(), [[0, 27, 25, 27, 27]] * 2)
