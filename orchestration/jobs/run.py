"""On the cluster: `python -m orchestration.jobs.run job.json` carries out the job in the folder of that file.

It compares the packages that are there with what the code requires, resolves the references to secrets, and runs the
command as a child process with the job's retries and time limit. Training whose run exists is resumed, and so is a
search whose study does. It ends with the command's exit code (`orchestration.jobs.attempts`).
"""

import importlib.metadata
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from md4.errors import UserError
from orchestration.jobs import secrets, versions
from orchestration.jobs.attempts import MISTAKE, Attempts, say
from orchestration.jobs.spec import ENVIRONMENT, Job
from pipelines.storage import Folder

_RESUME = "--resume"


def main(path: str) -> int:
    """Carry out the job of a file; gives the exit code."""
    try:
        file = Path(path).absolute()
        job = _read(file)
        os.chdir(file.parent)
        sent = file.parent / ENVIRONMENT
        if sent.is_file() and (notes := versions.compare(json.loads(sent.read_text(encoding="utf-8")))):
            say(f"other versions than the sender's: {', '.join(notes)}")
        environment = os.environ | secrets.resolve(job.secrets)
        os.environ.update(environment)  # the run's folder is looked at from here, too
        run = _run_folder(job) if job.verb == "train" else None
        begun = _begun(job, run and run[0])
    except UserError as error:
        print(f"md4: {error}", file=sys.stderr)
        return error.exit_code
    say(f"{job.command} (md4 {importlib.metadata.version('md4')})")
    progress = partial(_newest_step, run) if run else lambda: None
    return Attempts(job, partial(_command, job, begun), environment, say, progress).run()


def _read(file: Path) -> Job:
    try:
        return Job.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"job {file} can't be read ({error})") from None
    except ValidationError as error:
        raise UserError(f"{file} is no job: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def _command(job: Job, begun: tuple[Folder, str] | None) -> list[str]:
    """The command of the next attempt."""
    command = [sys.executable, "-m", "orchestration", job.verb, *job.arguments]
    if begun is not None and _RESUME not in job.arguments and begun[0].exists(begun[1]):
        say(f"{'study' if job.verb == 'search' else 'run'} {begun[0]} exists: it is resumed")
        command.insert(4, _RESUME)
    return command


def _begun(job: Job, run: Folder | None) -> tuple[Folder, str] | None:
    """What is to be resumed once it exists: its folder, and the file that is there then."""
    if job.verb == "search":
        given = dict(zip(job.arguments, job.arguments[1:], strict=False))  # resolved ones have both
        if not {"--studies", "--name"} <= given.keys():
            return None
        return Folder(given["--studies"]) / given["--name"], "study.yaml"
    return None if run is None else (run, "config.yaml")


def _run_folder(job: Job) -> tuple[Folder, Folder]:
    """The folder of the run that `train` makes or resumes, and that of its checkpoints."""
    tree = _settings(job)
    runs, name = str(tree["runs"]), str(tree["name"])
    where = tree["checkpoint"]["directory"]
    return Folder(runs) / name, Folder(where) / name if where else Folder(runs) / name / "checkpoints"


def _settings(job: Job) -> dict[str, Any]:
    """The settings that the arguments name. Of resolved ones without all that checks them: it would stay in memory."""
    import yaml

    if job.arguments[-1:] == ("config.yaml",) and Path("config.yaml").is_file():
        tree = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
        if {"runs", "name", "checkpoint"} <= tree.keys():
            return tree
    from orchestration.jobs.resolve import settings

    return settings(job.verb, job.arguments)


def _newest_step(run: tuple[Folder, Folder]) -> int | None:
    """Of the newest checkpoint; None while there is none, or it can't be said."""
    from orchestration.checkpoints import committed_in

    try:
        found = committed_in(run[1])
    except (OSError, UserError):
        return None
    return int(found[0].name.split("-")[1]) if found else None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m orchestration.jobs.run JOB.json", file=sys.stderr)
        sys.exit(MISTAKE)
    sys.exit(main(sys.argv[1]))
