"""Draws as the DALI graph reads them: one packed array of numbers a batch, all arithmetic on boxes and maps done here.

A strong crop is prepared as a chain of at most four steps: cut a window of the image (what lies outside of it is the
fill), one or two operations on pixels at the source's scale, more fill around it, one resize. Operations on places
become one warp after the resize, at the crop's scale, as warps are by far the slowest operator that DALI has on a CPU
(70 ns a pixel): the resized window is a little larger than the crop, and an affine map leads from the crop into it.
Where a warp comes first, the fill is in the window before the operation on pixels and is treated like pixels; where it
comes second, fill is added after. reference.py says what the result has to be, docs/views.md how close it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..boxes import chain, crop_maps, shifted
from ..draws import COLUMNS, Draws, Plan
from ..strong import GEOMETRIC, NUMBER, OPERATIONS
from .colour import colour_matrices

Floats = NDArray[np.float64]

# Columns of every crop: the box in what is resized, (y, x) each, mirrored if it runs backwards; blur; colours.
START, END, SIGMA, THRESHOLD, COLOURED, COLOURS = slice(0, 2), slice(2, 4), 4, 5, 6, slice(7, 19)
WEAK_WIDTH = 19
# Of strong crops: whether there are operations; what is cut, as (y, x, h, w) of the image; whether of the equalised one.
CHANGED, WINDOW, FROM, WINDOW_SHAPE, EQUALIZED = 19, slice(20, 24), slice(20, 22), slice(22, 24), 24
PADDED, PAD_FROM, PAD_SHAPE = 25, slice(26, 28), slice(28, 30)  # of the window; reaches beyond it
SIZE, WARPED, MATRIX = slice(30, 32), 32, slice(33, 39)  # (h, w) after resizing; crop to resized pixels, edges at 0
KINDS, ARGUMENTS = (39, 40), (41, 53)  # of both operations on pixels: which, and the first of its 12 numbers
ERASED, HOLE, HOLE_SHAPE, NOISE, PLACE = 65, slice(66, 68), slice(68, 70), slice(70, 72), slice(72, 74)
STRONG_WIDTH = 74

# What the graph can do to pixels; several of the 15 operations share a form.
LINEAR, POSTERIZE, SOLARIZE, ADD, STATISTICAL, MIX, SHARPEN, EQUALIZE = range(1, 9)
_FORMS = {
    **{"AutoContrast": STATISTICAL, "Contrast": STATISTICAL, "Equalize": EQUALIZE, "Invert": LINEAR},
    **{"Posterize": POSTERIZE, "Solarize": SOLARIZE, "SolarizeAdd": ADD, "Color": MIX, "Brightness": LINEAR},
    "Sharpness": SHARPEN,
}
_FORM = np.array([0, *(_FORMS.get(name, 0) for name in OPERATIONS)])
_IS_PLACE = np.array([number in GEOMETRIC for number in range(len(OPERATIONS) + 1)])
# PIL truncates where DALI rounds: a value is moved down by a half, less what keeps whole numbers safe.
TRUNCATE = -0.5 + 2.0**-10
LUMA = np.array([19595, 38470, 7471]) / 65536  # PIL's
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
_SAME = np.zeros((3, 3))
_SAME[1, 1] = 1


def pack(plan: Plan, draws: Draws) -> NDArray[np.float32]:
    """float32 [B, V, WEAK_WIDTH], or [B, V, STRONG_WIDTH] if the plan has strong crops."""
    any_strong = bool(plan.strong.any())
    packed = np.zeros((*draws.params.shape[:2], STRONG_WIDTH if any_strong else WEAK_WIDTH), np.float32)
    matrices = colour_matrices(draws.params)
    packed[..., COLOURS] = matrices.reshape(*matrices.shape[:2], 12)
    packed[..., COLOURED] = (matrices != np.eye(3, 4)).any((-1, -2))
    packed[..., SIGMA], packed[..., THRESHOLD] = draws.column("sigma"), draws.column("solarize")
    _put_box(packed, draws.params[..., :4].astype(np.float64), draws.column("flip") > 0)
    if any_strong:
        packed[..., SIZE] = plan.size[:, None]
        changed = (draws.column("op1") > 0) | (draws.column("op2") > 0)
        if changed.any():
            _Changed(plan, draws, *np.nonzero(changed)).put(packed)
        _put_erased(packed, draws)
    return packed


def _put_box(packed: NDArray[np.floating], box: Floats, flip: NDArray[np.bool_]) -> None:
    """Box [..., 4] as (x0, y0, x1, y1) into START and END."""
    packed[..., 0], packed[..., 1] = box[..., 1], np.where(flip, box[..., 2], box[..., 0])
    packed[..., 2], packed[..., 3] = box[..., 3], np.where(flip, box[..., 0], box[..., 2])


def _put_erased(packed: NDArray[np.float32], draws: Draws) -> None:
    x0, y0, x1, y1, x, y = (draws.params[..., COLUMNS.index("erase_x0") + n] for n in range(6))
    packed[..., ERASED] = (x1 > x0) & (y1 > y0)
    packed[..., HOLE] = np.stack([y0, x0], -1)
    packed[..., HOLE_SHAPE] = np.stack([y1 - y0, x1 - x0], -1)
    packed[..., NOISE] = np.stack([y, x], -1)
    packed[..., PLACE] = -packed[..., HOLE]


class _Changed:
    """The crops that have operations, m of them: rows of what is to be packed."""

    def __init__(self, plan: Plan, draws: Draws, image: NDArray[np.intp], crop: NDArray[np.intp]) -> None:
        at = image, crop
        self.at = at
        names = ("op1", "arg1", "op2", "arg2")
        op1, arg1, op2, arg2 = (draws.column(name)[at].astype(np.float64) for name in names)
        op1, op2 = op1.astype(int), op2.astype(int)
        self.flip = draws.column("flip")[at] > 0
        self.box = draws.params[at][:, :4].astype(np.float64)
        self.image_size = draws.sizes[image].astype(np.float64)  # (width, height)
        self.crop_size = plan.size[crop]
        cubic = np.array([plan.views[owner].filter == "bicubic" for owner in plan.owner])[crop]
        self.radius = np.where(cubic, 2.0, 1.0)[:, None]  # of the filter
        # The chain: the first operation on pixels, and the second if there are two of them.
        pixels1, pixels2 = _FORM[op1] > 0, _FORM[op2] > 0
        self.first = np.where(pixels1, op1, np.where(pixels2, op2, 0))
        self.first_argument = np.where(pixels1, arg1, arg2)
        self.second = np.where(pixels1 & pixels2, op2, 0)
        self.second_argument = arg2
        self.warped = (_IS_PLACE[op1] | _IS_PLACE[op2]) & (np.abs(draws.warp[at] - np.eye(2, 3)) > 1e-9).any((-1, -2))
        self.fill_last = self.warped & pixels1
        self.moved = self.warped & (draws.warp[at][..., :2] == np.eye(2)).all((-1, -2))  # and neither turned nor bent
        self.maps = shifted(_rebuilt(self.box, self.flip, self.crop_size, draws.warp[at]), 0.5)

    def put(self, packed: NDArray[np.float32]) -> None:
        rows = np.zeros((len(self.first), packed.shape[-1]))
        rows[:, :WEAK_WIDTH] = packed[self.at][:, :WEAK_WIDTH]
        rows[:, CHANGED] = 1
        rows[:, SIZE] = self.crop_size[:, None]
        forms = _FORM[self.first].copy(), _FORM[self.second]
        rows[:, EQUALIZED] = forms[0] == EQUALIZE
        forms[0][forms[0] == EQUALIZE] = 0
        for slot, (operation, argument) in enumerate(
            [(self.first, self.first_argument), (self.second, self.second_argument)]
        ):
            rows[:, KINDS[slot]] = forms[slot]
            first = ARGUMENTS[slot]
            rows[:, first : first + 12] = _numbers(operation, argument)
        self._put_places(rows)
        packed[self.at] = rows

    def _put_places(self, rows: Floats) -> None:
        """What is cut, how large it is resized, and how the crop lies in that."""
        zero = np.zeros_like(self.image_size)
        # As they are: the box and what the filter sees around it.
        step = (self.box[:, 2:] - self.box[:, :2]) / self.crop_size[:, None]
        more = np.floor(self.radius * np.maximum(step, 1)) + 2
        low, high = np.maximum(self.box[:, :2] - more, 0), np.minimum(self.box[:, 2:] + more, self.image_size)
        # Statistics of what one operation made are those of the whole image.
        whole = np.isin(_FORM[self.second], (STATISTICAL, EQUALIZE))[:, None]
        low, high = np.where(whole, zero, low), np.where(whole, self.image_size, high)
        _put_box(rows, self.box - np.concatenate([low, low], -1), self.flip)

        # Warped: the bounding box of where the crop's pixels come from, no further outside of the image than is seen.
        step = np.sqrt((self.maps[..., :2] ** 2).sum(-1))  # source pixels a crop pixel, along the source's axes
        ends = self.maps[..., :2] * self.crop_size[:, None, None]
        seen = np.ceil((self.radius + 2) * np.maximum(step, 1)) + 1
        least = np.floor(self.maps[..., 2] + np.minimum(ends, 0).sum(-1)) - seen
        most = np.ceil(self.maps[..., 2] + np.maximum(ends, 0).sum(-1)) + seen
        moved = self.moved[:, None]  # a box that reaches out of what is resized would be the end of the process
        least = np.where(moved, least, least.clip(-seen, self.image_size + seen - 1))
        most = np.where(moved, most, np.minimum(np.maximum(most, least + 1), self.image_size + seen))
        inner_low = least.clip(0, self.image_size - 1)
        inner_high = np.maximum(most.clip(0, self.image_size), inner_low + 1)
        resized = np.maximum(np.rint((most - least) / step), 1)
        scale = resized / (most - least)
        matrix = self.maps.copy()
        matrix[..., 2] -= least
        matrix *= scale[..., None]

        warped, last = self.warped[:, None], self.fill_last[:, None]
        low = np.where(warped, np.where(last, inner_low, least), low)
        high = np.where(warped, np.where(last, inner_high, most), high)
        rows[:, FROM], rows[:, WINDOW_SHAPE] = low[:, ::-1], (high - low)[:, ::-1]
        rows[:, PADDED] = self.fill_last
        rows[:, PAD_FROM], rows[:, PAD_SHAPE] = (least - low)[:, ::-1], (most - least)[:, ::-1]
        rows[:, WARPED] = self.warped & ~self.moved
        rows[:, MATRIX] = matrix.reshape(-1, 6)
        # What is only moved is cut at another place, whole pixels or not; what is turned is resized as a whole.
        start = self.maps[..., 2] - least
        end = start + self.maps[..., [0, 1], [0, 1]] * self.crop_size[:, None]
        turned = warped & ~moved
        rows[:, SIZE] = np.where(turned, resized[:, ::-1], rows[:, SIZE])
        rows[:, START] = np.where(turned, 0, np.where(moved, start[:, ::-1], rows[:, START]))
        rows[:, END] = np.where(turned, (most - least)[:, ::-1], np.where(moved, end[:, ::-1], rows[:, END]))


def _rebuilt(box: Floats, flip: NDArray[np.bool_], size: Floats, warp: Floats) -> Floats:
    """Draws.geometry of these crops before it was rounded to float32: [m, 2, 3]."""
    return chain(warp, crop_maps(size, box[None], flip[None])[0])


def _numbers(operation: NDArray[np.int64], argument: Floats) -> Floats:
    """What the forms read: float64 [m, 12]. See strong_graph.py for each one's."""
    numbers = np.zeros((len(operation), 12))

    def put(name: str, *columns: float | Floats) -> None:
        rows = operation == NUMBER[name]
        for index, column in enumerate(columns):
            numbers[rows, index] = column[rows] if isinstance(column, np.ndarray) else column

    put("Invert", -1.0, 1.0)
    put("Brightness", argument, TRUNCATE / 255)
    kept = np.where(operation == NUMBER["Posterize"], argument, 0)
    put("Posterize", 256 - 2.0 ** (8 - kept))
    put("Solarize", argument)
    put("SolarizeAdd", argument)
    put("AutoContrast", 1.0, 0.0)
    put("Contrast", 0.0, argument)
    rows = operation == NUMBER["Color"]
    factor = argument[rows, None, None]
    mix = factor * np.eye(3) + (1 - factor) * LUMA
    numbers[rows] = np.concatenate([mix, np.full((len(mix), 3, 1), TRUNCATE)], -1).reshape(-1, 12)
    rows = operation == NUMBER["Sharpness"]
    factor = argument[rows, None, None]
    numbers[rows, :9] = (factor * _SAME + (1 - factor) * _SMOOTH).reshape(-1, 9)
    return numbers
