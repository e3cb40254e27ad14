"""Average precision of detections, by pycocotools' own COCOeval: what papers report, not something like it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .coco import Coco, coco_masks, run_lengths, silent


def average_precision(truth: Coco, found: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"]) -> dict[str, float]:
    """`ap` (mean over overlaps .5 to .95), `ap50` and `ap75`, each 0 to 1, of detections in COCO's result format.

    No detection at all scores 0. Raises CocoError without pycocotools.
    """
    coco_masks()
    from pycocotools.cocoeval import COCOeval

    known = _index(truth)
    if not found:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    answer = silent(known.loadRes, [dict(one) for one in found])
    judge = COCOeval(known, answer, kind)
    for step in (judge.evaluate, judge.accumulate, judge.summarize):
        silent(step)
    return {name: max(0.0, float(judge.stats[place])) for place, name in enumerate(("ap", "ap50", "ap75"))}


def results(truth: Coco, row: int, found: dict[str, Tensor]) -> Iterable[dict[str, Any]]:
    """A torchvision detector's answer for a picture, in COCO's result format; labels count from 1."""
    masks = found.get("masks")
    for place, (box, label, score) in enumerate(
        zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ):
        left, top, right, bottom = box
        one = {
            "image_id": truth.pictures[row].number,
            "category_id": truth.categories[label - 1],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        if masks is not None:
            pixels = (masks[place, 0] > 0.5).to("cpu").numpy().astype(np.uint8)
            one["segmentation"] = coco_masks().encode(np.asfortranarray(pixels))
        yield one


def _index(truth: Coco) -> Any:
    """The set as pycocotools holds it; numbers of annotations start at 1, since COCOeval takes 0 for no match."""
    from pycocotools.coco import COCO

    annotations = []
    for picture, row in zip(truth.pictures, truth.objects, strict=True):
        for one in row:
            left, top, right, bottom = one.box
            entry = {
                "id": len(annotations) + 1,
                "image_id": picture.number,
                "category_id": truth.categories[one.label],
                "bbox": [left, top, right - left, bottom - top],
                "area": one.area,
                "iscrowd": int(one.crowd),
            }
            if one.outline is not None:
                entry["segmentation"] = run_lengths(one.outline, picture.height, picture.width)
            annotations.append(entry)
    known = COCO()
    known.dataset = {
        "info": {},
        "images": [{"id": each.number, "width": each.width, "height": each.height} for each in truth.pictures],
        "annotations": annotations,
        "categories": [{"id": number} for number in truth.categories],
    }
    silent(known.createIndex)
    return known
