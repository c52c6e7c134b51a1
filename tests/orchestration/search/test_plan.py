"""What a search says before it starts: budgets, packing, what is refused. Nothing is started here."""

from pathlib import Path

import pytest

from md4.errors import UserError
from orchestration.cli import main
from orchestration.config import load
from orchestration.search.budget import budget
from orchestration.search.packing import pack
from orchestration.search.run import Plan, find_space, make_plan
from orchestration.search.space import Settings
from orchestration.search.study import Study
from tests.orchestration.search.conftest import STEP_TOKENS

RATES = {"optimizer.learning_rate": [1e-2, 1e-3]}


@pytest.mark.parametrize(("batch", "length"), [(16, 32), (32, 32), (8, 64), (64, 16)])
def test_every_trial_gets_the_same_tokens(tiny, batch, length):
    config = tiny(f"train.batch_size={batch}", f"data.length={length}")
    given = budget(config, Settings(budget=100_000, rounds=6))
    assert given.steps == given.every * 6
    assert 0.95 * 100_000 <= given.tokens(6) <= 100_000
    assert given.tokens(2) * 3 == given.tokens(6)


def test_a_budget_that_rounds_do_not_fit_is_refused_with_the_numbers(tiny):
    message = (
        r"search\.budget=4,000: too small for search\.rounds=9: a step has 16 x 32 = 512 tokens, so a round needs that "
        r"many and the budget at least 4,608"
    )
    with pytest.raises(UserError, match=message):
        budget(tiny(), Settings(budget=4000, rounds=9))
    with pytest.raises(UserError, match=r"9 rounds of 1 steps use 4,608 alone.*Take 9,216"):
        budget(tiny(), Settings(budget=9000, rounds=9))
    with pytest.raises(
        UserError, match=r"optimizer\.warmup=90: search\.budget=46,080 is 90 steps .*all of them warm-up"
    ):
        budget(tiny("optimizer.warmup=90"), Settings(budget=46_080, rounds=9))


@pytest.mark.parametrize(
    ("workers", "room", "asked", "concurrent"),
    [(1, 4, None, 4), (2, 4, None, 2), (3, 4, 4, 1), (1, 4, 2, 2), (2, 100, None, 8)],
)
def test_as_many_trials_run_as_have_room_for_their_workers(tiny, workers, room, asked, concurrent):
    found = pack(tiny(f"train.workers={workers}"), {"CPU": float(room), "memory": 1e9}, asked, 8, False)
    assert found.concurrent == concurrent
    assert found.need == {"CPU": workers}
    assert found.concurrent * workers <= room
    assert f"a trial needs {workers} CPU" in found.describe()


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(tiny):
    with pytest.raises(UserError, match=r"a trial needs 3 CPU for train\.workers=3, the cluster has 2"):
        pack(tiny("train.workers=3"), {"CPU": 2.0}, None, 8, False)
    with pytest.raises(UserError, match=r"pbt trains its 4 trials at the same time, 2 CPU each, and 3 fit"):
        pack(tiny("train.workers=2"), {"CPU": 6.0}, None, 4, True)
    with pytest.raises(UserError, match=r"and search\.concurrent=2: take fewer"):
        pack(tiny(), {"CPU": 8.0}, 2, 4, True)


def test_a_plan_states_trials_tokens_and_packing_and_leaves_nothing(planned, tmp_path):
    plan = planned(RATES, {"algorithm": "grid"}, "search.rounds=4")
    told = "\n".join(plan.lines())
    assert "2 trials of pydocs-tiny by grid, asha (of 3 trials one goes on after round 1, 3)" in told
    assert "trial 001: 12 steps, 6,144 tokens  optimizer.learning_rate=0.001" in told
    assert not (tmp_path / "studies").exists()
    assert [one.evaluation.every for one in plan.configs] == [3, 3]
    assert [one.checkpoint.every for one in plan.configs] == [3, 3]
    assert [one.optimizer.learning_rate for one in plan.configs] == [0.01, 0.001]
    assert plan.configs[0].runs == str(tmp_path / "studies" / "study" / "trials")


