"""`verify`: is everything there that the registry says, to the byte?"""

from collections.abc import Callable
from dataclasses import dataclass, field

from md4.errors import UserError
from orchestration.registry.registry import Registry
from orchestration.registry.versions import Version


@dataclass
class Found:
    """What was looked at, and what is wrong."""

    versions: int = 0
    files: int = 0
    bytes: int = 0
    damage: list[str] = field(default_factory=list)


def check(registry: Registry, ref: str | None, say: Callable[[str], None]) -> Found:
    """Verify a version (MODEL@REF), a model or all; each problem is said when it is found.

    Files that are none of a version's (reports of a later evaluation) are said, and no damage.
    """
    found = Found()

    def wrong(problem: str) -> None:
        found.damage.append(problem)
        say(f"damaged: {problem}")

    models = registry.models() if ref is None else [registry.find(ref).model]
    if not models:
        raise UserError(f"{registry} has no models")
    for model in models:
        numbers = {version.number for version in registry.versions(model)}
        for version in [registry.find(ref)] if ref and "@" in ref else registry.versions(model):
            _check_version(version, found, wrong, say)
        for name in registry.names(model):
            try:
                state = registry.name(model, name)
            except UserError as error:
                wrong(str(error))
                continue
            trial = None if state.candidate is None else state.candidate.version
            for number in {state.version, trial} - {None} - numbers:
                wrong(f"{model}: {name} stands for version {number}, which is not there")
    return found


def _check_version(version: Version, found: Found, wrong: Callable[[str], None], say: Callable[[str], None]) -> None:
    found.versions += 1
    before = len(found.damage)
    for problem in version.damage():
        wrong(problem)
    if len(found.damage) == before:
        found.files += len(version.manifest.files)
        found.bytes += version.manifest.bytes
        if strangers := version.strangers():
            say(f"{version}: files beside it were not added with it ({len(strangers)}), such as {strangers[0]}")
