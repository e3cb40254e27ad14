"""The units of a generation as jobs for workers: all of a plan, or what failed in earlier ones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from .candidate import Unit
from .errors import IngestError
from .ledger import failed, generations
from .plan import Plan
from .unit import Job
from .workplace import Workplace


class Jobs(Protocol):
    """`jobs[n]` for n below `len(jobs)`; `inputs` of them all, of which the first has the number `base`."""

    inputs: int
    base: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Job: ...


class Planned:
    """Every unit of a plan."""

    def __init__(
        self, plan: Plan, inputs: Path, spool: Path, base: int, *, store: bool = True, hosts: Path | None = None
    ) -> None:
        self.plan, self.inputs, self.base = plan, plan.inputs, base
        self._job = Job(plan.unit(0), str(inputs), str(spool), base, None, store, str(hosts) if hosts else None)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Job:
        return replace(self._job, unit=self.plan.unit(number))


class Retried:
    """What failed for reasons that may have passed, a job for each unit with such inputs. IngestError if there is none."""

    base = 0  # the inputs keep their numbers

    def __init__(self, place: Workplace, hosts: Path) -> None:
        self._jobs: list[Job] = []
        self.inputs = 0
        known = generations(place.root)
        for generation, numbers in failed(place.root).items():
            earlier, base = Workplace(place.root, generation), known[generation].base
            plan = Plan.open(earlier.inputs)
            firsts = _Firsts(plan)
            by_unit: dict[int, list[int]] = {}
            for number in numbers:
                by_unit.setdefault(bisect_right(firsts, number - base) - 1, []).append(number - base)
            for unit, wanted in by_unit.items():
                job = replace(plan.unit(unit), number=len(self._jobs))
                self._jobs.append(
                    Job(job, str(earlier.inputs), str(place.spool), base, tuple(wanted), True, str(hosts))
                )
            self.inputs += len(numbers)
        if not self._jobs:
            raise IngestError(
                f"nothing in {place.root} failed in a way that may have passed: there is nothing to retry"
            )

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: int) -> Job:
        return self._jobs[number]


class _Firsts(Sequence[int]):
    """The first input of every unit of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number):  # type: ignore[override]
        unit: Unit = self._plan.unit(number)
        return unit.first
