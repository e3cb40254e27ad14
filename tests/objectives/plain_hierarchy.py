"""HCSC's loss written from the formulas, whole logits and loops over images: what objectives/hierarchy.py is held to.

From sections 2.3 to 2.6 of the notes on the official code. Masks are given, [levels, N, K] for the queue and
[views, N, k] for each level of prototypes but the last, True where a negative stays.
"""

import math
from typing import NamedTuple

import torch
from gristmill.objectives.hierarchy import HierarchyConfig
from gristmill.objectives.tree import Tree
from torch import Tensor


class Given(NamedTuple):
    queries: Tensor  # [views, N, D], the first one global, the others local
    key: Tensor  # [N, D]
    queue: Tensor  # [K, D]
    tree: Tree
    lineage: Tensor  # [levels, N]
    instance: Tensor | None = None
    prototype: list[Tensor] | None = None


def entropy(own: Tensor, others: list[tuple[Tensor, bool]], masked: str) -> Tensor:
    """Of one query: its positive's logit and the negatives' (logit, stays)."""
    logits = [own]
    for logit, stays in others:
        if stays:
            logits.append(logit)
        elif masked == "zero":
            logits.append(torch.zeros_like(logit))
    return torch.logsumexp(torch.stack(logits), 0) - own


def instance_stays(given: Given, config: HierarchyConfig) -> Tensor:
    """Probability that each queue entry stays for each image, [levels, N, K]."""
    levels = []
    for level, own in enumerate(given.lineage):
        ratio = (config.selection_temperature or config.temperature) / config.temperature
        phi = given.tree.phi[level].clamp(min=1e-3) * ratio
        belongs = torch.softmax(given.queue @ given.tree.prototypes[level].T / phi, dim=1)  # [K, k]
        levels.append((1 - belongs[:, own].T).clamp(*config.instance_keep))
    return torch.stack(levels)


def prototype_stays(given: Given, config: HierarchyConfig, level: int) -> Tensor:
    """Probability that each prototype of a level stays for each image, [N, k]."""
    ratio = (config.selection_temperature or config.temperature) / config.temperature
    cosine = given.tree.prototypes[level] @ given.tree.prototypes[level + 1].T
    belongs = torch.softmax(cosine / (given.tree.phi[level + 1] * ratio), dim=1)  # [k, k above]
    return (1 - belongs[:, given.lineage[level + 1]].T).clamp(*config.prototype_keep)


def excluded(own: Tensor, image: int, config: HierarchyConfig, highest: int, k: int) -> set[int]:
    if config.negatives == "all":
        return {int(own[image])}
    group = config.exclusion_batch or len(own)
    first = image // group * group
    return set(own[first : first + group].tolist()) | set(range(highest, k))


def terms(given: Given, config: HierarchyConfig) -> tuple[Tensor, Tensor]:
    """Cross-entropies, means over images: of instances [levels or 1, views], of prototypes [levels, views]."""
    views, images, _ = given.queries.shape
    instance, prototype = [], []
    for level in range(len(given.lineage) if config.instance_selection else 1):
        row = []
        for view in range(views):
            masked = (
                config.instance_selection and given.instance is not None and (view == 0 or config.selection_on_local)
            )
            found = []
            for n in range(images):
                q = given.queries[view, n]
                stay = (
                    given.instance[level, n].tolist()
                    if masked and given.instance is not None
                    else [True] * len(given.queue)
                )
                others = [(q @ u / config.temperature, s) for u, s in zip(given.queue, stay, strict=True)]
                found.append(entropy(q @ given.key[n] / config.temperature, others, config.masked))
            row.append(torch.stack(found).mean())
        instance.append(torch.stack(row))
    for level, own in enumerate(given.lineage):
        phi, rows, row = given.tree.phi[level], given.tree.prototypes[level], []
        for view in range(views):
            found = []
            for n in range(images):
                q, c = given.queries[view, n], int(own[n])
                out = excluded(own, n, config, given.tree.highest[level], len(rows))
                chosen = config.prototype_selection and given.prototype is not None and level + 1 < len(given.lineage)
                stay = (
                    given.prototype[level][view, n] if chosen and given.prototype is not None else torch.ones(len(rows))
                )
                others = [(q @ rows[j] / phi[j], bool(stay[j])) for j in range(len(rows)) if j not in out]
                found.append(entropy(q @ rows[c] / phi[c], others, config.masked))
            row.append(torch.stack(found).mean())
        prototype.append(torch.stack(row))
    return torch.stack(instance), torch.stack(prototype)


def total(given: Given, config: HierarchyConfig) -> Tensor:
    """The loss after warm-up and ramp, of one teacher crop and one global student crop."""
    instance, prototype = terms(given, config)

    def over_crops(row: Tensor) -> Tensor:
        local = row[1:]
        return row[0] + (0 if not len(local) else local.sum() if config.local_crops == "sum" else local.mean())

    def over_levels(table: Tensor, how: str) -> Tensor:
        found = torch.stack([over_crops(row) for row in table])
        return found.sum() if how == "sum" else found.mean()

    how = config.instance_levels if config.instance_selection else "sum"
    if config.instance_selection and not config.selection_on_local:  # local crops once, not once a level
        first = over_levels(instance[:, :1], how)
        local = over_crops(torch.cat([instance[0, :1] * 0, instance[0, 1:]]))
        whole = first + local
    else:
        whole = over_levels(instance, how)
    return config.instance_weight * whole + config.prototype_weight * over_levels(prototype, config.prototype_levels)


def concentrations(
    squared: list[float], numbers: list[int], k: int, temperature: float, smoothing: float
) -> list[float]:
    """phi of each cluster, by loops; NaN where the formula divides zero by zero."""
    wide = [0.0] * k
    members = [[math.sqrt(d) for d, n in zip(squared, numbers, strict=True) if n == c] for c in range(k)]
    for c, distances in enumerate(members):
        if len(distances) > 1:
            wide[c] = sum(distances) / len(distances) / math.log(len(distances) + smoothing)
    wide = [w if len(members[c]) > 1 else max(wide) for c, w in enumerate(wide)]
    ordered = sorted(wide)

    def percentile(share: float) -> float:
        place = share * (k - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, k - 1)] - ordered[low])

    low, high = percentile(0.1), percentile(0.9)
    wide = [min(max(w, low), high) for w in wide]
    mean = sum(wide) / k
    return [temperature * w / mean if mean else math.nan for w in wide]
