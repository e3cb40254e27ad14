"""Tensors of ResNet checkpoints for tests: hollow or small, under whatever names somebody gives them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

VECTORS = Path(__file__).parent.parent / "vectors"
State = dict[str, Tensor]


def manifest(name: str) -> dict[str, Any]:
    with gzip.open(VECTORS / f"{name}_r50_keys.json.gz") as file:
        return json.load(file)


def hollow(shapes: dict[str, list[int]]) -> State:
    """Tensors of these shapes that take no room, each of a value of its own."""
    return {
        name: torch.tensor(number if name.endswith(("tracked", "ptr", "index")) else 1.0 + number).expand(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def trained(network: nn.Module, seed: int) -> State:
    """A network's state with running statistics that are not those of a new one."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + (torch.rand(value.shape, generator=draw) if value.is_floating_point() else 7)
        for name, value in network.state_dict().items()
    }


SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 1}


@cache
def plain(seed: int = 0) -> State:
    """A small ResNet of basic blocks; torchvision's names."""
    network = timm.create_model("resnet18", num_classes=0, layers=[1] * 4, channels=(8, 16, 32, 64))
    return trained(network, seed)


@cache
def head(seed: int, *sizes: int, norm: bool = False) -> State:
    parts: list[nn.Module] = []
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    return trained(nn.Sequential(*parts[:-1]), seed)


def layer(name: str, seed: int, out: int) -> State:
    return {key.replace("0", name): value for key, value in head(seed, 64, out).items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def save(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def left(report: Any) -> list[str]:
    return [name for names in report.ignored.values() for name in names]


def moco1() -> State:
    state = {}
    for seed, side in enumerate(("encoder_q", "encoder_k")):
        state |= under(f"module.{side}.", plain(seed) | layer("fc", seed, 16))
    return state | {"module.queue": torch.ones(16, 8), "module.queue_ptr": torch.zeros(1).long()}


def moco2(prefix: str = "module.") -> State:
    state = {}
    for seed, side in enumerate(("encoder_q", "encoder_k")):
        state |= under(f"{prefix}{side}.", plain(seed) | under("fc.", head(seed, 64, 32, 16)))
    return state | {f"{prefix}queue": torch.ones(16, 8), f"{prefix}queue_ptr": torch.zeros(1).long()}
