"""Fine-tuning end to end, and on few labels: how good a start the weights are.

BEiT's recipe, which iBOT and Mugs took over: AdamW, rates that shrink with depth, stochastic depth, RandAugment and erasing,
mixup or cutmix with smoothed labels by timm, linear warm-up and a cosine. Everything that is drawn is drawn by (seed,
epoch, row) or (seed, step), so a result can be had again on any number of workers. presets.py has the papers' values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from ...shards.errors import GristmillError
from .augmented import MIX, Labelled, augmented_batches, drawn, shuffled, transform
from .drop_path import DropPath
from .layer_decay import layer_groups
from .linear import Progress, same_codes
from .subsets import draw_balanced

if TYPE_CHECKING:
    from .subject import Subject

ASKED = 128  # images at once where nothing is learned


class FinetuneError(GristmillError, ValueError):
    """Settings or data that cannot be fine-tuned with, or a run that diverged."""


@dataclass(frozen=True)
class FinetuneOptions:
    """The defaults are Mugs' for ViT-B (presets.FINETUNE has others).

    rate: for a batch of `rate_per`, scaled by the batch there is, or taken as it is where that is None. warmup_rate,
    min_rate: start and end of the schedule. layer_decay: see layer_decay.py. mixup, cutmix: timm's alphas, one of the two
    for each batch; 0 leaves it out. augment: "crop" and "strong" of augmented.transform. pool: what the head reads.
    head_scale: of the head's first weights. evaluate_every: epochs between looks at the queries; the last is always one.
    """

    epochs: int = 100
    batch: int = 1024
    rate: float = 1.2e-3
    rate_per: int | None = None
    warmup_epochs: float = 20
    warmup_rate: float = 1e-6
    min_rate: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 0.55
    drop_path: float = 0.2
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    augment: Literal["crop", "strong"] = "strong"
    policy: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    pool: Literal["class", "average"] = "class"
    head_scale: float = 0.001
    evaluate_every: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.evaluate_every) < 1 or self.batch < 2 or self.rate <= 0:
            raise FinetuneError("fine-tuning needs at least 1 epoch, 2 images a batch, and a rate above 0")
        shares = (self.drop_path, self.smoothing, self.erase)
        if not 0.0 < self.layer_decay <= 1.0 or not all(0.0 <= share < 1.0 for share in shares):
            raise FinetuneError("layer_decay lies in (0, 1]; drop_path, smoothing and erase lie in [0, 1)")

    def rate_at(self, step: int, steps: int, per_epoch: int, batch: int) -> float:
        """The rate of the head at a step of `steps`: BEiT's, linear with both ends, then a cosine that never quite ends."""
        peak = self.rate * (batch / self.rate_per if self.rate_per else 1.0)
        warm = min(int(self.warmup_epochs * per_epoch), steps)
        if step < warm:
            return self.warmup_rate + (peak - self.warmup_rate) * step / max(1, warm - 1)
        turn = math.pi * (step - warm) / (steps - warm)
        return self.min_rate + 0.5 * (peak - self.min_rate) * (1.0 + math.cos(turn))


class Classifier(nn.Module):
    """A backbone, images [B, 3, H, W] -> tokens [B, 1 + p, d], and a linear head: logits [B, classes]."""

    def __init__(
        self, backbone: nn.Module, width: int, classes: int, *, pool: str = "class", scale: float = 0.001, seed: int = 0
    ) -> None:
        super().__init__()
        self.backbone, self.pool = backbone, pool
        with torch.random.fork_rng(devices=[]):  # what torch draws here is overwritten
            self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images)
        return self.head(tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1))


