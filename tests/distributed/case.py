"""One run of two ranks through the command line, in a folder of its own: what tests of faults, nodes and Slurm begin with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.ops.bench.endings import TINY
from gristmill.ops.checkpoint import Saved, newest
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store

from .zygote import Group, Zygote

END, EVERY = 64, 16


@dataclass
class Case:
    """One run folder, and the command that trains there."""

    zygote: Zygote
    folder: Path
    data: Path
    said: list[str] = field(default_factory=list)  # what each rank of the reference run wrote to stderr

    def command(self, *overrides: object) -> list[object]:
        settings = (
            *TINY,
            f"data={self.data}",
            f"images={END}",
            f"checkpoint.every={EVERY}",
            "checkpoint.keep=3",
            "engine.zero=2",
        )
        return ["train", "demo", "--out", self.folder, *settings, *overrides]

    def run(self, *overrides: object, faults: tuple[dict[str, Any], ...] = (), **how: Any) -> Group:
        return self.zygote.commands(self.folder.parent / "rank", self.command(*overrides), faults=faults, **how)

    def finish(self, straight: Case, says: str = "going on from image") -> Group:
        """Start the same command again: it goes on, and ends as if nothing had happened."""
        group = self.run()
        assert group.codes == [0, 0], group.errors
        assert says in group.errors[0]
        assert self.trace() == straight.trace()
        assert len(self.trace()) == END // 8
        mine, theirs = self.newest(), straight.newest()
        assert mine.position == theirs.position == END
        assert mine.digests == theirs.digests  # weights, moments, EMA, memories, centres, buffers
        assert mine.state["cursor"] == theirs.state["cursor"]
        return group

    def trace(self) -> list[dict[str, Any]]:
        lines = [line for line in self.log() if line["kind"] == "step"]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["kind"] == "event" and line["event"] == name]

    def log(self) -> list[dict[str, Any]]:
        return read_log(self.folder / "metrics.jsonl")

    def newest(self) -> Saved:
        """The newest checkpoint; all digests hold, and none was passed over."""
        saved, told = newest(open_store(self.folder / "checkpoints"))
        assert saved
        assert told == []
        return saved
