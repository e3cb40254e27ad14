"""A hierarchy of prototypes and contrast that heeds it: HCSC (Guo et al., CVPR 2022; sections 2 and 3 of the notes on its code).

After a warm-up by plain InfoNCE, embeddings are clustered into levels of prototypes. Instance contrast then drops queue
entries that seem to be of the query's own cluster, level by level; prototype contrast asks for the query's prototypes among
the others, dropping those whose parent seems to be the query's. Two ways to know an image's cluster: `assign: table`, the
official one, embeds the whole data set every so often and remembers each image's cluster; `assign: stream` clusters a
memory of the teacher's keys, each time from the prototypes that are there, and asks the key of the moment. It needs no epoch.
The tree is tree.py's, the losses are selection.py's. Values are the official code's where no comment says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bernoulli import keyed
from .hierarchy_config import HierarchyConfig
from .kmeans import Share
from .levels import Levels, Masks, Queue, Scene
from .memory import RingMemory, check_state
from .protocol import Outcome, StepInfo
from .tree import Growth, Tree, grow, stable_share

__all__ = ["HierarchyConfig", "HierarchyObjective", "Masks"]


class HierarchyObjective:
    """HCSC on the outputs called `name`: student [C*B, dim] and teacher [G*B, dim], unit rows, crop-major.

    images: of the data set, which `assign: table` has a number for, each. Official: one global student crop, one teacher crop of
    another view. With more, each teacher crop meets all crops but itself; the mean over teacher crops and, for each, over global crops.
    """

    def __init__(
        self,
        config: HierarchyConfig,
        dim: int,
        *,
        seed: int,
        images: int = 0,
        name: str = "hierarchy",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        place = {"dtype": dtype, "device": device}
        self.config, self.name, self.seed = config, name, seed
        self.queue = RingMemory(config.queue, dim, seed=seed, unit=True, name=f"{name}.queue", **place)
        self.memory: RingMemory | None = None
        self.table: Tensor | None = None  # int32 [images], on the host: number on level 0; -1: not known
        if config.assign == "stream":
            self.memory = RingMemory(config.memory, dim, seed=seed, unit=True, name=f"{name}.memory", **place)
        elif images < config.levels[0]:
            raise ValueError(
                f"{name}: {images} images cannot make {config.levels[0]} prototypes; lower the levels or take assign: stream"
            )
        else:
            self.table = torch.full((images,), -1, dtype=torch.int32)
        self.listed = 0  # images that the table has a number for, which is an epoch: a filter's others never come
        self.last, self.begun = -1, 0.0  # position of the last clustering, progress at the first one
        self.tree = Tree(
            [torch.zeros(k, dim, **place) for k in config.levels],
            [torch.full((k,), config.temperature, **place) for k in config.levels],
            [torch.zeros(k, dtype=torch.int64, device=device) for k in config.levels[:-1]],
            [0] * len(config.levels),
        )
        self.levels = Levels(config, self.tree)
        # Log-sum-exp over a level's prototypes, [levels, queue]: of each queue entry's products, as selection wants them.
        self.scores = torch.zeros(len(config.levels), config.queue, **place)

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo, masks: Masks | None = None
    ) -> Outcome:
        """Adds no more than logs and the teacher rows to enqueue, [B, G, dim]. ValueError where the step does not fit."""
        queries, keys = info.outputs(self.name, student, teacher)
        config, dtype = self.config, self.queue.rows.dtype
        self.queue.check(*keys.shape)
        if self.memory is not None:
            self.memory.check(info.batch, keys.shape[1])
        if config.exclusion_batch and info.batch % config.exclusion_batch:
            raise ValueError(
                f"{self.name}: exclusion_batch {config.exclusion_batch} does not divide the {info.batch} images of one forward"
            )
        with torch.autocast(self.queue.rows.device.type, enabled=False):
            keys = keys.detach().to(dtype)
            crops = queries.to(dtype).view(info.student_crops, info.batch, -1)
            ramp = self.ramp(info.progress)
            losses, parts, queue = [], [], Queue(self.queue.rows, self.scores)
            for scene in self._scenes(crops, keys.view(info.teacher_crops, info.batch, -1), info):
                lineage = self._lineage(scene.key, info) if ramp else None
                loss, signs = self.levels.compare(scene, queue, ramp, lineage, masks)
                losses.append(loss)
                parts.append(signs)
            total = torch.stack(losses).mean()
        logs: dict[str, Tensor | float] = {f"loss/{self.name}": total.detach(), f"{self.name}/ramp": ramp}
        for key in parts[0]:
            logs[f"{self.name}/{key}"] = torch.stack([part[key] for part in parts]).mean()
        logs |= self.queue.logs() | (self.memory.logs() if self.memory is not None else {})
        keys = keys.view(info.teacher_crops, info.batch, -1).transpose(0, 1).contiguous()
        return Outcome(total, logs, {"keys": keys})

    @torch.no_grad()
    def commit(self, outcome: Outcome) -> None:
        """Enqueue view by view, images (of all ranks, in order) inside a view; the memory takes each image's first view."""
        keys = outcome.commit["keys"].to(self.queue.rows)
        rows = keys.transpose(0, 1).flatten(0, 1)
        slots = (self.queue.pointer + torch.arange(len(rows), device=rows.device)) % self.queue.capacity
        self.queue.enqueue(rows)
        if self.memory is not None:
            self.memory.enqueue(keys[:, 0])
        if self.last >= 0:
            self.scores[:, slots] = self.levels.score(rows)

    # Clustering.

    @property
    def every(self) -> int:
        """Images from one clustering to the next."""
        return self.config.every or (4 * self.config.memory if self.table is None else self.listed)

    def due(self, info: StepInfo) -> bool:
        """Whether the position asks for a clustering, which also needs its rows."""
        warm = info.progress >= self.config.warmup - 1e-9
        return warm and (self.last < 0 or info.position - self.last >= self.every)

    def stale(self, info: StepInfo) -> bool:
        """Whether the table form wants all images embedded before this step."""
        return self.table is not None and self.due(info)

    def refresh(self, features: Tensor, info: StepInfo) -> None:
        """Cluster unit rows [images, dim] of all images in the order of their numbers, and take their clusters down.

        A zero row stands for an image that could not be read: it belongs to no cluster, should it come up all the same
        its key decides. Collective. ValueError with another number of rows, or too few that are whole.
        """
        if self.table is None or len(features) != len(self.table):
            wanted = "none" if self.table is None else len(self.table)
            raise ValueError(
                f"{self.name}: {len(features)} rows to cluster, wanted {wanted}; embed the data set that it reads"
            )
        rows = features.to(self.queue.rows)
        whole = rows.square().sum(1) > 0.25
        growth = self._grow(rows[whole], None, info)
        self.table.fill_(-1)
        self.table[whole.cpu()] = growth.assignment.cpu().to(self.table.dtype)
        self.listed = len(growth.assignment)
        self.plant(growth.tree, info)

    def refit(self, info: StepInfo) -> dict[str, Tensor | float]:
        """Cluster the memory anew, once it is full, where a clustering is due; logs of that moment. Collective."""
        if self.memory is None or not self.due(info) or self.memory.filled < self.memory.capacity:
            return {}
        before = self.tree if self.last >= 0 else None
        growth = self._grow(self.memory.rows, before, info)
        self.plant(growth.tree, info)
        logs: dict[str, Tensor | float] = {f"{self.name}/distance": growth.objectives[0] / self.memory.capacity}
        for level, reseeded in enumerate(growth.reseeded):
            logs[f"{self.name}/level{level}_reseeded"] = float(reseeded.sum())
            if before is not None:
                logs[f"{self.name}/level{level}_stable"] = stable_share(before, growth.tree, level)
        return logs

    def plant(self, tree: Tree, info: StepInfo) -> None:
        """Take over a tree, at this position and progress."""
        if self.last < 0:
            self.begun = info.progress
        self.last = info.position
        self._root(tree)
        self.scores = self.levels.score(self.queue.rows)

    def _root(self, tree: Tree) -> None:
        self.tree, self.levels = tree, Levels(self.config, tree)

    def ramp(self, progress: float) -> float:
        """Weight of the full loss against plain InfoNCE, 0 to 1."""
        if self.last < 0:
            return 0.0
        if self.config.assign == "table" or not self.config.ramp:
            return 1.0
        return min(1.0, max(0.0, (progress - self.begun) / self.config.ramp))

    def _grow(self, rows: Tensor, before: Tree | None, info: StepInfo) -> Growth:
        config = self.config
        return grow(
            rows,
            config.levels,
            temperature=config.temperature,
            smoothing=config.smoothing,
            seed=self.seed,
            niter=config.iterations if before is None else config.again,
            nredo=config.attempts,
            before=before,
            share=Share.of(info),
        )

    # The loss: what is compared, and to which prototypes an image belongs.

    def _scenes(self, crops: Tensor, keys: Tensor, info: StepInfo) -> list[Scene]:
        # What an image's masks are drawn from is the step's position and its own number: nothing of ranks or micro-batches.
        places = torch.arange(info.rank * info.batch, (info.rank + 1) * info.batch)
        numbers = (places if info.index is None else info.index).to(crops.device, non_blocking=True)
        draws = keyed(self.seed, f"{self.name}/{info.position}"), numbers
        scenes = []
        for i, key in enumerate(keys):
            wide = [j for j in range(info.student_globals) if j != i or not info.same_views]
            if not wide:
                raise ValueError(
                    f"{self.name}: the student's only global crop is the teacher's own; give the recipe another view"
                )
            chosen = [*wide, *range(info.student_globals, info.student_crops)]
            whole = chosen == list(range(info.student_crops))
            scenes.append(Scene(i, key, crops if whole else torch.stack([crops[j] for j in chosen]), len(wide), draws))
        return scenes

    @torch.no_grad()
    def _lineage(self, key: Tensor, info: StepInfo) -> Tensor:
        """Each image's prototypes, int64 [levels, N]: from the table, or nearest to its key."""
        if self.table is None:
            return self.tree.lineage(self.tree.assign(key))
        if info.index is None:
            raise ValueError(
                f"{self.name}: assign: table needs each image's number in the data set; the step has no index"
            )
        if len(info.index) != info.batch or info.index.min() < 0 or info.index.max() >= len(self.table):
            raise ValueError(
                f"{self.name}: numbers {info.index.min()} to {info.index.max()} of {len(info.index)} images do not fit "
                f"{info.batch} of a data set of {len(self.table)}; take assign: stream where data sets grow or mix"
            )
        known = self.table[info.index].long().to(key.device, non_blocking=True)
        if (self.table[info.index] < 0).any():
            known = torch.where(known < 0, self.tree.assign(key), known)
        return self.tree.lineage(known)

    # What a resumed run needs.

    def state(self) -> dict[str, Tensor]:
        own = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in self._live().items()}
        for name, memory in self._memories().items():
            own |= {f"{name}.{key}": tensor for key, tensor in memory.state().items()}
        return own

    def load(self, state: dict[str, Tensor]) -> None:
        memories: dict[str, dict[str, Tensor]] = {name: {} for name in self._memories()}
        rest: dict[str, Tensor] = {}
        for key, tensor in state.items():
            part, _, inner = key.partition(".")
            if part in memories:
                memories[part][inner] = tensor
            else:
                rest[key] = tensor
        check_state(self.name, rest, self._live())
        for name, memory in self._memories().items():  # all of them, before any changes
            check_state(memory.name, memories[name], memory.state())
        for name, memory in self._memories().items():
            memory.load(memories[name])
        device = self.queue.rows.device
        rest = {key: t.to(t.device, copy=True, memory_format=torch.contiguous_format) for key, t in rest.items()}
        levels = range(len(self.config.levels))
        tree = Tree(
            [rest[f"means.{level}"].to(device) for level in levels],
            [rest[f"phi.{level}"].to(device) for level in levels],
            [rest[f"parents.{level}"].to(device) for level in levels[:-1]],
            rest["highest"].tolist(),
        )
        self._root(tree)
        self.scores = rest["scores"].to(device)
        self.last, self.begun = int(rest["last"]), float(rest["begun"])
        if self.table is not None:
            self.table = rest["table"].cpu()
            self.listed = int((self.table >= 0).sum())

    def _memories(self) -> dict[str, RingMemory]:
        return {"queue": self.queue} | ({"memory": self.memory} if self.memory is not None else {})

    def _live(self) -> dict[str, Tensor]:
        own = {f"means.{level}": tensor for level, tensor in enumerate(self.tree.means)}
        own |= {f"phi.{level}": tensor for level, tensor in enumerate(self.tree.phi)}
        own |= {f"parents.{level}": tensor for level, tensor in enumerate(self.tree.parents)}
        own |= {"highest": torch.tensor(self.tree.highest, dtype=torch.int64), "scores": self.scores}
        own |= {
            "last": torch.tensor(self.last, dtype=torch.int64),
            "begun": torch.tensor(self.begun, dtype=torch.float64),
        }
        return own | ({"table": self.table} if self.table is not None else {})
