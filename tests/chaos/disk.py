"""A disk that can be full: a small file system in memory where we may mount one, else a limit on a process's files."""

import resource
import subprocess
from pathlib import Path

import psutil

BYTES = 4 << 20


class Disk:
    """A file system of `BYTES` at `folder`. OSError with the reason where none can be mounted."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise OSError(str(error)) from None
        if done.returncode:
            raise OSError(done.stderr.strip())
        self._ballast = folder / "ballast"

    def fill(self, worker: int) -> None:
        """From now on nothing more can be written."""
        with self._ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        """There is space again."""
        self._ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True)


class Limit:
    """The same to one worker, without any rights: its files may not become longer than a few bytes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._worker: int | None = None

    def fill(self, worker: int) -> None:
        self._worker = worker
        limit_files(worker, 16)

    def free(self) -> None:
        if self._worker is not None and psutil.pid_exists(self._worker):
            limit_files(self._worker, None)

    def close(self) -> None:
        self.free()


def full_disk(folder: Path) -> "Disk | Limit":
    """One that can be filled, with what this machine allows."""
    try:
        return Disk(folder)
    except OSError:
        return Limit(folder)


def limit_files(process: int, bytes: int | None) -> None:
    """Writes of a process beyond so many bytes of a file fail from now on, or no longer (None). Needs no rights."""
    _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (hard if bytes is None else bytes, hard))
