"""Durations for people."""

from datetime import timedelta

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


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
