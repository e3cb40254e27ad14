"""How wide a cluster is, and so how sharply its prototype is asked for: the concentration phi of PCL, which HCSC took over.

phi = mean distance of the members / log(members + smoothing), clipped to the tenth and ninetieth percentile and scaled to a
mean of the temperature (Li et al., "Prototypical contrastive learning", 2021, equation 12; notes on HCSC, section 2.3).
A cluster of at most one member takes the largest value of all. Where nobody has two members, or all members
coincide, the official code divides zero by zero; here every prototype then gets the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def concentration(
    squared: Tensor,
    assignment: Tensor,
    k: int,
    *,
    temperature: float,
    smoothing: float = 10.0,
    percentiles: tuple[float, float] = (10.0, 90.0),
) -> Tensor:
    """phi float [k] of clusters with members of these squared distances [n] and numbers int64 [n]; its mean is `temperature`."""
    # On the host in float64, in the members' order: the same bits everywhere, and k numbers are soon added up.
    who = assignment.cpu()
    counts = torch.bincount(who, minlength=k).double()
    sums = torch.zeros(k, dtype=torch.float64).index_add_(0, who, squared.cpu().double().sqrt())
    wide = sums / counts.clamp(min=1) / torch.log(counts + smoothing)
    wide = torch.where(counts > 1, wide, 0.0)
    wide = torch.where(counts > 1, wide, wide.max())
    low, high = torch.quantile(wide, torch.tensor(percentiles, dtype=torch.float64) / 100)
    wide = wide.clamp(low, high)
    mean = wide.mean()
    phi = wide / mean * temperature if mean > 0 else torch.full_like(wide, temperature)
    return phi.to(squared)
