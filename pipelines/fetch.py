"""Data that lie elsewhere, brought to this machine: by url, or from the Hugging Face hub.

Urls go through pooch into the cache folder (`MD4_CACHE`, else `~/.cache/md4` or where XDG_CACHE_HOME says), and are
unpacked there; what the hub has goes into the hub's own cache (`HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what
they mean everywhere). An interrupted download goes on where it was. When all is there and verified, a *receipt* in the
cache says which files they are, with sizes and hashes: until then nothing counts as fetched, and what is fetched again
later must have the same hashes.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from md4.errors import UserError
from pipelines import roots
from pipelines.archives import FREE_BYTES, RATIO
from pipelines.roots import File, local_file
from pipelines.storage import write_atomically
from pipelines.units import Report

_CHUNK = 2**20
_ARRIVING = 2**16  # bytes written at once: what is lost when a connection breaks
_ATTEMPTS = 5


def cache_folder() -> Path:
    """Where fetched data lie."""
    if chosen := os.environ.get("MD4_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "md4"


# -- receipts --------------------------------------------------------------------------------------------------------


class Receipt(BaseModel):
    """What was fetched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    folder: str
    files: dict[str, tuple[int, str]]  # size and sha256 by the path below the folder
    splits: dict[str, str | None] = {}  # where the origin says which files belong to which split
    archives: dict[str, str] = {}  # sha256 of what was downloaded, by url

    def is_whole(self) -> bool:
        """Are the files still there? They are told by their sizes."""
        with suppress(OSError):
            return all(
                os.stat(os.path.join(self.folder, name)).st_size == size for name, (size, _) in self.files.items()
            )
        return False

    def listed(self) -> list[File]:
        """The files, sorted by name."""
        return [local_file(os.path.join(self.folder, name), name) for name in sorted(self.files)]


def receipt(key: str) -> Receipt | None:
    """The receipt of a finished fetch of that name, or None."""
    try:
        found = Receipt.model_validate_json(_receipt_file(key).read_bytes())
    except (OSError, ValidationError):
        return None
    return found


def fetched(key: str) -> Receipt | None:
    """The receipt, if what it tells of is there."""
    found = receipt(key)
    return found if found is not None and found.is_whole() else None


