"""Mugs' training step computed as its official code computes it: what `gristmill bench objectives` compares ours with.

Written anew from what is known of that code (arXiv 2203.14415, sail-sg/mugs): a backbone pass for each crop size with
attention as two products around a softmax, three float32 banks of neighbours for student and teacher each, of which one is
normalised anew in every pass, a copy of each queue a step, [B, K + 1] logits for each pair of crops, float32
logits and a softmax over all prototypes for each pair, and loops over parameters for clipping, AdamW and EMA. It shares
weights' names with ours, so that a test can start both from the same weights and find the same losses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.config import set_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...models.student import StudentConfig
from ...models.vit import resize_pos_embed

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CONTRAST_TEMPERATURE = 0.1, 0.04, 0.2


def plain_backbone(config: StudentConfig, drop_path: float, fused: bool) -> Any:
    """timm's ViT as it comes; `fused`: with torch's attention kernel, which the official code is older than."""
    given = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    sizes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    set_fused_attn(fused)
    try:
        return timm.create_model(
            config.backbone, img_size=config.image_size, num_classes=0, drop_path_rate=drop_path, dynamic_img_size=True, **sizes
        )  # fmt: skip
    finally:
        set_fused_attn(True)


def backbone_tokens(vit: Any, x: Tensor) -> Tensor:
    """Images [n, 3, S, S] to the tokens [n, 1 + P, d] before the last norm."""
    x = vit.patch_embed(x)  # [n, h, w, d]
    n, height, width, dim = x.shape
    x = torch.cat([vit.cls_token.expand(n, -1, -1), x.reshape(n, height * width, dim)], 1)
    return vit.blocks(x + resize_pos_embed(vit.pos_embed, height, width))


def _projector(dim: int, hidden: int, out: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, hidden, bias=bias), nn.GELU(),
        nn.Linear(hidden, out, bias=bias),
    )  # fmt: skip


class _Contrasted(nn.Module):
    def __init__(self, dim: int, config: StudentConfig, predicts: bool):
        super().__init__()
        self.projector = _projector(dim, config.head_hidden, config.head_out, False)
        sizes = config.head_out, config.predictor_hidden
        self.predictor = None
        if predicts:
            self.predictor = nn.Sequential(
                nn.Linear(*sizes, bias=False), nn.GELU(), nn.Linear(*sizes[::-1], bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.projector(x), dim=-1)
        return x if self.predictor is None else F.normalize(self.predictor(x), dim=-1)


class _Grouped(nn.Module):
    def __init__(self, dim: int, config: StudentConfig):
        super().__init__()
        self.projector = _projector(dim, config.head_hidden, config.head_out, True)
        shape = config.prototypes, config.head_out
        start = torch.empty(shape).uniform_(-(config.head_out**-0.5), config.head_out**-0.5)
        self.last_layer = nn.ParameterDict({"weight_v": start, "weight_g": torch.ones(config.prototypes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        v, g = self.last_layer["weight_v"], self.last_layer["weight_g"]
        weight = torch._weight_norm(v, g, 0)  # pyright: ignore[reportPrivateImportUsage]  # in one pass
        return F.linear(F.normalize(self.projector(x), dim=-1), weight)


class _Bank:
    """Three copies of the rows, as the official memory has them: to search, to return, and one that nobody reads."""

    def __init__(self, capacity: int, dim: int):
        self.queries, self.keys, self.values = (torch.randn(capacity, dim) for _ in range(3))
        self.pointer = 0

    def neighbours(self, query: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            similarity = F.normalize(query, dim=-1) @ F.normalize(self.queries, dim=-1).T
            return self.keys[similarity.topk(k, dim=-1).indices]

    def enqueue(self, rows: Tensor) -> None:
        slots = (self.pointer + torch.arange(len(rows), device=rows.device)) % len(self.keys)
        for bank in (self.queries, self.keys, self.values):
            bank[slots] = rows.to(bank.dtype)
        self.pointer = (self.pointer + len(rows)) % len(self.keys)


class PlainNetwork(nn.Module):
    """Backbone, relation block and three heads; `student`: with predictors and stochastic depth."""

    def __init__(self, config: StudentConfig, memory: int, student: bool):
        super().__init__()
        self.backbone: Any = plain_backbone(config, config.drop_path if student else 0.0, fused=False)
        dim = self.backbone.embed_dim
        set_fused_attn(False)
        self.relation = Block(dim, self.backbone.blocks[0].attn.num_heads, qkv_bias=True)
        set_fused_attn(True)
        self.heads = nn.ModuleDict(OrderedDict(
            instance=_Contrasted(dim, config, student), local_group=_Contrasted(dim, config, student),
            group=_Grouped(dim, config),
        ))  # fmt: skip
        self.neighbours = config.neighbours
        self.bank = _Bank(memory, dim)

    def forward(self, views: list[Tensor]) -> dict[str, Tensor]:
        tokens, local, rows = [], [], []
        norm = self.backbone.norm
        for x in views:  # one size of crops after the other
            before = backbone_tokens(self.backbone, x)
            query = before.mean(1)
            joined = torch.cat([query[:, None], self.bank.neighbours(query, self.neighbours)], 1)
            local.append(norm(self.relation(joined))[:, 0])
            after = norm(before)
            tokens.append(after[:, 0])
            rows.append(after[:, 1:].mean(1).detach())
        first, second = torch.cat(tokens), torch.cat(local)
        out = {"instance": first, "local_group": second, "group": first}
        return {name: self.heads[name](x) for name, x in out.items()} | {"memory_row": rows[0]}


class PlainStep:
    """The whole step; `run(teacher crops, student crops)`, each a tensor a crop size, crop-major.

    `mixed` opens the autocast under which networks and losses are computed: none as built.
    """

    def __init__(self, config: StudentConfig, *, batch: int, queue: int, memory: int, globals_: int = 2):
        self.batch, self.globals = batch, globals_
        self.mixed: Callable[[], AbstractContextManager] = nullcontext
        self.student = PlainNetwork(config, memory, student=True)
        self.teacher = PlainNetwork(config, memory, student=False)
        self.teacher.load_state_dict(self.student.state_dict(), strict=False)
        self.teacher.requires_grad_(False)
        self.queues = {n: F.normalize(torch.randn(config.head_out, queue), dim=0) for n in ("instance", "local_group")}
        self.pointers = dict.fromkeys(self.queues, 0)
        self.center = torch.zeros(1, config.prototypes)
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, foreach=False, fused=False)

    def losses(self, s: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name; queues and centre move on, as in the official code, before anything is known of the gradients."""
        found = {name: self._contrast(name, s[name], t[name]) for name in self.queues}
        return found | {"group": self._group(s["group"], t["group"])}

    def _mean(self, terms: dict[bool, list[Tensor]]) -> Tensor:
        halves = [torch.stack(found).mean() for found in terms.values() if found]
        return torch.stack(halves).mean()

    def _contrast(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        negatives = self.queues[name].clone()
        terms: dict[bool, list[Tensor]] = {True: [], False: []}
        for i, target in enumerate(teacher.split(self.batch)):
            for j, given in enumerate(student.split(self.batch)):
                if i != j:
                    positive = torch.einsum("nc,nc->n", given, target)[:, None]
                    logits = torch.cat([positive, given @ negatives], 1) / CONTRAST_TEMPERATURE
                    label = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
                    terms[j < self.globals].append(F.cross_entropy(logits, label))
            slots = (self.pointers[name] + torch.arange(self.batch, device=target.device)) % negatives.shape[1]
            self.queues[name][:, slots] = target.T.to(negatives.dtype)
            self.pointers[name] = (self.pointers[name] + self.batch) % negatives.shape[1]
        return self._mean(terms)

    def _group(self, student: Tensor, teacher: Tensor) -> Tensor:
        scaled = student.float() / STUDENT_TEMPERATURE
        targets = torch.softmax((teacher.float() - self.center) / TEACHER_TEMPERATURE, -1).split(self.batch)
        terms: dict[bool, list[Tensor]] = {True: [], False: []}
        for i, target in enumerate(targets):
            for j, given in enumerate(scaled.split(self.batch)):
                if i != j:
                    terms[j < self.globals].append(-(target * F.log_softmax(given, -1)).sum(-1).mean())
        self.center = self.center * 0.9 + teacher.mean(0, keepdim=True) * 0.1
        return self._mean(terms)

    def run(self, teacher_crops: list[Tensor], student_crops: list[Tensor]) -> dict[str, float]:
        """One step; losses by name."""
        with self.mixed():
            with torch.no_grad():
                t = self.teacher(teacher_crops)
            s = self.student(student_crops)
            losses = self.losses(s, t)
        for network, out in ((self.student, s), (self.teacher, t)):
            network.bank.enqueue(out["memory_row"][: self.batch])
        self.optimizer.zero_grad()
        (sum(losses.values()) / len(losses)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        self._clip()
        self.optimizer.step()
        self._average(0.996)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _clip(self) -> None:
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = 3.0 / (p.grad.norm(2) + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)

    @torch.no_grad()
    def _average(self, momentum: float) -> None:
        own = dict(self.student.named_parameters())
        for name, target in self.teacher.named_parameters():
            target.mul_(momentum).add_((1 - momentum) * own[name].detach())
