"""The one entry point: `gristmill COMMAND`. It answers at once: a command's own imports happen when it runs.

Exit codes: 0 all went well; 1 the thing that was checked is not in order; 2 a user can mend it (the message says how);
75 stopped by SIGTERM with a checkpoint written, start the same command again; 130 the same after Ctrl-C.
"""

from __future__ import annotations

import difflib
import errno
import json
import sys
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)


def refuse(ctx: click.Context, message: str) -> None:
    """Print an error that a user can mend, and leave with exit code 2."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(message, err=True)
    ctx.exit(2)


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
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({error.filename})" if error.filename else ""
            refuse(
                ctx, f"no space left on the disk{where}: make room, and give the same command again; it goes on there"
            )
        except Exception as error:
            from ..shards.errors import GristmillError  # here, since it brings pyarrow along

            if not isinstance(error, GristmillError):
                raise
            refuse(ctx, str(error))

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
        "gristmill order shards/train --step 1000 --batch 256 --ranks 8", "gristmill order shards/train --prove"
    )
)
@click.argument("folder", type=FOLDER)
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Which step to show.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images a step, over all ranks.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the batch.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The recipe's seed.")
@click.option("--lanes", type=click.IntRange(1), default=64, show_default=True, help="The recipe's stream.lanes.")
@click.option("--window", type=click.IntRange(1), default=65536, show_default=True, help="The recipe's stream.window.")
@click.option("--prove", is_flag=True, help="Walk one epoch and show that every image comes exactly once.")
def order(folder: Path, step: int, batch: int, ranks: int, seed: int, lanes: int, window: int, prove: bool) -> None:
    """Who sees what: the images of one step, rank by rank."""
    from .look import show_order

    sys.exit(
        show_order(folder, step=step, batch=batch, ranks=ranks, seed=seed, lanes=lanes, window=window, prove=prove)
    )


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
