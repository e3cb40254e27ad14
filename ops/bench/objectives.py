"""`gristmill bench objectives`: what a Mugs step costs, against the way the official code computes it, in one run.

Four parts. "forms": each fast form against its plain form, time and memory. "step": whole steps of the recipe
mugs-vits16-100 at batch 4, ours against a plain one (plain_step.py), beside timm's backbone passes alone and the rate at
which this machine multiplies matrices, so that what is left is explained. "growth": time and memory as queue, prototypes
and crops grow. Everything is measured in processes of its own (steps.py, forms.py) that take turns, `rounds` times, and
of which the fastest counts. "parts": a step of multigrain without each of its objectives (parts.py). Where others use the machine, CPU seconds of one thread (`--threads 1`) are steadier than wall time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .parts import names_of

STEPS = ("plain", "ours fp32", "ours fp32, recompute", "backbones fp32")
LOW = ("ours autocast", "ours bf16", "backbones bf16")  # where products in bf16 are worth it
# The official code runs under autocast on GPUs; what is compiled there wants a compiler beside it.
ON_GPU = (
    "plain", "ours fp32", "backbones fp32", "plain autocast", "ours autocast", "ours bf16", "ours autocast, recompute",
    "ours autocast, compiled", "backbones bf16",
)  # fmt: skip
SIZES: dict[str, Any] = {
    "batch": 4, "crops": 12, "globals": 2, "dim": 256, "features": 384, "queue": 65536, "prototypes": 65536, "neighbours": 8,
    "seconds": 1.0, "queues": [16384, 65536, 262144], "prototype_counts": [16384, 65536, 262144], "crop_counts": [4, 12, 24],
}  # fmt: skip
TINY = {
    "batch": 2, "crops": 4, "dim": 8, "features": 64, "queue": 64, "prototypes": 64, "neighbours": 2, "seconds": 0.0,
    "queues": [32, 64], "prototype_counts": [32, 64], "crop_counts": [3, 4],
}  # fmt: skip
# Beyond what a recipe's --tiny makes small.
TINY_STEP = (
    "student.head_hidden=32", "student.head_out=8", "student.predictor_hidden=32", "student.prototypes=64",
    "objectives.instance.queue=64", "objectives.local_group.queue=64", "objectives.local_group.memory=64",
    "views.local.count=2",
)  # fmt: skip

TINY_PARTS = ("student.head_hidden=32", "objectives.hierarchy.memory=64", "views.local.count=2")


def bench_objectives(
    as_json: bool,
    only: tuple[str, ...] = (),
    *,
    plot: Path | None = None,
    threads: int = 0,
    steps: int = 3,
    rounds: int = 1,
    bf16: bool = False,
    tiny: bool = False,
    device: str = "cpu",
    overrides: tuple[str, ...] = (),
) -> int:
    """Run the parts asked for (all by default) and print them; returns the exit code.

    `bf16`: measure steps in bf16 also where its products are slower than those in float32. `plot`: a PNG of the growth.
    `device`: "cuda" measures steps on a GPU; the other parts are the CPU's alone.
    """
    threads = threads or len(os.sched_getaffinity(0))
    settings = {**SIZES, **(TINY if tiny else {}), "threads": threads}
    found: dict[str, Any] = {"threads": threads}
    for part in ("forms", "growth"):
        if not only or part in only or (part == "growth" and plot):
            found[part] = _both_ways(part, settings)
    if "forms" in found:
        found["forms"] |= granular_forms(settings, tiny)
    if not only or "step" in only:
        own = [*(TINY_STEP if tiny else ()), *overrides]
        whole = {
            "overrides": own,
            "steps": steps,
            "threads": threads,
            "tiny": tiny,
            "seconds": settings["seconds"],
            "device": device,
        }
        found["step"] = whole_steps(whole, rounds, bf16)
    if not only or "parts" in only:
        own = [*(TINY_PARTS if tiny else ()), *overrides]
        found["parts"] = parts({"overrides": own, "steps": steps, "threads": threads, "tiny": tiny})
    if plot:
        from .growth_plot import draw

        draw(found["growth"], plot)
    print(json.dumps(found)) if as_json else _show(found)
    return 0


def _apart(module: str, *arguments: str, threads: int) -> dict[str, Any]:
    """One measurement in a process of its own. Raises RuntimeError with what it said when it fails."""
    command = [sys.executable, "-m", f"gristmill.ops.bench.{module}", *arguments]
    # Threads wait as they do in training: asleep, they would be late for each of the many small operators.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:4])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _both_ways(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    fast, plain = (
        _apart("forms", way, part, json.dumps(settings), threads=settings["threads"]) for way in ("fast", "plain")
    )
    return _paired(fast, plain)


def _paired(fast: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Leaves of equal place side by side, with their ratios."""
    if "seconds" not in fast:
        return {key: _paired(fast[key], plain[key]) for key in fast}
    ratios = {key: fast[key] / plain[key] if plain[key] else float("nan") for key in fast}
    return {"fast": fast, "plain": plain, "fast_over_plain": ratios}


