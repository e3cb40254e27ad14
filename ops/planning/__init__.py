"""`gristmill plan`: what a recipe needs on a machine, before either is touched.

    recipe + machine -> weights, states of each ZeRO stage, activations -> memory -> fits, or what would
                     -> FLOPs, traffic, bytes sent -> time of a step -> days; storage, decoders, host

Nothing here is a formula where the code itself can be asked: networks are built on torch's meta device, and a step of
them runs on tensors without memory (trace.py). What is a formula, because only DeepSpeed knows, is in states.py.
"""

from .fitting import Judged, PlanError, Setting, judge
from .hardware import GPUS, Hardware, HardwareError, hardware
from .report import Plan, plan
from .speed import AssumptionError, Assumptions
from .trace import Trace, traced

__all__ = [
    "GPUS",
    "AssumptionError",
    "Assumptions",
    "Hardware",
    "HardwareError",
    "Judged",
    "Plan",
    "PlanError",
    "Setting",
    "Trace",
    "hardware",
    "judge",
    "plan",
    "traced",
]
