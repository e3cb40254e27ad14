"""The card of an export: a page of Markdown that says what the weights are, for whoever meets them without the run.

The head is YAML as the Hugging Face hub reads it (huggingface_hub's ModelCardData). Everything on it comes from the
checkpoint and the run's log: recipe, identity of the data, position, the probes with what chance, raw pixels and the untrained
network reach beside them. It travels, so that urls lose their keys and paths all but their last part. A card that
somebody has edited is never written over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..shards.addresses import redact
from .calls import Format, usage
from .checkpoint import digest_of
from .exported import ExportError, writable, write_text
from .origin import Origin
from .programs import SMALLEST, SUFFIX
from .runlog import read_log

SECRET = re.compile(r"(?i)(password|passwd|secret|token|credential|api_?key|access_?key)")
LIBRARY: dict[str, str] = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx"}
BASELINES = {"chance": "chance", "pixels": "raw pixels", "random": "untrained network"}
NO_PROBE = ("position", "step", "time", "seconds")  # numbers of a probe's line that measure nothing of the weights
MARK = re.compile(r"<!-- written by gristmill export; ([0-9a-f]{32}) -->\n\Z")
# What a reader may look for, and how the name of a probe shows that it was measured after all.
BATTERY = {
    "linear|logistic": "linear probe and logistic regression",
    "finetune|semi": "fine-tuning, with all and with few labels",
    "iou|segment|video": "segmentation of images and of video",
    "detection|_ap$": "detection",
    "robust": "robustness to other domains, corruptions and attacks",
    "fair|bias": "bias and fairness: which people it serves worse",
}


def beside(path: Path) -> Path:
    """Where the card of a file lies."""
    return path.with_name(path.name + ".md")


def card(origin: Origin, form: Format, about: Mapping[str, str], path: Path, where: str) -> str:
    """The whole text. about: the export's metadata; where: what was exported, beside whose checkpoints the log may lie."""
    log = _log(origin, where)
    head = {
        "library_name": LIBRARY.get(form, "pytorch"),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["gristmill", "self-supervised-learning", "vision", *origin.config.objectives],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        _title(origin, about),
        _loading(form, about, path, origin),
        _data(origin),
        _training(origin, log),
        _probes(origin, log),
        "## Licence\n\nNot stated. It is for whoever publishes these weights to choose, and the images have a say in it:\n"
        "put `license:` into the head of this page.\n",
        f"## Recipe\n\nAs resolved; urls without their keys, paths by their last part.\n\n```yaml\n{_recipe(origin)}```\n",
    ]
    text = "\n".join(parts)
    return f"{text}\n<!-- written by gristmill export; {digest_of(text.encode())} -->\n"


def write_card(path: str | Path, text: str) -> Path:
    """Write a card, complete or absent, over an older one of ours; over none that was edited: ExportError."""
    path = writable(path, ".md", "a card is Markdown")
    if path.exists() and not _ours(path.read_text(errors="replace")):
        raise ExportError(f"{path} was edited, or is no card of ours, and stays as it is; move it away for a new one")
    return write_text(path, text)


def check_card(path: Path) -> None:
    """ExportError if a card that was edited is in the way, before anything is written."""
    if path.is_dir() or (path.exists() and not _ours(path.read_text(errors="replace"))):
        raise ExportError(f"{path} was edited, or is no card of ours: move it away, or export under another name")


def _ours(text: str) -> bool:
    mark = MARK.search(text)
    return mark is not None and digest_of(text[: mark.start() - 1].encode()) == mark[1]


def _log(origin: Origin, where: str) -> list[dict[str, Any]]:
    """Lines of the run's log up to the checkpoint's position; [] where there is no log, as beside an object store."""
    folders = [Path(place).absolute() for place in (where, origin.saved.path) if "://" not in place]
    for folder in [each for place in folders for each in (place, place.parent.parent)]:
        if lines := read_log(folder / "metrics.jsonl"):
            return [line for line in lines if line.get("position", 0) <= origin.saved.position]
    return []


def _title(origin: Origin, about: Mapping[str, str]) -> str:
    learned = ", ".join(origin.config.objectives)
    return (
        f"# {origin.config.backbone}, recipe {origin.recipe.name}\n\n"
        f"The backbone of a {origin.who} trained without labels (objectives: {learned}), after "
        f"{origin.saved.position:,} of {origin.recipe.images:,} images.\n\n"
        f"Checkpoint `{about['gristmill.source']}`, digest `{about['gristmill.digest']}`.\n"
    )


