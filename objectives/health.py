"""Signs of collapse in a matrix of features, cheap enough to look at during training.

Two ways to collapse: all images at one point (`feature_std` goes to 0, SimSiam, arXiv 2011.10566, section 4.1), or on few
directions (`rank_me` falls, Garrido et al., arXiv 2210.02885, eq. 1). Both read features [n, d] of different images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(x: Tensor) -> float:
    """Spread of the unit rows of x [n, d]: 0 when all are equal, about 1 when spread evenly over the sphere.

    The standard deviation of each coordinate over the rows, averaged, times sqrt(d). nan for non-finite features.
    """
    x = _checked(x)
    return float(F.normalize(x, dim=1).std(0).mean() * math.sqrt(x.shape[1]))


@torch.no_grad()
def rank_me(x: Tensor) -> float:
    """Effective rank of x [n, d], 1 to min(n, d): exponential of the entropy of the singular values' shares.

    nan for non-finite features, since a rank cannot be had of them.
    """
    x = _checked(x)
    if not bool(torch.isfinite(x).all()):
        return math.nan
    singular = torch.linalg.svdvals(x)
    total = singular.sum()
    if not total:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features of shape {tuple(x.shape)}: need [n, d] with at least two rows")
    return x.detach().double()
