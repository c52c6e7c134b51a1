"""What is installed where a job is sent from, and where it runs: compared when it starts, for the packages are the
cluster's own."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from md4.errors import UserError
from orchestration.jobs.wheel import project


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """What goes with a job: this Python, what our code requires, and the versions of it here."""
    required = project()[1]
    names = [Requirement(one).name for one in required]
    here = {name: version for name in names if (version := _installed(name))}
    return {"python": platform.python_version(), "requires": list(required), "versions": here}


def pins() -> list[str]:
    """Our requirements, each at the version that is here; Ray itself is the cluster's."""
    versions = describe()["versions"]
    return [f"{name}=={Version(version).public}" for name, version in versions.items() if name != "ray"]


def compare(sent: Mapping[str, Any]) -> list[str]:
    """Compare this machine with what was sent with a job; gives notes on what differs without harm.

    Raises:
        UserError: packages that the code requires are missing here, or too old.
    """
    wrong, other = [], []
    for text in sent["requires"]:
        required = Requirement(text)
        here, there = _installed(required.name), sent["versions"].get(required.name)
        if here is None:
            wrong.append(f"{required.name} is missing ({required.specifier} is needed)")
        elif not required.specifier.contains(here, prereleases=True):
            wrong.append(f"{required.name} is {here} ({required.specifier} is needed)")
        elif there is not None and Version(there).public != Version(here).public:
            other.append(f"{required.name} {here} (the sender has {there})")
    if wrong:
        raise UserError(
            f"the cluster's machine lacks what md4 needs: {', '.join(wrong)}; use an image that has it, or "
            "`md4 submit --install`"
        )
    if (python := platform.python_version()).split(".")[:2] != sent["python"].split(".")[:2]:
        other.insert(0, f"Python {python} (the sender has {sent['python']})")
    return other
