"""Where a run's files are for pods: in S3, or on a volume that all pods mount. This machine's paths mean nothing."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from infra.kuberay.options import named
from md4.errors import UserError
from orchestration import results
from orchestration.config import Config
from orchestration.suites.settings import suite_names
from pipelines.storage import Folder

MOUNT = "/storage"  # of the volume, in every pod
_ELSEWHERE = ("s3://", "http://", "https://")
# Folders that are written.
_WRITTEN = ("runs", "data.directory", "checkpoint.directory", "evaluation.suite_results", "registry")


class Places:
    """Puts local paths of a configuration below a volume or a prefix in S3.

    A path is taken relative to the current folder, as the command would take it here: `runs` becomes /storage/runs on a
    volume, and s3://bucket/prefix/runs in S3. One below /storage is meant as it is.
    """

    def __init__(self, storage: str | None):
        """storage: pvc:NAME, s3://bucket/prefix, or None where the configuration has no local path."""
        self.claim, self.base = None, None
        self.needed: list[str] = []  # what must lie there before
        if storage is None:
            return
        scheme, _, rest = storage.partition(":")
        if scheme == "pvc" and rest:
            named("--storage pvc", rest)
            self.claim, self.base = rest, MOUNT
        elif scheme == "s3":
            self.base = str(Folder(storage))  # UserError for what is no url of S3
        else:
            raise UserError(f"--storage {storage!r} must be pvc:NAME (a PersistentVolumeClaim) or s3://bucket/prefix")

    def put(self, key: str, place: str) -> str:
        """The place as pods see it; UserError naming `key` for a path of this machine that has no place there."""
        if place.startswith(_ELSEWHERE):
            return place
        if self.base is None:
            raise UserError(
                f"{key}={place} is a path of this machine, which pods don't see: say s3://..., or --storage pvc:NAME "
                "or s3://bucket/prefix, below which it is put"
            )
        path = PurePosixPath(place)
        if path.is_absolute():
            if self.claim is not None and path.is_relative_to(MOUNT):
                return str(path)
            if not path.is_relative_to(Path.cwd()):
                raise UserError(
                    f"{key}={place} lies outside of the current folder, so that it has no place below --storage: say a "
                    f"relative path, s3://...{', or one below ' + MOUNT if self.claim else ''}"
                )
            path = path.relative_to(Path.cwd())
        if ".." in path.parts:
            raise UserError(f"{key}={place} leads out of the current folder: it has no place below --storage")
        found = f"{self.base}/{path}"
        if key not in _WRITTEN:
            if self.claim is None and not key.endswith(("path", "texts")):
                raise UserError(f"{key}={place} is read as a file: on pods it needs a volume, --storage pvc:NAME")
            self.needed.append(found)
        return found

    def tree(self, config: Config, serving: bool = False) -> dict[str, Any]:
        """The configuration as pods read it: all settings, with places put. serving: those that a service reads."""
        tree = config.model_dump(mode="json")
        for below, name, key in _places(tree):
            if not serving or key.startswith(("runs", "serving")):
                below[name] = self.put(key, below[name])
        return tree


def _places(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every setting that names a place: the part that holds it, its name there, and its key."""
    yield tree, "runs", "runs"
    if tree["checkpoint"]["directory"] is not None:
        yield tree["checkpoint"], "directory", "checkpoint.directory"
    sets = [("data", tree["data"])] + [(f"data.mixture.{n}", one) for n, one in enumerate(tree["data"]["mixture"])]
    for key, one in sets:
        yield one, "directory", f"{key.partition('.mixture')[0]}.directory"
        if "/" in one["vocabulary"]:
            yield one, "vocabulary", f"{key}.vocabulary"
        # A name on the hub has a slash, too, but is there for the source huggingface alone.
        if one["path"] is not None and not (one["source"] == "huggingface" and not Path(one["path"]).exists()):
            yield one, "path", f"{key}.path"
    evaluation = tree["evaluation"]
    if evaluation["suite"] is not None:
        evaluation["suite_results"] = str(results.place(evaluation["suite_results"]))
        yield evaluation, "suite_results", "evaluation.suite_results"
        if evaluation["suite"] not in suite_names():
            yield evaluation, "suite", "evaluation.suite"
    if tree["serving"]["canary"]["texts"] is not None:
        yield tree["serving"]["canary"], "texts", "serving.canary.texts"
    for name in ("keys", "access_log"):
        if tree["serving"][name] is not None:
            yield tree["serving"], name, f"serving.{name}"
