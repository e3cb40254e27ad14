"""The one entry point: `gristmill COMMAND`. It answers at once: a command's own imports happen when it runs.

Exit codes: 0 all went well; 1 the thing that was checked is not in order; 2 a user can mend it (the message says how);
75 stopped by SIGTERM with a checkpoint written, start the same command again; 130 the same after Ctrl-C; 76 a rank was
lost or stands still, start the same command again. torchrun itself always ends with 1 when a rank did not end with 0.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)


def refuse(ctx: click.Context, message: str, code: int = 2) -> None:
    """Print an error that a user can mend, and leave with exit code 2, or what the error brings as its `code`."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(message, err=True)
    ctx.exit(code)


class Commands(click.Group):
    """Names the nearest command when one is mistyped, and prints our errors without a traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(self.list_commands(ctx))}."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OSError as error:
            from ..shards.storage import NO_SPACE  # here, since it brings pyarrow along

            if error.errno not in NO_SPACE:
                raise
            where = f" ({error.filename})" if error.filename else ""
            refuse(
                ctx, f"no space left on the disk{where}: make room, and give the same command again; it goes on there"
            )
        except Exception as error:
            from ..shards.errors import GristmillError  # here too

            if not isinstance(error, GristmillError):
                raise
            refuse(ctx, str(error), getattr(error, "code", 2))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(
            "\nStart here:\n  gristmill demo                    the whole way on a small data set made on the spot\n"
            "  gristmill demo --images PHOTOS    the same with a folder of your own\n"
        )


def example(*lines: str) -> str:
    """An epilogue that click does not re-wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gristmill", message="%(package)s %(version)s")
def main() -> None:
    """Pretrain vision backbones on unlabelled images, at several granularities at once."""