def granular_forms(settings: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Dense and hierarchical contrast, at the sizes of their papers."""
    from .dense_forms import compare
    from .selective_forms import Sizes, bench_selective  # which takes turns by what is above

    seconds, threads = settings["seconds"], settings["threads"]
    places = {"images": 2, "places": [4], "features": 8, "dim": 8, "queue": 64} if tiny else {}
    found = {f"dense, {n} places": leaf for n, leaf in compare(places, seconds=seconds, threads=threads).items()}
    small: dict[str, Any] = {"images": 4, "queue": 32, "levels": (6, 4, 2), "dim": 8} if tiny else {}
    for locals_ in (0, 4):
        sizes = Sizes(**small, locals=locals_, seconds=seconds, threads=threads)
        found["hierarchy" + (f", {locals_} local crops" if locals_ else "")] = bench_selective(sizes)
    return found


def parts(settings: dict[str, Any]) -> dict[str, Any]:
    """A whole step with all objectives, and what leaving out each one saves."""
    given, threads = json.dumps(settings), settings["threads"]
    whole = _apart("parts", "without", "nothing", given, threads=threads)
    found: dict[str, Any] = {"all": whole}
    for name in names_of(settings):
        less = _apart("parts", "without", name, given, threads=threads)
        found[name] = {key: whole[key] - less[key] for key in ("seconds", "cpu_seconds", "memory_MB")}
    return found


def whole_steps(settings: dict[str, Any], rounds: int, bf16: bool) -> dict[str, Any]:
    """Every step in `rounds` turns, ratios to the plain one, and where ours spends its time."""
    threads = settings["threads"]
    rates = _apart("steps", "products", json.dumps(settings), threads=threads)
    worth = bf16 or rates["bf16"] > rates["fp32"]
    kinds = ON_GPU if settings.get("device") == "cuda" else (*STEPS, *(LOW if worth else ()))
    found: dict[str, Any] = {}
    for turn in range(rounds):
        for what in kinds:
            one = settings | {"profile": turn == 0}
            now = _apart("steps", what, json.dumps(one), threads=threads)
            before = found.setdefault(what, now)
            for key in ("seconds", "cpu_seconds", "memory_MB", "process_MB"):
                before[key] = min(before[key], now[key])
    for what, row in found.items():
        if what.startswith("ours"):
            plain = found["plain autocast" if "plain autocast" in found and "fp32" not in what else "plain"]
            row["over_plain"] = {key: row[key] / plain[key] for key in ("seconds", "cpu_seconds", "memory_MB")}
        low = "bf16" in what or "autocast" in what
        row["seconds_at_product_rate"] = (
            row["GFLOP"] / rates["bf16" if low else "ours fp32" if what.startswith("ours") else "fp32"]
        )
    if not worth:
        why = f"products in bf16 run at {rates['bf16'] / rates['fp32']:.2f} of float32's rate here; --bf16 measures them all the same"
        found |= {what: {"missing": why} for what in LOW}
    return {"product_GFLOP_per_s": rates, "steps": found}


def _show(found: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{found['threads']} threads")
    leaves = {f"form: {name}": leaf for name, leaf in found.get("forms", {}).items()}
    leaves |= {f"{axis} {size}": leaf for axis, row in found.get("growth", {}).items() for size, leaf in row.items()}
    if leaves:
        table = Table(title="fast forms over plain forms", title_justify="left")
        for column in ("", "ms", "plain", "ratio", "CPU ratio", "MB", "plain", "ratio"):
            table.add_column(column, justify="right" if column else "left")
        for name, leaf in leaves.items():
            fast, plain, ratio = leaf["fast"], leaf["plain"], leaf["fast_over_plain"]
            table.add_row(
                name, f"{fast['seconds'] * 1e3:.1f}", f"{plain['seconds'] * 1e3:.1f}", f"{ratio['seconds']:.2f}",
                f"{ratio['cpu_seconds']:.2f}", f"{fast['memory_MB']:.0f}", f"{plain['memory_MB']:.0f}",
                f"{ratio['memory_MB']:.2f}",
            )  # fmt: skip
        console.print(table)
    if "step" in found:
        _show_steps(console, found["step"])
    if "parts" in found:
        _show_parts(console, found["parts"])


def _show_parts(console: Console, found: dict[str, Any]) -> None:
    table = Table(title="a step of multigrain, and what each objective adds to it", title_justify="left")
    for column in ("", "s", "CPU s", "MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in found.items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['memory_MB']:.0f}")
    console.print(table)
    if (seconds := found["all"]["clustering_seconds"]) is not None:
        console.print(f"clustering the hierarchy's memory anew, every so many images: {seconds:.1f} s")


def _show_steps(console: Console, found: dict[str, Any]) -> None:
    rates = found["product_GFLOP_per_s"]
    console.print(
        f"matrix products: {rates['fp32']:.0f} GFLOP/s in float32 by torch, {rates['ours fp32']:.0f} as ours are made, "
        f"{rates['bf16']:.0f} in bf16"
    )
    table = Table(title="a step", title_justify="left")
    for column in ("", "s", "CPU s", "MB", "over plain: s", "CPU s", "MB", "GFLOP", "s at product rate"):
        table.add_column(column, justify="right" if column else "left")
    for what, row in found["steps"].items():
        if "missing" in row:
            console.print(f"{what}: {row['missing']}")
            continue
        over = row.get("over_plain", {})
        table.add_row(
            what, f"{row['seconds']:.3g}", f"{row['cpu_seconds']:.2f}", f"{row['memory_MB']:.0f}",
            *(f"{over[key]:.2f}" if key in over else "-" for key in ("seconds", "cpu_seconds", "memory_MB")),
            f"{row['GFLOP']:.0f}", f"{row['seconds_at_product_rate']:.2g}",
        )  # fmt: skip
    console.print(table)
    for what, row in found["steps"].items():
        if "shares" in row:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in row["shares"].items())
            console.print(f"time in operators, {what}: {shares}")
