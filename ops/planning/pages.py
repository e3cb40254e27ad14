"""The table of docs/plan.md: recipes for clusters on 8, 32 and 128 GPUs. `python -m gristmill.ops.planning.pages FILE`.

It writes what stands between the two marks of the file, and nothing else; `--check` only says whether that is what it
would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from ..recipe import load_recipe
from .fitting import PlanError, Setting, micro_of, unit_of
from .hardware import hardware
from .report import plan
from .speed import Assumptions
from .tables import gib

RECIPES = (
    "multigrain-vits16", "multigrain-vitb16", "multigrain-vitl16", "multigrain-vitg16", "mugs-vits16-800", "mugs-vitl16-250",
    "ibot-vits16-800", "dino-vits16-100", "moco-v3-vitb16-300", "moco-v2-r50-800", "densecl-r50-200", "hcsc-stream-r50",
    "swav-r50-800", "byol-r50-1000", "simclr-r50",
)  # fmt: skip
GPUS = (8, 32, 128)
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
HEAD = (
    "| recipe | GPUs | batch | ZeRO | images a rank | largest that fits | peak a rank | images/s | of the peak | MB/s read | days |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def row(name: str, gpus: int, gpu: str = "h100-80") -> str:
    """One recipe on so many GPUs; its batch is taken to the nearest that can be shared, and marked if it is another."""
    setting = Setting(hardware(gpu, gpus), Assumptions())
    recipe = load_recipe(name)
    mark = ""
    try:
        micro_of(recipe, gpus)
    except PlanError:
        step = gpus * unit_of(recipe)
        if step > 2 * recipe.batch:
            return f"| `{name}` | {gpus} | {recipe.batch} |" + " – |" * 8
        recipe = load_recipe(name, [f"batch={max(1, round(recipe.batch / step)) * step}"])
        mark = "*"
    try:
        found = plan(recipe, setting, brief=True)
    except PlanError:
        return f"| `{name}` | {gpus} | {recipe.batch}{mark} |" + " – |" * 8
    told, judged = found.speed, found.judged
    peak = gib(judged.memory.peak) + ("" if found.fits else " (does not fit)")
    return (
        f"| `{name}` | {gpus} | {recipe.batch}{mark} | {judged.stage} | {recipe.batch // gpus} | {found.largest} | {peak} | "
        f"{told.images:,.0f} | {told.utilisation:.0%} | {found.supply.read / 1e6:,.0f} | {found.days:.1f} |"
    )


def table(names: Iterable[str] = RECIPES, gpus: Iterable[int] = GPUS) -> list[str]:
    """Lines of Markdown."""
    counts = list(gpus)
    return [*HEAD, *(row(name, count) for name in names for count in counts)]


def written(text: str, lines: list[str]) -> str:
    """The page with these lines between its marks. ValueError where it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page wants one line {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    path = Path(next(argument for argument in arguments if argument != "--check"))
    before = path.read_text()
    after = written(before, table())
    if not check:
        path.write_text(after)
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