@main.command(
    epilog=example(
        "gristmill demo",
        "gristmill demo --images ~/Pictures --out runs/pictures",
        "gristmill demo optimizer.lr=0.002 images=20000",
    )
)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("gristmill-demo"),
    show_default=True,
    help="Run folder; go on there if it exists.",
)
@click.option(
    "--images", type=FOLDER, help="A folder of JPEG, PNG or WebP; subfolders are labels, read by probes only."
)
@click.option("--tiny", is_flag=True, help="Shrink everything: a look at the machinery in under a minute.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the data set made, and of the run.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(out: Path, images: Path | None, tiny: bool, seed: int, overrides: tuple[str, ...]) -> None:
    """The whole way in minutes: make shards, train, probe, report.

    Without --images a data set of drawn things is made, whose coarse, fine and instance labels are known. Kill it and
    start it again: it goes on where it was.
    """
    from .demo import run_demo

    sys.exit(run_demo(out, images, tiny=tiny, seed=seed, overrides=overrides))


@main.command(
    epilog=example(
        "gristmill ingest ~/Pictures --out shards", "gristmill ingest ~/Pictures --out shards --holdout 0.2 --json"
    )
)
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the shards; `train` (and `probe`) are made inside.")
@click.option("--shard-samples", type=click.IntRange(1), default=1024, show_default=True, help="Images in a shard.")
@click.option(
    "--holdout", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share kept apart for probes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def ingest(source: Path, out: Path, shard_samples: int, holdout: float, as_json: bool) -> None:
    """A folder of images becomes WebDataset shards with a manifest.

    Every image is decoded once to check it; what does not decode is listed in OUT/skipped.tsv. Duplicates are kept once.
    """
    from ..shards.engine import ingest as run
    from .progress import Meter

    with Meter("ingest", 0, quiet=as_json) as meter:
        report = run(source, out, shard_samples=shard_samples, holdout=holdout, progress=meter)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        click.echo(report.summary())


@main.command(epilog=example("gristmill verify shards/train", "gristmill verify shards/train --deep --json"))
@click.argument("folder", type=FOLDER)
@click.option("--deep", is_flag=True, help="Read every image: checksum and decode.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(folder: Path, deep: bool, as_json: bool) -> None:
    """Compare shards with their manifest; exit 1 with a list when something is wrong."""
    from ..shards.verify import verify as run

    findings = run(folder, deep=deep)
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.shard}  {finding.key or '-'}  {finding.problem}")
        click.echo(f"{folder}: {len(findings)} findings" if findings else f"{folder}: all in order")
    sys.exit(1 if findings else 0)


@main.command(
    epilog=example(
        "gristmill order shards/train --step 1000 --batch 256 --ranks 8",
        "gristmill order shards/train --prove --quality",
        "gristmill order crawl archive --weight 3 --weight 1 --where 'width >= 256' --json",
    )
)
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="FOLDER...")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Which step to show.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images a step, over all ranks.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the batch.")
@click.option(
    "--ranks-per-node", type=click.IntRange(1), help="Of these on a node, for its working set (default: all)."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The recipe's seed.")
@click.option("--lanes", type=click.IntRange(1), help="The recipe's stream.lanes (default: as suits the data).")
@click.option("--window", type=click.IntRange(1), help="The recipe's stream.window (default: as suits the data).")
@click.option(
    "--where", default="", help="Only the samples for which this holds: 'width >= 256 and format == \"jpg\"'."
)
@click.option("--weight", "weights", type=click.FloatRange(0), multiple=True, help="One for each FOLDER, to mix them.")
@click.option("--prove", is_flag=True, help="Walk one epoch and show that every image comes exactly once.")
@click.option("--quality", is_flag=True, help="Measure the shuffling and the working set, beside the usual ways.")
@click.option("--cache", type=click.IntRange(1), help="Bytes of a node's cache; exit 1 if the working set exceeds it.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def order(
    folders: tuple[Path, ...], lanes: int | None, window: int | None, weights: tuple[float, ...], **options: Any
) -> None:
    """Who sees what: the images of one step, rank by rank; how well they are mixed, and proof of exactly-once."""
    from .look import show_order, suggested

    sys.exit(
        show_order(list(folders), weights=weights, **suggested(folders, lanes, window, options["cache"]), **options)
    )


@main.command(
    epilog=example(
        "gristmill index crawl",
        "gristmill index s3://bucket/{000..127}.tar --out manifest --deep",
        "gristmill index a --idx",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", type=FOLDER, help="Folder for the manifest (default: SOURCE, if it is one folder).")
@click.option("--deep", is_flag=True, help="Read every image: checksums, sizes, and whether it decodes.")
@click.option("--idx", is_flag=True, help="Write an index for DALI's own webdataset reader too.")
@click.option("--leave-out", is_flag=True, help="Go on without shards that cannot be indexed, and list them.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def index(sources: tuple[str, ...], out: Path | None, deep: bool, idx: bool, leave_out: bool, as_json: bool) -> None:
    """A manifest for WebDataset shards that others made; they stay where and as they are.

    SOURCE is a folder, a .tar, a pattern, a URL (http, https, s3) or a text file with one of these a line.
    """
    from .index import run_index

    sys.exit(run_index(sources, out, deep=deep, idx=idx, leave_out=leave_out, as_json=as_json))


@main.command(
    epilog=example(
        "gristmill remove shards/train 000123 000456 --reason 'asked for by their owner'",
        "gristmill remove shards/train --from keys.txt --reason 'ticket 17'",
    )
)
@click.argument("folder", type=FOLDER)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--from", "listed", type=click.File(), help="A text file with one key a line.")
@click.option("--reason", required=True, help="Why; it is kept beside each.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def remove(folder: Path, keys: tuple[str, ...], listed: Any, reason: str, as_json: bool) -> None:
    """Remove samples for good: no run reads them from its next start on, and others take their slots.

    The shards stay as they are. Keys that the data set does not have are an error, and then nothing is removed.
    """
    from ..shards.manifest import Manifest
    from ..shards.tombstones import Tombstones

    wanted = [*keys, *(line.strip() for line in listed or () if line.strip())]
    if not wanted:
        raise click.UsageError("name at least one key, or a file of keys with --from")
    manifest = Manifest.open(folder)
    tombstones = Tombstones.of(manifest)
    new = tombstones.remove(manifest, wanted, reason)
    if as_json:
        click.echo(json.dumps({"removed": new, "total": tombstones.count}))
    else:
        click.echo(f"{folder}: {new} newly removed, {tombstones.count} of {manifest.samples} in all")


@main.command(
    epilog=example(
        "gristmill train demo data=shards/train --out runs/first",
        "gristmill train my.yaml optimizer.lr=0.001 --out runs/b",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out", type=FOLDER, required=True, help="Run folder; if it has a checkpoint, training goes on from there."
)
@click.option("--tiny", is_flag=True, help="Shrink the recipe to run on a laptop CPU in minutes.")
def train(recipe: str, overrides: tuple[str, ...], out: Path, tiny: bool) -> None:
    """Train RECIPE (a shipped name or a YAML file), or go on where the run folder's newest checkpoint stands."""
    from .recipe import load_recipe

    resolved = load_recipe(recipe, overrides, tiny=tiny)
    from .train import train as run

    ending = run(resolved, out)
    if ending.code:
        click.echo(f"stopped at image {ending.position}; the same command goes on from there", err=True)
    sys.exit(ending.code)


@main.command(epilog=example("gristmill eval runs/first", "gristmill eval runs/first --query shards/probe --json"))
@click.argument("run", type=FOLDER)
@click.option("--reference", type=FOLDER, help="Data set that neighbours come from (default: the recipe's).")
@click.option("--query", type=FOLDER, help="Held-out data set (default: the recipe's).")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def eval(run: Path, reference: Path | None, query: Path | None, as_json: bool) -> None:
    """Probe the teacher of a run's newest checkpoint: k-NN at each label level, instance retrieval."""
    from .evaluate.online import evaluate_run

    sys.exit(evaluate_run(run, reference, query, as_json=as_json))


@main.command(
    epilog=example(
        "gristmill replay runs/first",
        "gristmill replay runs/first/captures/000000012288 --json",
        "gristmill replay runs/first/captures/000000012288 --rank 3",
    )
)
@click.argument("capture", type=FOLDER)
@click.option("--rank", "ranks", type=click.IntRange(0), multiple=True, help="Only this rank's share (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def replay(capture: Path, ranks: tuple[int, ...], as_json: bool) -> None:
    """Feed a bad step again that a run left out, and say what is not finite: rank, objective, sample, module, gradients.

    CAPTURE is RUN/captures/POSITION, or RUN if it holds just one. It runs on the CPU, in one process, and changes
    nothing. Exit 0 if what was wrong is wrong again, so that the cause is in the data, the weights or the recipe; 1 if
    not, which points to the hardware or software of the rank that is named.
    """
    from .replay import show_replay

    sys.exit(show_replay(capture, ranks, as_json=as_json))


@main.command(epilog=example("gristmill report runs/first"))
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Write RUN/report.html: curves, the crops that were fed, probes, nearest neighbours."""
    from .report import write_report

    click.echo(f"{write_report(run)}")


@main.command(epilog=example("gristmill status runs/first", "gristmill status http://127.0.0.1:9464/metrics --once"))
@click.argument("target", default="gristmill-demo")
@click.option("--once", is_flag=True, help="Print one view and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print the values as JSON and leave.")
def status(target: str, once: bool, as_json: bool) -> None:
    """Live view of a run, from its metrics: TARGET is a run folder or a URL."""
    from .monitor.status import show_status

    sys.exit(show_status(target, once, as_json))


@main.group()
def bench() -> None:
    """What each part costs on this machine, against its peer, as ratios in one run."""


@bench.command("train", epilog=example("gristmill bench train", "gristmill bench train --only guard --only ema --json"))
@click.option("--steps", type=click.IntRange(4), default=12, show_default=True, help="Steps of each run.")
@click.option(
    "--only",
    type=click.Choice(["step", "guard", "ema", "teacher", "ranks"]),
    multiple=True,
    help="These parts (default: all).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench_train(steps: int, only: tuple[str, ...], as_json: bool, overrides: tuple[str, ...]) -> None:
    """Shares of a training step, the cost of verdict and guard, of the EMA with and without gather, one process and two."""
    from .bench.train import bench_train as run

    sys.exit(run(steps, as_json, only, overrides))


@bench.command(
    "stream", epilog=example("gristmill bench stream", "gristmill bench stream --images PHOTOS --only reader --json")
)
@click.option("--images", type=FOLDER, help="A folder of photographs, 10 to 100 kB each (default: drawn ones).")
@click.option("--samples", type=click.IntRange(64), default=4000, show_default=True, help="Images to read with each.")
@click.option(
    "--only",
    type=click.Choice(["reader", "resume", "scale"]),
    multiple=True,
    help="These parts (default: all).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_stream(images: Path | None, samples: int, only: tuple[str, ...], as_json: bool) -> None:
    """The reader alone against webdataset and others, each with its own format; resuming; memory up to 1e9 samples."""
    from .bench.stream import bench_stream as run

    sys.exit(run(images, samples, as_json, only))


@bench.command(
    "views", epilog=example("gristmill bench views --images PHOTOS", "gristmill bench views --only multi-crop --json")
)
@click.option("--images", type=FOLDER, help="A folder of photographs, 10 to 100 kB each (default: drawn ones).")
@click.option("--samples", type=click.IntRange(64), default=1024, show_default=True, help="Images through each loader.")
@click.option("--only", type=click.Choice(["multi-crop", "mugs"]), multiple=True, help="These settings (default: all).")
@click.option("--filter", type=click.Choice(["bilinear", "bicubic"]), default="bicubic", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_views(images: Path | None, samples: int, only: tuple[str, ...], filter: str, as_json: bool) -> None:
    """Shards to augmented views against webdataset with torchvision and others, and what each stage of ours takes."""
    from .bench.views import bench_views as run

    sys.exit(run(images, samples, as_json, only, filter))


if __name__ == "__main__":
    main()
