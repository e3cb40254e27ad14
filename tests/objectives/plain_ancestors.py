"""The contrastive and predictive ancestors written down plainly, from the formulas of their papers.

NPID (arXiv 1805.01978), MoCo (1911.05722), MoCo v3 (2104.02057), SimCLR (2002.05709), BYOL (2006.07733), SimSiam
(2011.10566). Float64, one image, one pair at a time; nothing of gristmill is used. Rows are unit vectors unless said.
"""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def minus_log_softmax(logits: list[Tensor], wanted: int) -> Tensor:
    return -torch.log_softmax(torch.stack(logits), 0)[wanted]


def moco(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Eq. 1 of MoCo: queries [N, D] and keys [N, D] of the same images, negatives queue [K, D]."""
    terms = []
    for q, k in zip(queries, keys, strict=True):
        logits = [q @ k / temperature] + [q @ row / temperature for row in queue]
        terms.append(minus_log_softmax(logits, 0))
    return torch.stack(terms).mean()


def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of MoCo v3: ctr(q1, k2) + ctr(q2, k1), each 2 T times a cross-entropy over all keys [N, D]."""

    def ctr(queries: Tensor, keys: Tensor) -> Tensor:
        terms = [minus_log_softmax([q @ k / temperature for k in keys], i) for i, q in enumerate(queries)]
        return 2 * temperature * torch.stack(terms).mean()

    return ctr(q1, k2) + ctr(q2, k1)


def simclr(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of SimCLR: mean of l(i, j) over the 2N anchors; every other row is a candidate."""
    rows, count = [*z1, *z2], len(z1)
    terms = []
    for i, anchor in enumerate(rows):
        others = [j for j in range(2 * count) if j != i]
        logits = [anchor @ rows[j] / temperature for j in others]
        terms.append(minus_log_softmax(logits, others.index((i + count) % (2 * count))))
    return torch.stack(terms).mean()


def byol(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. 2 of BYOL, symmetrised: squared distances of predictions p and the target's projections z of the other crop."""
    return ((p1 - z2) ** 2).sum(1).mean() + ((p2 - z1) ** 2).sum(1).mean()


def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. 4 of SimSiam: half the negative cosines, the gradient of z stopped."""

    def distance(p: Tensor, z: Tensor) -> Tensor:
        return -(p * z.detach()).sum(1).mean()

    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def npid_softmax(rows: Tensor, index: list[int], bank: Tensor, temperature: float) -> Tensor:
    """Eq. 2 and 3 of NPID: minus the mean log-probability of the right image, among all."""
    return torch.stack(
        [minus_log_softmax([v @ f / temperature for f in bank], i) for v, i in zip(rows, index, strict=True)]
    ).mean()


def npid_z(rows: Tensor, index: list[int], bank: Tensor, noise: Tensor, temperature: float) -> float:
    """Eq. 8 of NPID as its code takes it: N times the mean over the batch of exp(f . v / T), right images and noise."""
    values = []
    for v, i, others in zip(rows, index, noise.tolist(), strict=True):
        values += [float(torch.exp(v @ bank[j] / temperature)) for j in [i, *others]]
    return len(bank) * math.fsum(values) / len(values)


def npid_nce(rows: Tensor, index: list[int], bank: Tensor, noise: Tensor, z: float, temperature: float) -> Tensor:
    """Eq. 5 to 7 of NPID: h = P / (P + m / N), noise [B, m] drawn uniformly; summed over noise, averaged over images."""
    terms = []
    for v, i, others in zip(rows, index, noise.tolist(), strict=True):
        share = len(others) / len(bank)

        def parts(j: int, v: Tensor = v, share: float = share) -> tuple[Tensor, Tensor]:
            """h and 1 - h; the second is not taken from the first, which next to one would leave few digits of it."""
            p = torch.exp(v @ bank[j] / temperature) / z
            return p / (p + share), share / (p + share)

        terms.append(-torch.log(parts(i)[0]) - torch.stack([torch.log(parts(j)[1]) for j in others]).sum())
    return torch.stack(terms).mean()


def npid_update(bank: Tensor, rows: Tensor, index: list[int], momentum: float) -> Tensor:
    """The bank after a step: f <- unit(momentum f + (1 - momentum) v), image by image in order."""
    bank = bank.clone()
    for v, i in zip(rows, index, strict=True):
        bank[i] = unit(momentum * bank[i] + (1 - momentum) * v)
    return bank


class PlainMoCo:
    """MoCo's training loop in its official order of events, for a linear encoder [in, out]: teacher, keys, loss, queue."""

    def __init__(self, weights: Tensor, queue: Tensor, temperature: float, momentum: float, lr: float) -> None:
        self.query, self.key, self.queue = weights.clone(), weights.clone(), queue.clone()
        self.temperature, self.momentum, self.lr, self.pointer = temperature, momentum, lr, 0

    def step(self, query_crops: Tensor, key_crops: Tensor) -> Tensor:
        """Crops [N, in] of the same images. Returns the loss."""
        self.key = self.momentum * self.key + (1 - self.momentum) * self.query
        keys = unit(key_crops @ self.key)
        weights = self.query.clone().requires_grad_()
        loss = moco(unit(query_crops @ weights), keys, self.queue, self.temperature)
        (gradient,) = torch.autograd.grad(loss, weights)
        self.query = self.query - self.lr * gradient
        for row in keys:
            self.queue[self.pointer] = row
            self.pointer = (self.pointer + 1) % len(self.queue)
        return loss.detach()