def _loading(form: Format, about: Mapping[str, str], path: Path, origin: Origin) -> str:
    short = {key: value.replace(str(path), path.name) for key, value in about.items()}
    lines = usage("timm" if form == "card" else form, short, Path("FILE.safetensors" if form == "card" else path.name))
    height, width = origin.image_size
    sides = f"{height} x {width} pixels"
    if origin.config.resnet:
        sides = f"any size from {SMALLEST} pixels on" if form in SUFFIX else "any size"
    text = (
        "## Use\n\n```\n" + "\n".join(lines) + "\n```\n\n"
        f"Images are RGB of {sides}, values from 0 to 1, less the mean {about['gristmill.mean']}, divided by the\n"
        f"deviation {about['gristmill.std']}.\n"
    )
    if form in SUFFIX and not origin.config.resnet:
        text += "The program takes no other size; `gristmill export --size HxW` makes one that does.\n"
    elif not origin.config.resnet:
        text += (
            "At another size the positions are carried over by whoever loads the file, in another way than in training;\n"
            "`gristmill export --size HxW` does it as the run did.\n"
        )
    if "gristmill.difference" in about:
        text += f"Its numbers differ from torch's by at most {about['gristmill.difference']} of the largest.\n"
    return text


def _data(origin: Origin) -> str:
    cursor = _cursor(origin)
    sources = [_safe(str(each.path)) for each in origin.recipe.sources]
    images = origin.saved.state.get("images")
    lines = [
        f"- identity (digest of the manifest): `{cursor.get('data', 'not recorded')}`",
        f"- images: {images:,}" if images else "- images: not recorded",
        f"- from: {', '.join(f'`{each}`' for each in sources) or 'not recorded'}",
    ]
    return "## Data\n\n" + "\n".join(lines) + "\n\nNo labels were read in training.\n"


def _cursor(origin: Origin) -> dict[str, Any]:
    return json.loads(origin.saved.state.get("cursor", "{}"))


def _training(origin: Origin, log: list[dict[str, Any]]) -> str:
    state, topology = origin.saved.state, origin.saved.state.get("topology", {})
    cursor = _cursor(origin)
    lost = cursor.get("position", 0) - cursor.get("trained", 0)
    world = topology.get("world", "unknown")
    lines = [
        f"- seed {origin.recipe.seed}, {origin.recipe.batch} images a step, precision {origin.recipe.precision}, "
        f"{world} process{'' if world == 1 else 'es'} on {topology.get('device', 'an unknown device')}",
        f"- images of steps that were left out as bad: {lost:,}",
        f"- with {', '.join(f'{name} {each}' for name, each in state.get('versions', {}).items()) or 'unknown versions'}",
    ]
    begun = [line for line in log if line.get("event") == "initial"]
    if begun or origin.config.init:
        file = (begun[-1].get("sha256") if begun else None) or "not in the log"
        lines.insert(0, f"- began with weights of `{_safe(str(origin.config.init))}`, sha256 `{file}`")
    return "## Training\n\n" + "\n".join(lines) + "\n"


def _probes(origin: Origin, log: list[dict[str, Any]]) -> str:
    rows = [line for line in log if line.get("kind") == "probe"]
    taught = [line for line in rows if line.get("who") == "teacher"]
    if not taught:
        return "## Probes\n\nNone up to this position.\n\n" + _missing(list(BATTERY.values()))
    last = max(taught, key=lambda line: line["position"])
    shown = [(label, [line for line in rows if line.get("who") == who][-1:]) for who, label in BASELINES.items()]
    table = [(label, found[0]) for label, found in shown if found]
    table.append((f"**teacher after {last['position']:,} images**", last))
    names = [name for name, value in last.items() if name not in NO_PROBE and _is_number(value)]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {label} | {' | '.join(_shown(row.get(name)) for name in names)} |" for label, row in table]
    notes = []
    if last["position"] < origin.saved.position:
        notes.append(f"The last probe is {origin.saved.position - last['position']:,} images older than these weights.")
    if origin.who == "student":
        notes.append("What was probed is the teacher; these weights are the student's.")
    missing = [text for mark, text in BATTERY.items() if not any(re.search(mark, name) for name in names)]
    if not any(row.get("who") == "random" for row in rows):
        missing.insert(0, "the untrained network on the same probes")
    return "## Probes\n\n" + "\n".join(lines) + "\n\n" + "".join(f"{note}\n" for note in notes) + _missing(missing)


def _missing(lines: list[str]) -> str:
    return "Not measured by the run's own probes:\n\n" + "".join(f"- {line}\n" for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else "–"


def _recipe(origin: Origin) -> str:
    tree = _redacted(origin.saved.state["recipe"])
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def _redacted(value: Any, key: str = "") -> Any:
    if SECRET.search(key) and isinstance(value, str):
        return "..."
    if isinstance(value, dict):
        return {name: _redacted(each, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(each, key) for each in value]
    return _safe(value) if isinstance(value, str) else value


def _safe(text: str) -> str:
    """A url without keys; of a path from the root the last part."""
    text = redact(text)
    return f".../{Path(text).name}" if text.startswith(("/", "~")) else text
