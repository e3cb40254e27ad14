"""Mugs' training step written down plainly, from the formulas (arXiv 2203.14415 and the notes on the official code).

Float64, one crop, one pair, one tensor at a time; nothing of gristmill is used. Weights are a dict with the student's
names. It equals what the official code printed (test_official_step.py), and stands in for it where its images, too many
megabytes to keep, are missing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def affine(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """One pre-norm transformer block on [n, t, d]."""
    d = x.shape[-1]
    q, k, v = affine(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").split(d, -1)
    mixed = []
    for part in range(heads):
        columns = slice(part * (d // heads), (part + 1) * (d // heads))
        scores = q[..., columns] @ k[..., columns].mT / math.sqrt(d // heads)
        mixed.append(torch.softmax(scores, -1) @ v[..., columns])
    x = x + affine(torch.cat(mixed, -1), w, f"{name}.attn.proj")
    return x + affine(gelu(affine(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")


class PlainMugs:
    """State and step. shapes: heads of attention, depth, patch; `memory` {"student", "teacher"}: keys and search rows."""

    def __init__(self, student: Weights, teacher: Weights, *, heads: int, depth: int, patch: int, neighbours: int):
        self.student = {k: v.detach().double().clone().requires_grad_() for k, v in student.items()}
        self.teacher = {k: v.detach().double().clone() for k, v in teacher.items()}
        self.heads, self.depth, self.patch, self.neighbours = heads, depth, patch, neighbours
        self.queues: dict[str, Tensor] = {}  # "instance", "local_group": [K, D], and their pointers
        self.pointer = {"instance": 0, "local_group": 0, "student": 0, "teacher": 0}
        self.memories: dict[str, Tensor] = {}  # "student", "teacher": rows that are returned [M, d]
        self.searched: dict[str, Tensor] = {}  # and those that are compared with
        self.center = torch.zeros(0)
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def tokens(self, x: Tensor, w: Weights) -> Tensor:
        """One crop size of images [n, 3, S, S] to tokens before the last norm."""
        n, p = len(x), self.patch
        cells = x.unfold(2, p, p).unfold(3, p, p)  # n, 3, h, w, p, p
        h = cells.shape[2]
        flat = cells.permute(0, 2, 3, 1, 4, 5).reshape(n, h * h, -1)
        weight, bias = w["backbone.patch_embed.proj.weight"], w["backbone.patch_embed.proj.bias"]
        x = flat @ weight.reshape(len(weight), -1).T + bias
        position = w["backbone.pos_embed"]
        side = math.isqrt(position.shape[1] - 1)
        grid = position[:, 1:]
        if side != h:
            grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side,) * 2, mode="bicubic", align_corners=False)
            grid = grid.permute(0, 2, 3, 1).reshape(1, h * h, -1)
        first = (w["backbone.cls_token"] + position[:, :1]).expand(n, -1, -1)
        x = torch.cat([first, x + grid], 1)
        for i in range(self.depth):
            x = block(x, w, f"backbone.blocks.{i}", self.heads)
        return x

    def outputs(self, crops: list[Tensor], who: str) -> dict[str, Tensor]:
        """Crops, each [B, 3, S, S], to what is compared: rows crop-major."""
        w = self.student if who == "student" else self.teacher
        found: dict[str, list[Tensor]] = {"instance": [], "local_group": [], "group": [], "rows": []}
        for crop in crops:
            before = self.tokens(crop.double(), w)
            after = layer_norm(before, w, "backbone.norm")
            query = before.mean(1)
            cosine = unit(query.detach()) @ unit(self.searched[who]).T
            near = cosine.argsort(dim=1, descending=True)[:, : self.neighbours]
            joined = torch.cat([query[:, None], self.memories[who][near]], 1)
            local = layer_norm(block(joined, w, "relation", self.heads), w, "backbone.norm")[:, 0]
            found["instance"].append(self._project(after[:, 0], w, "instance"))
            found["local_group"].append(self._project(local, w, "local_group"))
            found["group"].append(self._prototypes(after[:, 0], w))
            found["rows"].append(after[:, 1:].mean(1).detach())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _project(self, x: Tensor, w: Weights, name: str) -> Tensor:
        head = f"heads.{name}"
        for i in (0, 2, 4):
            x = affine(x, w, f"{head}.projector.{i}")
            x = x if i == 4 else gelu(x)
        x = unit(x)
        if f"{head}.predictor.0.weight" in w:
            x = unit(affine(gelu(affine(x, w, f"{head}.predictor.0")), w, f"{head}.predictor.2"))
        return x

    def _prototypes(self, x: Tensor, w: Weights) -> Tensor:
        for i in (0, 2, 4):
            x = affine(x, w, f"heads.group.projector.{i}")
            x = x if i == 4 else gelu(x)
        v, g = w["heads.group.last_layer.weight_v"], w["heads.group.last_layer.weight_g"]
        return unit(x) @ (g * v / v.norm(dim=1, keepdim=True)).T

    def losses(self, s: dict[str, Tensor], t: dict[str, Tensor], batch: int, temperature: float) -> dict[str, Tensor]:
        """The three losses of outputs with two global crops on either side."""
        found = {}
        for name in ("instance", "local_group", "group"):
            large, small = [], []
            for i, target in enumerate(t[name].split(batch)):
                for j, given in enumerate(s[name].split(batch)):
                    if i == j:
                        continue
                    if name == "group":
                        p = torch.softmax((target - self.center) / temperature, 1)
                        term = -(p * torch.log_softmax(given / 0.1, 1)).sum(1).mean()
                    else:
                        positive = (given * target).sum(1, keepdim=True)
                        logits = torch.cat([positive, given @ self.queues[name].T], 1) / 0.2
                        term = -torch.log_softmax(logits, 1)[:, 0].mean()
                    (large if j < 2 else small).append(term)
            found[name] = 0.5 * (sum(large) / len(large) + sum(small) / len(small))
        return found

    def step(
        self, teacher_crops: list[Tensor], student_crops: list[Tensor], weak: Tensor, *, lr: float, wd: float, m: float,
        temperature: float, clip: float, held: bool,
    ) -> dict[str, dict[str, Tensor]]:  # fmt: skip
        """One step in the official order of events. Returns student and teacher outputs, losses, gradients as they come
        out of backward, and clipped."""
        batch = len(weak)
        with torch.no_grad():
            t = self.outputs(teacher_crops, "teacher")
        s = self.outputs(student_crops, "student")
        losses = self.losses(s, t, batch, temperature)
        total = torch.stack(list(losses.values())).mean()
        raw = dict(zip(self.student, torch.autograd.grad(total, list(self.student.values())), strict=True))
        clipped = {k: g * min(1.0, clip / (float(g.norm()) + 1e-6)) for k, g in raw.items()}
        for name in ("instance", "local_group"):
            for view in t[name].split(batch):
                self._ring(self.queues[name], name, view)
        self.center = 0.9 * self.center + 0.1 * t["group"].mean(0, keepdim=True)
        self._skipping("student", s["rows"][:batch][weak])
        self._skipping("teacher", t["rows"][:batch])
        for name, g in clipped.items():
            if not (held and "last_layer" in name):
                self._adamw(name, g, lr * (0.2 if "patch_embed" in name else 1.0), wd)
        for name, value in self.teacher.items():
            value.copy_(m * value + (1 - m) * self.student[name].detach())
        return {
            "student": {k: v.detach() for k, v in s.items()}, "teacher": t,
            "losses": {k: v.detach() for k, v in losses.items()}, "raw": raw, "clipped": clipped,
        }  # fmt: skip

    def _ring(self, queue: Tensor, name: str, rows: Tensor) -> None:
        for row in rows:
            queue[self.pointer[name]] = row
            self.pointer[name] = (self.pointer[name] + 1) % len(queue)

    def _skipping(self, who: str, rows: Tensor) -> None:
        """The official memory: after n rows its pointer moves by 2n, unless the write wrapped."""
        at, count, size = self.pointer[who], len(rows), len(self.memories[who])
        for i, row in enumerate(rows):
            self.memories[who][(at + i) % size] = row
            self.searched[who][(at + i) % size] = row
        self.pointer[who] = (at + (count if at + count > size else 2 * count)) % size

    @torch.no_grad()
    def _adamw(self, name: str, g: Tensor, lr: float, wd: float) -> None:
        p = self.student[name]
        first, second, steps = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p), 0))
        if p.ndim > 1 and not name.endswith("bias"):
            p.mul_(1 - lr * wd)
        first, second, steps = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g, steps + 1
        p.sub_(lr * (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8))
        self.moments[name] = (first, second, steps)
