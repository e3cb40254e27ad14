"""A ring of rows that outlives the step: negatives of a contrastive loss, or features to search for neighbours.

New rows overwrite the oldest. Norms are renewed around the written slots only, so that a search does not
normalise the whole memory each time (the official Mugs code does), and in windows of fixed place and size: a kernel
may sum a row in another order when it gets other numbers of rows, and a resumed run must find the same bits.
`compat` gives the official pointer, which moves by 2n after n rows unless the write wrapped (section 1.3 of the notes
on that code): half of the teacher's slots are then never written when the capacity is a multiple of 2n.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 256  # slots whose norms are computed together


class RingMemory:
    """`capacity` rows of `dim` numbers, random at first (normal, or unit vectors with `unit`), keyed by (seed, name).

    With `unit` the caller enqueues unit rows; they are stored as they come. Memories that start from the same
    arguments and see the same rows are equal bit for bit, so ranks need no broadcast.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        seed: int,
        unit: bool,
        compat: bool = False,
        name: str = "memory",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"{name}: capacity and dim must be positive, got {capacity} and {dim}")
        self.name, self.unit, self.compat = name, unit, compat
        rows = _random_rows(capacity, dim, seed, name, device).to(dtype)
        self.rows = (F.normalize(rows, dim=1) if unit else rows).to(device)
        self.pointer = 0  # slot that the next row goes to
        self.step = 0  # enqueues so far
        self._derive(torch.full((capacity,), -1, dtype=torch.int64))

    def _derive(self, written: Tensor) -> None:
        """Derive from `written` (step of each slot's last write, -1 never) what is kept beside it; drop the caches."""
        # On the host: it decides nothing on the device and must not synchronise with it.
        self._written = written
        self.filled = int((written >= 0).sum())  # slots that hold a real row
        self._stamps = int(written.clamp(min=0).sum())  # sum of the filled slots' steps
        self._added = int((written == written.max()).sum()) if self.filled else 0  # rows of the last enqueue
        self._real = (written >= 0).to(self.rows.dtype).to(self.rows.device)
        self._norms: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.rows.shape[0]

    @property
    def norms(self) -> Tensor:
        """Norm of each row [capacity]; read only."""
        norms = self._norms
        if norms is None:
            norms = self._norms = self.rows.new_empty(self.capacity)
            self._renew(0, self.capacity)
        return norms

    def _renew(self, start: int, stop: int) -> None:
        """Bring norms up to date in all windows that slots [start, stop) touch."""
        if self._norms is None:
            return
        for first in range(start // WINDOW * WINDOW, stop, WINDOW):
            window = slice(first, first + WINDOW)
            rows = self.rows[window]
            self._norms[window] = torch.linalg.vector_norm(rows, dim=1)

    def check(self, count: int, dim: int) -> None:
        """Raise ValueError unless rows [count, dim] can be enqueued at once."""
        if dim != self.rows.shape[1]:
            raise ValueError(f"{self.name}: rows of {dim} numbers do not fit a memory of {self.rows.shape[1]}")
        if count > self.capacity:
            raise ValueError(
                f"{self.name}: a step brings {count} rows but the memory holds {self.capacity}; "
                "make the memory larger or the global batch smaller"
            )

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Write `rows` [n, dim] at the pointer, in order, and move it. ValueError if n exceeds the capacity."""
        count, capacity = rows.shape[0], self.capacity
        self.check(count, rows.shape[1])
        rows = rows.detach().to(self.rows)
        head = min(count, capacity - self.pointer)  # rows before the end of the ring; the rest starts again at 0
        for start, part in ((self.pointer, rows[:head]), (0, rows[head:])):
            slots = slice(start, start + part.shape[0])
            old = self._written[slots]
            self.filled += int((old < 0).sum())
            self._stamps += self.step * part.shape[0] - int(old.clamp(min=0).sum())
            self._written[slots] = self.step
            self._real[slots] = 1
            self.rows[slots] = part
            self._renew(slots.start, slots.stop)
        self._added = count or self._added
        wrapped = self.pointer + count > capacity
        self.pointer = (self.pointer + (2 * count if self.compat and not wrapped else count)) % capacity
        self.step += 1

    def stats(self) -> dict[str, Tensor | float]:
        """`fill` (share of slots), `age` (mean, in enqueues, of the filled slots), `norm` (their mean row norm).

        `nonfinite`: rows with a number that is not finite, which must be none. `expected_age`: what the age settles at
        once the memory is full and each enqueue brings as many rows as the last one; not there where that is unknown.
        """
        if not self.filled:
            return {"fill": 0.0, "age": 0.0, "norm": 0.0}
        found = {
            "fill": self.filled / self.capacity,
            "age": self.step - self._stamps / self.filled,
            "norm": torch.dot(self.norms, self._real) / self.filled,
            "nonfinite": (~torch.isfinite(self.norms)).sum(),
        }
        # The official pointer passes over as many slots as it fills: always the same ones, if they come out even.
        passed = self._added * (1 + (self.compat and self._added < self.capacity))
        if not self.compat or self.capacity % passed == 0:
            found["expected_age"] = (self.capacity / passed + 1) / 2
        return found

    def logs(self) -> dict[str, Tensor | float]:
        """`stats` under the names of the run's log, `memory/<name>/fill` and so on."""
        return {f"memory/{self.name}/{key}": value for key, value in self.stats().items()}

    def state(self) -> dict[str, Tensor]:
        """Contiguous copies: rows, written (step of each slot), pointer and step as int64 scalars."""
        return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Become what `state` was taken from. ValueError, and nothing changed, if it belongs to another memory."""
        check_state(self.name, state, self._live())
        if not 0 <= int(state["pointer"]) < self.capacity:
            raise ValueError(f"{self.name}.pointer: {int(state['pointer'])} is outside the {self.capacity} slots")
        self.rows = state["rows"].to(self.rows.device, copy=True, memory_format=torch.contiguous_format)
        self.pointer, self.step = int(state["pointer"]), int(state["step"])
        self._derive(state["written"].to("cpu", copy=True, memory_format=torch.contiguous_format))

    def _live(self) -> dict[str, Tensor]:
        return {
            "rows": self.rows,
            "written": self._written,
            "pointer": torch.tensor(self.pointer, dtype=torch.int64),
            "step": torch.tensor(self.step, dtype=torch.int64),
        }


def check_state(name: str, given: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError unless `given` has the names, shapes and types of `own`."""
    if given.keys() != own.keys():
        raise ValueError(
            f"{name}: the saved state has {sorted(given)}, expected {sorted(own)}; resume with the recipe that wrote it"
        )
    for key, tensor in own.items():
        found = given[key]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(
                f"{name}.{key}: the saved state is {tuple(found.shape)} {found.dtype}, the recipe asks for "
                f"{tuple(tensor.shape)} {tensor.dtype}; resume with the recipe that wrote it"
            )


def _random_rows(capacity: int, dim: int, seed: int, name: str, device: torch.device | str) -> Tensor:
    """Standard normal rows [capacity, dim] from Philox, keyed by (seed, name) so that no two memories share a stream.

    On the host, for any device; rows of the meta device have no numbers, and none are drawn.
    """
    if torch.device(device).type == "meta":
        return torch.empty(capacity, dim, device=device)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    draws = np.random.Generator(np.random.Philox(key=key)).standard_normal((capacity, dim), dtype=np.float32)
    return torch.from_numpy(draws)
