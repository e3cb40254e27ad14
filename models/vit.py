"""The backbone: timm's plain ViT, with the papers' position embedding and stochastic depth fed from outside.

Parameter names are timm's, so checkpoints travel both ways. Three things differ from timm, each for a reason: the position
embedding is carried to other crop sizes as DINO, iBOT and Mugs do it; the forward returns the tokens before the last
LayerNorm, because Mugs' local-group query is their mean (arXiv 2203.14415, 3.2); stochastic depth is a function of
numbers that come in, so that a resumed run and any split over ranks drop the same blocks (arXiv 1603.09382). What a
block does, it does in its own forward: blocks are what is recomputed, compiled and gathered one by one.
"""

import importlib.util
import math
import os
import shlex
import shutil
import sys
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch_norm import BatchNorm
from .block import Read, ScaledBlock
from .initial import generator
from .patches import as_product
from .products import QueryKeyValue, by_onednn

PosInterp = Literal["official", "timm"]


class Backbone(VisionTransformer):
    """A plain ViT: class token, learned position embedding, pre-norm blocks. Built by `build_backbone`."""

    pos_interp: PosInterp = "official"
    heads: int  # of each block's attention
    mask_token: nn.Parameter | None  # [1, d], what stands for a hidden patch; only where a student learns by masks
    stride: int  # pixels a side of a patch
    # Keep only each block's input for the backward and compute the block once more there: less memory for a third more
    # arithmetic, the same bits.
    recompute: bool = False

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [n, h, w, d] to tokens [n, 1 + h*w, d]. timm's own `forward_features` comes through here too."""
        if self.pos_interp == "timm":
            return super()._pos_embed(x)
        n, height, width, dim = x.shape
        assert self.cls_token is not None
        assert self.pos_embed is not None
        embedding = resize_pos_embed(self.pos_embed, height, width)
        if not isinstance(self.pos_embed, nn.Parameter):  # a buffer stays fp32, whatever the weights are
            embedding = embedding.to(x.dtype)
        # Add before joining: one pass over the patches instead of two.
        first = (self.cls_token + embedding[:, :1]).expand(n, -1, -1)
        return torch.cat([first, x.reshape(n, height * width, dim) + embedding[:, 1:]], dim=1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of images of so many pixels."""
        return height // self.stride, width // self.stride

    def _embed(self, x: Tensor) -> Tensor:
        weight = self.patch_embed.proj.weight
        if isinstance(weight, nn.Parameter):
            return self.patch_embed(x)
        return self.patch_embed(x.to(weight.dtype)).to(x.dtype)  # frozen weights are buffers, and those stay fp32

    def forward(
        self, x: Tensor, branch_scale: Tensor | None = None, masks: Tensor | None = None, read: Read = "all"
    ) -> Tensor:
        """Images [n, 3, H, W] to tokens [n, 1 + P, d] BEFORE the last LayerNorm (`self.norm`), class token first.

        `read` "class": to the class token alone, [n, 1, d]; "pair": to that and the mean of all tokens, [n, 2, d]; the last
        block computes no more.

        branch_scale [n, 2 * depth] multiplies what each block's attention and MLP add to each sample (`branch_scales`);
        None leaves them whole. masks [n, h, w] bool hide patches: the mask token takes the place of what was embedded,
        and keeps the patch's position (iBOT, arXiv 2111.07832). H and W must be multiples of the patch size.
        """
        patches = self._embed(x)
        if masks is not None:
            assert self.mask_token is not None
            # Also where nothing is hidden, so that the token has a gradient on every rank.
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        x = self._pos_embed(patches)
        how: list[dict[str, Any]] = [{} for _ in self.blocks]
        if branch_scale is not None:
            how = [{"scale": scale} for scale in branch_scale.to(x.dtype).split(2, dim=1)]
        if read != "all":
            how[-1]["read"] = read
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for block, given in zip(self.blocks, how, strict=True):
            if recompute:
                # Blocks draw nothing, so there is no generator to put back.
                x = checkpoint(block, x, **given, lean=False, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, **given)
        return x


def build_backbone(
    name: str,
    *,
    img_size: int = 224,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    pos_interp: PosInterp = "official",
    seed: int = 0,
    linear_std: float = 0.02,
) -> Backbone:
    """A timm ViT by name, each measure replaced where one is given, with Mugs' initial weights drawn from `seed`.

    Raises ValueError when timm does not know the name, or knows it as something else than a plain ViT (registers, pooled
    heads without a class token, rotary embeddings, other activations): these would need another student.
    """
    if name not in timm.list_models(module="vision_transformer"):
        raise ValueError(f"backbone {name!r} is not a ViT that timm knows; try vit_small_patch16_224")
    given = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    overrides |= {"img_size": img_size, "num_classes": 0, "dynamic_img_size": True}
    try:
        # The measures that go with the name are read off a model without storage.
        named: Any = timm.create_model(name, **overrides, device="meta")
    except (AssertionError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"backbone {name!r} cannot be built with {overrides}: {error}") from error
    dim, patch, block = named.embed_dim, named.patch_embed.patch_size[0], named.blocks[0]
    if img_size % patch:
        raise ValueError(f"image_size {img_size} is not a multiple of the patch size {patch} of backbone {name!r}")
    # timm's constructors draw from the global generator; what they draw is overwritten below.
    with torch.random.fork_rng(devices=[]):
        backbone = Backbone(
            patch_size=patch,
            embed_dim=dim,
            depth=len(named.blocks),
            num_heads=block.attn.num_heads,
            mlp_ratio=block.mlp.fc1.out_features / dim,
            img_size=img_size,
            num_classes=0,
            dynamic_img_size=True,
            block_fn=ScaledBlock,
        )
    plain = [(key, value.shape) for key, value in backbone.state_dict().items()]
    wanted = [(key, value.shape) for key, value in named.state_dict().items()]
    same = [_parts(backbone) == _parts(named), repr(backbone.norm) == repr(named.norm), type(block) is Block]
    if plain != wanted or not all(same):
        raise ValueError(
            f"backbone {name!r} is not a plain ViT (class token, learned positions, GELU); choose one that is"
        )
    by_onednn(backbone)
    for part in backbone.blocks:
        part.attn.qkv.__class__ = QueryKeyValue
    as_product(backbone.patch_embed.proj)  # pyright: ignore[reportArgumentType]
    backbone.heads = block.attn.num_heads
    backbone.register_parameter("mask_token", None)
    backbone.pos_interp, backbone.stride = pos_interp, patch
    init_weights(backbone, seed, "backbone", linear_std=linear_std)
    return backbone


def _parts(vit: VisionTransformer) -> list[str]:
    """What the blocks are made of, but for the blocks' own class."""
    return [f"{name} {part!r}" for block in vit.blocks for name, part in block.named_children()]


def compile_blocks(backbone: Backbone, backend: str = "inductor") -> None:
    """Compile each block in place (`torch.compile`, at its first forward); parameter names stay.

    One block at a time, since all have one shape and so share what is compiled, and what surrounds them (position
    embedding, search, heads) is little work in many shapes. A copy of the backbone made afterwards is not compiled.
    Raises ValueError for a backend that torch does not have, RuntimeError where "inductor" lacks its compiler.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"torch.compile has no backend {backend!r}; choose of {known}")
    if backend == "inductor" and (lacking := _lacking(backbone.cls_token)):
        raise RuntimeError(
            f"compiling blocks with inductor needs {lacking}, which is not here; install it, or leave compilation off"
        )
    for block in backbone.blocks:
        block.compile(backend=backend)


def _lacking(weight: Tensor | None) -> str | None:
    """What inductor needs and this machine lacks, on the device of `weight`."""
    assert weight is not None
    if weight.device.type == "cpu":
        # As inductor chooses it; where PATH lacks that one it takes no other.
        compiler = (shlex.split(os.environ.get("CXX", "")) or ["clang++" if sys.platform == "darwin" else "g++"])[0]
        return None if shutil.which(compiler) else f"a C++ compiler ({compiler}, or the one that CXX names)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not any(shutil.which(c) for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c):
        return "a C compiler (gcc, clang, or the one that CC names)"
    return None


def tokens(backbone: Backbone, x: Tensor, branch_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images [n, 3, H, W] to (tokens before, tokens after the last LayerNorm), each [n, 1 + P, d], class token first."""
    before = backbone(x, branch_scale)
    return before, backbone.norm(before)


def resize_pos_embed(embedding: Tensor, height: int, width: int) -> Tensor:
    """Position embedding [1, 1 + s*s, d] for a grid of height x width patches, the papers' way.

    They pass bicubic interpolation a scale factor of (side + .1) / s, against rounding down, and it becomes the step
    between samples: asking for the size instead gives other numbers (reference/mugs.md, 6 #17).
    """
    side = math.isqrt(embedding.shape[1] - 1)
    if (height, width) == (side, side):
        return embedding
    grid = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = ((height + 0.1) / side, (width + 0.1) / side)
    grid = nn.functional.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, height * width, -1)], dim=1)