def key_of(name: str, place: str | None = None) -> str:
    """The name under which something is kept: of a set, and where it came from if that is not the usual place."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return name if place is None else f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def _receipt_file(key: str) -> Path:
    return cache_folder() / "receipts" / f"{key}.json"


def _keep(key: str, new: Receipt, old: Receipt | None) -> Receipt:
    """Write a receipt. UserError if the same was fetched before and was something else then."""
    if old is not None and old.files != new.files:
        changed = sorted(name for name in {*old.files, *new.files} if old.files.get(name) != new.files.get(name))
        raise UserError(
            f"{new.origin} is not what it was when it was fetched before: {', '.join(changed[:3])} changed. If that is "
            f"right, remove {str(_receipt_file(key))!r}"
        )
    write_atomically(_receipt_file(key), new.model_dump_json(indent=1).encode() + b"\n")
    return new


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; gives the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


# -- urls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Url:
    """A file to download; `hash` as pooch has it, "sha256:..." or "md5:...", or None if no sure one is known."""

    url: str
    hash: str | None = None

    @property
    def name(self) -> str:
        """What the file is called."""
        return self.url.partition("?")[0].rstrip("/").rpartition("/")[2]


def fetch_urls(key: str, urls: tuple[Url, ...], wanted: str | None, report: Report) -> Receipt:
    """Download the files, unless that is done, and unpack from archives what matches the pattern `wanted`.

    UserError if they cannot be had, or are not what they should be.
    """
    if done := fetched(key):
        return done
    old = receipt(key)
    folder, downloads = cache_folder() / "sets" / key, cache_folder() / "downloads" / key
    archives = {}
    for url in urls:
        report(f"data: fetching {url.url}")
        known = url.hash or (f"sha256:{old.archives[url.url]}" if old and url.url in old.archives else None)
        file = _download(url, known, downloads)
        archives[url.url] = _sha256(file)
    with _replacing(folder) as made:
        for url in urls:
            file = downloads / url.name
            if wanted is None or not _is_archive(file):
                shutil.move(file, made / url.name)
            else:
                with open(file, "rb") as opened:
                    unpack(opened, url.url, wanted, made)
    found = _facts(folder)
    shutil.rmtree(downloads, ignore_errors=True)
    origin = ", ".join(url.url for url in urls)
    return _keep(key, Receipt(origin=origin, folder=str(folder), files=found, archives=archives), old)


def _facts(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, _sha256(path)) for path in files}


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        yield made
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _download(url: Url, known: str | None, folder: Path) -> Path:
    import pooch
    import requests

    folder.mkdir(parents=True, exist_ok=True)
    downloader: Any = _Resuming(folder / f"{url.name}.part")
    pooch.get_logger().setLevel("ERROR")  # it advises to write the hash down, which receipts do
    try:
        return Path(pooch.retrieve(url.url, known, fname=url.name, path=folder, downloader=downloader))
    except ValueError as error:
        raise UserError(
            f"{url.url} is not what it should be ({error}). If the origin has changed, get a file with the known hash "
            "elsewhere, and say where it lies with data.path"
        ) from error
    except (requests.RequestException, OSError) as error:
        raise UserError(
            f"{url.url} cannot be fetched: {error}. With a copy elsewhere, say where: data.path=FOLDER or a url"
        ) from error


class _Resuming:
    """A downloader for pooch that goes on with what an earlier attempt left in the file `part`."""

    def __init__(self, part: Path):
        self.part, self.tag = part, part.with_suffix(".etag")

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        import requests

        for attempt in range(_ATTEMPTS):
            try:
                self._go_on(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt + 1 == _ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempt)
        self.tag.unlink(missing_ok=True)
        os.replace(self.part, output_file)

    def _go_on(self, url: str) -> None:
        import requests

        have = self.part.stat().st_size if self.part.exists() and self.tag.exists() else 0
        # Only what is still the same file may be continued.
        headers = {"Range": f"bytes={have}-", "If-Range": self.tag.read_text()} if have else {}
        headers["Accept-Encoding"] = "identity"
        with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
            if answer.status_code == 416:  # all of it is there, or it is another file now
                self.part.unlink()
                raise requests.ConnectionError(f"{url} cannot be continued")
            answer.raise_for_status()
            if answer.status_code != 206:
                have = 0
            etag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            self.tag.write_text(etag) if etag and not etag.startswith("W/") else self.tag.unlink(missing_ok=True)
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(self.part, "ab" if have else "wb") as file, _progress(self.part.stem, total) as advance:
                advance(have)
                for chunk in answer.iter_content(_ARRIVING):
                    file.write(chunk)
                    advance(len(chunk))
                if total is not None and file.tell() < total:
                    raise requests.ConnectionError(f"{url} broke off after {file.tell():,} of {total:,} bytes")


# -- archives --------------------------------------------------------------------------------------------------------


def is_archive(name: str) -> bool:
    """Does a file's name say that it is an archive?"""
    return name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def _is_archive(file: Path) -> bool:
    return is_archive(file.name) and (zipfile.is_zipfile(file) or tarfile.is_tarfile(file))


def unpack(file: BinaryIO, name: str, wanted: str, folder: Path) -> None:
    """Write the plain files in a zip or a tar whose path matches `wanted`, each with the last of its folders.

    UserError for archives that are damaged, hold none, or unpack to very much more than they are.
    """
    most = max(FREE_BYTES, RATIO * file.seek(0, os.SEEK_END))
    file.seek(0)
    count = 0
    try:
        for path, content in _plain_files(file):
            if not re.search(wanted, path):
                continue
            parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
            target = folder.joinpath(*parts[-2:])
            target.parent.mkdir(exist_ok=True)
            with open(target, "wb") as out:
                while chunk := content.read(_CHUNK):
                    most -= len(chunk)
                    if most < 0:
                        raise UserError(f"{name} unpacks to more than {RATIO} times its size: it is refused")
                    out.write(chunk)
            count += 1
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise UserError(f"{name} is not a sound archive: {error}") from error
    if not count:
        raise UserError(f"{name} holds no file that matches {wanted!r}")


