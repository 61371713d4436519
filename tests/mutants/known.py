"""Changes that no test notices, each with the reason: known.txt."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("known.txt")


class Known(NamedTuple):
    """Names of changes -> what is said of them."""

    names: dict[str, str]

    def kind(self, name: str) -> str:
        """Return ``equivalent``, ``accepted``, or nothing for what is not in the list."""
        return self.names.get(name, "").partition(":")[0]

    def reason(self, name: str) -> str:
        """Return what is said of one."""
        return self.names.get(name, "")


def read_known(text: str | None = None) -> Known:
    """Read the list: a change's name on a line, and indented under it ``equivalent: why`` or ``accepted: why``."""
    names: dict[str, str] = {}
    name = ""
    for line in (FILE.read_text(encoding="utf-8") if text is None else text).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            name = line.strip()
        elif name and line.strip().partition(":")[0] in ("equivalent", "accepted"):
            names[name] = line.strip()
            name = ""
        else:
            raise ValueError(f"known.txt: {line.strip()!r} is neither 'equivalent: why' nor 'accepted: why'")
    return Known(names)
