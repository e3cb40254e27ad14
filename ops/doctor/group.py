"""All ranks of a group look, meet, and are judged together: rank 0 prints one table for all.

They meet in the launcher's store first, and only then talk in collectives: a rank that is lost, or a network on which
nobody hears anybody, is a finding then and no hang. Findings travel as JSON. A rank that says nothing for as long as one
check may take is lost. Everything ends with one verdict, which is every rank's exit code.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..launch_place import LaunchError, Place
from .finding import Asked, Finding, said, worst
from .judging import judge_talk, judge_together
from .runner import examine

GRACE = 15.0  # seconds beyond what a check may take


@dataclass
class Told:
    """What one rank said of itself."""

    rank: int
    host: str
    findings: list[Finding]


def examine_group(
    place: Place, asked: Asked, only: Sequence[str], show: Callable[[list[Finding]], object]
) -> tuple[int, bool]:
    """Look on this rank, meet the others; `show` is called on rank 0. Returns (exit code, whether a thread is stuck).

    Raises LaunchError where there is nobody to meet.
    """
    store = _meet(place, asked.seconds)
    post = Post(store, place.rank, place.world, asked.seconds + GRACE)
    mine = examine(asked, only, first=place.local_rank == 0, told=lambda _: post.beat())
    shared = _Shared(place.rank, asked.out)
    about = {"host": socket.gethostname(), "findings": [f.as_dict() for f in mine], "token": shared.leave()}
    post.put("found", about)
    everyone, lost = post.collect("found")
    if place.rank == 0:
        post.put("go", {"talk": not lost, "token": about["token"]})
    go = post.get("go", 0)
    seen = shared.look(go["token"]) if go else ""
    talk, stuck = (
        _talk(place, post, asked.seconds) if go and go["talk"] else ({"error": "not all ranks are there"}, False)
    )
    post.put("talk", {"shared": seen, "host": socket.gethostname(), **talk})
    if place.rank:
        verdict = post.get("verdict", 0)
        post.put("bye", {})
        return (1 if verdict is None else verdict["code"]), stuck
    answers, silent = post.collect("talk", but=lost)
    shared.clear()
    told = [
        Told(rank, tree["host"], [Finding.from_dict(f) for f in tree["findings"]]) for rank, tree in everyone.items()
    ]
    findings = judge_together(told, place.world, lost)
    findings += judge_talk(answers, place.world, sorted({*lost, *silent}), bool(asked.out))
    show(findings)
    code = int(worst(findings) == "bad")
    post.put("verdict", {"code": code})
    post.collect("bye", but=[0, *lost, *silent], patience=5.0)  # rank 0 may hold the store: it goes last
    return code, stuck


def _meet(place: Place, seconds: float) -> Any:
    """A corner of the launcher's store, for this command alone, where a training would find its own."""
    from ..launch import meet

    place.export(os.environ)
    try:
        return meet("doctor", timedelta(seconds=seconds))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {place.rank} of {place.world} ({place.launcher}) meets nobody at {place.address}:{place.port}: {said(error)}. "
            "Look whether all ranks were started, whether rank 0's host has this address, and whether its firewall lets "
            "this port through"
        ) from error


class Post:
    """JSON from rank to rank by a store, and a sign of life with each. patience: seconds of silence that mean lost."""

    def __init__(self, store: Any, rank: int, world: int, patience: float) -> None:
        self.store, self.rank, self.world, self.patience = store, rank, world, patience

    def beat(self) -> None:
        self.store.add(f"beat/{self.rank}", 1)

    def put(self, name: str, tree: dict[str, Any]) -> None:
        self.beat()
        self.store.set(f"{name}/{self.rank}", json.dumps(tree))

    def get(self, name: str, rank: int, patience: float | None = None) -> dict[str, Any] | None:
        """What a rank put under a name, waited for as long as it lives; None of one that is lost."""
        key, pulse, since = f"{name}/{rank}", -1, time.monotonic()
        try:
            while not self.store.check([key]):
                now = self.store.add(f"beat/{rank}", 0)
                if now != pulse:
                    pulse, since = now, time.monotonic()
                if time.monotonic() - since > (self.patience if patience is None else patience):
                    return None
                time.sleep(0.05)
                if self.rank == 0:
                    self.beat()
            return json.loads(self.store.get(key))
        except RuntimeError:  # the store went with the process that held it
            return None

    def collect(
        self, name: str, but: Sequence[int] = (), patience: float | None = None
    ) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """On rank 0 what all ranks put under a name, and who is lost; nothing elsewhere."""
        if self.rank:
            return {}, []
        found = {rank: self.get(name, rank, patience) for rank in range(self.world) if rank not in but}
        return {rank: tree for rank, tree in found.items() if tree is not None}, [
            r for r, t in found.items() if t is None
        ]


class _Shared:
    """Whether all ranks see one --out: rank 0 leaves a file in it, and the others look."""

    def __init__(self, rank: int, out: str | None) -> None:
        from .disk import existing

        self.rank, self.folder = rank, existing(Path(out)) if out else None
        self.path: Path | None = None

    def leave(self) -> str:
        if self.rank or self.folder is None:
            return ""
        self.path = self.folder / f".gristmill-doctor-{secrets.token_hex(8)}"
        try:
            self.path.write_text("seen by all ranks?")
        except OSError:  # the finding on --out says so
            self.path = None
            return ""
        return self.path.name

    def look(self, token: str) -> str:
        """ "yes", "no", or "" where there is nothing to look for. A shared folder may show a new file late."""
        if not token or self.folder is None:
            return ""
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            try:
                os.listdir(self.folder)  # a network file system then looks, too
                if (self.folder / token).exists():
                    return "yes"
            except OSError:
                pass
            time.sleep(0.1)
        return "no"

    def clear(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _talk(place: Place, post: Post, seconds: float) -> tuple[dict[str, Any], bool]:
    """What this rank measures with the others, in a thread that may be left behind; whether it was."""
    found: dict[str, Any] = {"stage": "forming the group"}

    def work() -> None:
        try:
            _measure(place, post, seconds, found)
        except Exception as error:
            found["error"] = f"{found['stage']}: {said(error)}"

    thread = threading.Thread(target=work, name="doctor talk", daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < until:
        thread.join(1.0)
        post.beat()
    if thread.is_alive():
        found = {"error": f"{found['stage']}: no answer within {seconds:.0f} s"}
    return dict(found), thread.is_alive()


def _measure(place: Place, post: Post, seconds: float, found: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from ..launch import card_of
    from .talk import offset, pair_rates, sum_rate

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    patience = timedelta(seconds=seconds)
    corner = PrefixStore("talk", post.store)
    dist.init_process_group("gloo", store=corner, rank=place.rank, world_size=place.world, timeout=patience)
    try:
        found["stage"] = "clocks"
        found["clock"] = offset(place.rank, place.world)
        device, group, backend = torch.device("cpu"), None, "gloo"
        everywhere = torch.tensor([float(cards > 0)])
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if everywhere.item():
            found["stage"], backend = "forming the group of GPUs", "nccl"
            device = torch.device("cuda", card_of(place.local_rank, cards))
            torch.cuda.set_device(device)
            group = dist.new_group(backend="nccl", timeout=patience)
        found["backend"] = backend
        found["stage"] = f"a sum over all ranks ({backend})"
        found["sum"] = sum_rate(device, group)
        found["stage"] = f"exchanges in pairs ({backend})"
        found["pairs"] = pair_rates(place.rank, place.world, device, group)
        found["stage"] = "leaving"
        dist.barrier()
    finally:
        dist.destroy_process_group()
