"""Detection and instance segmentation: torchvision's Faster or Mask R-CNN on a backbone, frozen or trained along.

Features are worth for detection what a standard detector makes of them (He et al., arXiv 1703.06870): a pyramid of maps
(pyramid.py), proposals, boxes, and masks where the set has outlines; learned on one COCO-format set, scored on another by COCOeval.
A frozen backbone with a small head is the cheap probe; the papers train everything for hours on many GPUs, and
their settings are presets. One seed gives the same numbers twice on a CPU (on a GPU, pooling regions adds in any order).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from ...models.initial import generator
from ...shards.errors import GristmillError
from .coco import Coco, labels_of, open_coco
from .precision import average_precision, results
from .pyramid import COARSEST, STRIDES, Pyramid
from .sight import Progress

RATIOS = (0.5, 1.0, 2.0)  # height to width of anchors


class DetectionError(GristmillError):
    """A detector that cannot be built, or that did not learn."""


class Trainable(Protocol):
    """A network whose copy can be trained; `Subject` is one."""

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...

    def backbone(self) -> Any: ...

    def layers(self, module: Any) -> list[list[nn.Parameter]]: ...


@dataclass(frozen=True)
class DetectionOptions:
    """Settings of a detector; the defaults are a probe for one machine, not a paper's.

    masks: whether to learn outlines (None: if every object has one). trainable: the backbone, too. short: pixels of a
    picture's shorter side, one of them drawn for each picture in training, the last one in scoring; long: the longer side at
    most. layer_decay: of the backbone's rates from the last block down. milestones: shares of the steps after which the
    rate is a tenth; none: it falls to zero by a half cosine. warmup: steps. anchor: side of anchors in strides of their
    map. channels, hidden: width of the pyramid and of the box head. proposals: regions kept from
    the first stage; regions: of a picture that the heads learn from in one step.
    """

    masks: bool | None = None
    trainable: bool = False
    short: tuple[int, ...] = (320,)
    long: int = 533
    steps: int = 2000
    batch: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: float = 4e-4
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup: int = 100
    milestones: tuple[float, ...] = ()
    clip: float = 35.0
    flip: bool = True
    anchor: float = 8.0
    channels: int = 256
    hidden: int = 1024
    proposals: int = 1000
    regions: int = 512
    device: str = "cpu"


_SCALES = tuple(range(480, 801, 32))  # mmdetection's and detectron2's multi-scale training, the last one to score
# Mugs' settings of optimizer and schedule (12 passes over COCO's 117,266 pictures with objects, 32 a step). The paper's
# detector is a Cascade Mask R-CNN on four inner layers; here it is Mask R-CNN on the last one.
MUGS = DetectionOptions(
    trainable=True, short=_SCALES, long=1333, steps=43_975, batch=32, rate=2e-4, layer_decay=0.8, warmup=500,
    milestones=(8 / 12, 11 / 12),
)  # fmt: skip
# DenseCL's and detectron2's Mask R-CNN R50-FPN 1x: 90,000 steps of 16. Its authors use batch norm over all GPUs in place of
# the kept statistics here.
DENSECL = DetectionOptions(
    trainable=True, short=(*range(640, 800, 32), 800), long=1333, steps=90_000, batch=16, optimizer="sgd", rate=0.02,
    weight_decay=1e-4, warmup=1000, milestones=(2 / 3, 8 / 9),
)  # fmt: skip


def run_detection(
    subject: Trainable,
    train: Coco | str | Path,
    query: Coco | str | Path,
    options: DetectionOptions | None = None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`detection_box_ap`, `..._ap50`, `..._ap75`, and `detection_mask_...` where outlines are learned, each 0 to 1.

    train, query: COCO-format sets of the same categories. Raises CocoError for a broken set, DetectionError if the loss
    is not finite.
    """
    options = options or DetectionOptions()
    train, query = (source if isinstance(source, Coco) else open_coco(source) for source in (train, query))
    labels_of([train, query])
    with seeded(seed):
        detector = build_detector(subject, train, options)
        learn(detector, subject, train, options, seed, progress)
        return score(detector, query, options, progress)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torchvision draws weights and samples from the global generators: they start from `seed`, and are put back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build_detector(subject: Trainable, train: Coco, options: DetectionOptions) -> FasterRCNN:
    """Faster R-CNN, or Mask R-CNN, for the set's classes. DetectionError where outlines are asked that it does not have."""
    masks = train.outlined if options.masks is None else options.masks
    if masks and not train.outlined:
        raise DetectionError("masks cannot be learned: some objects have no outline; say masks=False")
    try:
        pyramid = Pyramid(subject.backbone(), options.channels, trainable=options.trainable)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise DetectionError(f"a detector wants a backbone that takes images of any size: {error}") from error
    wide, classes = options.channels, len(train.classes) + 1
    anchors = AnchorGenerator(
        tuple((round(options.anchor * stride),) for stride in (*STRIDES, COARSEST)), (RATIOS,) * (len(STRIDES) + 1)
    )
    more: dict[str, Any] = {}
    if masks:
        more["mask_roi_pool"] = _pool(14)
        more["mask_head"] = MaskRCNNHeads(wide, (wide,) * 4, 1)
        more["mask_predictor"] = MaskRCNNPredictor(wide, wide, classes)
    detector = (MaskRCNN if masks else FasterRCNN)(
        pyramid,
        min_size=options.short,  # pyright: ignore[reportArgumentType]  # one of several, as it allows
        max_size=options.long,
        image_mean=list(subject.mean),
        image_std=list(subject.std),
        size_divisible=COARSEST,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=2 * options.proposals,
        rpn_post_nms_top_n_train=options.proposals,
        rpn_pre_nms_top_n_test=options.proposals,
        rpn_post_nms_top_n_test=options.proposals,
        box_batch_size_per_image=options.regions,
        box_roi_pool=_pool(7),
        box_head=TwoMLPHead(wide * 7**2, options.hidden),
        box_predictor=FastRCNNPredictor(options.hidden, classes),
        **more,
    )
    return detector.to(options.device)


