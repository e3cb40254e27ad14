"""Learning rates that shrink towards the input, for fine-tuning what is already good below.

BEiT's rule (Bao et al., arXiv 2106.08254): layer l of a network with `depth` blocks, 0 being the embedding and depth + 1
the head, learns at decay ** (depth + 1 - l) times the rate. Grouping is timm's (`param_groups_layer_decay`, which a
test holds it to): the final norm goes with the last block, where BEiT's own code leaves it with the head. Vectors and
embeddings of position and class have no weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...shards.errors import GristmillError

UNDECAYED = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token")


class LayersError(GristmillError, ValueError):
    """A network whose layers do not name each of its parameters once."""


def layer_groups(
    layers: Iterable[Iterable[nn.Parameter]],
    network: nn.Module,
    head: Iterable[nn.Parameter],
    *,
    decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, {params, lr_scale, weight_decay}, the input's first and the head's last.

    layers: the parameters of `network` by depth, as Subject.layers gives them. Raises LayersError when one is missing
    or there twice: it would not learn, or twice as fast, and nobody would see.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parts = [list(layer) for layer in layers]
    listed = [id(parameter) for layer in parts for parameter in layer]
    wrong = [name for key, name in names.items() if listed.count(key) != 1]
    if wrong or len(listed) != len(names):
        raise LayersError(
            f"layers must name each parameter of the network once; see {', '.join(wrong[:3]) or 'others'}"
        )
    parts.append(list(head))
    groups = []
    for number, layer in enumerate(parts):
        kinds: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for parameter in layer:
            last = names.get(id(parameter), "").rpartition(".")[2]
            kinds[parameter.ndim > 1 and last not in UNDECAYED].append(parameter)
        for decayed, parameters in kinds.items():
            if parameters:
                scale = decay ** (len(parts) - 1 - number)
                groups.append(
                    {"params": parameters, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
                )
    return groups
