"""Durations as people write them: 90s, 10m, 6h, 2d."""

import re
from datetime import timedelta

from md4.errors import UserError

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def seconds(text: str, what: str) -> float:
    """The seconds of `90`, `90s`, `10m`, `1h30m`, `2d`; UserError that names `what`."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip()) if text.strip() else None
    if match is None:
        raise UserError(f"{what} {text!r} is no duration: e.g. 90s, 10m, 1h30m or 2d")
    return float(sum(int(number) * unit for number, unit in zip(match.groups("0"), _UNITS.values(), strict=True)))


def duration(length: float | timedelta) -> str:
    """The two largest parts of a duration (s): 2h05m, 41s."""
    rest = round(length.total_seconds() if isinstance(length, timedelta) else length)
    parts: list[str] = []
    for unit, size in _UNITS.items():
        if rest >= size or (parts and rest):
            number, rest = divmod(rest, size)
            parts.append(f"{number:02d}{unit}" if parts else f"{number}{unit}")
        if len(parts) == 2:
            break
    return "".join(parts) or "0s"
