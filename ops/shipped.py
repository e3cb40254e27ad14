"""The recipes that are shipped, by name, and what a name that is none of them was meant to be.

Names are families and what follows: `mugs-vits16-100` is of the family `mugs`. A family's own name is no recipe, since
its recipes differ in what they cost, so that all of them are named.
"""

from __future__ import annotations

import difflib
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def shipped() -> list[str]:
    """Names of all of them, in order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def unknown(source: str | Path) -> str:
    """What to say of a name or a path behind which there is no recipe."""
    name = str(source)
    if Path(name).suffix or "/" in name:
        what = "that is a folder; give a YAML file" if Path(name).is_dir() else "there is no such file"
        return f"no recipe {name!r}: {what}"
    known = shipped()
    low = name.lower()
    kin = [one for one in known if low and one.startswith(low)]
    family = "that is a family; " if len(kin) > 1 and kin[0].startswith(f"{low}-") else ""
    if near := kin or difflib.get_close_matches(low, known, n=1) or _family(low, known):
        return f"no recipe {name!r}: {family}did you mean {', '.join(map(repr, near))}?"
    return f"no recipe {name!r}: shipped are {', '.join(known)}, or give a YAML file"


def _family(name: str, known: list[str]) -> list[str]:
    """The recipes of the family whose name is most like this one's first part; [] where none is like enough."""
    near = difflib.get_close_matches(name.partition("-")[0], sorted({one.partition("-")[0] for one in known}), n=1)
    return [one for one in known if one.partition("-")[0] in near]
