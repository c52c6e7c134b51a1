"""Secrets go by reference: what looks like one is refused where it would be sent, and references are resolved on the
machine that uses them.

    NAME=env:VARIABLE    a variable of the cluster's machines
    NAME=file:PATH       a file on them
    NAME=k8s:SECRET/KEY  the pods have it as variable NAME, from that secret (`md4 render kuberay` puts it there)
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md4.errors import UserError

REFERENCES = "MD4_SECRETS"  # the variable with a job's references, for the processes of its workers
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Where the last part of a key says so, any value is one.
_KEY = re.compile(
    r"(?:^|[._-])(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]id)?|"
    r"secret[_-]?key|private[_-]?key|credentials?)$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[\w-]{35}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"  # user and password in a url
    r"|[?&](?:X-Amz-Signature|X-Goog-Signature|sig|signature|access_token|token|api_?key)=[^&\s]+"
    r"|\bBearer\s+[\w.~+/-]{16,}"
)


@dataclass(frozen=True)
class Reference:
    """Where a secret is. Its text is not the secret's."""

    name: str  # of the variable that the command finds it in
    kind: str  # env, file, k8s
    place: str

    def value(self) -> str:
        """The secret, on the machine that has it; UserError where it has not."""
        if self.kind == "file":
            try:
                return Path(self.place).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"secret {self.name}: file {self.place} can't be read on this machine ({error})"
                ) from None
        variable = self.place if self.kind == "env" else self.name
        if not (found := os.environ.get(variable)):
            source = "" if self.kind == "env" else f" from the secret {self.place} (`md4 render kuberay` sets it)"
            raise UserError(f"secret {self.name}: the cluster's machine has no variable {variable}{source}")
        return found


def parse(text: str) -> Reference:
    """A reference as typed; ValueError says what one looks like, and does not repeat the text: it may be a secret."""
    name, equals, place = text.partition("=")
    kind, colon, place = place.partition(":")
    if not equals or not _VARIABLE.fullmatch(name):
        raise ValueError("a secret is named as NAME=env:VARIABLE, NAME=file:PATH or NAME=k8s:SECRET/KEY")
    right = {
        "env": bool(_VARIABLE.fullmatch(place)),
        "file": place.startswith("/"),
        "k8s": bool(re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", place)),
    }
    if not colon or not right.get(kind):
        raise ValueError(
            f"secret {name} is not a reference: {name}=env:VARIABLE, {name}=file:/PATH or {name}=k8s:SECRET/KEY"
        )
    return Reference(name, kind, place)


def in_tree(tree: Any, key: str = "") -> Iterator[str]:
    """The keys of a configuration, or of labels, whose values look like secrets."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from in_tree(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for number, value in enumerate(tree):
            yield from in_tree(value, f"{key}.{number}")
    elif isinstance(tree, str) and tree and (_KEY.search(key) or _VALUE.search(tree)):
        yield f"{key} looks like a secret"


def in_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The settings and options of a command whose values look like secrets."""
    for number, (before, text) in enumerate(zip(("", *arguments), arguments, strict=False), 1):
        key, equals, value = text.partition("=")
        if equals and value and (_KEY.search(key.lstrip("-")) or _VALUE.search(value)):
            yield f"{key if not _VALUE.search(key) else f'argument {number}'} looks like a secret"
        elif before.startswith("--") and "=" not in before and not text.startswith("-") and _KEY.search(before[2:]):
            yield f"{before} looks like a secret"
        elif _VALUE.search(text):
            yield f"argument {number} looks like a secret"


def in_file(name: str, text: str) -> Iterator[str]:
    """Places in a file that is sent."""
    if name.endswith((".yaml", ".yml")):
        from orchestration.config import read_yaml

        yield from (f"{name}: {place}" for place in in_tree(read_yaml(text, name)))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if _VALUE.search(line):
            yield f"{name}, line {number}, looks like a secret"


def resolve(references: Sequence[str]) -> dict[str, str]:
    """The variables that references stand for, on this machine; UserError where one is missing."""
    return {found.name: found.value() for found in map(parse, references)}


def set_up_worker() -> None:
    """Called by Ray in every process of a job's workers: the job's secrets come into its environment.

    What this machine does not have stays away: the driver refuses to start without it, and not every worker uses it.
    """
    for reference in os.environ.get(REFERENCES, "").split():
        try:
            os.environ.update(resolve([reference]))
        except UserError:
            continue
