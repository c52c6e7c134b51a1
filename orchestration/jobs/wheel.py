"""The code that runs here as a wheel, out of its source tree or an installed package; equal bytes for equal code.

Ray knows wheels by their names alone, and installs them with pip. So the name holds a hash of the content, and the
metadata name no dependencies: pip would fetch all of them anew beside those that the cluster has. What they should be
is compared when a job starts (`orchestration.jobs.versions`).
"""

import base64
import hashlib
import importlib.metadata
import tomllib
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path

import md4
from orchestration.jobs.spec import PACKAGES
from pipelines.storage import write_atomically

_HOME = Path(md4.__file__).resolve().parents[1]
_LEFT_OUT = {".pyc", ".pyo", ".so"}
_TIME = (1980, 1, 1, 0, 0, 0)  # of every file: content alone decides


@cache
def project() -> tuple[str, tuple[str, ...]]:
    """Version and requirements of this code: of the source tree that it runs from, else of the installed package."""
    source = _HOME / "pyproject.toml"
    if source.is_file():
        facts = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        return facts["version"], tuple(facts["dependencies"])
    found = importlib.metadata.distribution("md4")
    return found.version, tuple(one for one in found.requires or () if "extra ==" not in one)


def build(folder: Path) -> Path:
    """The wheel, written to `folder` unless it is there already; its path."""
    files = _files()
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    version = f"{project()[0].partition('+')[0]}+code.{digest.hexdigest()[:12]}"
    path = folder / f"md4-{version}-py3-none-any.whl"
    if not path.exists():
        write_atomically(path, _pack(files, version))
    return path


def _files() -> dict[str, bytes]:
    """All files of our packages, by their path in the wheel."""
    found = {}
    for package in PACKAGES:
        for path in sorted((_HOME / package).rglob("*")):
            below = path.relative_to(_HOME)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in below.parts)
            if path.is_file() and not hidden and path.suffix not in _LEFT_OUT:
                found[below.as_posix()] = path.read_bytes()
    return found


def _pack(files: dict[str, bytes], version: str) -> bytes:
    about = f"md4-{version}.dist-info"
    files = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: md4\nVersion: {version}\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: md4\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_sum(data)},{len(data)}\n" for name, data in files.items())
    files[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _sum(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
