"""The local-group part of the student: find a crop's nearest rows in a memory, let it attend to them.

Mugs (arXiv 2203.14415, 3.2; reference/mugs.md 1.0, 1.3): the mean of a crop's tokens asks the memory for its k nearest rows
by cosine, and one ViT block over [query; rows] followed by the backbone's last LayerNorm gives the local-group feature,
its first token. Only that token is read, so only its query, projection and MLP are computed: a ninth of the work at k = 8.
The plain form is timm's `Block`, which takes the same state; a test ties them.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from .products import QueryKeyValue, product

# Similarities held at once in a search: 64 MiB of float32.
_SEARCH_CELLS = 1 << 24


class FirstTokenAttention(nn.Module):
    """Multi-head self-attention of which only the output at token 0 is computed. State keys are a ViT block's `attn`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, d] to [n, d]."""
        n, t, d = x.shape
        query, rest = self.qkv(x, apart=True)
        query = query.reshape(n, 1, self.heads, d // self.heads).transpose(1, 2)
        key, value = rest.reshape(n, t, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(scaled_dot_product_attention(query, key, value).reshape(n, d))


class NeighbourBlock(nn.Module):
    """One pre-norm ViT block over [query; rows], read at the query. State keys and shapes are a ViT block's (MLP 4d)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = FirstTokenAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, query: Tensor, rows: Tensor, norm: nn.Module) -> Tensor:
        """Queries [n, d], their neighbours [n, k, d] and the backbone's last LayerNorm to features [n, d]."""
        # The memory is fp32; with bf16 weights a LayerNorm takes bf16 only.
        x = query + self.attn(self.norm1(torch.cat([query[:, None], rows.to(query.dtype)], dim=1)))
        return norm(x + self.mlp(self.norm2(x)))


@torch.no_grad()
def search(
    query: Tensor, bank: Tensor, k: int, unit_bank: Tensor | None = None, norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [K, d] nearest by cosine to each query [n, d]: indices [n, k], nearest first, and rows [n, k, d].

    The rows come as they are in the bank, not normalised, and nothing here has a gradient. `norms` [K] are the rows'
    lengths, where the caller keeps them; without them they are taken here. `unit_bank`: rows to compare with instead of
    the bank's own. Raises ValueError when k > K.
    """
    if k > bank.shape[0]:
        raise ValueError(
            f"{k} neighbours asked of a memory of {bank.shape[0]} rows; lower `neighbours` or enlarge the memory"
        )
    rows = bank if unit_bank is None else unit_bank
    if unit_bank is not None:
        norms = None
    else:
        norms = (torch.linalg.vector_norm(bank, dim=1) if norms is None else norms).clamp_min(1e-12)
    # Autocast would compare in bf16, in which the nearest rows of a large memory are ties.
    with torch.autocast(query.device.type, enabled=False):
        found = []
        for part in normalize(query.to(rows.dtype), dim=-1).split(max(1, _SEARCH_CELLS // len(bank))):
            cosine = product(part, rows)
            # The length of a row belongs to a column of products: no second, normalised copy of the memory.
            found.append((cosine if norms is None else cosine.div_(norms)).topk(k, dim=-1).indices)
        index = torch.cat(found)
    return index, bank[index]
