"""Which dictionary in a file of weights holds the network asked for, and what everything beside it is.

Full checkpoints have one dictionary a network (Mugs, DINO, iBOT), or both in one (pairs.py), or one network under "state_dict"
or "model"; VISSL nests it five deep (`classy_state_dict.base_model.model.trunk`). Nothing of a file goes unmentioned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .pair import WHO, Pair, Who, pair_of
from .unpickle import WeightsError

# Under which files keep the one network that they hold; VISSL's nest all of the latter.
NESTED = ("state_dict", "model", "model_state_dict", "classy_state_dict", "base_model", "trunk")
# Parts of a full checkpoint beside its networks, and the group under which a report lists them.
BESIDE = {
    "student_mem": "memories", "teacher_mem": "memories", "instance-sup.": "queues", "local-group-sup.": "queues",
    "group-sup.": "centre", "dino_loss": "centre", "ibot_loss": "centre", "optimizer": "optimizer",
    "objectives": "memories", "model_ema": "other network", "state_dict_ema": "other network",
} | dict.fromkeys((
    "fp16_scaler", "scaler", "amp", "epoch", "iteration", "steps", "args", "config", "arch", "meta", "author", "best_acc1",
    "__author__", "matching_heuristics", "gristmill", "phase_idx", "loss",
), "bookkeeping")  # fmt: skip


def choose(
    tree: Mapping[str, Any], who: Who | None, path: Path
) -> tuple[dict[str, Any], str, dict[str, list[str]], Pair | None]:
    """(a flat dictionary of a file, which network is meant, everything beside it by group, how the two in it are told apart).

    The last is None where the dictionary holds one network. WeightsError if there is none such.
    """
    rest: dict[str, list[str]] = {}
    if any(f"{each}/backbone.{name}" in tree for each in WHO for name in ("cls_token", "conv1.weight")):  # ours, whole
        split: dict[str, dict[str, Any]] = {}
        for name, value in tree.items():
            part, _, rest_of_name = name.partition("/")
            split.setdefault(part, {})[rest_of_name] = value
        tree = split
    held = [each for each in WHO if isinstance(tree.get(each), Mapping)]
    if held:
        network = who or held[-1]
        if network not in held:
            raise WeightsError(f"{path} holds no {network}, only a {held[0]}; ask for --{held[0]}")
        return _open(tree, network, rest), network, rest, None
    while inner := [key for key in NESTED if isinstance(tree.get(key), Mapping)]:
        tree = _open(tree, inner[0], rest)
    if (pair := pair_of(map(str, tree))) is None:
        return dict(tree), "the only one", rest, None
    network = who or pair.held[0]
    if network not in pair.held:
        raise WeightsError(f"{path} holds no {network}, only a {pair.held[0]}; ask for --{pair.held[0]}")
    return dict(tree), network, rest, pair


def _open(tree: Mapping[str, Any], key: str, rest: dict[str, list[str]]) -> dict[str, Any]:
    """What is under `key`; what is beside it goes into `rest`, by group."""
    for name, part in tree.items():
        if name != key:
            group = "other network" if name in WHO else BESIDE.get(str(name), "other")
            spread = isinstance(part, Mapping) and group not in ("optimizer", "bookkeeping")
            rest.setdefault(group, []).extend([f"{name}/{each}" for each in part] if spread else [str(name)])
    return dict(tree[key])
