"""The DALI graph of a view: for each crop the decoded image that it is cut of and its packed numbers in, the crop out.

Crops are the graph's samples, so that it has each operator once, however many crops a view has: on a GPU an operator
costs tens of microseconds whatever it does, and a graph of all crops side by side would have thousands of them.

Order: what strong crops need done to their source (strong_graph.py) -> cut and resize, mirrored by a box that runs
backwards -> warp where drawn -> blur where drawn -> colours where drawn, one matrix a crop (colour.py) -> cut to
0 ... 255 -> solarise where drawn -> erase where drawn -> normalise; float32 from the resize on. Blur comes before
colours, not after as in DINO: they commute but for what is cut off. All numbers of a crop enter as one packed row
and are sliced as vectors, since each slice costs its own operator. Filters widen with the scale: a triangle, or the
cubic with a = -0.5, both PIL's and torchvision's. reference.py says plainly what this graph computes.
"""

from __future__ import annotations

from typing import Any, Literal

from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def

from ..draws import NEVER, Plan
from ..views import View
from . import packed as at
from .colour import MEAN, STD
from .strong_graph import erased, here, noise, prepared, upright

Device = Literal["cpu", "gpu"]
Node = Any  # see strong_graph.py


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
def crops_of(plan: Plan, view: View, device: Device, half: bool = False) -> Any:
    """The graph: image and row of packed numbers in, normalised crop [3, H, W] out."""
    # Several crops are cut of one image, which is not copied for each.
    image: Node = fn.external_source(name="image", device=device, dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
    row: Node = fn.external_source(name="packed", dtype=types.FLOAT, ndim=1)
    strong = view.strong
    able = bool(strong and strong.operations)
    source = image
    if able:
        changed = row[at.CHANGED]
        if changed > 0:
            source = prepared(image, row, device)
    crop: Node = fn.resize(
        source,
        size=row[at.SIZE] if able else [view.size, view.size],
        roi_start=row[at.START],
        roi_end=row[at.END],
        interp_type=types.INTERP_CUBIC if view.filter == "bicubic" else types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    if able:
        warped = row[at.WARPED]
        if warped > 0:
            matrix = fn.reshape(row[at.MATRIX], shape=[2, 3])
            crop = fn.warp_affine(crop, matrix=matrix, size=[view.size, view.size], interp_type=types.INTERP_LINEAR)
    crop = _finished(crop, row, plan, view, device)
    if strong is not None and strong.erase > 0:
        tile = noise(strong.erase_noise == "raw", device)
        if row[at.ERASED] > 0:
            crop = erased(crop, row, tile, view.size)
    return fn.crop_mirror_normalize(
        crop,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        output_layout="CHW",
        dtype=types.FLOAT16 if half else types.FLOAT,
    )


def _finished(crop: Node, row: Node, plan: Plan, view: View, device: Device) -> Node:
    """A crop after the resize, float [H, W, 3]: blurred, coloured, cut to 0 ... 255, solarised.

    What can never be drawn is left out of the graph, what is always drawn is not asked for.
    """
    columns = plan.columns[view.name]
    forms = [
        (form, v)
        for v in range(columns.start, columns.stop)
        for form in (plan.weak, plan.strong_form if plan.strong[v] else None)
        if form is not None
    ]
    if view.filter == "bicubic":  # which overshoots
        crop = upright(math.clamp(crop, 0.0, 255.0))
    if all(form.blur[v] == 1 for form, v in forms):
        crop = fn.gaussian_blur(crop, sigma=row[at.SIGMA])
    elif any(form.blur[v] > 0 for form, v in forms):
        sigma = row[at.SIGMA]
        if sigma > 0:
            crop = fn.gaussian_blur(crop, sigma=sigma)
    if any(form.jitter[v] > 0 or form.grey[v] > 0 for form, v in forms):
        coloured = row[at.COLOURED]
        if coloured > 0:
            crop = fn.coord_transform(crop, MT=fn.reshape(row[at.COLOURS], shape=[3, 4]))
            crop = upright(math.clamp(crop, 0.0, 255.0))
    if any(form.solarize[v] > 0 for form, v in forms):
        threshold = row[at.THRESHOLD]
        if threshold < NEVER:
            crop = upright(crop + (crop >= here(threshold, device)) * (255.0 - 2.0 * crop))
    return crop
