"""API keys: who may ask.

The file of keys has a line for each, `name: sha256 of the key in hex`; `#` begins a comment. The keys themselves are in
no file. It is read again when it changes, so that keys can be given out and taken back under way.

    md4 key alice --file keys    # shows the key, and adds the line
"""

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

from md4.errors import UserError

_LINE = re.compile(r"([^\s:#]+)\s*:\s*([0-9a-fA-F]{64})")
_log = logging.getLogger(__name__)


def new(name: str) -> tuple[str, str]:
    """A new key, and its line for the file. UserError for a name that can't stand there."""
    if not re.fullmatch(r"[^\s:#]+", name):
        raise UserError(f"name {name!r}: a key's name has neither spaces nor ':' nor '#'")
    key = f"md4-{secrets.token_urlsafe(32)}"
    return key, f"{name}: {_digest(key)}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys of a file. UserError if it can't be read, holds no key or a line that is none."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stamp = self._stamp_now()
        self._digests = self._read()

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None if it is none. Takes as long for a wrong one as for a right one."""
        self._refresh()
        digest, found = _digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def make_sure_is_new(self, name: str) -> None:
        """UserError if there is a key of that name."""
        if name in self._digests:
            raise UserError(f"{str(self.file)!r} has a key of {name!r} already: remove that line first")

    def _refresh(self) -> None:
        try:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp, self._digests = stamp, self._read()
        except UserError as error:
            _log.warning("the keys of before stay in force: %s", error)

    def _stamp_now(self) -> tuple[int, int]:
        try:
            facts = self.file.stat()
        except OSError as error:
            raise UserError(f"the file of keys {str(self.file)!r} can't be read: {error.strerror}") from None
        return facts.st_mtime_ns, facts.st_size

    def _read(self) -> dict[str, str]:
        try:
            lines = self.file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the file of keys {str(self.file)!r} can't be read: {error}") from None
        found: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.split("#", 1)[0].strip()
            if not text:
                continue
            match = _LINE.fullmatch(text)
            if match is None or match[1] in found:
                why = "that name was there before" if match else "a line is 'name: sha256 of the key in hex'"
                raise UserError(f"the file of keys {str(self.file)!r}, line {number}: {why}")
            found[match[1]] = match[2].lower()
        if not found:
            raise UserError(f"the file of keys {str(self.file)!r} has no key: nobody could ask")
        return found
