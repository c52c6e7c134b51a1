"""`md4 plan`: what it states is what a real step takes, and what can't fit is refused."""

import gc
import json

import pytest
import torch

from md4.errors import UserError
from md4.model import build, count_parameters
from orchestration.config import load
from orchestration.memory_plan import Layout, Planner, Target, read_counts, read_size
from orchestration.memory_trace import trace
from orchestration.plan_report import run

CPU = torch.device("cpu")
FLOAT, HALF = torch.float32, torch.bfloat16
TARGET = Target(CPU, FLOAT)


@pytest.mark.parametrize(
    ("preset", "stage", "rows", "compute"),
    [
        ("pydocs-tiny", 2, 2, FLOAT),
        ("pydocs-tiny", 0, 16, HALF),
        ("digits-tiny", 0, 2, FLOAT),
        ("pydocs-tiny-genmd4", 1, 2, FLOAT),
    ],
)
def test_the_plan_is_the_tracked_peak_of_a_real_step(process_group, preset, stage, rows, compute):
    """Of tensors of the update, of the reduction, and (with more rows) of activations."""
    from tests.benchmarks import peaks

    batch = [f"train.batch_size={rows}", "train.slices=1", "train.workers=1", f"train.micro_batch={rows}"]
    config = load(preset, [*batch, f"train.zero_stage={stage}"])
    planned = Planner(config, Target(CPU, compute)).need(stage, 1, rows).total
    gc.collect()
    others = peaks.live_bytes()  # of tests before
    step = peaks.step_of(config, rows, CPU, compute)
    step()
    assert peaks.tracked(step) - others == pytest.approx(planned, rel=0.1)


def test_activations_grow_less_when_they_are_computed_again():
    gpu, grows = torch.device("cuda"), []
    for again in ("false", "true"):
        layers = ["model.network.layers=6", f"model.network.checkpoint_activations={again}"]
        config = load("text8", layers).model  # with dropout, which must not change how a GPU's attention is planned
        four, eight = (int(trace(config, rows, torch.bfloat16, gpu).body.max()) for rows in (4, 8))
        grows.append(eight - four)
    assert grows[1] < grows[0] / 3


def test_a_trace_leaves_nothing_behind():
    """Neither fake tables in caches nor changed networks: a real pass works afterwards, and before another trace."""
    config = load("pydocs-tiny").model
    model, tokens = build(config), torch.zeros(1, config.length, dtype=torch.int64)
    before = model.logits(tokens, 0.5)
    found = trace(config, 3, torch.float32, CPU)
    assert torch.equal(model.logits(tokens, 0.5), before)
    assert found.gradients[-1] == 4 * count_parameters(config)
    assert sum(elements for _, elements in found.ready) == count_parameters(config)


def test_zero_divides_what_it_says():
    config = load("text8")
    planner = Planner(config, Target(torch.device("cuda"), torch.bfloat16))
    elements = Layout.of(config).elements
    for stage in range(4):
        need = planner.need(stage, 8, 1)
        assert need.ema == pytest.approx(4 * elements / (8 if stage else 1), rel=1e-3)
        assert need.optimizer == pytest.approx(8 * elements if stage == 0 else 12 * elements / 8, rel=1e-3)
        assert need.weights == pytest.approx(4 * elements / 8 if stage == 3 else 4 * elements, rel=0.05)
    totals = [planner.need(stage, 8, 1).total for stage in (0, 1, 2)]
    assert totals == sorted(totals, reverse=True)
    offloaded = Planner(load("text8", ["train.offload=true"]), planner.target).need(2, 8, 1)
    assert offloaded.ema == offloaded.optimizer == 0
    assert offloaded.host >= 4 * 4 * elements / 8


def test_what_fits_and_what_it_costs():
    config = load("pydocs-tiny", ["train.batch_size=64", "train.steps=3600"])
    line = Planner(config, Target(CPU, torch.float32, read_size("60MB"), price=2.0, throughput=1024.0)).line(2, 2)
    assert line.micro_batch == 32
    assert not line.fits
    assert line.largest in (1, 2, 4, 8, 16)
    assert line.seconds == 32 * 64 / 1024
    assert line.cost == line.seconds * 2 * 2.0
    planner = Planner(config, Target(CPU, torch.float32, read_size("60MB")))
    assert planner.need(2, 2, line.largest).total <= 54e6 < planner.need(2, 2, 2 * line.largest).total


def test_a_configuration_that_can_not_fit_is_refused_with_what_can(capsys):
    def plan(*more: str, memory: str | None, as_json: bool = True) -> None:
        run(
            "pydocs-tiny",
            ["train.device=cpu", "train.precision=float32", *more],
            None,
            "1,2",
            memory,
            None,
            None,
            as_json,
        )

    with pytest.raises(UserError, match=r"zero_stage=2 .* needs .* of 60\.0 MB .*These fit: train\.micro_batch=\d+$"):
        plan(memory="60MB")
    capsys.readouterr()
    plan("train.micro_batch=1", memory="60MB")
    found = json.loads(capsys.readouterr().out)
    assert [(one["workers"], one["stage"]) for one in found["plans"]] == [(n, s) for n in (1, 2) for s in range(4)]
    assert all(one["fits"] for one in found["plans"])
    plan("train.micro_batch=1", memory=None, as_json=False)
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "value"), [("80GB", 80_000_000_000), ("1.5 GiB", 3 << 29), ("512m", 512_000_000)])
def test_sizes(text, value):
    assert read_size(text) == value


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0GB", "80 apples"])
def test_wrong_sizes_are_named(text):
    with pytest.raises(UserError, match="80GB"):
        read_size(text)


def test_numbers_of_devices():
    assert [read_counts(text) for text in ("8", "4,1", "2..4")] == [[8], [1, 4], [2, 3, 4]]
    for wrong in ("0", "8..2", "", "a", "1,,2"):
        with pytest.raises(UserError, match="gpus="):
            read_counts(wrong)


def test_offload_needs_a_stage():
    with pytest.raises(UserError, match=r"offload=True needs zero_stage"):
        load("pydocs-tiny", ["train.offload=true", "train.zero_stage=0"])
