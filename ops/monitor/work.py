"""How much work a step is for one rank: tokens that its student is shown, and FLOPs that its networks need for them.

Both are known before the first step but for one thing: how many patches an objective hides differs from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...models.flops import Asked, tokens, training_flops

if TYPE_CHECKING:
    from ..run import Run

HIDDEN = "patch/hidden_ratio"  # in the logs of a step


class Work:
    """Of one rank of a run."""

    def __init__(self, run: Run) -> None:
        student: Any = run.engine.module
        seen, aims = (
            [(views[0].size, sum(view.count for view in views)) for views in side]
            for side in (run.inputs.student, run.inputs.teacher)
        )
        images = run.inputs.micro * run.inputs.parts
        local = run.recipe.objectives.local_group
        memory = local.memory if local is not None else 0
        teacher: Any = run.engine.teacher.module if run.mixture.needs_teacher else None
        size, large = seen[0]
        self.tokens = images * tokens(student.backbone, seen)
        self._patches = large * (tokens(student.backbone, [(size, 1)]) - 1)
        none, one = (training_flops(student, teacher, seen, aims, Asked(memory, hidden)) for hidden in (0, 1))
        self._flops, self._each = images * none, images * (one - none)

    def flops(self, logs: Mapping[str, float]) -> float:
        """Of a step with these logs."""
        return self._flops + self._each * self._patches * logs.get(HIDDEN, 0.0)