def test_length_and_size_may_be_searched_with_what_follows_from_them(planned):
    plan = planned(
        {"data.length": [16, 32], "model.times": [{"a": 0.5}, {}]}, {"algorithm": "grid", "budget": 24 * STEP_TOKENS}
    )
    assert [one.model.length for one in plan.configs] == [16, 16, 32, 32]
    assert [one.train.steps for one in plan.configs] == [48, 48, 24, 24]
    assert [one.model.times.a for one in plan.configs] == [0.5, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("space", "overrides", "message"),
    [
        (RATES, ["train.steps=5"], r"train\.steps: of a trial it follows from search\.budget"),
        (RATES, ["checkpoint.every=5"], r"checkpoint\.every: of a trial it follows from search\.rounds"),
        (RATES, ["optimizer.learning_rate=1"], r"optimizer\.learning_rate: is searched over in .*, and given"),
        (RATES, ["train.workers=1..2"], r"train\.workers=1\.\.2: a search needs one number"),
        (RATES, ["search.rouns=3"], r"unknown key 'search\.rouns'; did you mean 'rounds'"),
        (RATES, ["model.schedule=sine"], r"model\.schedule='sine'"),
        ({"model.network.feature_dim": [16, 17]}, [], r"trial with model\.network\.feature_dim=17: .*even number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_there(planned, tmp_path, space, overrides, message):
    with pytest.raises(UserError, match=message):
        planned(space, {"algorithm": "grid"}, *overrides)
    assert not (tmp_path / "studies").exists()


def test_without_evaluations_there_is_nothing_to_judge_by(tmp_path):
    preset, file = tmp_path / "mute.yaml", tmp_path / "space.yaml"
    preset.write_text(load("pydocs-tiny", ["evaluation.every=0", "data.validation=0.1"]).to_yaml())
    file.write_text("space: {seed: [1, 2]}\nsearch: {budget: 5898240}")
    with pytest.raises(UserError, match=r"evaluation\.every=0: trials are judged by the validation bound"):
        make_plan(str(preset), file, [], None, None, tmp_path)


def test_spaces_are_found_by_name(tmp_path):
    assert find_space(type(tmp_path)("schedules")).name == "schedules.yaml"
    with pytest.raises(
        UserError, match=r"--space schedule: give a \.yaml file, or one of population, powers, schedules"
    ):
        find_space(type(tmp_path)("schedule"))
    with pytest.raises(UserError, match="--space is missing"):
        find_space(None)


def test_a_study_is_resumed_only_as_what_it_is(planned):
    plan = planned(RATES, {"algorithm": "grid"})
    study = Study.create(plan.folder, plan.preset, plan.base, plan.space)
    assert (study.space, study.base) == (plan.space, plan.base)
    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        Study.create(plan.folder, plan.preset, plan.base, plan.space)
    again = planned(RATES, {"algorithm": "grid", "concurrent": 1})
    assert Study.resume(again.folder, again.preset, again.base, again.space).space.search.concurrent == 1
    other = planned(RATES, {"algorithm": "grid", "seed": 7}, "optimizer.ema=0.5")
    with pytest.raises(
        UserError, match=r"search\.seed: the study has 0, given is 7\nbase\.optimizer\.ema: the study has"
    ):
        Study.resume(other.folder, other.preset, other.base, other.space)
    with study.locked(), pytest.raises(UserError, match=r"is being run by process \d+"), study.locked():
        pass
    with pytest.raises(UserError, match=r"is not a study's folder .*studies there: study"):
        Study(plan.folder.parent / "nothing")


@pytest.mark.parametrize(
    ("name", "studies", "message"),
    [
        ("my study", "studies", r"--name 'my study': a study's name has letters, digits and \. _ - alone"),
        ("a/../b", "studies", r"--name 'a/\.\./b': "),
        ("a\n", "studies", r"--name 'a\\n': "),
        (".", "studies", r"--name '\.': "),
        ("..", "studies", r"--name '\.\.': "),
        (None, "s3://bucket/studies", r"--studies s3://bucket/studies: a study can't lie in s3: .* of this machine"),
        (None, Path("gs://bucket"), r"--studies gs:/bucket: a study can't lie in gs: "),
    ],
)
def test_a_study_has_a_name_that_its_winner_can_have_and_a_folder_here(name, studies, message):
    with pytest.raises(UserError, match=message):
        make_plan("pydocs-tiny", find_space(Path("schedules")), [], None, name, studies)
    assert not Path("s3:").exists()


def typed(plan: Plan, tmp_path, given, *options: str) -> list[str]:
    """`md4 search` of a plan of the fixture `planned`, which is not to start Ray."""
    place = ["--space", f"{tmp_path}/study.yaml", "--name", plan.folder.name, "--studies", str(plan.folder.parent)]
    return ["md4", "search", "pydocs-tiny", *place, *options, *given, "train.workers=1"]


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_what_trials_lack_is_said_before_ray_starts(planned, tmp_path, given, monkeypatch, capsys, options):
    def start(*_, **__) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("orchestration.search.run.cluster", start)
    plan = planned(RATES, {"algorithm": "grid"})

    def refused(*more: str) -> str:
        monkeypatch.setattr("sys.argv", typed(plan, tmp_path, given, *options, *more))
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        return capsys.readouterr().err

    gone = [one if not one.startswith("data.path=") else "data.path=/nowhere.txt" for one in given]
    monkeypatch.setattr("sys.argv", typed(plan, tmp_path, gone, *options))
    with pytest.raises(SystemExit):
        main()
    assert "/nowhere.txt" in capsys.readouterr().err
    assert "study is not a study's folder (it has no study.yaml)" in refused("--resume")
    assert not plan.folder.exists()
    Study.create(plan.folder, plan.preset, plan.base, plan.space)
    assert "exists already: continue it with --resume, or choose another --name" in refused()
    assert "search.seed: the study has 0, given is 7" in refused("--resume", "search.seed=7")
