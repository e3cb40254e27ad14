"""Executors: they carry draws out and draw nothing themselves, `run(encoded images, draws) -> tensors`.

dali.py is the one that trains, on CPU and GPU; reference.py says in plain NumPy what it has to compute; colour.py is
the arithmetic of colours that both are held to. What is common to executors is here, and loads neither torch nor DALI.
"""

from __future__ import annotations

from typing import Literal

from ...shards.errors import GristmillError


def chosen(augment: Literal["auto", "dali", "cpu"], device: Literal["cpu", "gpu"]) -> Literal["dali", "cpu"]:
    """The executor that `stream.augment` stands for on a device: a fixed rule, for each rounds in its own way."""
    if augment != "auto":
        return augment
    return "dali" if device == "gpu" else "cpu"


class DecodeError(GristmillError):
    """Images of a batch that do not decode, or not to the size that is noted for them; `bad` holds their slots."""

    def __init__(self, bad: list[int]) -> None:
        self.bad = bad
        slots = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
        super().__init__(
            f"{len(bad)} image(s) of the batch do not decode, or to another size than noted (slots {slots}): "
            "put others in their place and run the batch again; `gristmill verify DIR --deep` finds all such images"
        )
