"""The student: every trainable weight of a run behind one forward.

DeepSpeed wants one container, one call, one backward, so the backbone, the local-group block, the heads and predictors all
run in `Student.forward`, and what they only read (memories, draws) comes in as `context`. Data flow and names follow Mugs
(arXiv 2203.14415; reference/mugs.md 1.0, 1.1). Where the papers ask for a crop's width, this asks for its role.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from .batch_norm import BatchNorm, collect_statistics
from .block import Read
from .dense import DenseHead
from .fixed import fix_patch_embed, fix_positions
from .heads import ProjectionHead, PrototypeHead
from .mlp import HEADS, MlpConfig, MlpHead, SwapHead, draw_kaiming, normed
from .neighbours import NeighbourBlock, search
from .products import by_onednn
from .resnet import ResNetBackbone, build_resnet, is_resnet
from .vit import Backbone, branch_scales, build_backbone, init_weights

ObjectiveName = Literal[
    "instance", "dense", "local_group", "hierarchy", "group", "patch", "batch_contrast", "bootstrap", "bank", "swapped",
    "clusters",
]  # fmt: skip


class StudentConfig(BaseModel):
    """What the networks look like. Defaults are Mugs' ViT-S/16 (arXiv 2203.14415, official `pretraining.sh`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # timm's name of a plain ViT or ResNet; it decides width, depth, heads and patch unless the fields below do.
    # Paper: vit_small_patch16_224, vit_base_patch16_224, vit_large_patch16_224; resnet50 elsewhere.
    backbone: str = "vit_small_patch16_224"
    # Pixels a side at which the position embedding is stored (other sizes interpolate it). Paper: 224.
    image_size: int = Field(default=224, ge=1)
    # Pixels a side of a patch; None: as the backbone's name says. Paper: 16.
    patch_size: int | None = Field(default=None, ge=1)
    # Width d of a token, or of a ResNet's last map; None: as named. Paper: 384 (S), 768 (B), 1024 (L).
    embed_dim: int | None = Field(default=None, ge=1)
    # Transformer blocks, or blocks in each of a ResNet's four stages; None: as named. Paper: 12 (S, B), 24 (L).
    depth: int | None = Field(default=None, ge=1)
    # Attention heads, must divide embed_dim; None: as named. Paper: 6 (S), 12 (B), 16 (L).
    heads: int | None = Field(default=None, ge=1)
    # Stochastic depth of the student, linear from 0 at the first block to this at the last. Paper: .1 (S, B), .3 (L).
    # Above 0 a training forward wants the draws in its context ("drop_path.draws"). A ResNet has none: 0.
    drop_path: float = Field(default=0.1, ge=0.0, lt=1.0)
    # How the position embedding is carried to other crop sizes. "official" is the papers' (DINO, iBOT, Mugs): bicubic with
    # a scale factor of (side + .1) / grid and no antialiasing; "timm" is timm's. They agree at image_size only.
    pos_interp: Literal["official", "timm"] = "official"
    # Standard deviation of the initial linear weights. Paper: .02, about 1 / sqrt(d) at its widths; a much narrower network
    # needs more, or its first thousand steps go into growing.
    linear_std: float = Field(default=0.02, gt=0.0)
    # Hidden width of all projectors. Paper: 2048.
    head_hidden: int = Field(default=2048, ge=1)
    # Output width of the instance and local-group heads, and the bottleneck before the prototypes. Paper: 256, 256, 256.
    head_out: int = Field(default=256, ge=1)
    # Hidden width of the predictors, which only the student has. Paper: 4096.
    predictor_hidden: int = Field(default=4096, ge=1)
    # Norm of the projectors' hidden layers, before their GELU; never in a predictor. Paper: none ("batch" is the official
    # switch `use_bn_in_head`, off in all their recipes).
    head_norm: Literal["none", "batch"] = "none"
    # Rows over which batch norm takes its statistics, in row order. With a divisor of a rank's images they depend neither
    # on the number of ranks nor mix crops; exactly a rank's images makes each crop a batch, as a forward a crop has it
    # (MoCo v3). None: all rows of a rank together, which ties the run to its number of ranks. A ResNet's as well.
    virtual_batch: int | None = Field(default=None, ge=2)
    # Images, in the order of the positions, among which the teacher's batches of batch norm are shuffled, so that key and
    # query do not share one and tell each other by it: MoCo's shuffled batch norm (arXiv 1911.05722, 3.3), without sending
    # images between ranks. A multiple of virtual_batch that divides a rank's images; None: not shuffled.
    shuffle: int | None = Field(default=None, ge=4)
    # Heads by objective, where they are not Mugs'; see models/mlp.py for what they are where a recipe says nothing.
    projections: dict[ObjectiveName, MlpConfig] = {}
    # MoCo v3's ViTs keep the patch embedding as drawn, and have fixed positions. Paper (Mugs): neither.
    freeze_patch_embed: bool = False
    positions: Literal["learned", "fixed"] = "learned"
    # Initial weights of a ResNet's convolutions: torchvision's, or (fan_in) DenseCL's; the last norm of each residual
    # branch at 0 (SimSiam: torchvision's zero_init_residual).
    init_conv: Literal["fan_out", "fan_in"] = "fan_out"
    zero_init_residual: bool = False
    # Rows of the last, weight-normed layer of the group head. Paper: 65536.
    prototypes: int = Field(default=65536, ge=1)
    # Keep the norms of the prototypes at 1 instead of training them. Paper: false (S, B), true (L).
    norm_last_layer: bool = False
    # Whether hidden patches are assigned to the group head's prototypes, or to `patch_prototypes` of their own behind the
    # group head's projector; without the group objective they have a head of their own. iBOT: true.
    shared_head: bool = True
    # Prototypes of hidden patches where they are not the group head's. iBOT: 8192.
    patch_prototypes: int = Field(default=8192, ge=1)
    # Nearest memory rows that the local-group block attends to (k of its top-k). Paper: 8.
    neighbours: int = Field(default=8, ge=1)
    # Weights to begin with: a file of `gristmill import` or anyone's checkpoint of this backbone, or "timm:NAME" for what
    # timm has. Whoever runs the training puts them in; None: drawn from the seed. Paper: none.
    init: str | None = Field(default=None, min_length=1)
    # Granularities to build heads for. Paper: all but "patch", which is iBOT's.
    objectives: tuple[ObjectiveName, ...] = Field(default=("instance", "local_group", "group"), min_length=1)

    @property
    def resnet(self) -> bool:
        """Whether the backbone is a ResNet."""
        return is_resnet(self.backbone)

    @property
    def batch_norm(self) -> bool:
        """Whether there is batch norm anywhere."""
        heads = any(normed(config) for name in self.objectives if (config := self.projection(name)))
        return self.resnet or self.head_norm == "batch" or heads

    def projection(self, name: str) -> MlpConfig | None:
        """The head of an objective, or None if it is one of Mugs' kind."""
        return self.projections.get(name, HEADS.get(name))  # type: ignore[call-overload]

    def out_of(self, name: str) -> int:
        """Width of what an objective compares."""
        projection = self.projection(name)
        return projection.out if projection else self.head_out

    @property
    def prototypes_of_patches(self) -> int:
        """To which hidden patches are assigned: the group head's, or their own."""
        return self.prototypes if self.shared_head and "group" in self.objectives else self.patch_prototypes

    @model_validator(mode="before")
    @classmethod
    def _without_drop_path(cls, given: Any) -> Any:
        """A ResNet drops no paths unless somebody says so, and then hears that it cannot."""
        if isinstance(given, dict) and isinstance(name := given.get("backbone"), str) and is_resnet(name):
            return {"drop_path": 0.0, **given}
        return given

    @model_validator(mode="after")
    def _kind(self) -> Self:
        if self.resnet:
            lacking = {"patch_size": None, "heads": None, "drop_path": 0.0, "freeze_patch_embed": False}
            for name, absent in (lacking | {"positions": "learned"}).items():
                if getattr(self, name) != absent:
                    raise ValueError(f"{name} is for ViTs, and {self.backbone} is a ResNet; leave it out")
            if "patch" in self.objectives:
                raise ValueError("the patch objective hides patches, which a ResNet has none of; take a ViT")
        elif self.init_conv != "fan_out" or self.zero_init_residual:
            name = "zero_init_residual" if self.zero_init_residual else "init_conv"
            raise ValueError(f"{name} is for ResNets, and {self.backbone} is none; leave it out")
        for name in self.projections:
            if name in ("local_group", "group", "patch"):
                raise ValueError(f"projections.{name}: this head is of Mugs' kind; see head_hidden and head_out")
            if strange := self.projections[name].strange(dense=name == "dense"):
                raise ValueError(f"projections.{name}.{strange}: this head has none; leave it out")
        if self.shuffle and not (self.resnet and self.virtual_batch and self.shuffle % self.virtual_batch == 0):
            raise ValueError(
                f"shuffle {self.shuffle} is for a ResNet's batch norm, and a multiple of virtual_batch; set that, too"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.patch_size and self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim and self.heads and self.embed_dim % self.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of heads {self.heads}")
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives {list(self.objectives)} names one twice; name each once")
        if "patch" in self.objectives and self.head_norm == "batch":
            raise ValueError(
                "head_norm batch does not go with the patch objective: as many patches as are hidden fill no virtual "
                "batch; set head_norm: none"
            )
        if self.virtual_batch and not self.batch_norm:
            raise ValueError(
                f"virtual_batch {self.virtual_batch} is for batch norm; set head_norm: batch or leave it out"
            )
        return self


class Student(nn.Module):
    """Backbone, local-group block and one head an objective, behind one forward. The teacher is the same class."""

    def __init__(self, config: StudentConfig, seed: int = 0) -> None:
        """Weights are drawn from `seed`, each by its name; the global generator stays as it was."""
        super().__init__()
        self.config = config
        self.backbone = _backbone(config, seed)
        dim = self.backbone.embed_dim
        self.relation: NeighbourBlock | None = None
        with torch.random.fork_rng(devices=[]):
            if "local_group" in config.objectives:
                self.relation = NeighbourBlock(dim, self.backbone.heads)
                init_weights(self.relation, seed, "relation", linear_std=config.linear_std)
            shared = {"patch"} if "group" in config.objectives else set()
            self.heads = nn.ModuleDict({n: _head(n, dim, config) for n in config.objectives if n not in shared})
            if "patch" in config.objectives:
                self.backbone.mask_token = nn.Parameter(torch.zeros(1, dim))  # iBOT's initial value
        for name, head in self.heads.items():
            # Heads that are not Mugs' begin as PyTorch draws them, as in their official code.
            given = config.projection(name)
            init_weights(head, seed, name, given is not None, linear_std=config.linear_std)
            if given and given.init == "kaiming":
                draw_kaiming(head, f"{seed}/{name}")
            predictor = getattr(head, "predictor", None)
            if predictor is not None:
                # The official code makes the predictor after it has initialised the rest, so it keeps PyTorch's default.
                init_weights(predictor, seed, f"{name}.predictor", default_linear=True)
        by_onednn(self)
        self._batch_norms = any(isinstance(module, BatchNorm) for module in self.modules())

    def forward(
        self, views: Sequence[Tensor], context: Mapping[str, Tensor] | None = None, global_sizes: int = 1
    ) -> dict[str, Tensor]:
        """Crops to what the objectives compare.

        views: one tensor [c*B, 3, S, S] a crop size, crop-major (crop 0 of all images, then crop 1, ...); the first
        `global_sizes` of them hold the global crops. context: read-only tensors, "local_group.bank" [K, d] (and, where
        they are kept, "local_group.norms" [K], or "local_group.unit_bank") for the local-group objective, and "drop_path.draws"
        [n, 2*depth], uniform in [0, 1), for training with drop_path > 0; for the patch objective "patch.masks" bool
        [global crops, h, w], True where the student sees the mask token, and where it is known "patch.index" [M], the
        flat indices of those patches. The teacher has no such token: it sees all, and gives out what is asked for.
        "group.targets" [G, B, prototypes] and "group.temperature" [] (on the host): what the teacher assigned, where the
        group objective says so before the student's forward; without patches, prototypes are then streamed.

        With n crops in all, in the order given: "class_token" [n, d] after the last LayerNorm; "instance" and "local_group"
        [n, head_out], unit; "group" [n, prototypes], logits, or, streamed, "group.lse" [n] and "group.agreement" [B, n / B, G]
        (`streamed_assignment`); "memory_row" [global crops, d], detached: the mean of the
        patches after the last LayerNorm, what a neighbour memory stores; "patch" [M, prototypes], logits of the hidden
        patches, and of the teacher "patch_mean" [1, prototypes], the mean over all patches. With batch norm, in training: what
        `merge_statistics` takes once the step was applied, "batch_norm.<module>" [virtual batches, 2, width], detached.
        Objectives with a head of models/mlp.py: "<name>" [n, out], unit, and "<name>.projection", the same before the
        predictor, detached; "swapped" [n, prototypes] cosines, "swapped.projection", and "swapped.queue_scores" where context
        has a "swapped.queue" [Q, out]; "dense", "dense.features" [global crops, locations, width] and "dense.pooled" (models/dense.py).
        A ResNet's class token is the average of its last map, its patches are that map's locations. "shuffle.order" [B]:
        the images' order in the backbone's forward, which nothing but batch norm notices.
        Raises ValueError when context lacks a tensor, or crops do not fill virtual batches.
        """
        virtual = self.config.virtual_batch
        if self.training and virtual and (odd := [len(x) for x in views if len(x) % virtual]):
            raise ValueError(
                f"{odd[0]} crops of one size do not fill virtual batches of {virtual}; let virtual_batch divide the "
                "images of a rank"
            )
        # To look for batch norms in a ViT-L, module by module, takes milliseconds of every forward.
        with collect_statistics(self) if self._batch_norms else nullcontext({}) as statistics:
            out = self._outputs(views, {} if context is None else context, global_sizes)
        return out | statistics

    def _outputs(self, views: Sequence[Tensor], context: Mapping[str, Tensor], global_sizes: int) -> dict[str, Tensor]:
        norm = self.backbone.norm
        reads = self.reads(len(views), global_sizes)
        before = self._tokens(views, context, reads)
        out = {"class_token": norm(torch.cat([x[:, 0] for x in before]))}
        if self.relation is not None:
            bank = _from(context, "local_group.bank", "the objective's context() has it")
            query = torch.cat([x[:, 1] if read == "pair" else x.mean(1) for x, read in zip(before, reads, strict=True)])
            kept = context.get("local_group.unit_bank"), context.get("local_group.norms")
            _, rows = search(query, bank, self.config.neighbours, *kept)
            out["local_group"] = self.heads["local_group"](self.relation(query, rows, norm))
            with torch.no_grad():
                out["memory_row"] = torch.cat([norm(x)[:, 1:].mean(1) for x in before[:global_sizes]])
        for name, head in self.heads.items():
            if isinstance(head, SwapHead):
                told = head.scores(out["class_token"], context.get(f"{name}.queue"))
                out |= dict(zip((name, f"{name}.projection"), told, strict=False))
                out |= {f"{name}.queue_scores": told[2]} if told[2] is not None else {}
            elif name == "instance" and isinstance(head, ProjectionHead):
                out[name] = head(out["class_token"])
            elif isinstance(head, MlpHead):
                out[name], out[f"{name}.projection"] = head(out["class_token"])
            elif isinstance(head, DenseHead):
                grid = self.backbone.grid(*views[0].shape[2:])
                dense = head(norm(torch.cat([x[:, 1:] for x in before[:global_sizes]])), grid)
                out |= {name: dense.rows, f"{name}.features": dense.features, f"{name}.pooled": dense.pooled}
        if "patch" in self.config.objectives:
            out |= self._patches(out["class_token"], before[:global_sizes], context)
        elif "group" in self.heads and "group.targets" in context:
            temperature = float(context["group.temperature"])
            lse, agreement = self.heads["group"](
                out["class_token"], targets=context["group.targets"], temperature=temperature
            )
            out |= {"group.lse": lse, "group.agreement": agreement}
        elif "group" in self.heads:
            out["group"] = self.heads["group"](out["class_token"])
        return out

    def _patches(
        self, class_token: Tensor, before: Sequence[Tensor], context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs "patch" and, of the teacher, "patch_mean"; with a group head also "group"."""
        norm, index = self.backbone.norm, context.get("patch.index")
        if index is None:
            index = _from(context, "patch.masks", MASKS).flatten().nonzero().squeeze(1)
        every = torch.cat([x[:, 1:].flatten(0, 1) for x in before])
        teacher = self.backbone.mask_token is None
        patches, chosen = (norm(every), index) if teacher else (norm(every[index]), None)
        own = "patch" in self.heads
        head = self.heads["patch" if own else "group"]
        group, logits, mean = head(class_token[:0] if own else class_token, patches, chosen)
        out = {"patch": logits} | ({} if own else {"group": group})
        return out | ({"patch_mean": mean.detach()} if teacher else {})

    def reads(self, sizes: int, global_sizes: int = 1) -> list[Read]:
        """What heads and memories want to see of each size of crops, the global ones first."""
        asked = self.config.objectives
        if self.config.resnet:
            return ["all"] * sizes
        whole = not {"patch", "dense", "local_group"}.isdisjoint(asked)  # memory rows are means of patches
        few: Read = "class" if self.relation is None else "pair"
        return ["all" if whole and place < global_sizes else few for place in range(sizes)]

    def _tokens(self, views: Sequence[Tensor], context: Mapping[str, Tensor], reads: Sequence[Read]) -> list[Tensor]:
        """Before the last LayerNorm, what is read of the tokens of each size: [n_i, 1 + P_i, d], or fewer (`Backbone.forward`)."""
        if isinstance(self.backbone, ResNetBackbone):
            return [_shuffled(self.backbone, x, context.get("shuffle.order")) for x in views]
        rate = self.config.drop_path
        masks: list[Tensor | None] = [None] * len(views)
        if self.backbone.mask_token is not None and self.training:
            masks[0] = _from(context, "patch.masks", MASKS)
            grid = tuple(side // self.backbone.patch_embed.patch_size[0] for side in views[0].shape[2:])
            if masks[0].shape != (len(views[0]), *grid):
                raise ValueError(
                    f'"patch.masks" has shape {tuple(masks[0].shape)}; the global crops want {(len(views[0]), *grid)}'
                )
        if not (self.training and rate > 0.0):
            return [self.backbone(x, None, *more) for x, *more in zip(views, masks, reads, strict=True)]
        draws = _from(context, "drop_path.draws", "pass uniform numbers [n, 2 * depth], or set drop_path 0")
        wanted = (sum(len(x) for x in views), 2 * len(self.backbone.blocks))
        if draws.shape != wanted:
            raise ValueError(f'"drop_path.draws" has shape {tuple(draws.shape)}; these views want {wanted}')
        scales = branch_scales(draws, rate).split([len(x) for x in views])
        return [self.backbone(*given) for given in zip(views, scales, masks, reads, strict=True)]


MASKS = "the patch objective wants masks [global crops, h, w]; a run draws them"


def _backbone(config: StudentConfig, seed: int) -> Backbone | ResNetBackbone:
    if config.resnet:
        return build_resnet(
            config.backbone,
            embed_dim=config.embed_dim,
            depth=config.depth,
            seed=seed,
            virtual=config.virtual_batch,
            init_conv=config.init_conv,
            zero_init_residual=config.zero_init_residual,
        )
    backbone = build_backbone(
        config.backbone,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.heads,
        pos_interp=config.pos_interp,
        seed=seed,
        linear_std=config.linear_std,
    )
    if config.freeze_patch_embed:
        fix_patch_embed(backbone)
    if config.positions == "fixed":
        fix_positions(backbone)
    return backbone


def _head(name: ObjectiveName, dim: int, config: StudentConfig) -> nn.Module:
    if (given := config.projection(name)) is not None:
        if name == "dense":
            return DenseHead(dim, given.hidden, given.out, given.grid, given.layers)
        if name == "swapped":
            return SwapHead(dim, given, config.prototypes, config.virtual_batch)
        return MlpHead(dim, given, config.virtual_batch)
    norm = partial(BatchNorm, virtual=config.virtual_batch) if config.head_norm == "batch" else None
    if name in ("group", "patch"):
        sizes = (config.head_hidden, config.head_out, config.prototypes if name == "group" else config.patch_prototypes)
        apart = name == "group" and "patch" in config.objectives and not config.shared_head
        second = config.patch_prototypes if apart else None
        return PrototypeHead(dim, *sizes, norm_last_layer=config.norm_last_layer, norm=norm, second=second)
    return ProjectionHead(dim, config.head_hidden, config.head_out, config.predictor_hidden, norm)


def _shuffled(backbone: ResNetBackbone, x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of crops [c * B, ...], computed with the images of each crop in another order [B]."""
    if order is None:
        return backbone(x)
    images = len(order)
    rows = (torch.arange(0, len(x), images, device=x.device)[:, None] + order).flatten()
    return backbone(x[rows])[rows.argsort()]


def _from(context: Mapping[str, Tensor], key: str, remedy: str) -> Tensor:
    if key not in context:
        raise ValueError(f'context lacks "{key}": {remedy}')
    return context[key]
