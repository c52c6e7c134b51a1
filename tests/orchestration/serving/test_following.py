"""A model that follows a name, with real engines and a real registry: what it serves, tries, confirms and drops."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from md4.errors import UserError
from orchestration.registry import Registry
from orchestration.sampling import Request, sample
from orchestration.serving import canary
from orchestration.serving.config import CanaryConfig, EngineConfig, ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.events import Begun, Done
from orchestration.serving.following import Following
from orchestration.serving.models import Score, UnknownModel
from orchestration.serving.sources import load_version
from orchestration.serving.trial_record import Part
from tests.orchestration.registry.conftest import Clock
from tests.orchestration.serving.versions import MODEL, NAME, export
from tests.s3 import BUCKET

CONFIG = ServingConfig(
    refresh_s=0, engine=EngineConfig(max_rows=8), canary=CanaryConfig(min_requests=8, entropy_margin=2.0)
)
SEEDS = range(24)


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("exports")
    return lambda kind: export(folder, kind)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path, clock, exports) -> Registry:
    """With version 1 as production."""
    found = Registry(tmp_path / "registry", now=clock)
    add(found, exports("1"))
    found.promote(MODEL, 1, NAME, by="ada")
    return found


def add(registry: Registry, folder: Path) -> None:
    registry.add(MODEL, folder, by="ada", say=lambda text: None)


def attempt(registry: Registry, folder: Path, share: float = 0.5) -> None:
    """Version 2, with a share."""
    add(registry, folder)
    registry.promote(MODEL, 2, NAME, share=share, by="ada")


@asynccontextmanager
async def serving(registry: Registry, config: ServingConfig = CONFIG, replica: str = "a") -> AsyncIterator[Following]:
    """A replica, after its first look at the name."""
    held = await Following.open(MODEL, f"{MODEL}@{NAME}", config, registry, replica)
    try:
        await held.refresh()
        yield held
    finally:
        await held.close()


def run(work: Awaitable[None]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(within())


def with_canary(**changes) -> ServingConfig:
    return CONFIG.model_copy(update={"canary": CONFIG.canary.model_copy(update=changes)})


def actions(registry: Registry) -> list[str]:
    return [f"{change.action} {change.version}" for change in registry.name(MODEL, NAME).history]


def texts(registry: Registry, version: int) -> dict[int, str]:
    """What a version writes, by seed."""
    loaded = load_version(registry.version(MODEL, version))
    settings = loaded.config.sampling
    return {seed: sample(loaded, seed=seed, settings=settings).samples[0].text for seed in SEEDS}


async def ask(held: Following, seed: int, version: str | None = None) -> tuple[str, int | None, bool]:
    """Its text, the version that wrote it, and whether that is tried."""
    answer = await held.sample(Request(seed=seed, settings=held.describe().sampling), version)
    return answer.samples[0].text, answer.model.model_version, answer.model.trial


async def ask_all(held: Following) -> dict[int, tuple[str, int | None, bool]]:
    return dict(zip(SEEDS, await asyncio.gather(*(ask(held, seed) for seed in SEEDS)), strict=True))


def chosen(held: Following) -> set[int]:
    """The seeds that the candidate gets."""
    assert held.trial is not None
    return {seed for seed in SEEDS if held.trial.takes(canary.key(Request(seed=seed)))}


def test_both_answer_and_the_candidate_takes_the_name(registry, exports):
    attempt(registry, exports("2"))
    expected = {version: texts(registry, version) for version in (1, 2)}

    async def work() -> None:
        async with serving(registry) as held:
            its = chosen(held)
            assert 4 < len(its) < 20
            for _ in range(2):  # a request that is repeated gets the same version
                for seed, (text, version, tried) in (await ask_all(held)).items():
                    assert (version, tried) == ((2, True) if seed in its else (1, False))
                    assert text == expected[version][seed]
            info = held.describe()
            assert (info.model_version, info.trial, info.run) == (1, False, MODEL)
            assert info.candidate is not None
            assert (info.candidate.model_version, info.candidate.answered) == (2, len(its))  # each counts once
            await held.refresh()
            assert actions(registry) == ["promote 1", "candidate 2", "confirm 2"]
            last = registry.name(MODEL, NAME).history[-1]
            assert (last.by, last.why) == ("md4 serve", f"{len(its)} requests answered, 0 errors")
            assert last.figures["canary"]["candidate"]["answered"] == len(its)
            assert last.figures["canary"]["present"]["answered"] == len(SEEDS) - len(its)
            assert await ask(held, 0) == (expected[2][0], 2, False)
            assert held.describe().candidate is None

    run(work())


def test_one_that_breaks_costs_nobody_an_answer(registry, exports):
    attempt(registry, exports("nan"))
    expected = texts(registry, 1)

    async def work() -> None:
        async with serving(registry) as held:
            its = chosen(held)
            assert {seed: text for seed, (text, _, _) in (await ask_all(held)).items()} == expected
            await held.refresh()
            assert actions(registry) == ["promote 1", "candidate 2", "drop 2"]
            why = registry.name(MODEL, NAME).history[-1].why
            assert why.startswith(f"errors: {len(its)} of {len(its)} requests failed, 0 of {len(SEEDS) - len(its)}")
            assert held.trial is None
            assert held.healthy
            await held.refresh()
            assert len(actions(registry)) == 3

    run(work())


def test_a_stream_that_breaks_at_once_is_another_versions(registry, exports):
    attempt(registry, exports("nan"), share=0.9)
    expected = texts(registry, 1)

    async def work() -> None:
        async with serving(registry) as held:
            seed = min(chosen(held))
            request = Request(seed=seed, settings=held.describe().sampling)
            events = [event async for event in held.stream(request, None)]
            assert isinstance(events[0], Begun)
            assert isinstance(events[-1], Done)
            assert {type(event) for event in events[1:-1]} & {Begun, Done} == set()
            assert (events[0].model.model_version, events[-1].answer.samples[0].text) == (1, expected[seed])
            assert held.trial.part.candidate.errors == 1
            with pytest.raises(Exception, match="NaN"):  # who asks for it gets what it is
                await ask(held, seed, "2")
            assert held.trial.part.candidate.errors == 1

    run(work())


def test_a_stream_of_the_candidates_says_so(registry, exports):
    attempt(registry, exports("2"))
    expected = texts(registry, 2)

    async def work() -> None:
        async with serving(registry) as held:
            seed = min(chosen(held))
            events = [event async for event in held.stream(Request(seed=seed, settings=held.describe().sampling), None)]
            assert (events[0].model.model_version, events[0].model.trial) == (2, True)
            assert (events[-1].answer.model.trial, events[-1].answer.samples[0].text) == (True, expected[seed])
            assert held.trial.part.candidate.answered == 1

    run(work())


def test_a_worse_one_is_dropped_by_what_it_scores(registry, exports, tmp_path):
    attempt(registry, exports("sharp"))
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n".join(["the end of the line", "a cat sat on the mat", "", "one and two", "what was it"]))

    async def work() -> None:
        async with serving(registry, with_canary(texts=str(held_out))) as held:
            await held._scoring
            await held.refresh()
            assert actions(registry)[-1] == "drop 2"
            last = registry.name(MODEL, NAME).history[-1]
            assert last.why.startswith("quality: +")
            assert last.figures["canary"]["quality"]["texts"] == 4

    run(work())


def test_an_equal_one_passes_what_it_scores(registry, exports, tmp_path):
    """The same weights under another number: no difference at all."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the end of the line\na cat sat on the mat\n")
    attempt(registry, exports("2"))

    async def work() -> None:
        async with serving(registry, with_canary(texts=str(held_out), quality_margin=9.0)) as held:
            await ask_all(held)
            await held._scoring
            await held.refresh()
            assert actions(registry)[-1] == "confirm 2"

    run(work())


