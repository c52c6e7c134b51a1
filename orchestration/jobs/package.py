"""What is sent for a job: our wheel, and a folder with the job, its files and the sender's versions, and nothing else
that could be imported.

Both lie in the cache folder under a hash of their content, so that the same is sent once, and a plain `ray job submit`
sends the same.
"""

import hashlib
import json
import os
import shlex
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

from orchestration.jobs import secrets, versions, wheel
from orchestration.jobs.spec import ENVIRONMENT, SPEC, Job
from pipelines.fetch import cache_folder

ENTRYPOINT = ("python", "-m", "orchestration.jobs.run", SPEC)
# How Ray stops a job. Its own signal would end Python without a word; and it kills after 3 s.
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
# Keys of what Ray keeps with a job.
NAME, ATTEMPT, VERB, COMMAND, DIGEST, PLACE, LABEL = (
    f"md4/{key}" for key in ("name", "attempt", "verb", "command", "digest", "place", "label/")
)
# What Ray does not tell of a job: how it is submitted again.
RESOURCES = {"md4/cpus": "entrypoint_num_cpus", "md4/gpus": "entrypoint_num_gpus"}


def digest(job: Job) -> str:
    """Of what is asked for: verb, arguments and files."""
    asked = json.dumps([job.verb, job.arguments, sorted(job.files.items())])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def attempt(name: str, submission_id: str) -> int | None:
    """The number of an attempt, of ids of the form NAME-NUMBER."""
    before, dash, number = submission_id.rpartition("-")
    return int(number) if dash and before == name and number.isdecimal() else None


@dataclass(frozen=True)
class Package:
    """A job, packed. The folder and the wheel exist on this machine."""

    job: Job
    submission_id: str
    folder: Path
    wheel: Path
    environment: dict[str, Any]  # Ray's runtime_env, with local paths
    metadata: dict[str, str]

    @property
    def entrypoint(self) -> str:
        return shlex.join(ENTRYPOINT)

    def command(self, address: str) -> str:
        """The plain command that sends the same."""
        rest = {key: value for key, value in self.environment.items() if key != "working_dir"}
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.submission_id]
        words += ["--working-dir", str(self.folder), "--runtime-env-json", json.dumps(rest)]
        words += ["--metadata-json", json.dumps(self.metadata)]
        for option, amount in (("cpus", self.job.num_cpus), ("gpus", self.job.num_gpus)):
            words += [f"--entrypoint-num-{option}", f"{amount:g}"] if amount else []
        return shlex.join([*words, "--", *ENTRYPOINT])

    def describe(self, address: str) -> str:
        """Everything that would be sent, for people."""
        files = [self.wheel, *sorted(path for path in self.folder.rglob("*") if path.is_file())]
        lines = ["files"]
        for path in files:
            data = path.read_bytes()
            shown = path.name if path == self.wheel else path.relative_to(self.folder).as_posix()
            lines.append(f"  {shown}  {len(data):,} bytes  sha256 {hashlib.sha256(data).hexdigest()}")
        for path in files[1:]:
            lines += [f"\n{path.relative_to(self.folder).as_posix()}", _indented(path.read_text(encoding="utf-8"))]
        lines += ["\nruntime environment", _indented(json.dumps(self.environment, indent=2))]
        lines += ["\nmetadata", _indented(json.dumps(self.metadata, indent=2))]
        lines += ["\nentrypoint", f"  {self.entrypoint}", "\nthe same without md4", f"  {self.command(address)}"]
        return "\n".join(lines)


def pack(job: Job, submission_id: str, *, install: bool = False) -> Package:
    """Write what is sent for a job to the cache folder.

    install: have Ray install our requirements, at the versions that are here, before the job starts.

    Raises:
        UserError: something that would be sent looks like a secret.
    """
    job.refuse_secrets()
    cache = cache_folder() / "jobs"
    code = wheel.build(cache)
    about = job.model_dump_json(exclude={"files"}, indent=1) + "\n"
    files = {SPEC: about, ENVIRONMENT: json.dumps(versions.describe(), indent=1) + "\n", **job.files}
    folder = _write(cache, files)
    variables = dict(STOPPING)
    if job.secrets:  # resolved in each process, on its own machine
        variables |= {
            secrets.REFERENCES: " ".join(job.secrets),
            HOOK: f"{secrets.__name__}.{secrets.set_up_worker.__name__}",
        }
    environment: dict[str, Any] = {"working_dir": str(folder), "py_modules": [str(code)], "env_vars": variables}
    if install:
        environment["pip"] = versions.pins()
    number = attempt(job.name, submission_id)
    facts = metadata(job) | ({} if number is None else {ATTEMPT: str(number)})
    return Package(job, submission_id, folder, code, environment, facts)


def metadata(job: Job) -> dict[str, str]:
    """What Ray keeps with a job, of all its attempts."""
    found = {NAME: job.name, VERB: job.verb, COMMAND: job.typed or job.command, DIGEST: digest(job)}
    found |= {} if job.place is None else {PLACE: job.place}
    amounts = zip(RESOURCES, (job.num_cpus, job.num_gpus), strict=True)
    found |= {key: f"{amount:g}" for key, amount in amounts if amount}
    return found | {LABEL + key: value for key, value in job.labels.items()}


def _write(cache: Path, files: dict[str, str]) -> Path:
    """A folder of these files, complete or not at all."""
    name = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:24]
    folder = cache / name
    if folder.is_dir():
        return folder
    temporary = cache / f".{name}.{uuid.uuid4().hex}"
    for file, text in files.items():
        path = temporary / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    try:
        os.rename(temporary, folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
    return folder


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip("\n").splitlines())
