"""The DALI graph of a plan: decoded images and packed numbers in, a view's crops out. The same for CPU and GPU.

Order: what strong crops need done to their source (strong_graph.py) -> cut and resize, mirrored by a box that runs
backwards -> warp where drawn -> blur where drawn -> colours where drawn, one matrix a crop (colour.py) -> cut to
0 ... 255 -> solarise where drawn -> erase where drawn -> normalise; float32 from the resize on. Blur comes before
colours, not after as in DINO: they commute but for what is cut off. All numbers of a batch enter as one packed array
and are sliced as vectors, since each slice costs its own operator. Filters widen with the scale: a triangle, or the
cubic with a = -0.5, both PIL's and torchvision's. reference.py says plainly what this graph computes.
"""

from __future__ import annotations

from typing import Any, Literal

from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def

from ..draws import NEVER, Plan
from . import packed as at
from .colour import MEAN, STD
from .strong_graph import erased, here, noise, prepared, statistics, upright

Device = Literal["cpu", "gpu"]
Node = Any  # see strong_graph.py


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
def multi_crop(plan: Plan, device: Device, half: bool = False) -> Any:
    """The graph: decoded image and packed numbers in, [n, 3, H, W] a sample out for each view in the recipe's order."""
    image: Node = fn.external_source(name="image", device=device, dtype=types.UINT8, ndim=3, layout="HWC")
    packed: Node = fn.external_source(name="packed", dtype=types.FLOAT, ndim=2)
    able = [bool(form and form.operations) for form in (plan.views[owner].strong for owner in plan.owner)]
    of_image: Any = statistics(image, packed[0], device) if any(able) else None
    tiles: dict[bool, Node] = {}
    outputs: list[Node] = []
    for view in plan.views:
        columns = plan.columns[view.name]
        crops = []
        for v in range(columns.start, columns.stop):
            row: Node = packed[v]
            source = image
            if able[v]:
                changed = row[at.CHANGED]
                if changed > 0:
                    source = prepared(image, row, of_image, device)
            crop: Node = fn.resize(
                source,
                size=row[at.SIZE] if able[v] else [view.size, view.size],
                roi_start=row[at.START],
                roi_end=row[at.END],
                interp_type=types.INTERP_CUBIC if view.filter == "bicubic" else types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
            if able[v]:
                warped = row[at.WARPED]
                if warped > 0:
                    matrix = fn.reshape(row[at.MATRIX], shape=[2, 3])
                    crop = fn.warp_affine(
                        crop, matrix=matrix, size=[view.size, view.size], interp_type=types.INTERP_LINEAR
                    )
            crop = _finished(crop, row, plan, v, device)
            if view.strong is not None and view.strong.erase > 0:
                raw = view.strong.erase_noise == "raw"
                if raw not in tiles:
                    tiles[raw] = noise(raw, device)
                tile = tiles[raw]
                if row[at.ERASED] > 0:
                    crop = erased(crop, row, tile, view.size)
            crops.append(crop)
        normal = fn.crop_mirror_normalize(
            fn.reshape(fn.stack(*crops), layout="FHWC"),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            output_layout="FCHW",
            dtype=types.FLOAT16 if half else types.FLOAT,
        )
        outputs.append(normal)
    return tuple(outputs)


def _finished(crop: Node, row: Node, plan: Plan, v: int, device: Device) -> Node:
    """A crop after the resize, float [H, W, 3]: blurred, coloured, cut to 0 ... 255, solarised.

    What can never be drawn is left out of the graph, what is always drawn is not asked for.
    """
    strong = bool(plan.strong[v])
    forms = [form for form in (plan.weak, plan.strong_form if strong else None) if form is not None]
    if plan.views[plan.owner[v]].filter == "bicubic":  # which overshoots
        crop = upright(math.clamp(crop, 0.0, 255.0))
    if all(form.blur[v] == 1 for form in forms):
        crop = fn.gaussian_blur(crop, sigma=row[at.SIGMA])
    elif any(form.blur[v] > 0 for form in forms):
        sigma = row[at.SIGMA]
        if sigma > 0:
            crop = fn.gaussian_blur(crop, sigma=sigma)
    if any(form.jitter[v] > 0 or form.grey[v] > 0 for form in forms):
        coloured = row[at.COLOURED]
        if coloured > 0:
            crop = fn.coord_transform(crop, MT=fn.reshape(row[at.COLOURS], shape=[3, 4]))
            crop = upright(math.clamp(crop, 0.0, 255.0))
    if any(form.solarize[v] > 0 for form in forms):
        threshold = row[at.THRESHOLD]
        if threshold < NEVER:
            crop = upright(crop + (crop >= here(threshold, device)) * (255.0 - 2.0 * crop))
    return crop