def learn(
    detector: FasterRCNN,
    subject: Trainable,
    train: Coco,
    options: DetectionOptions,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; the loss of each step. Pictures without objects are passed over, as torchvision's own training does."""
    rows = [row for row, objects in enumerate(train.objects) if any(not one.crowd for one in objects)]
    if not rows:
        raise DetectionError("no picture to learn from has an object that is not a crowd")
    groups = _groups(detector, subject, options)
    if options.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, options))
    trained = [parameter for group in groups for parameter in group["params"]]
    draws, queue, losses = generator(f"{seed}/detection"), [], []
    detector.train()
    for step in range(options.steps):
        while len(queue) < options.batch:
            queue += [rows[place] for place in torch.randperm(len(rows), generator=draws).tolist()]
        batch, queue = queue[: options.batch], queue[options.batch :]
        flips = (torch.rand(len(batch), generator=draws) < (0.5 if options.flip else 0)).tolist()
        pairs = [example(train, row, flip, options.device) for row, flip in zip(batch, flips, strict=True)]
        images, targets = (list(part) for part in zip(*pairs, strict=True))
        loss = torch.stack(list(detector(images, targets).values())).sum()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise DetectionError(f"the loss is {losses[-1]} at step {step}; lower the rate ({options.rate:g})")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, options.steps, f"detection: learning, loss {losses[-1]:.2f}")
    return losses


@torch.no_grad()
def score(
    detector: FasterRCNN, query: Coco, options: DetectionOptions, progress: Progress | None = None
) -> dict[str, float]:
    """Average precision of boxes, and of masks where the detector gives them and the set knows them."""
    detector.eval()
    found: list[dict[str, Any]] = []
    for row in range(len(query)):
        answer = detector([_pixels(query, row, options.device)])[0]
        found += results(query, row, answer)
        if progress:
            progress(row + 1, len(query), "detection: scoring")
    kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"}
    if isinstance(detector, MaskRCNN) and query.outlined:
        kinds["mask"] = "segm"
    scores = {name: average_precision(query, found, kind) for name, kind in kinds.items()}
    return {f"detection_{name}_{what}": value for name, row in scores.items() for what, value in row.items()}


def rate_factor(step: int, options: DetectionOptions) -> float:
    """What the rate is multiplied by: linear warm-up, then milestones or a half cosine."""
    warm = min(1.0, (step + 1) / (options.warmup + 1))
    if options.milestones:
        return warm * 0.1 ** sum(step >= share * options.steps for share in options.milestones)
    return warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def example(train: Coco, row: int, flip: bool, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """A picture fp32 [3, H, W], 0 to 1, and its boxes [n, 4], labels [n] from 1 and masks uint8 [n, H, W], mirrored or not."""
    image = _pixels(train, row, device)
    high, wide = image.shape[1:]
    objects = [one for one in train.objects[row] if not one.crowd]
    boxes = torch.tensor([one.box for one in objects], dtype=torch.float32, device=device)
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, wide), boxes[:, 1::2].clamp(0, high)
    target = {"boxes": boxes, "labels": torch.tensor([1 + one.label for one in objects], device=device)}
    if train.outlined:
        masks = np.stack([train.instance_mask(row, one) for one in objects])
        target["masks"] = torch.from_numpy(masks).to(device)
    if flip:
        image, target["boxes"] = (
            image.flip(2),
            torch.stack([wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]], 1),
        )
        if "masks" in target:
            target["masks"] = target["masks"].flip(2)
    return image, target


def _pixels(source: Coco, row: int, device: str) -> Tensor:
    return torch.from_numpy(np.array(source.load(row), np.float32) / 255).permute(2, 0, 1).to(device)


def _groups(detector: FasterRCNN, subject: Trainable, options: DetectionOptions) -> list[dict[str, Any]]:
    """Parameters with their rates: the backbone's fall from the last block down; norms and biases decay nowhere in AdamW."""
    pyramid: Any = detector.backbone
    depths = subject.layers(pyramid.eye) if options.trainable else []
    parts = [(layer, options.layer_decay ** (len(depths) - depth)) for depth, layer in enumerate(depths)]
    inside = {id(parameter) for parameter in pyramid.eye.parameters()}
    parts.append(([parameter for parameter in detector.parameters() if id(parameter) not in inside], 1.0))
    groups = []
    for part, factor in parts:
        for plain in (False, True):
            some = [p for p in part if p.requires_grad and (options.optimizer == "adamw" and p.ndim < 2) == plain]
            if some:
                groups.append({"params": some, "lr": options.rate * factor} | ({"weight_decay": 0.0} if plain else {}))
    return groups


def _pool(side: int) -> MultiScaleRoIAlign:
    """Regions pooled at our strides, told, since torchvision guesses them from the first batch and keeps the guess."""
    pool = MultiScaleRoIAlign([str(number) for number in range(len(STRIDES))], side, 2)
    pool.scales = [1 / stride for stride in STRIDES]
    low, high = (int(math.log2(stride)) for stride in (STRIDES[0], STRIDES[-1]))
    pool.map_levels = initLevelMapper(low, high, canonical_scale=224, canonical_level=4)
    return pool
