"""What all commands share: errors without a traceback, the nearest name for a mistyped one, examples under `--help`."""

from __future__ import annotations

import difflib
from pathlib import Path

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
