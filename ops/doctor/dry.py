"""A dry save, load and probe in the first minute of a run, so that it does not fail at its first checkpoint, hours in.

The checkpoint of position 0 is read back as a resumed run would read it, loaded, and compared bit for bit with what this
process holds; probes that are not due at the start run once on a few images, and nothing of that is kept. A run that goes
on from a checkpoint has just done all of this with the one that it goes on from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models.teacher import make_teacher
from ...shards.errors import GristmillError
from ..checkpoint import CheckpointError, Content, Saved, newest

if TYPE_CHECKING:
    from ..run import Run

FEW = 64  # images that are probed


def dry_run(run: Run, due: Collection[int]) -> list[str]:
    """Read the run's only checkpoint back and load it; probe, unless position 0 is in `due`. Returns lines for the user.

    Call it when the checkpoint of the run's position is published. Collective; raises CheckpointError on all ranks where
    what was read is not what is held, and whatever a probe raises.
    """
    began = time.perf_counter()
    size = dry_load(run)
    told = [f"checkpoint of image {run.position} read back and compared, {size / 1e6:.3g} MB a process"]
    if due and run.position not in due:
        dry_probe(run)
        told.append(f"probes tried on {min(FEW, run.recipe.probes.images)} images")
    return [f"{'; '.join(told)} ({time.perf_counter() - began:.1f} s)"]


def dry_load(run: Run) -> int:
    """Compare, load, compare again: what was written is what is held, and loading it changes nothing. Bytes compared."""
    saved, told = newest(run.store, run.rank, run.world, run.total)
    if saved is None or saved.position != run.position:
        raise CheckpointError(
            f"the checkpoint of image {run.position} in {run.store} cannot be found again"
            + (f" ({'; '.join(told)})" if told else "")
            + ": look at that storage, or name another place with checkpoint.store"
        )
    size = _compare(run, saved, "read back")
    run._load(saved)
    _compare(run, saved, "loaded")
    saved.close()
    return size


def dry_probe(run: Run) -> None:
    """All probes of the recipe on a few images, nothing noted. Collective; rank 0 does the work."""
    from ..evaluate.chosen import measure
    from ..evaluate.online import Probing, class_token

    failed: Exception | None = None
    with run.engine.teacher.plain(lambda: make_teacher(run.build())) as teacher:
        if teacher is not None:
            try:
                config = run.recipe.probes.model_copy(update={"images": min(FEW, run.recipe.probes.images)})
                probing = Probing(config, run.recipe.sources[0].path)
                found = probing.features(class_token(teacher, run.engine.autocast), run.device)
                measure(config.names, probing.asked(*found), lambda: probing.places(teacher.backbone))  # pyright: ignore[reportArgumentType]
            except Exception as error:  # told to the others first: they would wait for this rank
                failed = error
    failures = run.total([float(failed is not None)])[0]
    if failed is not None:
        raise failed
    if failures:
        raise GristmillError("the probes cannot be made; see what rank 0 says")


def _compare(run: Run, saved: Saved, how: str) -> int:
    """Bytes that this rank holds, which are the same in the checkpoint on every rank, or else all of them raise."""
    content = run.content()  # collective, so before anything that may fail on this rank alone
    size, wrong, failed = 0, [], None
    try:
        size, wrong = _differing(content, saved)
    except Exception as error:  # told to the others first: they would wait for this rank
        failed = error
    _agree(run, wrong, failed, how, saved.path)
    return size


def _differing(content: Content, saved: Saved) -> tuple[int, list[str]]:
    """Bytes of `content`, and the names of what is not the same in the checkpoint."""
    size, wrong = 0, []
    for part in content.parts:
        there = saved.read(part.group, part.name, part.start, part.start + part.tensor.numel())
        size += part.tensor.nbytes
        if not same(there, part.tensor):
            wrong.append(f"{part.group} {part.name}")
    for group, tensors in content.whole.items():
        there = saved.whole(group)
        size += sum(tensor.nbytes for tensor in tensors.values())
        wrong += [f"{group} {name}" for name in tensors.keys() ^ there.keys()]
        wrong += [f"{group} {name}" for name in tensors.keys() & there.keys() if not same(there[name], tensors[name])]
    for name, value in content.state.items():
        if _plain(saved.state.get(name)) != _plain(value):
            wrong.append(f"state {name}")
    return size, wrong


def same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, NaN included."""
    two = two.detach().cpu()
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (one, two)))


def _agree(run: Run, wrong: list[str], failed: Exception | None, how: str, path: str) -> None:
    """Every rank says in one vector whether it failed; its own error on a rank that has one, else who has. Collective."""
    told = run.total(
        [float(bool(wrong) or failed is not None) if each == run.rank else 0.0 for each in range(run.world)]
    )
    if failed is not None:
        raise failed
    others = ", ".join(f"rank {rank}" for rank, bad in enumerate(told) if bad)
    if not others:
        return
    which = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    raise CheckpointError(
        f"{path}, {how}, is not what was saved ({which or f'on {others}; see what is said there'}): do not train with this. "
        "Run `gristmill doctor --out` on its folder; if the disk is sound, report it with the recipe"
    )


def _plain(value: object) -> object:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
