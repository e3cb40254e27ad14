"""Video object segmentation by propagating labels: the first frame's mask is carried along by patch tokens alone.

Each patch of a frame takes the mean label of the most similar patches of the first frame and the few before it, within
a window around its own place (Jabri et al., arXiv 2006.14613; DINO, arXiv 2104.14294, section 4.2.2, and its eval script).
Nothing is trained. What is carried are soft labels at the resolution of patches; a frame's mask is their bilinear
enlargement, each object's scores stretched to 0 ... 1 first, as the script does. Similarities are computed for some rows
of patches at a time, against only those within reach, so that memory does not grow with the window's unused part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .davis import VOID, Clip, DavisError, Mask, clip_scores, open_davis
from .sight import Progress, Sees, normalised, see


@dataclass(frozen=True)
class VideoOptions:
    """side: pixels of a frame's shorter side; the other is rounded down to a `multiple`, as both are to whole patches.

    frames: how many before this one are asked besides the first; top: the similar patches that vote; radius: cells in
    either direction; temperature: of their similarities.
    """

    side: int = 480
    multiple: int = 64
    frames: int = 7
    top: int = 5
    radius: int = 12
    temperature: float = 0.1


DINO = VideoOptions()  # eval_video_segmentation.py's defaults
MUGS = VideoOptions(frames=20)  # reference: Mugs' evaluation, otherwise the same


def run_video(
    subject: Sees,
    folder: str | Path | Sequence[Clip],
    *,
    seed: int = 0,
    options: VideoOptions | None = None,
    split: str = "val",
    progress: Progress | None = None,
) -> dict[str, float]:
    """`video_j`, `video_f`, their mean `video_j_f`, and `video_chance`: J and F's mean where the first mask never moved.

    Each 0 to 1, the mean over all objects of all clips. folder: DAVIS's layout, or its clips. seed: nothing is drawn here,
    it is taken as all evaluators take it. Raises DavisError for clips that are broken or show no object.
    """
    options = options or DINO
    clips = open_davis(folder, split) if isinstance(folder, str | Path) else list(folder)
    carried, copied = [], []
    for number, clip in enumerate(clips):
        truth = [clip.mask(frame) for frame in range(len(clip.masks))]
        sizes = {mask.shape for mask in truth}
        if len(sizes) > 1:
            raise DavisError(f"clip {clip.name!r} has masks of different sizes: {sorted(sizes)}")
        carried += clip_scores(truth, propagate(subject, clip, truth[0], options))
        copied += clip_scores(truth, [truth[0]] * len(truth))
        if progress:
            progress(number + 1, len(clips), f"video: {clip.name}")
    if not carried:
        raise DavisError("no clip shows an object; there is nothing to score")
    region, edge = np.mean(carried, axis=0).tolist()
    return {
        "video_j": region,
        "video_f": edge,
        "video_j_f": (region + edge) / 2,
        "video_chance": float(np.mean(copied)),
    }


@torch.no_grad()
def propagate(subject: Sees, clip: Clip, first: Mask, options: VideoOptions = DINO) -> list[Mask]:
    """Masks uint8 [H, W] of all frames, from that of the first one; pixels undecided there are background to begin with."""
    high, wide = first.shape
    objects = int(np.where(first == VOID, 0, first).max())
    known = torch.from_numpy(np.where(first == VOID, 0, first).astype(np.int64))
    start = _tokens(subject, clip.frame(0), options)
    labels = _one_hot(known, objects + 1, start.shape[1:])
    behind: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.frames)
    masks = [known.numpy().astype(np.uint8)]
    for number in range(1, len(clip.frames)):
        tokens = _tokens(subject, clip.frame(number), options)
        context = [(start, labels), *behind]
        if any(seen.shape != tokens.shape for seen, _ in context):
            raise DavisError(f"frame {number} of clip {clip.name!r} has another shape than those before it")
        soft = carry(tokens, [seen for seen, _ in context], [said for _, said in context], options)
        behind.append((tokens, soft))
        scores = F.interpolate(soft[None], size=(high, wide), mode="bilinear", align_corners=False)[0]
        masks.append(_stretched(scores).argmax(0).numpy().astype(np.uint8))
    return masks


def carry(tokens: Tensor, context: list[Tensor], labels: list[Tensor], options: VideoOptions) -> Tensor:
    """Labels [C, h, w] of a frame's unit tokens [d, h, w], from those of n frames: [d, h, w] and [C, h, w] each.

    The weights are softmax(similarity / T) over the `top` patches within `radius` of all frames together; ties are
    all counted in DINO's script and the first of them here.
    """
    high, wide = tokens.shape[1:]
    reach = options.radius
    seen, said = torch.stack(context), torch.stack(labels)  # [n, d, h, w], [n, C, h, w]
    columns = torch.arange(wide)
    far = (columns[:, None] - columns).abs() > reach  # [w, w]
    rows = []
    for row in range(high):
        low, top = max(0, row - reach), min(high, row + reach + 1)
        keys = seen[:, :, low:top].permute(1, 0, 2, 3)  # [d, n, rows, w]
        similar = torch.einsum("dq,dnrk->qnrk", tokens[:, row], keys)
        similar = similar.masked_fill(far[:, None, None], -torch.inf).flatten(1)
        best, where = similar.topk(min(options.top, similar.shape[1]), dim=1)
        weights = (best / options.temperature).softmax(1)  # what lies out of reach has weight 0
        voices = said[:, :, low:top].permute(0, 2, 3, 1).flatten(0, 2)[where]  # [w, top, C]
        rows.append((weights[..., None] * voices).sum(1))
    return torch.stack(rows).permute(2, 0, 1)


def frame_size(width: int, height: int, stride: int, options: VideoOptions) -> tuple[int, int]:
    """(width, height) at which frames are seen: the shorter side as asked, the longer one in proportion, rounded down."""
    short = max(stride, options.side // stride * stride)
    long = int(options.side * max(width, height) / min(width, height))
    long = max(short, long // options.multiple * options.multiple // stride * stride)
    return (long, short) if width >= height else (short, long)


def _tokens(subject: Sees, frame: Image.Image, options: VideoOptions) -> Tensor:
    """Unit patch tokens [d, h, w] of a frame."""
    size = frame_size(*frame.size, subject.stride, options)
    tokens = see(subject, normalised(frame, size, subject.mean, subject.std)[None])[0]
    return F.normalize(tokens, dim=-1).permute(2, 0, 1)


def _one_hot(mask: Tensor, classes: int, size: tuple[int, ...]) -> Tensor:
    """int64 [H, W] to fp32 [C, h, w] of 0 and 1: the class of the pixel at each cell's centre."""
    small = F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, classes).permute(2, 0, 1).float()


def _stretched(scores: Tensor) -> Tensor:
    """Each class's scores [C, H, W] from 0 to 1 over the picture; a class that is nowhere stays nowhere."""
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (scores - low) / (high - low).clamp(min=1e-12), scores)
