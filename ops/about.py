"""What a run folder says of itself: README.md for whoever finds it, recipe.yaml, starts.jsonl with a line a start.

A line holds what a later reader asks: the command and where it was given, the machines, the versions and the commit of
the code, the processes, the data by their digest, and from which image it went on. Nothing of the environment is written,
and no url with its secrets (redacted.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import yaml

from .launch_place import environment
from .redacted import bare, command_line, without_secrets

if TYPE_CHECKING:
    from .recipe import Recipe
    from .run import Run

STARTS = "starts.jsonl"
README = "README.md"
# What may lie in a run folder. Tests hold it against real ones.
CONTENTS = {
    "README.md": "this page",
    "recipe.yaml": "all settings as resolved, defaults included; `gristmill train recipe.yaml` takes it",
    "starts.jsonl": "a line for each start: command, directory, machine, versions, commit, processes, digest of the data",
    "attempts.jsonl": "when each start began and ended, from which image, and why it ended",
    "metrics.jsonl": "the log: each step, probe and event as a JSON object",
    "checkpoints/": "a folder a position: weights, teacher, optimizer, memories, the place in the data",
    "crops.npz": "the first batch as the network was fed it",
    "neighbours.npz": "nearest neighbours at the last probe",
    "quarantine.jsonl": "damaged samples that were replaced",
    "captures/": "steps that were left out, for `gristmill replay`",
    "goodput.json": "where the wall clock went, over all starts",
    "metrics.url, targets/": "where metrics are served while it runs",
    "tensorboard/": "for `tensorboard --logdir`, if the recipe asks for it",
    "wandb/, wandb.json": "what Weights & Biases keeps here, and the id of its run",
    "data/, images/, source.json": "of `gristmill demo`: the shards, the pictures, what they were made of",
    "report.html": "curves, probes, crops, neighbours: `gristmill report` makes it anew",
}


def describe_run(run: Run, started: float) -> None:
    """Write both, on rank 0 of a run that knows where it goes on; a page that is there stays as it is."""
    about = facts(run, started)
    try:
        with (run.folder / STARTS).open("a") as file:
            file.write(json.dumps(about) + "\n")
        page = run.folder / README
        if not page.exists():
            page.write_text(readme(run, about))
    except OSError as error:  # a full disk, for one: the run has better to do than to end over this
        click.echo(f"warning: {run.folder} cannot be described: {error.strerror or error}", err=True)


def resolved(recipe: Recipe) -> str:
    """The recipe with every default, as YAML that loads again; without the secrets of its urls."""
    return yaml.safe_dump(without_secrets(recipe.model_dump(mode="json")), sort_keys=False)


def facts(run: Run, started: float) -> dict[str, Any]:
    """Of this start."""
    from .run import versions

    cuda = run.device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "position": run.position,
        "command": command_line([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "devices": f"{run.world} x {torch.cuda.get_device_name()}"
        if cuda
        else f"{len(os.sched_getaffinity(0))} CPU cores",
        "launcher": environment(os.environ).launcher,
        "topology": run.topology(),
        "data": [
            {"path": bare(str(source.path)), "images": int(found.selected.sum())}
            for source, found in zip(run.recipe.sources, run.feed.sources, strict=True)
        ],
        "data_digest": json.loads(run.cursor.to_json())["data"],
        "recipe": run.recipe.name,
        "python": platform.python_version(),
        "versions": {"gristmill": importlib.metadata.version("gristmill"), **versions()},
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the source tree that this code lies in, `-dirty` if files of it were changed; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip()
    return None


def readme(run: Run, about: dict[str, Any]) -> str:
    """A page of Markdown."""
    recipe = run.recipe
    learned = ", ".join(recipe.objectives.names())
    rows = "\n".join(f"| `{name}` | {what} |" for name, what in CONTENTS.items())
    sets = "\n".join(f"- {each['path']}: {each['images']:,} images" for each in about["data"])
    return f"""# {run.folder.resolve().name}

A run of Gristmill {about["versions"]["gristmill"]}: {recipe.student.backbone} pretrained without labels (recipe `{recipe.name}`;
objectives: {learned}) on {run.end:,} images, {recipe.batch:,} a step. It first began on {about["time"]} on {about["host"]}.

Data, digest `{about["data_digest"]}`:

{sets}

## Go on

The command that began it, in `{about["directory"]}`; given again, it goes on from the newest checkpoint. Later ones are in
{STARTS}. Urls stand here without their passwords and keys.

    {shlex.join(about["command"])}

## Look at it and use it

    gristmill report .          # one page: curves, probes, crops, neighbours
    gristmill status .          # while it runs
    gristmill eval .            # all probes of the newest checkpoint
    gristmill export . --out backbone.safetensors

## Files

Not all of them are in every run.

| | |
| --- | --- |
{rows}
"""
