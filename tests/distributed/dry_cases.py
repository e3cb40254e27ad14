"""Run by zygote.py (see test_dry.py): two ranks that read their first checkpoint back, of which one cannot."""

import sys
from pathlib import Path

import torch.distributed as dist
from gristmill.ops.doctor.dry import dry_load
from gristmill.ops.launch import join, leave
from gristmill.ops.run import Run
from gristmill.shards.errors import GristmillError
from guard_cases import recipe_of


class Gone(Run):
    """Loses this rank's own file of the checkpoint once it was found whole: a disk that goes away meanwhile."""

    lost = False

    def content(self):
        found = super().content()
        if self.lost and self.rank == 1:
            for file in (self.folder / "checkpoints").glob("*/rank-00001.safetensors"):
                file.rename(file.with_suffix(".gone"))
        return found


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world, device = join()
    run = Gone(recipe_of(folder, 4, "engine.zero=2"), folder / "run", rank, world, device)
    try:
        run.restore()
        run.writer.begin(run.position, run.content())
        run.writer.finish(run.total)
        print("sound", dry_load(run) > 0, file=sys.stderr)
        run.lost = True
        try:
            dry_load(run)
        except GristmillError as error:
            print(error, file=sys.stderr)
        dist.barrier()  # nobody waits for somebody who has gone
    finally:
        run.close()
        leave()
