"""What strong forms add to the crops of one image: another image to cut from, and noise in a box at the end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..draws import COLUMNS, Draws, Plan
from .colour import MEAN, STD
from .noise import noise_tile
from .strengthen import Rect, Room, Strengthened

_OP1, _ARG1, _OP2, _ARG2 = (COLUMNS.index(name) for name in ("op1", "arg1", "op2", "arg2"))
_ERASED = slice(COLUMNS.index("erase_x0"), COLUMNS.index("erase_y1") + 1)
_NOISE = slice(COLUMNS.index("noise_x"), COLUMNS.index("noise_y") + 1)

Source = tuple[NDArray[np.uint8], int, int, NDArray[np.float64]]  # rows and slack, width, height, box: see kernels.cut


class StrongForms:
    """The crops of the image in `slot`, whose decoded rows are `pixels`. `changed` [V]: cut of another image.

    room: with kernels.SLACK bytes of slack, of the thread.
    """

    def __init__(self, plan: Plan, draws: Draws, slot: int, pixels: NDArray[np.uint8], room: Room) -> None:
        self._plan, self._params = plan, draws.params[slot]
        self.changed = ((self._params[:, _OP1] > 0) | (self._params[:, _OP2] > 0)).tolist()
        self._warp = draws.warp[slot] if any(self.changed) else None
        width, height = draws.sizes[slot].tolist()
        self._image = Strengthened(pixels[: height * width * 3].reshape(height, width, 3), room)

    def source(self, v: int, size: int, cubic: bool) -> Source:
        """What crop v is cut of: the part of the strengthened image that it and its filter see, until the next one."""
        p = self._params[v]
        box = p[:4].astype(np.float64)
        seen = _seen(box, size, 2 if cubic else 1, self._image.whole)
        assert self._warp is not None
        chain = [(int(p[_OP1]), float(p[_ARG1])), (int(p[_OP2]), float(p[_ARG2]))]
        part = self._image.part(chain, self._warp[v], seen)
        return part.memory, part.width, part.height, box - (seen[0], seen[1], seen[0], seen[1])

    def erase(self, v: int, out: NDArray[np.float32]) -> None:
        """Noise in the drawn box of a normalised crop, float32 [3, H, W]; none if none is drawn."""
        x0, y0, x1, y1 = self._params[v, _ERASED].astype(int).tolist()
        if x1 > x0 and y1 > y0:
            x, y = self._params[v, _NOISE].astype(int).tolist()
            noise = noise_tile()[y : y + y1 - y0, x : x + x1 - x0]
            strong = self._plan.views[self._plan.owner[v]].strong
            if strong is None or strong.erase_noise == "raw":  # in place of values in 0 ... 1
                noise = ((noise - np.array(MEAN)) / STD).astype(np.float32)
            out[:, y0:y1, x0:x1] = noise.transpose(2, 0, 1)


def _seen(box: NDArray[np.float64], size: int, support: int, whole: Rect) -> Rect:
    """The box and what a filter sees around it. Beyond the image's edges there is nothing, elsewhere room to spare."""
    x0, y0, x1, y1 = box.astype(int).tolist()
    more_x = int(support * max((x1 - x0) / size, 1)) + 2
    more_y = int(support * max((y1 - y0) / size, 1)) + 2
    return max(x0 - more_x, 0), max(y0 - more_y, 0), min(x1 + more_x, whole[2]), min(y1 + more_y, whole[3])
