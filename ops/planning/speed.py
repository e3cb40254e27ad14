"""How long a step takes: a roofline of products, memory traffic, launches and what is sent, each assumption a number.

Products run at a share of the GPU's peak, all other operators at a share of its memory's bandwidth, both as the step's
own operators ask (trace.py); a host that launches them one by one is a bound of its own. What ranks send each other goes
round a ring, beside the backward only where DeepSpeed's settings let it. These are estimates: a GPU's share of its peak
is known when it was measured, and then it goes in here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from ...shards.errors import GristmillError, nearest
from ..recipe import Recipe
from .hardware import Hardware
from .parameters import Weights
from .states import States
from .trace import Trace


class AssumptionError(GristmillError):
    """An assumption that is not known, or no number that it can be."""


@dataclass(frozen=True)
class Assumptions:
    """What the estimate goes by; any may be replaced (`--assume efficiency=0.5`)."""

    efficiency: float = 0.5  # share of the peak FLOP/s that products reach
    bandwidth: float = 0.75  # share of the memory's bandwidth that other operators reach
    launch: float = 3e-5  # seconds that the host takes for one operator, with autograd and its hooks
    wire: float = 0.75  # share of links and network that collectives reach
    overlap: float = 0.5  # share of what is sent that hides behind the backward, where it may
    reserve: float = 2.0  # GiB for the driver, the communication library and workspaces
    fragments: float = 0.05  # share of the memory that the allocator cannot use
    pixels: float = 500e3  # of an image, on average
    bytes: float = 110e3  # of an image file, on average (ImageNet-1k's)
    crops: float = 15e3  # strong crops that DALI makes on a GPU a second, decoding included
    core: float = 120.0  # images of 14 crops that a CPU core decodes and cuts a second (docs/views.md: 96 to 143)
    readers: float = 1500.0  # images that one reader thread fetches a second from a local disk

    def replaced(self, given: list[str]) -> Assumptions:
        """With `name=number` in place of the defaults. Raises AssumptionError."""
        known, changes = {entry.name for entry in fields(self)}, {}
        for text in given:
            name, equals, value = text.partition("=")
            if name not in known or not equals:
                raise AssumptionError(
                    f"--assume {text}: {nearest(name, sorted(known))}known are {', '.join(sorted(known))}"
                )
            try:
                changes[name] = float(value)
            except ValueError as error:
                raise AssumptionError(f"--assume {text}: {value!r} is no number") from error
            if changes[name] < 0 or (name not in ("overlap", "reserve", "fragments", "launch") and not changes[name]):
                raise AssumptionError(f"--assume {text}: it must be above 0")
            if name in ("efficiency", "bandwidth", "wire", "overlap", "fragments") and changes[name] > 1:
                raise AssumptionError(f"--assume {text}: it is a share, 1 at most")
        return replace(self, **changes)

    def dump(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """Of one step. `seconds` by cause add up to `step`; `sending` is what of it is not hidden."""

    step: float
    seconds: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0  # executed on one rank
    model_flops: float = 0.0  # of one image: forward and backward of the student, forward of the teacher
    sent: dict[str, float] = field(default_factory=dict)  # bytes a rank and step, as they go over its links
    images: float = 0.0  # a second, all ranks
    utilisation: float = 0.0  # model FLOPs over the peak


def speed(
    recipe: Recipe,
    hardware: Hardware,
    trace: Trace,
    states: States,
    weights: Weights,
    assumed: Assumptions,
    stage: int,
    model_flops: float,
) -> Speed:
    """The estimate for one step of the whole run's batch."""
    gpu, world, parts = hardware.gpu, hardware.gpus, recipe.engine.accumulate
    peak = gpu.flops32 if recipe.precision == "fp32" else gpu.flops
    products = parts * trace.all_flops / (peak * assumed.efficiency)
    traffic = parts * trace.traffic / (gpu.bandwidth * assumed.bandwidth)
    share = 1 if stage == 0 else 1 / world
    moments = 2 if recipe.optimizer.name == "adamw" else 1
    # Weights, gradients and moments are read, weights and moments written; the average reads two and writes one.
    update = 4.0 * (weights.trained * (3 + 2 * moments) + 3 * weights.averaged) * share
    update /= gpu.bandwidth * assumed.bandwidth
    waiting = max(0.0, parts * trace.kernels * assumed.launch - products - traffic)
    rounds = (world - 1) / world
    factor = {"all-reduce": 2 * rounds, "all-gather": rounds, "reduce-scatter": rounds}
    sent = {name: size * factor[name] for name, size in states.sent.items()}
    if stage == 3 and parts > 1:  # weights are gathered and gradients scattered for each micro-batch
        sent = {name: size * parts for name, size in sent.items()}
    wire = sum(sent.values()) / (hardware.bus * assumed.wire)
    hidden = min(wire * assumed.overlap, 0.66 * (products + traffic)) if states.overlap else 0.0
    seconds = {
        "products": products,
        "other operators": traffic,
        "launches": waiting,
        "optimizer, EMA": update,
        "sending": wire - hidden,
    }
    step = sum(seconds.values())
    images = recipe.batch / step
    reached = images * model_flops / (peak * world)
    return Speed(step, seconds, parts * trace.all_flops, model_flops, sent, images, reached)