def test_texts_that_the_present_version_failed_with_are_scored_again(registry, exports, tmp_path, monkeypatch):
    """A failure that passes, after which the candidate would have waited for ever; not at every look."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the end of the line\na cat sat on the mat\n")
    attempt(registry, exports("2"))
    asked, sound = [], Engine.score

    async def fails_once(engine: Engine, *arguments) -> list[Score]:
        asked.append(engine.loaded.model_version)
        if len(asked) == 1:
            raise RuntimeError("out of memory")
        return await sound(engine, *arguments)

    async def work() -> None:
        monkeypatch.setattr(Engine, "score", fails_once)
        async with serving(registry, with_canary(texts=str(held_out), quality_margin=9.0)) as held:
            await held._scoring
            await ask_all(held)
            await held.refresh()
            assert (asked, actions(registry)[-1]) == ([1], "candidate 2")
            monkeypatch.setattr(held, "_score_at", 0.0)  # a while later
            await held.refresh()
            await held._scoring
            await held.refresh()
            assert (asked, actions(registry)[-1]) == ([1, 1, 2], "confirm 2")

    run(work())


def test_a_damaged_one_is_never_served(registry, exports):
    attempt(registry, exports("2"))
    file = Path(registry.version(MODEL, 2).folder.path("model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    async def work() -> None:
        async with serving(registry) as held:
            assert held.trial is None
            assert actions(registry)[-1] == "drop 2"
            assert "model.safetensors is damaged" in registry.name(MODEL, NAME).history[-1].why
            assert {version for _, version, _ in (await ask_all(held)).values()} == {1}

    run(work())


def test_another_model_is_not_tried_but_another_network_is(registry, exports):
    attempt(registry, exports("short"))

    async def work() -> None:
        async with serving(registry, with_canary(min_requests=6)) as held:
            why = registry.name(MODEL, NAME).history[-1].why
            assert why.endswith("can't be served in the place of version 1: its length is 16, not 32")
            add(registry, exports("wide"))
            registry.promote(MODEL, 3, NAME, share=0.5, by="ada")
            await held.refresh()
            assert len(chosen(held)) >= 6
            await ask_all(held)
            await held.refresh()
            assert actions(registry)[-1] == "confirm 3"
            assert (await ask(held, 0))[:2] == (texts(registry, 3)[0], 3)

    run(work())


def test_replicas_decide_together_and_one_signs(registry, exports):
    attempt(registry, exports("2"))
    config = with_canary(min_requests=len(SEEDS) // 2 - 4)

    async def work() -> None:
        async with serving(registry, config, "a") as one, serving(registry, config, "b") as other:
            its = chosen(one)
            assert its == chosen(other)
            for place, seed in enumerate(SEEDS):
                await ask((one, other)[place % 2], seed)
            counts = [held.trial.part.candidate.answered for held in (one, other)]
            assert max(counts) < config.canary.min_requests <= sum(counts)
            await asyncio.gather(one.refresh(), other.refresh(), one.refresh(), other.refresh())
            assert actions(registry) == ["promote 1", "candidate 2", "confirm 2"]
            assert registry.name(MODEL, NAME).history[-1].figures["canary"]["replicas"] == 2
            await asyncio.gather(one.refresh(), other.refresh())
            assert [held.present.version for held in (one, other)] == [2, 2]

    run(work())


def test_what_a_dead_replica_had_written_counts(registry, exports):
    """Errors once: of a request that fails again in the replica that takes its place nothing new is learned."""
    attempt(registry, exports("nan"))

    async def work() -> None:
        async with serving(registry, replica="a") as held:
            one, two, three, *_ = sorted(chosen(held))
            present = min(set(SEEDS) - chosen(held))
            for seed in (one, two, present):
                await ask(held, seed)
            await held.refresh()
        async with serving(registry, replica="b") as held:
            assert held.describe().candidate.errors == 2
            for seed in (one, three, present):
                await ask(held, seed)
            await held.refresh()
            assert held.trial.part.candidate.errors == 2
            assert held.describe().candidate.errors == 3
            assert held.trial.record.total().present.answered == 2  # an answer, which nobody has the key of, in each

    run(work())


def test_while_a_candidate_gets_nothing_nothing_is_counted(registry, exports):
    """Requests of its share that the present version fails with would speak for it."""
    attempt(registry, exports("2"))

    async def work() -> None:
        async with serving(registry) as held:
            held.trial.open = False
            await ask_all(held)
            assert held.trial.part == Part()

    run(work())


def test_a_person_who_decides_meanwhile_is_right(registry, exports):
    attempt(registry, exports("2"))

    async def work() -> None:
        async with serving(registry) as held:
            await ask_all(held)
            registry.rollback(MODEL, NAME, "I don't like it", by="ada")  # after the look, before the verdict
            await held._judge(held.trial)
            assert actions(registry) == ["promote 1", "candidate 2", "drop 2"]
            await held.refresh()
            assert held.trial is None
            registry.promote(MODEL, 2, NAME, by="ada")  # all at once
            await held.refresh()
            assert held.present.version == 2
            registry.rollback(MODEL, NAME, "back", by="ada")
            await held.refresh()
            assert held.present.version == 1

    run(work())


def test_another_share_begins_anew(registry, exports):
    attempt(registry, exports("2"), share=0.5)

    async def work() -> None:
        async with serving(registry, with_canary(min_requests=50)) as held:
            await ask_all(held)
            await held.refresh()
            before, side = chosen(held), held.trial.side
            registry.promote(MODEL, 2, NAME, share=0.9, by="ada")
            await held.refresh()
            assert (held.trial.side, held.trial.part.candidate.answered) == (side, 0)
            assert len(chosen(held)) > len(before)
            assert held.trial.record.total().candidate.answered == 0

    run(work())


def test_a_candidate_whose_engine_ends_is_dropped_and_nobody_notices(registry, exports):
    attempt(registry, exports("2"))
    expected = texts(registry, 1)

    class Dead(torch.nn.Module):
        def forward(self, z, t, labels=None):
            raise torch.AcceleratorError("the device is gone")

    async def work() -> None:
        async with serving(registry) as held:
            held.trial.side.engine.loaded.model.network = Dead()
            assert {seed: text for seed, (text, _, _) in (await ask_all(held)).items()} == expected
            assert held.healthy
            await held.refresh()
            assert actions(registry)[-1] == "drop 2"
            assert {version for _, version, _ in (await ask_all(held)).values()} == {1}

    run(work())


def test_a_request_that_fails_with_both_is_no_fault_of_the_candidates(registry, exports):
    attempt(registry, exports("2"), share=0.9)

    class Failing(torch.nn.Module):
        def forward(self, z, t, labels=None):
            raise RuntimeError("no such kernel")

    async def work() -> None:
        async with serving(registry) as held:
            seed, other = min(chosen(held)), min(set(SEEDS) - chosen(held))
            held.present.engine.loaded.model.network = Failing()
            sound = held.trial.side.engine.loaded.model.network
            held.trial.side.engine.loaded.model.network = Failing()
            with pytest.raises(RuntimeError, match="no such kernel"):
                await ask(held, seed)
            assert held.trial.part.candidate.errors == 0
            held.trial.side.engine.loaded.model.network = sound
            with pytest.raises(RuntimeError, match="no such kernel"):
                await ask(held, other)  # the present version's own
            assert held.trial.part.present.errors == 1
            with pytest.raises(UserError, match="33 tokens"):
                await held.sample(Request(prompt="x" * 33, seed=seed), None)
            assert held.trial.part.candidate.errors == 0

    run(work())


def test_who_waits_in_vain_has_met_an_error_and_who_leaves_has_not(registry, exports):
    attempt(registry, exports("2"), share=0.9)

    released = threading.Event()

    class Stuck(torch.nn.Module):
        def forward(self, z, t, labels=None):
            released.wait(30)
            raise RuntimeError("too late")

    async def work() -> None:
        async with serving(registry, CONFIG.model_copy(update={"timeout_s": 0.3})) as held:
            held.trial.side.engine.loaded.model.network = Stuck()
            one, other = sorted(chosen(held))[:2]
            try:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(ask(held, one), 0.01)
                assert held.trial.part.candidate.errors == 0
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(ask(held, other), 0.3)
                assert held.trial.part.candidate.errors == 1
            finally:
                released.set()

    run(work())


def test_a_stream_ends_with_the_weights_it_began_with(registry, exports):
    add(registry, exports("2"))
    expected = texts(registry, 1)

    async def work() -> None:
        async with serving(registry) as held:
            events = held.stream(Request(seed=3, settings=held.describe().sampling), None)
            begun = await anext(events)
            old = held.present
            registry.promote(MODEL, 2, NAME, by="ada")
            await held.refresh()
            assert (await ask(held, 3))[1] == 2
            rest = [event async for event in events]
            assert begun.model.model_version == rest[-1].answer.model.model_version == 1
            assert rest[-1].answer.samples[0].text == expected[3]
            await asyncio.gather(*held._background)
            assert old.closed
            assert not old.engine.healthy

    run(work())


def test_versions_can_be_asked_for(registry, exports):
    attempt(registry, exports("2"))
    expected = {version: texts(registry, version) for version in (1, 2)}

    async def work() -> None:
        async with serving(registry) as held:
            for version in ("1", "2"):
                answers = [await ask(held, seed, version) for seed in (0, 1)]
                assert [text for text, _, _ in answers] == [expected[int(version)][seed] for seed in (0, 1)]
            assert held.trial.part.candidate.answered == 0  # tests of somebody's count for nothing
            scores = {v: (await held.score(["the end"], 4, 1, None, v))[0] for v in (None, "1", "2")}
            assert scores[None] == scores["1"] != scores["2"]
            with pytest.raises(
                UnknownModel, match="'3' of model small is not served; allowed: small, small@1, small@2"
            ):
                await ask(held, 0, "3")
            await ask(held, 0, NAME)

    run(work())


def test_time_runs_out(registry, exports, clock):
    attempt(registry, exports("2"))

    async def work() -> None:
        async with serving(registry, with_canary(max_seconds=60)) as held:
            clock.time += timedelta(seconds=61)
            await held.refresh()
            assert registry.name(MODEL, NAME).history[-1].why == "time: 0 of 8 requests in 61 s"

    run(work())


@pytest.mark.parametrize("change", ["share", "present"])
def test_time_begins_anew_with_the_figures(registry, exports, clock, change):
    """With another share of the same candidate, and with another present version beside it."""
    for kind in ("3", "2"):
        add(registry, exports(kind))
    registry.promote(MODEL, 2, NAME, by="ada")
    registry.promote(MODEL, 3, NAME, share=0.5, by="ada")

    async def work() -> None:
        async with serving(registry, with_canary(max_seconds=60)) as held:
            clock.time += timedelta(seconds=50)
            if change == "share":
                registry.promote(MODEL, 3, NAME, share=0.6, by="ada")
            else:
                registry.rollback(MODEL, NAME, "bad", version=2, by="ada")
            clock.time += timedelta(seconds=50)
            await held.refresh()
            assert held.trial is not None
            clock.time += timedelta(seconds=11)
            await held.refresh()
            assert registry.name(MODEL, NAME).history[-1].why == "time: 0 of 8 requests in 61 s"

    run(work())


def test_a_registry_that_is_away_changes_nothing(s3, exports, monkeypatch, tmp_path):
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    registry = Registry(f"s3://{BUCKET}/registry")
    add(registry, exports("1"))
    registry.promote(MODEL, 1, NAME, by="ada")
    attempt(registry, exports("2"))
    expected = {version: texts(registry, version) for version in (1, 2)}

    async def work() -> None:
        async with serving(registry) as held:
            s3.fails(1, ("error",))
            answers = await ask_all(held)
            assert {version for _, version, _ in answers.values()} == {1, 2}
            assert all(text == expected[version][seed] for seed, (text, version, _) in answers.items())
            with pytest.raises(UserError):
                await held.refresh()
            assert held.healthy
            assert held.trial is not None
            s3.fails(0)
            await held.refresh()
            assert actions(registry)[-1] == "confirm 2"

    run(work())


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (None, "can't be read"),
        ("one\n", "has 1 texts"),
        ("one\n" + "x" * 40, r"texts\[1\]: it has 40 tokens"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_at_the_start(registry, tmp_path, lines, problem):
    file = tmp_path / "held-out.txt"
    if lines is not None:
        file.write_text(lines)

    async def work() -> None:
        with pytest.raises(UserError, match=problem):
            await Following.open(MODEL, f"{MODEL}@{NAME}", with_canary(texts=str(file)), registry, "a")

    run(work())


def test_a_name_that_stands_for_nothing_is_refused(registry):
    async def work() -> None:
        with pytest.raises(UserError, match="nothing is signed off as staging; names there: production"):
            await Following.open(MODEL, f"{MODEL}@staging", CONFIG, registry, "a")

    run(work())
