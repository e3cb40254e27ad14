"""The exponential moving average that makes the teacher: teacher <- momentum * teacher + (1 - momentum) * student.

Plain arithmetic on two lists of tensors, so that it serves whole parameters and ZeRO's flat shards alike: every element
depends on its own pair only. Float32 is insisted on: at momentum .9999 a bf16 teacher would stop moving.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(pairs: tuple[list[Tensor], list[Tensor]], momentum: float) -> None:
    """Move each teacher tensor towards its student's, in place. pairs: (student tensors, teacher tensors), as `pairs` gives.

    Raises ValueError for a momentum outside [0, 1] or tensors that are not float32.
    """
    student, teacher = pairs
    _check(student, teacher, momentum)
    if teacher:
        # As teacher + (1 - momentum) * (student - teacher): one pass over memory instead of two, half the rounding, and a
        # teacher that equals its student stays so exactly.
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def ema_update_reference(pairs: tuple[list[Tensor], list[Tensor]], momentum: float) -> None:
    """`ema_update` one tensor at a time."""
    student, teacher = pairs
    _check(student, teacher, momentum)
    for source, target in zip(student, teacher, strict=True):
        target.copy_(momentum * target + (1.0 - momentum) * source)


def pairs(student: nn.Module, teacher: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both in the teacher's order, matched by name; what only the student has (its predictors) is left out.

    Raises ValueError when the teacher has a parameter that the student lacks, or one of another shape.
    """
    sources = dict(student.named_parameters())
    matched: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, target in teacher.named_parameters():
        if name not in sources or sources[name].shape != target.shape:
            found = tuple(sources[name].shape) if name in sources else "none"
            raise ValueError(
                f"teacher parameter {name} {tuple(target.shape)}: the student's is {found}; build both from one recipe"
            )
        matched[0].append(sources[name].detach())
        matched[1].append(target.detach())
    return matched


def _check(student: list[Tensor], teacher: list[Tensor], momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum {momentum} is not in [0, 1]")
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student tensors for {len(teacher)} of the teacher; take both from `pairs`")
    if other := {str(t.dtype) for t in (*student, *teacher)} - {"torch.float32"}:
        raise ValueError(f"the EMA is kept in float32, got {sorted(other)}; pass the fp32 master weights")
