"""What all commands share: errors without a traceback, the nearest name for a mistyped one, examples under `--help`."""

from __future__ import annotations

import difflib
import os
import time
from pathlib import Path

import click

# What all processes of a group find alike, rank 0 says for all; the others wait with their end, since launchers end all
# processes with the first one.
LATER = 5.0  # seconds
AS_RANK_0 = "rank {rank}: the recipe is refused, as rank 0 says; if it says nothing, this host has another copy of it"
FOLDER = click.Path(path_type=Path)


def refuse(ctx: click.Context, message: str, code: int = 2) -> None:
    """Print an error that a user can mend, and leave with exit code 2, or what the error brings as its `code`."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(message, err=True)
    ctx.exit(code)


def _rank() -> int:
    """This process's place in its group, as far as its launcher says one."""
    from .launch_place import LaunchError, environment

    try:
        return environment(os.environ).rank
    except LaunchError:
        return 0


def _no_space(error: OSError) -> bool:
    from ..shards.storage import NO_SPACE  # here, since it brings pyarrow along

    return error.errno in NO_SPACE


class Command(click.Command):
    """A full disk of which the system told no file is put down to what the command writes, its `--out`."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except OSError as error:
            out = ctx.params.get("out")
            if out and error.filename is None and _no_space(error):
                error.filename = str(out)
            raise


class Commands(click.Group):
    """Names the nearest command when one is mistyped, and prints our errors without a traceback; its groups do, too."""

    command_class = Command
    group_class = type

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
            if not _no_space(error):
                raise
            where = f" ({error.filename})" if error.filename else ""
            refuse(
                ctx, f"no space left on the disk{where}: make room, and give the same command again; it goes on there"
            )
        except Exception as error:
            from ..shards.errors import GristmillError  # here too

            if not isinstance(error, GristmillError):
                raise
            rank = _rank() if getattr(error, "everywhere", False) else 0
            if rank:
                time.sleep(LATER)
            refuse(ctx, AS_RANK_0.format(rank=rank) if rank else str(error), getattr(error, "code", 2))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.parent is not None:  # one of the groups
            return super().format_epilog(ctx, formatter)
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
