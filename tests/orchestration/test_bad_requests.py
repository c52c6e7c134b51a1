"""Requests that can't be answered: one message each, wherever they come from, and no harm to those beside them."""

import sys

import pytest
import torch

from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from orchestration.cli import main
from orchestration.runs import Run, load_model
from orchestration.sampling import LENGTH_LIMIT, SEED_LIMIT, Answer, Request, answer, prepare
from orchestration.sampling_settings import read_settings
from tests.orchestration.small_run import LENGTH, write_checkpoint, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run)


# What is wrong with a request beyond its settings, by the options of the command line too.
REQUESTS = [
    ({"prompt": ""}, ["--prompt", ""], "the prompt is empty"),
    ({"prompt": "x" * 33}, ["--prompt", "x" * 33], "33 tokens, the canvas only 32"),
    ({"prompt": "a_{40}"}, ["--prompt", "a_{40}"], "41 tokens, the canvas only 32"),
    ({"prompt": "a_{0}"}, ["--prompt", "a_{0}"], "each has at least 1"),
    ({"prompt": "_{900000}" * 2}, ["--prompt", "_{900000}" * 2], "all together 1,048,576"),
    ({"prompt": "b4d"}, ["--prompt", "b4d"], "'4' at position 1"),
    ({"prompt": "a\ud800"}, None, "position 1 is not proper Unicode"),
    ({"prompt": "abc", "length": 2}, ["--prompt", "abc", "--length", "2"], "3 tokens, the canvas only 2"),
    ({"length": 0}, ["--length", "0"], "length is 0"),
    ({"length": LENGTH_LIMIT + 1}, ["--length", str(LENGTH_LIMIT + 1)], "allowed are 1 to 65,536"),
    ({"length": 33}, ["--length", "33"], "they need block=N with N of at most 32"),
    ({"count": 0}, ["--count", "0"], "count is 0"),
    ({"seed": SEED_LIMIT}, ["--seed", str(SEED_LIMIT)], "seed is"),
    ({"label": 1}, ["--label", "1"], "this model has no classes"),
    ({"stop": "ab"}, ["--stop", "ab"], "'ab' is 2 tokens"),
    ({"stop": ""}, ["--stop", ""], "'' is 0 tokens"),
    ({"stop": "."}, ["--stop", "."], "'.' at position 0"),
    ({"stop": "_"}, ["--stop", "_"], "'_' at position 0"),
]
# Settings that this model, or any, can't be sampled with.
SETTINGS = [
    (["guidance=2"], "guidance=2.0 is towards a class: this model has no classes"),
    (["sampler=thinning"], "sampler=thinning is not for models of objective md4; allowed: ancestral, first_hitting"),
    (["sampler=magic"], "sampler='magic': input should be 'ancestral'"),
    (["min_reveals=5", "max_reveals=3"], "min_reveals=5 is above max_reveals=3"),
    (["grid=[1, 0.5, 0.5, 0]"], "fall strictly from 1 to 0"),
    (["grid=[1, 0.5, 0]", "steps=7"], "steps=7, but grid has 3 times"),
    (["grid=sine"], "grid='sine': allowed are 'uniform', 'cosine', or times"),
    (["grid=absent.json"], "can't read the grid absent.json"),
    (["extrapolate=true"], "extrapolate=True is no setting of the sampler ancestral"),
    (["sampler=first_hitting", "correct=true"], "correct needs steps"),
    (["block=40", "--length", "64"], "N of at most 32"),
    (["temperature=0"], "temperature=0: input should be greater than 0"),
    (["temperature=hot"], "temperature='hot'"),
    (["top_p=1.5"], "top_p=1.5"),
    (["tempperature=1"], "unknown setting 'tempperature'; did you mean 'temperature'? allowed: sampler, steps, grid"),
    (["sampling.steps=3"], "did you mean 'steps'?"),
    (["steps"], "'steps' is not of the form key=value"),
    (["loop=[0.1"], "value of loop"),
]


@pytest.mark.parametrize(("wrong", "_", "message"), REQUESTS)
def test_requests_are_refused_before_they_reach_a_batch(loaded, wrong, _, message):
    with pytest.raises(UserError) as caught:
        prepare(loaded, Request(**wrong))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("assignments", "message"), SETTINGS)
def test_settings_are_refused_before_they_reach_a_batch(loaded, assignments, message):
    length = 64 if "--length" in assignments else None
    typed = [assignment for assignment in assignments if assignment not in ("--length", "64")]
    with pytest.raises(UserError) as caught:
        prepare(loaded, Request(settings=read_settings(loaded.config.sampling, typed), length=length))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [(options, message) for _, options, message in REQUESTS if options is not None] + SETTINGS,
)
def test_the_command_ends_with_one_line(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["md4", "sample", str(run.resolve()), *options])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (run / "samples").exists()


def test_a_prompt_without_holes_is_the_answer(loaded):
    request = Request(prompt="x" * LENGTH, count=2)
    (found,) = answer(loaded, [request], [prepare(loaded, request)])
    assert isinstance(found, Answer)
    assert [(one.text, one.calls, one.draws) for one in found.samples] == [("x" * LENGTH, 0, 0)] * 2


class Poisoned(torch.nn.Module):
    """A network that answers NaN for rows that begin with the token 0."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, t, labels=None):
        return torch.where((z[:, 0] == 0)[:, None, None], torch.nan, self.network(z, t, labels))


@pytest.mark.parametrize("settings", [{}, {"sampler": "first_hitting"}, {"sampler": "first_hitting", "steps": 5}])
def test_nan_harms_nobody_else(run, settings):
    """The damaged row's request gets a message; the others, in the same calls, what they get alone."""
    sick = load_model(run)
    sick.model.network = Poisoned(sick.model.network)
    chosen = SamplingConfig.model_validate(settings)
    requests = [Request(p, seed=s, count=2, settings=chosen) for s, p in enumerate(["b_", "a_", "c__ d", "a"])]
    jobs = [prepare(sick, request) for request in requests]
    found = answer(sick, requests, jobs)
    for request, job, one in zip(requests, jobs, found, strict=True):
        if (request.prompt or "").startswith("a"):
            assert isinstance(one, UserError)
            assert "NaN" in str(one)
        else:
            (alone,) = answer(sick, [request], [job])
            assert isinstance(one, Answer)
            assert isinstance(alone, Answer)
            assert one.samples == alone.samples


def test_a_damaged_model_is_named_by_the_command(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path)
    model = load_model(path).model
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    write_checkpoint(Run(path), model, step=8)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["md4", "sample", str(path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "the network answered with NaN or infinity" in capsys.readouterr().err
    assert not (path / "samples").exists()


def test_changes_of_settings():
    base = SamplingConfig(steps=9, top_p=0.5)
    assert wording.change(base, {}) == base
    assert wording.change(base, {"temperature": 0.5}) == SamplingConfig(steps=9, top_p=0.5, temperature=0.5)
    assert wording.change(base, {"steps": None}) == SamplingConfig(top_p=0.5)
    assert read_settings(base, ["grid=[1, 0.4, 0]", "top_k=3"]) == SamplingConfig(grid=(1, 0.4, 0), top_p=0.5, top_k=3)
    assert read_settings(base, ["sampler=p2"]) == SamplingConfig(sampler="p2", top_p=0.5)
