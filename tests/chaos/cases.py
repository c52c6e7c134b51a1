"""The declared states, and what is done to a run in each of them."""

import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.chaos.attempts import NAME, Attempts, Trouble
from tests.chaos.disk import full_disk
from tests.nodes import Nodes, signal_all, wait_until_gone
from tests.s3 import BUCKET, S3, Hold

STEPS = 120
EVERY = 10  # steps between two checkpoints
_APART = 12  # steps between two of the random kills
# Evaluations take time and change nothing: steps that are long enough for machines to come and go.
_SLOW = ["evaluation.every=1", "evaluation.rows=256", "evaluation.draws=4"]


@dataclass
class Scene:
    """What a case works with. Everything random comes from `draw`."""

    nodes: Nodes
    s3: S3
    folder: Path  # of the case
    draw: random.Random
    kills: int
    make: Callable[..., Attempts]  # of settings: a run that is not started yet
    attempts: Attempts | None = None
    at_end: list[Callable[[], None]] = field(default_factory=list)  # when the case has been judged

    def start(self, *settings: str) -> Attempts:
        """A run, started."""
        self.attempts = self.make(*settings)
        self.attempts.start()
        return self.attempts

    def somewhere(self) -> int:
        """A step that is neither near the beginning nor near the end."""
        return self.draw.randint(2 * EVERY, STEPS // 2)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Scene], None]
    about: str
    exact: bool = True  # the final weights have the undisturbed run's bits
    settings: tuple[str, ...] = ()  # of this case and of the undisturbed run that it is compared with

    def steps(self, kills: int) -> int:
        return max(STEPS, _APART * (kills + 1)) if self.run is random_kills else STEPS


CASES: list[Case] = []


def case(
    name: str, exact: bool = True, settings: tuple[str, ...] = ()
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Declare a case; the first line of the docstring says what it does."""

    def declare(run: Callable[[Scene], None]) -> Callable[[Scene], None]:
        CASES.append(Case(name, run, (run.__doc__ or "").partition("\n")[0], exact, settings))
        return run

    return declare


# -- processes that die ----------------------------------------------------------------------------------------------


@case("worker in a step")
def worker_in_a_step(scene: Scene) -> None:
    """Another worker than the first is killed while it trains."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill(run.other)
    run.recovered()
    run.finish()


@case("leader in a step")
def leader_in_a_step(scene: Scene) -> None:
    """The first worker is killed while it trains: it writes metrics, and commits checkpoints."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill(run.leader)
    run.recovered()
    run.finish()


@case("all workers in a step")
def all_workers_in_a_step(scene: Scene) -> None:
    """All workers are killed at once."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill(run.leader, run.other)
    run.recovered()
    run.finish()


@case("node")
def node(scene: Scene) -> None:
    """All processes of a node are killed; another node takes its place."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill_node_of(run.other)
    scene.nodes.ensure(2)
    run.recovered()
    run.finish()


@case("node of the leader")
def node_of_the_leader(scene: Scene) -> None:
    """The same with the node of the first worker, which also holds the store that workers meet in."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill_node_of(run.leader)
    scene.nodes.ensure(2)
    run.recovered()
    run.finish()


@case("driver")
def driver(scene: Scene) -> None:
    """`md4 train` is killed, and started again with --resume at once, while its workers may still be there."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.kill_driver()
    run.start(resume=True)
    run.recovered()
    run.finish()


@case("stopped worker")
def stopped_worker(scene: Scene) -> None:
    """A worker stops without dying (SIGSTOP): it is named, the group starts anew, and it comes back too late."""
    _stopped(scene, lambda run: run.other, "worker 1")


@case("stopped leader")
def stopped_leader(scene: Scene) -> None:
    """The same with the first worker."""
    _stopped(scene, lambda run: run.leader, "worker 0")


def _stopped(scene: Scene, victim: Callable[[Attempts], int], name: str) -> None:
    run = scene.start("train.patience=10")
    run.reach(scene.somewhere())
    process = victim(run)
    try:
        run.stop(process)
        run.note_stop()
        run.recovered()
    finally:
        signal_all([process], signal.SIGCONT)  # if it is still there, it must do no harm
    if not any(name in event["reason"] for event in run.events("hang")):
        raise Trouble(f"no event names {name}: {run.events('hang')}")
    run.finish()


@case("random kills")
def random_kills(scene: Scene) -> None:
    """Kills (--kills) of random workers at random steps, one or all at once."""
    run = scene.start(f"checkpoint.every={_APART // 2}", f"train.max_restarts={scene.kills + 2}")
    for number in range(scene.kills):
        run.reach(_APART * (number + 1) + scene.draw.randint(-_APART // 3, _APART // 3))
        victims = scene.draw.choice([[0], [1], [0, 1]])
        both = [run.leader, run.other]
        run.kill(*[both[victim] for victim in victims])
        run.recovered()
    run.finish()


# -- around a checkpoint ---------------------------------------------------------------------------------------------


def _in_s3(scene: Scene, every: int = 2 * EVERY) -> list[str]:
    return [f"checkpoint.directory={_url(scene)}", f"checkpoint.every={every}"]


def _url(scene: Scene) -> str:
    return f"s3://{BUCKET}/{scene.folder.name}"


def _put(scene: Scene, step: int, file: str) -> str:
    """The request that writes a file of the checkpoint of `step`."""
    prefix = f"/{BUCKET}/{scene.folder.name}/{NAME}"
    return rf"^PUT {prefix}/step-{step:08d}-\w+/{re.escape(file)}(\s|\?|$)"


def _wait_for(run: Attempts, hold: Hold) -> None:
    run.wait(hold.came.is_set, f"the request {hold.pattern.pattern}")


def _killed_at(scene: Scene, file: str, victim: str, passes: bool, begun: int) -> None:
    """Kill while the request for a file of the second checkpoint is under way; it then passes, or is lost."""
    run = scene.make(*_in_s3(scene))
    hold = scene.s3.hold(_put(scene, 4 * EVERY, file))
    scene.attempts = run
    run.start()
    _wait_for(run, hold)
    run.kill(run.leader if victim == "leader" else run.other)
    hold.release(passes)
    run.recovered(begun)
    run.finish()


@case("before the upload")
def before_the_upload(scene: Scene) -> None:
    """The first worker is killed when a checkpoint is begun and nothing of it is written yet."""
    run = scene.make(*_in_s3(scene))
    holds = [scene.s3.hold(_put(scene, 4 * EVERY, f"weights-0000{writer}-of-00002.safetensors")) for writer in range(2)]
    scene.attempts = run
    run.start()
    for hold in holds:
        _wait_for(run, hold)
    if there := [key for key in scene.s3.objects() if f"/step-{4 * EVERY:08d}-" in key]:
        raise Trouble(f"written already: {there}")
    run.kill(run.leader)
    for hold in holds:
        hold.release(passes=False)
    run.recovered(2 * EVERY)
    run.finish()


@case("during the upload")
def during_the_upload(scene: Scene) -> None:
    """A worker is killed when a part of its files is written."""
    _killed_at(scene, "exp_avg-00001-of-00002.safetensors", "other", passes=False, begun=2 * EVERY)


@case("after the upload")
def after_the_upload(scene: Scene) -> None:
    """A worker is killed when all of its files are written, and its note that says so is not."""
    _killed_at(scene, "writer-00001.json", "other", passes=False, begun=2 * EVERY)


@case("between upload and commit")
def between_upload_and_commit(scene: Scene) -> None:
    """The first worker is killed when everything is written but the manifest."""
    _killed_at(scene, "manifest.json", "leader", passes=False, begun=2 * EVERY)


@case("commit after death")
def commit_after_death(scene: Scene) -> None:
    """The same, but the request arrives when its sender is dead: the checkpoint exists, and is used."""
    _killed_at(scene, "manifest.json", "leader", passes=True, begun=4 * EVERY)


@case("after the commit")
def after_the_commit(scene: Scene) -> None:
    """The first worker is killed before the pointer tells of a committed checkpoint: it is found nevertheless."""
    run = scene.make(*_in_s3(scene))
    commit = scene.s3.hold(_put(scene, 4 * EVERY, "manifest.json"))
    scene.attempts = run
    run.start()
    _wait_for(run, commit)
    pointer = scene.s3.hold(rf"^PUT .*/{scene.folder.name}/{NAME}/latest\.json")
    commit.release()
    _wait_for(run, pointer)
    run.kill(run.leader)
    pointer.release(passes=False)
    run.recovered(4 * EVERY)
    run.finish()


@case("store fails at 10 %")
def store_fails_at_10(scene: Scene) -> None:
    """A tenth of the requests to the store fail, and a worker is killed."""
    scene.s3.fails(0.1, seed=scene.draw.randrange(2**31))
    run = scene.start(*_in_s3(scene))
    run.reach(scene.somewhere())
    run.kill(run.other)
    run.recovered()
    run.finish()


@case("store fails at 50 %")
def store_fails_at_50(scene: Scene) -> None:
    """Half of them fail."""
    scene.s3.fails(0.5, seed=scene.draw.randrange(2**31))
    scene.start(*_in_s3(scene, every=STEPS // 2)).finish()


# -- damage ----------------------------------------------------------------------------------------------------------


def _committed(run: Attempts) -> list[Path]:
    """Folders of checkpoints on this machine that have a manifest, the newest first."""
    return sorted((one.parent for one in (run.path / "checkpoints").glob("step-*/manifest.json")), reverse=True)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data) // 2, len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _damaged(scene: Scene, damage: Callable[[Path], None], counts: bool = True) -> None:
    """Damage the newest checkpoint between two attempts; `counts`: it can then not be used."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.wait(lambda: len(_committed(run)) > 1, "two checkpoints")
    both = [run.leader, run.other]
    run.stop(*both)  # nothing is written any more
    newest, before = _committed(run)[:2]
    damage(newest)
    if counts:
        run.damaged.add(newest.name)
    run.kill(*both)
    run.recovered(_step(before if counts else newest))
    if counts and not any(newest.name in str(event) for event in run.events("damaged")):
        raise Trouble(f"no event names the damaged {newest.name}")
    run.finish()


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


@case("torn manifest")
def torn_manifest(scene: Scene) -> None:
    """The newest checkpoint's manifest is cut in half between two attempts."""
    _damaged(scene, lambda folder: _truncate(folder / "manifest.json"))


@case("flipped bit")
def flipped_bit(scene: Scene) -> None:
    """A bit of the newest checkpoint's moments is flipped between two attempts."""
    _damaged(scene, lambda folder: _flip(folder / "exp_avg-00001-of-00002.safetensors", scene.draw))


@case("missing file")
def missing_file(scene: Scene) -> None:
    """A file of the newest checkpoint is gone between two attempts."""
    _damaged(scene, lambda folder: (folder / "weights-00000-of-00002.safetensors").unlink())


@case("torn pointer")
def torn_pointer(scene: Scene) -> None:
    """`latest.json` is cut in half: a hint that nobody needs."""
    _damaged(scene, lambda folder: _truncate(folder.parent / "latest.json"), counts=False)


@case("flipped bit, new driver")
def flipped_bit_new_driver(scene: Scene) -> None:
    """The driver is killed, a bit of the newest weights flipped: --resume names the file, and takes the one before."""
    run = scene.start()
    run.reach(scene.somewhere())
    run.wait(lambda: len(_committed(run)) > 1, "two checkpoints")
    workers = scene.nodes.workers()
    run.kill_driver()
    signal_all(workers, signal.SIGKILL)
    wait_until_gone(workers)
    newest, before = _committed(run)[:2]
    _flip(newest / "weights-00000-of-00002.safetensors", scene.draw)
    run.damaged.add(newest.name)
    run.start(resume=True)
    run.recovered(_step(before))
    if not re.search(rf"{newest.name}: weights-00000\S+ is damaged", run.said()):
        raise Trouble("the driver does not name the damaged file")
    run.finish()


# -- disks -----------------------------------------------------------------------------------------------------------


def _failed_to_save(run: Attempts) -> bool:
    return bool(run.metrics("checkpoint failed"))


@case("disk full for a while")
def disk_full_for_a_while(scene: Scene) -> None:
    """No checkpoint can be written; the first worker is killed; then there is space again."""
    disk = full_disk(scene.folder / "disk")
    scene.at_end.append(disk.close)
    run = scene.start(f"checkpoint.directory={disk.folder}", "checkpoint.failures=100")
    run.wait(lambda: run.told, "the first checkpoint")
    disk.fill(run.other)
    run.wait(partial(_failed_to_save, run), "a checkpoint that fails")
    run.kill(run.leader)
    run.recovered()
    disk.free()
    run.finish()


@case("disk full for good")
def disk_full_for_good(scene: Scene) -> None:
    """The run ends with a message when its checkpoints fail, and goes on with --resume when there is space."""
    disk = full_disk(scene.folder / "disk")
    scene.at_end.append(disk.close)
    run = scene.start(f"checkpoint.directory={disk.folder}", "checkpoint.failures=2")
    run.wait(lambda: run.told, "the first checkpoint")
    disk.fill(run.other)
    run.note_stop()
    if not run.end():
        raise Trouble("the driver ended well, without checkpoints")
    if "could not be written" not in run.said() or "Traceback" in run.said():
        raise Trouble("the driver does not say in a message what is wrong")
    disk.free()
    run.start(resume=True)
    run.recovered()
    run.finish()


# -- sizes -----------------------------------------------------------------------------------------------------------


# At the other cases' 1e-2 two undisturbed runs, of one and of two workers, end with weights 6 % apart: training doubles
# a difference in the last bit every three steps. At 1e-3 they are 8e-8 apart.
@case("resizes 2 -> 1 -> 2", exact=False, settings=("optimizer.learning_rate=1e-3",))
def resizes(scene: Scene) -> None:
    """A node is killed: one worker goes on; a node comes, and two do, from a checkpoint made for that."""
    run = scene.start("train.workers=1..2", *_SLOW)
    run.reach(EVERY + 2)
    run.kill_node_of(run.other)
    run.recovered()
    _expect_workers(run, 1)
    scene.nodes.ensure(2)
    run.wait(lambda: _sizes(run)[-1] == 2, "a group of two workers")
    for resize in run.events("resize"):
        if not resize["saved"]:
            raise Trouble(f"no checkpoint before the resize: {resize}")
    run.finish()


def _sizes(run: Attempts) -> list[int]:
    return [event["workers"] for event in run.events("workers")]


def _expect_workers(run: Attempts, count: int) -> None:
    if _sizes(run)[-1] != count:
        raise Trouble(f"the run went on with {_sizes(run)[-1]} workers, not {count}")
