"""The command about what features are worth: eval. Imports happen when it runs."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main

# As in evaluate/battery.py, which brings torch along; a test holds them equal.
NAMES = (
    "knn", "logistic", "semi", "retrieval", "purity", "clustering", "label_free", "segmentation", "correspondence",
    "linear", "finetune", "semi_finetune", "video", "detection",
)  # fmt: skip


@main.command(
    epilog=example(
        "gristmill eval runs/first",
        "gristmill eval runs/first --data photos/train --query photos/val",
        "gristmill eval runs/first/checkpoints/000000036000 --data VOC2012 --split train --query-split val",
        "gristmill eval first.safetensors --data photos --holdout 0.2 --only knn --only linear",
        "gristmill eval timm:vit_small_patch16_224 --data photos --only linear --set linear.epochs=20 --json",
        "torchrun --nproc-per-node 8 -m gristmill.ops.cli eval runs/first --data photos --cache /shared/features",
    )
)
@click.argument("where", metavar="RUN|CHECKPOINT|FILE|timm:NAME")
@click.option("--data", metavar="DIR", help="Pictures to learn from.  [default: those of the run's probes]")
@click.option("--reference", "data_of_old", metavar="DIR", hidden=True)
@click.option(
    "--query", metavar="DIR", help="Pictures to be asked about.  [default: a val or test beside train, or none]"
)
@click.option("--split", metavar="NAME", help="Of --data, where it holds several (VOC, COCO, folders).")
@click.option("--query-split", metavar="NAME", help="The same of --query, or of --data.")
@click.option("--holdout", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.2, show_default=True, help="Share of --data to be asked about where there is no --query.")  # fmt: skip
@click.option("--only", multiple=True, type=click.Choice(NAMES), metavar="NAME", help=f"Of {', '.join(NAMES)}.")
@click.option("--all", "everything", is_flag=True, help="Those that train and take long, too.")
@click.option("--level", metavar="NAME", help="Of the labels, to be told apart.  [default: the finest but instances]")
@click.option("--limit", type=click.IntRange(2), help="So many pictures of each set, from all over it.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Chance, pixels and the untrained network beside it.")  # fmt: skip
@click.option("--teacher/--student", default=True, help="Which network of a run.  [default: teacher]")
@click.option("--size", type=click.IntRange(1), help="Pixels of an image.  [default: the network's]")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="That compute features.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--cache", type=FOLDER, help="Where features are kept.  [default: RUN/features, or the user's cache]")
@click.option("--davis", metavar="DIR", help="Clips in DAVIS's layout, for video.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME.FIELD=VALUE",
    help="A setting of an evaluator; NAME.preset=dino_s starts from a paper's.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all draws.")
@click.option("--out", type=FOLDER, help="A file for the JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def eval(where: str, data_of_old: str | None, teacher: bool, settings: tuple[str, ...], as_json: bool, out: Path | None, **asked: Any) -> None:  # fmt: skip
    """What are the features worth? k-NN, probes, retrieval, clustering and more, against chance, pixels and no training.

    Evaluates a run's newest checkpoint, one of its checkpoints, a file of weights, or timm's networks. Pictures lie in
    folders of classes, Gristmill's shards, WebDataset tars with .cls, VOC or COCO; without --data, the probes of the
    run's own recipe are asked first. Features are computed once and kept.
    """
    from .evaluate.exam import Request, examine
    from .evaluate.results import print_results, write_results

    if out is not None and not out.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}; make it first", param_hint="--out")
    given = parse_settings(settings)
    if data_of_old and not asked["data"]:
        asked["data"] = data_of_old
    results = examine(
        Request(where=where, who="teacher" if teacher else "student", given=given, quiet=as_json, **asked)
    )
    if results is None:
        return
    if out is not None:
        write_results(results, out)
    if as_json:
        click.echo(json.dumps(results))
    else:
        print_results(results)
    if any(name in results["skipped"] for name in asked["only"]):
        sys.exit(1)  # it was wanted by name


def parse_settings(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """NAME.FIELD=VALUE of evaluators, in the types of their settings. click.BadParameter names what is near."""
    import dataclasses
    import typing

    import yaml
    from pydantic import TypeAdapter, ValidationError

    from .evaluate.battery import EVALUATORS
    from .evaluate.presets import presets_of

    given: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, is_set, value = text.partition("=")
        name, _, key = path.partition(".")
        if not is_set or not key:
            raise click.BadParameter(
                f"{text!r} is no NAME.FIELD=VALUE, for example linear.epochs=20", param_hint="--set"
            )
        if name not in EVALUATORS:
            near = difflib.get_close_matches(name, EVALUATORS, 1) or [", ".join(EVALUATORS)]
            raise click.BadParameter(f"there is no evaluator {name!r}; did you mean {near[0]}?", param_hint="--set")
        make = EVALUATORS[name].options
        assert make is not None
        kind = type(make())
        if key == "preset":
            known = presets_of(name)
            if value not in known:
                near = difflib.get_close_matches(value, known, 1) or [", ".join(known) or "none for it"]
                raise click.BadParameter(f"{name} has no preset {value!r}; did you mean {near[0]}?", param_hint="--set")
            given.setdefault(name, {})[key] = value
            continue
        fields = {each.name for each in dataclasses.fields(kind)}
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or [", ".join(sorted(fields))]
            raise click.BadParameter(f"{name} has no setting {key!r}; did you mean {near[0]}?", param_hint="--set")
        try:
            parsed = TypeAdapter(typing.get_type_hints(kind)[key]).validate_python(yaml.safe_load(value))
        except (ValidationError, yaml.YAMLError) as error:
            raise click.BadParameter(f"{text}: {str(error).splitlines()[-2 if 'pydantic' in str(error) else 0].strip()}", param_hint="--set") from error  # fmt: skip
        given.setdefault(name, {})[key] = parsed
    return given