def _plain_files(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, content
        return
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if member.isreg() and not member.issparse() and (content := archive.extractfile(member)):
                yield member.name, content


def unpack_mirror(key: str, archives: list[str], wanted: str, report: Report) -> Receipt:
    """Unpack what matches `wanted` from archives at these places into the cache, unless that is done."""
    if done := fetched(key):
        return done
    folder = cache_folder() / "sets" / key
    with _replacing(folder) as made:
        for place in archives:
            report(f"data: unpacking {place}")
            with roots.opened(place) as file:
                unpack(file, place, wanted, made)
    origin = ", ".join(archives)
    return _keep(key, Receipt(origin=origin, folder=str(folder), files=_facts(folder)), receipt(key))


# -- the Hugging Face hub --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """Files of a dataset on the hub: those that match one of `patterns`, or those that its card names for `config`."""

    repository: str
    patterns: tuple[str, ...] = ()
    config: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        what = ", ".join(self.patterns) or self.config or "its default configuration"
        return f"https://huggingface.co/datasets/{self.repository} ({what})"


def fetch_hub(key: str, hub: Hub, report: Report) -> Receipt:
    """Download the files, unless that is done. UserError if they cannot be had, or there are none."""
    if done := fetched(key):
        return done
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"data: fetching {hub}")
    place: dict[str, Any] = {"repo_id": hub.repository, "repo_type": "dataset", "revision": hub.revision}
    try:
        splits = dict.fromkeys(hub.patterns) if hub.patterns else _named_by_card(hub, place)
        folder = snapshot_download(**place, allow_patterns=list(splits))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{hub} cannot be fetched: {message}. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are heeded; with a copy "
            "elsewhere, say where: data.path=FOLDER"
        ) from error
    found, told = {}, {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        pattern = next((pattern for pattern in splits if fnmatch.fnmatch(name, pattern)), None)
        if pattern is not None and name.endswith(
            (".parquet", ".jsonl", ".json", ".gz", ".zst", ".arrow", ".tar", ".txt")
        ):
            found[name], told[name] = _hub_facts(path), splits[pattern]
    if not found:
        raise UserError(f"{hub} has no files of data that can be read: parquet or JSON lines")
    return _keep(key, Receipt(origin=str(hub), folder=str(folder), files=found, splits=told), receipt(key))


def _hub_facts(path: Path) -> tuple[int, str]:
    """Size and sha256. Large files are called after their hash in the hub's cache: what differs is damaged."""
    digest, blob = _sha256(path), path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise UserError(f"{str(blob)!r} is damaged: its sha256 is {digest}. Remove it to fetch it again")
    return path.stat().st_size, digest


def _named_by_card(hub: Hub, place: dict[str, Any]) -> dict[str, str | None]:
    """Patterns of the files of a configuration, each with its split: as the dataset's card says, else by convention."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = Path(hf_hub_download(**place, filename="README.md")).read_text(errors="replace")
    except EntryNotFoundError:
        card = ""
    configs = _configs(card)
    if not configs:
        return {f"{hub.config}/*" if hub.config else "*.parquet": None}
    names = [str(one.get("config_name", "default")) for one in configs]
    chosen = hub.config
    if chosen is None:
        default = [name for name, one in zip(names, configs, strict=True) if one.get("default") or name == "default"]
        chosen = default[0] if default else names[0] if len(names) == 1 else None
    if chosen not in names:
        raise UserError(
            f"data.path={hub.repository!r}: say which configuration, as {hub.repository}:{names[0]}; there are "
            f"{', '.join(names[:20])}"
        )
    return dict(_patterns(configs[names.index(chosen)].get("data_files")))


def _configs(card: str) -> list[dict[str, Any]]:
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    with suppress(yaml.YAMLError, AttributeError):
        configs = yaml.safe_load(head[1]).get("configs") if head else None
        return [one for one in configs or [] if isinstance(one, dict)]
    return []


def _patterns(files: Any, split: str | None = None) -> Iterator[tuple[str, str | None]]:
    """What a card may say of files: a pattern, a list of them, or entries with a split and a path."""
    from pipelines.units import SPLIT_NAMES

    if isinstance(files, str):
        yield files, split
    elif isinstance(files, list):
        for one in files:
            yield from _patterns(one, split)
    elif isinstance(files, dict):
        yield from _patterns(files.get("path"), SPLIT_NAMES.get(str(files.get("split")).lower()))
