"""All inputs of an ingest, numbered once and for good, in units.

A plan is complete or absent: its own small file is written last. It says what was asked for, so that the same folder is
never gone on with for other sources, and holds no secret; those stand in a file beside, which only its owner can read,
and which a fresh signature of the same urls replaces.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .candidate import Unit
from .errors import IngestError
from .frozen import PLAN, ROOTS, UNITS, VERSION

_AGAIN = "begin the ingest anew"


class Plan:
    """An open plan: `len(plan)` units. `inputs` counts all inputs, `passed` what was there and is no input, by kind.

    `digest` names the inputs: equal for the same ones in the same order.
    """

    def __init__(self, folder: Path, about: dict[str, Any], units: pa.Table) -> None:
        self.folder, self.about = folder, about
        self.inputs, self.digest = int(about["inputs"]), str(about["digest"])
        self.passed: dict[str, int] = about["passed"]
        self.sources: list[str] = about["sources"]
        self._units = units

    @classmethod
    def open(cls, work: str | Path) -> Plan:
        """The plan in a folder. Raises IngestError if there is none, or no whole one."""
        folder = Path(work)
        try:
            about = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            if about["version"] != VERSION:
                raise IngestError(
                    f"{folder} was planned by another version of Gristmill ({about['version']}): finish it with "
                    f"that one, or {_AGAIN}"
                )
            units = pq.read_table(folder / UNITS, use_threads=False, memory_map=False)
            if units.num_rows != about["units"]:
                raise ValueError("units are missing")
            return cls(folder, about, units.combine_chunks())
        except FileNotFoundError as error:
            raise IngestError(
                f"{folder} holds no plan of an ingest ({error.filename} is not there): {_AGAIN}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IngestError(f"the plan in {folder} cannot be read ({error}): {_AGAIN}") from error

    def __len__(self) -> int:
        return self._units.num_rows

    def unit(self, number: int) -> Unit:
        """Unit `number`, below `len(plan)`. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"there is no unit {number} in a plan of {len(self)}")
        row = {name: self._units.column(name)[number].as_py() for name in self._units.column_names}
        return Unit(number=number, **{**row, "detail": json.loads(row["detail"])})

    def require(self, asked: dict[str, Any]) -> None:
        """Raise IngestError, with what differs, unless this plan is of what is asked for."""
        differing = [
            f"{name} {self.about.get(name)!r} and not {value!r}"
            for name, value in asked.items()
            if name not in ("sources", "prints") and self.about.get(name) != value
        ]
        before, now = self.sources, asked["sources"]
        gone = [one for one in before if one not in now]
        fresh = [one for one in now if one not in before]
        if gone or fresh:
            named = [*(f"{one} is not asked for now" for one in gone), *(f"{one} is new" for one in fresh)]
            differing += named[:10] + ([f"and {len(named) - 10} more"] if len(named) > 10 else [])
        elif before != now:
            differing.append("the same sources in another order, or another number of times")
        elif self.about.get("prints") != asked["prints"]:
            differing.append("sources with other queries behind the question mark")
        if differing:
            raise IngestError(
                f"{self.folder} holds the inputs of another ingest: {'; '.join(differing)}. Give the same sources and "
                f"settings to go on with it, or {_AGAIN}"
            )


def roots_of(folder: Path) -> list[str]:
    """The sources of a plan as they are opened, secrets included. Raises IngestError."""
    path = folder / ROOTS
    try:
        status = path.stat()
        return _roots(path, (status.st_mtime_ns, status.st_ino))
    except (OSError, ValueError) as error:
        raise IngestError(f"{path} cannot be read ({error}): {_AGAIN}") from error


@lru_cache(maxsize=4)
def _roots(path: Path, stamp: tuple[int, int]) -> list[str]:
    return json.loads(path.read_text(encoding="utf-8"))