def branch_scales(draws: Tensor, rate: float) -> Tensor:
    """Uniform draws [n, 2 * depth] in [0, 1) to factors of the same shape: 0 drops a branch, 1 / (1 - p) keeps its mean.

    p grows linearly from 0 at the first block to `rate` at the last. Columns: attention and MLP of block 0, of block 1, ...
    """
    p = torch.linspace(0.0, rate, draws.shape[1] // 2, device=draws.device).repeat_interleave(2)
    return (draws >= p).to(torch.float32) / (1.0 - p)


def init_weights(
    module: nn.Module, seed: int, name: str, default_linear: bool = False, linear_std: float = 0.02
) -> None:
    """Draw every weight anew, each from a generator keyed by (seed, name, parameter): leaving a head out moves no other.

    Mugs' values: trunc normal, std .02 (`linear_std` for the former), for linear weights and embeddings; zeros for biases;
    norms 1 and 0, weight norm 1. Buffers stay. The patch convolution, the prototypes and, with `default_linear`, linear layers have PyTorch's uniform +-1 / sqrt(fan in).
    """
    for prefix, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            draws = generator(f"{seed}/{name}/{prefix}.{key}")
            if key == "weight_g" or (isinstance(part, nn.LayerNorm | BatchNorm) and key == "weight"):
                nn.init.ones_(parameter)
            elif key == "bias" and not default_linear and not isinstance(part, nn.Conv2d):
                nn.init.zeros_(parameter)
            elif key == "weight_v" or isinstance(part, nn.Conv2d) or default_linear:
                bound = 1.0 / math.sqrt(dict(part.named_parameters())[key.replace("bias", "weight")][0].numel())
                nn.init.uniform_(parameter, -bound, bound, generator=draws)
            else:
                linear = isinstance(part, nn.Linear)
                nn.init.trunc_normal_(parameter, std=linear_std if linear else 0.02, generator=draws)
