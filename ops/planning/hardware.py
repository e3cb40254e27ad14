"""The machines that a run is planned for: what a GPU has, and how many of them are joined by what.

Figures are the vendors' data sheets', dense (no sparsity), one direction of a link: they are bounds, and what of them is
reached is an assumption of its own (speed.py). Memory is what the driver reports, a little less than what is printed
on the box.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...shards.errors import GristmillError, nearest

GB = 1e9
GIB = 2.0**30


class HardwareError(GristmillError):
    """Hardware that is unknown, or described by numbers that cannot be."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates a second: FLOPs with 16-bit inputs, FLOPs in fp32, bytes of its memory, bytes to its neighbours."""

    name: str
    memory: float  # bytes
    flops: float
    flops32: float
    bandwidth: float
    link: float
    network: float  # bytes a second of a node of such GPUs, all adapters together, as such nodes are sold
    decoders: float = 2000.0  # JPEGs of half a megapixel that it decodes a second, beside training


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80", 79.6 * GIB, 989e12, 67e12, 3350 * GB, 450 * GB, 400 * GB),
        Gpu("a100-80", 79.3 * GIB, 312e12, 19.5e12, 2039 * GB, 300 * GB, 200 * GB),
        Gpu("a100-40", 39.6 * GIB, 312e12, 19.5e12, 1555 * GB, 300 * GB, 100 * GB),
        Gpu("h200", 140.0 * GIB, 989e12, 67e12, 4800 * GB, 450 * GB, 400 * GB),
        Gpu("b200", 178.0 * GIB, 2250e12, 75e12, 8000 * GB, 900 * GB, 400 * GB),
        Gpu("l40s", 44.5 * GIB, 362e12, 91.6e12, 864 * GB, 32 * GB, 25 * GB),
        Gpu("v100-32", 31.7 * GIB, 125e12, 15.7e12, 900 * GB, 150 * GB, 12.5 * GB, 800.0),
    )
}
FIELDS = {"memory": GIB, "flops": 1e12, "flops32": 1e12, "bandwidth": GB, "link": GB, "network": GB, "decoders": 1.0}


@dataclass(frozen=True)
class Hardware:
    """`gpus` GPUs in nodes of `node` each."""

    gpu: Gpu
    gpus: int
    node: int = 8

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.node)

    @property
    def bus(self) -> float:
        """Bytes a second at which a ring over all GPUs goes round: the slowest way on it."""
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.gpu.network)


def hardware(text: str, gpus: int, node: int = 8, network: float | None = None) -> Hardware:
    """`h100-80`, or `custom memory=80,flops=989,bandwidth=3350,link=450`, or `h100-80 memory=60`: GiB, TFLOP/s, GB/s.

    network: GB/s of a node. Raises HardwareError, naming the nearest name, for what is not known.
    """
    if gpus < 1 or node < 1:
        raise HardwareError(f"{gpus} GPUs in nodes of {node}: a run wants one at least (--gpus, --node-gpus)")
    name, _, given = text.strip().partition(" ")
    changes = {}
    for part in filter(None, (piece.strip() for piece in given.split(","))):
        key, equals, value = part.partition("=")
        if key not in FIELDS or not equals:
            hint = nearest(key, sorted(FIELDS)) or f"known are {', '.join(FIELDS)}"
            raise HardwareError(f"--gpu: {part!r} is no field of a GPU: {hint}")
        try:
            changes[key] = float(value) * FIELDS[key]
        except ValueError as error:
            raise HardwareError(f"--gpu: {part!r} has no number behind the equals sign") from error
        if not changes[key] > 0:
            raise HardwareError(f"--gpu: {part!r} must be above 0")
    if name == "custom":
        lacking = [key for key in ("memory", "flops", "bandwidth", "link") if key not in changes]
        if lacking:
            raise HardwareError(
                f"--gpu custom: give {', '.join(f'{key}=' for key in lacking)} as well (GiB, TFLOP/s, GB/s)"
            )
        gpu = Gpu("custom", 1.0, 1.0, changes["flops"] / 2, 1.0, 1.0, changes["link"])
    elif name in GPUS:
        gpu = GPUS[name]
    else:
        hint = nearest(name, sorted(GPUS))
        raise HardwareError(f"--gpu: {name!r} is not known: {hint}known are {', '.join(GPUS)}, custom")
    if network is not None:
        if not network > 0:
            raise HardwareError(f"--network: {network} GB/s must be above 0")
        changes["network"] = network * GB
    return Hardware(replace(gpu, **changes), gpus, node)
