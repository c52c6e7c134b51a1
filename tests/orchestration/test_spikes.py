"""A step that is not to be believed: told by rule, left out alike in every ZeRO stage, and never saved."""

import json

import pytest
import torch

from md4.errors import UserError
from md4.objectives import bits_per_token
from orchestration import checkpoints
from orchestration.events import Events
from orchestration.spikes import Spikes
from orchestration.status import status
from orchestration.train import train


def test_the_rule():
    rule = Spikes(3.0)
    assert rule.of_loss(1e9) is None  # no usual loss yet
    for n in range(40):
        rule.made(2.0 + n % 2)
    assert rule.usual == 2.5
    assert rule.of_loss(7.4) is None
    assert "3.2 times the median 2.5" in str(rule.of_loss(8.0))
    for loss in (float("nan"), float("inf"), -float("inf")):
        assert "the loss is" in str(rule.of_loss(loss))
    rule.skip()
    rule.skip()
    again = Spikes(3.0, json.loads(json.dumps(rule.dump())))
    assert (again.usual, again.skipped, again.in_a_row) == (2.5, 2, 2)
    again.made(2.0)
    assert (again.skipped, again.in_a_row) == (2, 0)
    assert Spikes(0.0, rule.dump()).of_loss(1e9) is None
    assert Spikes(0.0).of_loss(float("nan")) is not None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["idle", "gradient"])
@pytest.mark.usefixtures("process_group")
def test_a_step_is_left_out_alike_in_every_stage(stage, kind):
    """Left out by us, or, from stage 1 on, by DeepSpeed for its gradient: the next step is that of a plain loop."""
    from tests.orchestration.zero_program import batch, make, parts

    def loss(model, call, step: int) -> torch.Tensor:
        slots = torch.arange(8)
        return bits_per_token(call(batch(step), **model.noise(0, step, slots, 8, 4, 32)).optimised, 32).mean()

    model, plain = parts("md4")
    for step in (0, 2):
        if step == 2:
            for group in plain.param_groups:
                for p in group["params"]:
                    plain.state[p]["step"] += 1
        plain.zero_grad()
        loss(model, model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()

    state = make(str(stage), "md4")
    engine = state.engine
    for step in range(3):
        factor = {"gradient": float("nan"), "idle": 1e4}[kind] if step == 1 else 1.0
        for _ in range(2):  # passes of an update
            engine.backward(loss(engine.module, engine, step) * factor)
            if step == 1 and (kind == "idle" or stage == 0):
                state.optimizer.idle = True
            engine.step()
        state.optimizer.idle = False
        if step == 1:
            assert engine.was_step_applied() == (kind == "idle" or stage == 0)
            state.count_update()
    whole = {(name, kind): tensor for name, kind, tensor in state.gather(dict.fromkeys(state.shapes, 0))}
    for name, p in model.named_parameters():
        assert torch.allclose(whole[name, "weights"], p, atol=1e-6), name
        assert torch.allclose(whole[name, "ema"], plain.state[p]["ema"], atol=1e-6), name


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_diverges_skips_and_then_stops_with_the_batch_named(tiny):
    """An absurd learning rate: after the first update every loss is no number."""
    absurd = ["optimizer.learning_rate=1e30", "optimizer.clip_norm=0", "train.steps=20", "checkpoint.every=1"]
    rule = ["train.on_spike=skip", "train.skips=3", "train.workers=2", "train.zero_stage=0", "evaluation.every=0"]
    config = tiny(*absurd, *rule, "data.length=32")
    said: list[str] = []
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step (\d+) .* 3 steps in a row were skipped"):
        train(config, report=said.append)
    found = status(config.directory)
    assert found.state == "stopped"
    assert found.why is not None
    assert "3 steps in a row" in found.why
    spikes = Events(config.directory).read("spike")
    steps = [event["step"] for event in spikes]
    assert steps == list(range(steps[0], steps[0] + 3))
    assert [event["action"] for event in spikes] == ["skipped", "skipped", "stopped"]
    assert sum("skipped: the loss is" in line for line in said) == 2
    batch = json.loads((config.directory / "reports" / f"batch-{steps[0]}.json").read_text())
    assert [row["slot"] for row in batch["rows"]] == list(range(16))
    assert batch["global_batch"] == steps[0] - 1
    assert None in [row["bits_per_token"] for row in batch["rows"]]
    newest = checkpoints.newest(config.checkpoints, print)
    assert newest is not None
    assert newest.step == steps[1]  # that step was skipped, the weights are of before it
    assert all(tensor.isfinite().all() for tensor in newest.tensors("weights").values())
    assert newest.manifest["spikes"]["skipped"] == 2