class Finetuning:
    """One fine-tuning under way: the classifier, its optimizer, and the step."""

    def __init__(
        self, model: Classifier, layers: list[list[nn.Parameter]], options: FinetuneOptions, seed: int
    ) -> None:
        self.model, self.options, self.seed = model, options, seed
        self.classes = model.head.out_features
        groups = layer_groups(
            layers,
            model.backbone,
            model.head.parameters(),
            decay=options.layer_decay,
            weight_decay=options.weight_decay,
        )
        # timm's names its scale of the rate; torch carries what it does not know along.
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate)
        self.drop_path = DropPath(model.backbone, options.drop_path, seed)
        self.loss = SoftTargetCrossEntropy()
        self.mix: Any = None
        if options.mixup > 0 or options.cutmix > 0:
            self.mix = Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=self.classes)

    def targets(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images and one-hot labels [B, C], mixed and smoothed. The images of an even batch are changed in place."""
        if self.mix is None:
            return images, mixup_target(labels, self.classes, smoothing=self.options.smoothing)
        with drawn(self.seed, MIX, 0, step):
            return self.mix(images, labels)

    def step(self, images: Tensor, labels: Tensor, rate: float, step: int) -> Tensor:
        """One update from images [B, 3, H, W] and labels int64 [B], B even where images are mixed. The loss, a scalar."""
        self.model.train()
        images, targets = self.targets(images, labels, step)
        with self.drop_path.drawn(len(images), step, images.device):
            loss = self.loss(self.model(images), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()
        return loss.detach()


def even_batches(rows: Tensor, batch: int) -> list[Tensor]:
    """Rows [n] in batches of at most `batch`, as equal as can be and each of an even number, as mixing in pairs wants.

    An odd one is left out here and there, at most one a batch, and another in another order. FinetuneError for one row.
    """
    if len(rows) < 2:
        raise FinetuneError(f"{len(rows)} labelled picture is too few to fine-tune on: give at least 2")
    parts = torch.tensor_split(rows, math.ceil(len(rows) / (batch - batch % 2)))
    return [part[: len(part) - len(part) % 2] for part in parts if len(part) > 1]


def _even(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """A batch that lost a picture which does not decode, even again; one that is left alone stands beside itself."""
    if len(rows) == 1:
        return rows.repeat(2), images.repeat(2, 1, 1, 1)
    return rows[: len(rows) - len(rows) % 2], images[: len(rows) - len(rows) % 2]


def run_finetune(
    subject: Subject,
    train: Labelled,
    query: Labelled,
    options: FinetuneOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    rows: Tensor | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Fine-tune a copy of a subject on `train` (of it, on `rows` alone), ask it about `query`; shares 0 to 1.

    finetune_top1, finetune_top5: after the last epoch. finetune_top1_best_epoch, finetune_top5_best_epoch: after the
    epoch, finetune_best_epoch, that answered the queries best, which is what the papers report. finetune_images: how many
    different pictures it learned from; one that does not decode is left out.
    progress(step, steps, loss). device: None is the subject's. Raises FinetuneError, also when the loss is not finite.
    """
    options = options or FinetuneOptions()
    where = torch.device(subject.device if device is None else device)
    labels, codes = torch.as_tensor(train.labels).to(torch.int64), same_codes(train, query)
    rows = torch.arange(len(labels)) if rows is None else rows
    rows = rows[labels[rows] >= 0]
    first = even_batches(rows, options.batch)
    per_epoch, batch = len(first), max(map(len, first))
    backbone = subject.backbone()
    model = Classifier(
        backbone, subject.width, len(train.classes), pool=options.pool, scale=options.head_scale, seed=seed
    )
    work = Finetuning(model.to(where), subject.layers(backbone), options, seed)
    change = transform(
        options.augment, subject.size, subject.mean, subject.std, policy=options.policy, erase=options.erase
    )
    done, steps, found = 0, per_epoch * options.epochs, []
    learned, loss = torch.zeros(len(labels), dtype=torch.bool), torch.tensor(torch.nan)
    schedule = (
        (epoch, taken)
        for epoch in range(options.epochs)
        for taken in even_batches(shuffled(rows, seed, epoch), options.batch)
    )
    altered = augmented_batches(train, schedule, change, seed=seed, workers=options.workers)
    for epoch in range(options.epochs):
        for taken, images in islice(altered, per_epoch):
            if not len(taken):
                continue
            taken, images = _even(taken, images)
            learned[taken] = True
            rate = options.rate_at(done, steps, per_epoch, batch)
            loss = work.step(images.to(where), labels[taken].to(where), rate, done)
            done += 1
            if progress is not None:
                progress(done, steps, float(loss))
        if not bool(loss.isfinite()):
            why = "give a smaller rate" if learned.any() else "no picture of the training set can be read"
            raise FinetuneError(f"the loss is {float(loss)} after epoch {epoch + 1}: {why}")
        if (epoch + 1) % options.evaluate_every == 0 or epoch + 1 == options.epochs:
            found.append((*_asked(model, query, codes, subject.size, where), epoch + 1))
    best = max(found, key=lambda score: score[:2])
    return {
        "finetune_top1": found[-1][0],
        "finetune_top5": found[-1][1],
        "finetune_top1_best_epoch": best[0],
        "finetune_top5_best_epoch": best[1],
        "finetune_best_epoch": float(best[2]),
        "finetune_images": float(learned.sum()),
    }


def run_semi_finetune(
    subject: Subject,
    train: Labelled,
    query: Labelled,
    options: FinetuneOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    shares: tuple[float, ...] = (0.01, 0.1),
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Fine-tune on few labels: the numbers of `run_finetune` as semi_finetune_1_top1, semi_finetune_10_top1, and so on.

    The rows are `draw_balanced`'s; the smaller share's are among the
    larger one's. progress counts the steps of each share from 1.
    """
    options = options or FinetuneOptions()
    result: dict[str, float] = {}
    for share in shares:
        rows = draw_balanced(train.labels, share, seed)
        name = f"semi_finetune_{share * 100:g}"
        got = run_finetune(subject, train, query, options, seed=seed, progress=progress, rows=rows, device=device)
        result |= {key.replace("finetune", name, 1): value for key, value in got.items()}
    return result


@torch.no_grad()
def _asked(model: Classifier, query: Labelled, codes: Tensor, size: int, device: torch.device) -> tuple[float, float]:
    """(top1, top5) on the labelled pictures of `query`, whole and unaltered."""
    model.eval()
    labels = torch.as_tensor(query.labels).to(torch.int64)
    right, seen = torch.zeros(2, dtype=torch.float64), 0
    for rows, images in query.batches(size, ASKED, (labels >= 0).nonzero()[:, 0]):
        logits = model(images.to(device))
        truth = codes[labels[torch.as_tensor(rows)]].to(device)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
        right += torch.stack([hits[:, 0].sum(), hits.sum()]).double().cpu()
        seen += len(images)
    if not seen:
        raise FinetuneError("no query picture has a label: give queries with labels")
    top1, top5 = (right / seen).tolist()
    return top1, top5
