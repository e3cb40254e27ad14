"""What is evaluated: a network that is looked through and never changed, wherever its weights lie.

A run's newest checkpoint or an older one, an export, weights of others, whatever timm builds, and the two baselines: raw
pixels, and a run's network before its first step. All give the same four things (eyes.py), on images of ImageNet's
mean and spread. `identity` is a digest of the weights and of how they are read: what is cached by it cannot be stale.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from torch import Tensor, nn

from ...models.measures import Measures, measure
from ...models.resnet import build_resnet, is_resnet
from ...models.unpickle import WeightsError, read_weights
from ...models.vit import PosInterp, build_backbone
from ...models.weights import Who, import_backbone
from ...pipeline.augment.colour import MEAN, STD
from ...shards.errors import GristmillError
from .eyes import Eye, PixelEye, ResNetEye, Seen, TimmEye, VitEye

TIMM, RANDOM, PIXELS = "timm:", "random:", "pixels"
FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
PIXEL_SIZE = 224


class SubjectError(GristmillError):
    """Nothing that can be evaluated, or not in the way that is asked."""


class Subject:
    """A frozen network on images of `size` pixels a side, normalised by `mean` and `std`.

    name: for people; stride: pixels of a patch or of a location of the last map; width: d; depth: blocks, or a ResNet's
    stages. Everything runs in evaluation mode, in fp32 and without gradient, on the device of `to`.
    """

    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __init__(self, name: str, eye: Eye, size: int, *, position: int | None = None) -> None:
        if eye.exact and size % eye.stride:
            _refuse(name, size, eye.stride)
        self.name, self.size, self.position = name, size, position
        self._eye = eye.float().eval().requires_grad_(False)
        self.stride, self.width, self.depth = eye.stride, eye.width, eye.depth
        self.identity = _digest(self._eye, size)
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Subject:
        """Move the network; images follow it by themselves, and features are left there."""
        self.device = torch.device(device)
        self._eye.to(self.device)
        return self

    @torch.no_grad()
    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        """(class [B, d], patches [B, h*w, d]) of the last n blocks, each after the final norm, the last one last.

        Images [B, 3, H, W]. A ResNet, what else timm has, and pixels give one, whatever n is.
        """
        return [(c.float(), p.float()) for c, p in self._eye.blocks(images.to(self.device, torch.float32), n)]

    def features(self, images: Tensor) -> Tensor:
        """Class tokens after the last norm, or a ResNet's average: images [B, 3, H, W] -> [B, d]."""
        return self.blocks(images)[-1][0]

    def patches(self, images: Tensor) -> Tensor:
        """Patches of the last block after the norm: images [B, 3, H, W] -> [B, h, w, d]."""
        patches = self.blocks(images)[-1][1]
        return patches.unflatten(1, self._eye.grid(*images.shape[-2:]))

    def backbone(self) -> Eye:
        """A trainable copy: images [B, 3, H, W] -> tokens [B, 1 + h*w, d] after the final norm. SubjectError for pixels."""
        if not any(True for _ in self._eye.parameters()):
            raise SubjectError(f"{self.name} has no weights to train; name a run, a file of weights or timm:NAME")
        return self._eye.trainable()

    def layers(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters of what `backbone` gave, by depth: embedding first, the final norm with the last block."""
        if not isinstance(module, Eye):
            raise SubjectError("layers are those of the module that backbone() gave; pass that one")
        return module.layers()


def open_subject(where: str, *, who: Who = "teacher", size: int | None = None, seed: int = 0) -> Subject:
    """What `where` names, on images of `size` pixels (default: the run's probes', the export's, or timm's).

    A run folder (its newest checkpoint), a checkpoint in one, a file of weights (an export's or others', nothing in it is
    executed), "timm:NAME" (with a tag behind a point, as in vit_small_patch16_224.augreg_in21k, the weights that timm has,
    if they are on this machine, for nothing is fetched; without, random ones drawn from `seed`), "pixels", or
    "random:RUN", a run's network before its first step. Raises SubjectError, CheckpointError, RecipeError.
    """
    if where == PIXELS:
        return Subject("pixels", PixelEye(size or PIXEL_SIZE), size or PIXEL_SIZE)
    if where.startswith(TIMM):
        return _from_timm(where.removeprefix(TIMM), size, seed)
    if where.startswith(RANDOM):
        return _untrained(where.removeprefix(RANDOM), size, seed)
    path = Path(where)
    if "://" not in where and (path.is_file() or path.suffix in FILES):
        return _from_file(path, who, size)
    if "://" not in where and not path.is_dir():
        near = difflib.get_close_matches(where, timm.list_models(), n=1) if timm.is_model(where) else []
        hint = f"; for timm's network say timm:{near[0]}" if near else "; name a run, a file of weights, or timm:NAME"
        raise SubjectError(f"{where}: there is no such file or folder{hint}")
    return _from_run(where, who, size)


def _from_run(where: str, who: Who, size: int | None) -> Subject:
    from ..export import open_checkpoint
    from ..networks import saved_networks
    from ..recipe import parse_recipe

    saved = open_checkpoint(where)
    try:
        recipe = parse_recipe(saved.state["recipe"], f"the recipe in {saved.path}")
        try:
            (network,) = saved_networks(saved, recipe, who)
        except ValueError as error:
            raise SubjectError(f"{saved.path} does not fit its own recipe: {error}; take another checkpoint") from error
        name = f"{recipe.name}, {who} after {saved.position} images"
        return Subject(name, eye_of(network.backbone), size or recipe.probes.size, position=saved.position)
    finally:
        saved.close()


def _untrained(where: str, size: int | None, seed: int) -> Subject:
    from ..networks import build_student
    from ..recipe import load_recipe

    folder = Path(where)
    if not (folder / "recipe.yaml").is_file():
        folder = folder.parent.parent  # of RUN/checkpoints/POSITION
    if not (folder / "recipe.yaml").is_file():
        raise SubjectError(f"{RANDOM}{where}: {where} holds no run (no recipe.yaml); name one, or take timm:NAME")
    recipe = load_recipe(folder / "recipe.yaml")
    student = build_student(recipe.model_copy(update={"seed": recipe.seed + seed}))
    return Subject(f"{recipe.name}, untrained", eye_of(student.backbone), size or recipe.probes.size)


def _from_file(path: Path, who: Who, size: int | None) -> Subject:
    """A file of weights: our export says how it is built, of any other its shapes do."""
    if not path.is_file():
        raise SubjectError(f"{path}: there is no such file; name one that `gristmill export` wrote, or others' weights")
    try:
        file = read_weights(path)
        about = file.metadata
        state, report = import_backbone(file, None if who == "teacher" else who)
    except WeightsError as error:
        raise SubjectError(str(error)) from error
    ours = "gristmill.arguments" in about
    arguments: dict[str, Any] = json.loads(about["gristmill.arguments"]) if ours else {}
    measures = measure(state)
    name = about.get("gristmill.model") or (measures.timm_name if measures else None)
    if measures is None or name is None:
        raise SubjectError(f"{path} holds {report.what}, which timm has no name for; name a file of `gristmill export`")
    normal = {key: json.loads(about[f"gristmill.{key}"]) for key in ("mean", "std") if f"gristmill.{key}" in about}
    try:
        if isinstance(measures, Measures):
            side = round((measures.tokens - 1) ** 0.5) * measures.patch
            interp: PosInterp = "official" if ours else "timm"
            named = {key: arguments[key] for key in ("embed_dim", "depth", "num_heads") if key in arguments}
            eye: Eye = VitEye(
                build_backbone(name, img_size=side, patch_size=measures.patch, pos_interp=interp, **named), **normal
            )
        else:
            side = 224
            plain = measures.timm_name is not None
            more: dict[str, Any] = {} if plain else {"embed_dim": measures.outer[-1], "depth": measures.blocks[0]}
            eye = ResNetEye(build_resnet(name, **more), **normal)
        net: Any = eye.net
        net.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        why = str(error).split("\n")[0]
        raise SubjectError(
            f"{path} does not fit timm's {name}: {why}; export the run again, or name another file"
        ) from (error)
    return Subject(path.name, eye, size or side)


def _from_timm(name: str, size: int | None, seed: int) -> Subject:
    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        near = ", ".join(difflib.get_close_matches(plain, timm.list_models(), n=3)) or "vit_small_patch16_224, resnet50"
        raise SubjectError(f"{TIMM}{name}: timm knows no such network; near it are {near}")
    config = timm.get_pretrained_cfg(name if tag else plain)
    size = size or (config.input_size[-1] if config is not None else 224)
    normal = {"mean": config.mean, "std": config.std} if tag and config is not None else {}
    named: Any = timm.create_model(plain, num_classes=0, device="meta")
    patch = getattr(getattr(named, "patch_embed", None), "patch_size", (1,))[0]
    if size % patch:
        _refuse(f"{TIMM}{name}", size, patch)
    given: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": _local(name)}} if tag else {}
    trained: Any = timm.create_model(name, num_classes=0, **given) if tag else None
    try:
        if is_resnet(plain):
            eye: Eye = ResNetEye(build_resnet(plain, seed=seed), **normal)
        else:
            stored = size if trained is None else trained.patch_embed.img_size[0]
            eye = VitEye(build_backbone(plain, img_size=stored, pos_interp="timm", seed=seed), **normal)
        if trained is not None:
            net: Any = eye.net
            net.load_state_dict(trained.state_dict())
    except (ValueError, AttributeError):  # no plain ViT or ResNet: as timm builds it
        eye = TimmEye(_built(name, size, seed, given), size, **normal)
    about = name if tag else f"{name}, random weights of seed {seed}"
    return Subject(f"timm's {about}", eye, size)


def _built(name: str, size: int, seed: int, given: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, num_classes=0, img_size=size, **given)
        except TypeError:  # a convolutional network takes any size
            return timm.create_model(name, num_classes=0, **given)


def _local(name: str) -> str:
    """timm's weights where an earlier download left them. SubjectError where there are none: nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    found = try_to_load_from_cache(config.hf_hub_id, "model.safetensors") if config and config.hf_hub_id else None
    if not isinstance(found, str):
        raise SubjectError(
            f"{TIMM}{name}: its weights are not on this machine, and nothing is fetched; where there is a network, save "
            f"those of timm.create_model({name!r}, pretrained=True) to a *.safetensors file, and name that"
        )
    return found


def _refuse(name: str, size: int, patch: int) -> NoReturn:
    near = max(1, round(size / patch)) * patch
    raise SubjectError(f"{name}: images of {size} pixels are no whole patches of {patch}; take {near}")


def eye_of(backbone: Any) -> Eye:
    return ResNetEye(backbone) if not hasattr(backbone, "pos_embed") else VitEye(backbone)


def _digest(eye: Eye, size: int) -> str:
    """Of the weights, and of all that decides on how they are read."""
    net = getattr(eye, "net", None)
    about = [type(eye).__name__, type(net).__name__, str(getattr(net, "pos_interp", "")), str(size), str(eye.stride)]
    about += [str(getattr(net, "heads", "")), str(getattr(net, "default_cfg", {}).get("architecture", ""))]
    state = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name, value in sorted([*eye.state_dict().items(), *((n, b) for n, b in eye.named_buffers(recurse=False))]):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
