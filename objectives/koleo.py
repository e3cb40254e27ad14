"""KoLeo: keep features apart by the distance to the nearest one (Sablayrolles et al., arXiv 1806.03198, eq. 4).

The Kozachenko-Leonenko estimate of a batch's entropy on the sphere, as DINOv2 adds it to DINO's loss, for each global
crop on its own: crops of one image lie close to each other and must. Which images share a batch decides, hence the
virtual batches of fixed size in the order of the positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-8  # DINOv2's: duplicates are far apart enough for the logarithm


def koleo(features: Tensor, batch: int) -> Tensor:
    """Mean of `-log(distance to the nearest other)` of unit rows, scalar; features [m * batch, d], `batch` rows each.

    Gradient flows to a row and to its nearest, whose choice has none. ValueError unless rows fill batches of two or more.
    """
    if batch < 2 or features.shape[0] % batch:
        raise ValueError(
            f"koleo: {features.shape[0]} rows in batches of {batch}; it needs whole batches of two or more"
        )
    unit = F.normalize(features, dim=-1, eps=TINY).view(-1, batch, features.shape[1])
    with torch.no_grad():
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=1, dim2=2).fill_(-1.0)
        nearest = cosine.argmax(2)
    others = torch.gather(unit, 1, nearest.unsqueeze(2).expand_as(unit))
    distance = torch.linalg.vector_norm(unit - others + TINY, dim=2)  # as torch.nn.PairwiseDistance has it
    return -torch.log(distance + TINY).mean()
