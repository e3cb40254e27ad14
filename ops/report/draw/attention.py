"""What a network looks at: attention of the class token, a map a head, and the patches' first principal components.

Attention is that of the last block, as DINO shows it (arXiv 2104.14294, figure 1); components are of the patch features of
all images together, so that one colour means one thing on all of them (as DINOv2 shows it, arXiv 2304.07193, figure 1).
Images are twice as large as in training, for finer maps. A ResNet has no class token, so that only components are left.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .source import SHOWN, Source

LARGEST = 448  # pixels a side
HEADS = 12  # shown
PICTURE = 160  # pixels of the image beside its maps


def draw_attention(source: Source) -> dict[str, np.ndarray]:
    """image uint8 [n, S, S, 3]; attention uint8 [n, 1 + heads, h, w] (mean first) and peak, as `scaled`; pca uint8 [n, h, w, 3]."""
    size = min(2 * source.size, max(LARGEST, source.size))
    images = source.queries(SHOWN, size)
    maps, places = look(source.teacher.backbone, images.pixels)
    shown = (
        torch.zeros(len(places), 0, 1, 1)
        if maps is None
        else torch.cat([maps.mean(1, keepdim=True), maps[:, :HEADS]], 1)
    )
    attention, peak = scaled(shown)
    return {
        "image": images.thumbnails(PICTURE),
        "attention": attention,
        "peak": peak,
        "heads": np.array(0 if maps is None else maps.shape[1]),
        "pca": components(places),
        "size": np.array(size),
    }


@torch.no_grad()
def look(backbone: nn.Module, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """Attention of the class token in the last block [n, heads, h, w] (None of a ResNet), patch features [n, h, w, d]."""
    grid = backbone.grid(*images.shape[2:])  # pyright: ignore[reportCallIssue]
    caught: list[Tensor] = []
    blocks: nn.Sequential = backbone.blocks  # pyright: ignore[reportAssignmentType]
    hook = blocks[-1].register_forward_pre_hook(lambda _, given: caught.append(given[0])) if len(blocks) else None
    try:
        tokens = backbone.norm(backbone(images))  # pyright: ignore[reportCallIssue]
    finally:
        if hook is not None:
            hook.remove()
    places = tokens[:, 1:].float().unflatten(1, grid)
    if not caught:
        return None, places
    return class_attention(blocks[-1], caught[0])[:, :, 1:].unflatten(2, grid), places


def class_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """Shares of attention that the first token pays to all tokens in a pre-norm block: [n, heads, t], sums of 1."""
    attention, normed = block.attn, block.norm1(tokens)  # pyright: ignore[reportCallIssue]
    heads: int = attention.num_heads  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    query, key, _ = attention.qkv(normed).unflatten(2, (3, heads, -1)).unbind(2)  # pyright: ignore
    query, key = attention.q_norm(query), attention.k_norm(key)  # pyright: ignore
    scores = torch.einsum("nhd,nthd->nht", query[:, 0], key).float() * query.shape[-1] ** -0.5
    return scores.softmax(-1)


def scaled(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Maps [n, m, h, w] to uint8 from each one's lowest to its highest, and how far the highest is above an even share [n, m]."""
    if not maps.numel():
        return np.zeros(maps.shape, np.uint8), np.zeros(maps.shape[:2])
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    spread = (maps - low) / (high - low).clamp_min(1e-12)
    peak = high / maps.mean((-2, -1), keepdim=True).clamp_min(1e-12)
    return (255 * spread).round().to(torch.uint8).numpy(), peak[:, :, 0, 0].numpy()


def components(places: Tensor) -> np.ndarray:
    """First three principal components of features [n, h, w, d] as red, green and blue: uint8 [n, h, w, 3].

    Each is spread from its 2nd to its 98th percentile. The sign of a component means nothing; the longer tail is bright,
    so that the same features always give the same picture.
    """
    rows = places.flatten(0, 2).double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    found = rows @ vectors[:, -3:].flip(1)
    found = found * torch.where((found**3).sum(0) < 0, -1.0, 1.0)
    found = torch.nn.functional.pad(found, (0, 3 - found.shape[1]))
    low, high = (torch.quantile(found, share, dim=0) for share in (0.02, 0.98))
    flat = high - low < 1e-9
    spread = ((found - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)
    spread[:, flat] = 0.5
    return (255 * spread).round().to(torch.uint8).view(*places.shape[:3], 3).numpy()
