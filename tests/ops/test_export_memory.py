"""An export holds one tensor at a time: beside the network's size, what it takes is little."""

import re
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

from .test_export import checkpoint, recipe_of

# In a process of its own, watched from here: one small export first, so that everything is imported; then the large
# ones; then the whole network, to show that the watch would see it.
PROGRAM = """
import sys
from gristmill.ops.export import export_checkpoint
from gristmill.ops.origin import origin

small, large, out = sys.argv[1:]

def both(run, out):
    export_checkpoint(run, out + ".safetensors")
    export_checkpoint(run, out, format="huggingface")

def say(what):
    print(what, flush=True)
    sys.stdin.readline()

both(small, out + "-small")
say("begin")
both(large, out)
say("exported")
with origin(large) as source:
    network = source.network()
    say("whole")
"""


def anonymous(pid: int) -> int:
    """Bytes of private memory that a process has touched; pages of mapped files are not among them."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def peak_until(process: subprocess.Popen[str], word: str) -> tuple[int, int]:
    """(the most that it had at any look until it says the word, what it had then); it is let go on after that."""
    import select

    said, most = cast(IO[str], process.stdout), 0
    while not select.select([said], [], [], 0.001)[0]:
        most = max(most, anonymous(process.pid))
    assert said.readline().strip() == word
    now = anonymous(process.pid)
    told = cast(IO[str], process.stdin)
    told.write("\n")
    told.flush()
    return max(most, now), now


def test_no_more_than_a_few_tensors(tmp_path: Path):
    checkpoint(tmp_path / "small", recipe_of(), 1)
    sizes = ("student.embed_dim=256", "student.heads=4", "student.depth=16")
    _, teacher = checkpoint(tmp_path / "large", recipe_of(*sizes), 2)
    weights = [value.nbytes for value in teacher.backbone.state_dict().values()]
    total, largest = sum(weights), max(weights)
    assert total > 40 * largest
    command = [sys.executable, "-c", PROGRAM, tmp_path / "small", tmp_path / "large", tmp_path / "x"]
    pipe = subprocess.PIPE
    with subprocess.Popen([str(each) for each in command], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            _, before = peak_until(process, "begin")
            exporting = peak_until(process, "exported")[0] - before
            whole = peak_until(process, "whole")[0] - before
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0
    # Digests are taken in pieces of 16 MiB, of which the small checkpoint filled none.
    assert exporting < (16 << 20) + 6 * largest < total
    assert whole > 0.9 * total
    assert (tmp_path / "x.safetensors").stat().st_size > total
    assert (tmp_path / "x" / "model.safetensors").stat().st_size > total
