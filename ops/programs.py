"""A backbone as a program that runs without its code: ONNX, or torch.export's .pt2, each checked against torch.

What is traced is timm's network (docs: torch.export, torch.onnx.export with dynamo) and what it is compared with is the
run's own, on the file as it lies on the disk: images in, `class_token` and `patch_tokens` out, at several batch
sizes. A file whose numbers differ by more than BOUND is removed and never gets its name. ONNX is run by onnxruntime, or
where that is not installed by the reference evaluator of the format itself.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..shards.storage import published
from .exported import ExportError, writable
from .origin import Origin

Program = Literal["onnx", "torch-export"]
SUFFIX: dict[Program, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
OUTPUTS = ("class_token", "patch_tokens")
BOUND = 1e-4  # largest difference to torch that is let through, of an output's largest number
TINY = 1e-30  # where all numbers are 0
SMALLEST = 33  # pixels of a ResNet's image: below, its last map is one location, and that is another program
LARGEST = 2**31 - 2**20  # bytes of weights: an ONNX file is one protobuf message, and these end at 2 GiB
OPSET = 20
Run = Callable[[Tensor], Mapping[str, Tensor]]


class Features(nn.Module):
    """timm's network with its two outputs named: images [B, 3, H, W] to class_token [B, d], patch_tokens [B, h * w, d]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        last = self.network.forward_features(images)
        if last.ndim == 4:  # a ResNet's map: its average stands for the class
            patches = last.flatten(2).mT
            return {"class_token": patches.mean(1), "patch_tokens": patches}
        return {"class_token": last[:, 0], "patch_tokens": last[:, 1:]}


def reference(network: Any) -> Run:
    """The same of the run's own backbone, which is what a program has to equal."""

    def run(images: Tensor) -> dict[str, Tensor]:
        tokens = network.norm(network(images))
        return {"class_token": tokens[:, 0], "patch_tokens": tokens[:, 1:]}

    return run


def write_program(origin: Origin, out: str | Path, form: Program, about: Mapping[str, str]) -> tuple[Path, float]:
    """Write the program; returns its path and the largest difference to the run's network, relative.

    The batch is free, and so is the size of a ResNet's images from SMALLEST on; a ViT's are of `origin.image_size`. The network is whole in
    memory. Raises ExportError for a name of another ending, a missing package, weights beyond 2 GiB (ONNX), and for a
    difference above BOUND.
    """
    path = writable(out, SUFFIX[form], f"what is written is {'ONNX' if form == 'onnx' else 'a torch.export program'}")
    if form == "onnx":
        _need("onnx", "onnxscript")
        size = sum(each.numel() * 4 for each in origin.shapes().values())
        if size > LARGEST:
            raise ExportError(
                f"{path}: {size:,} bytes of weights, and an ONNX file holds 2 GiB; take --format torch-export"
            )
    network = origin.network()
    images = _images(origin.image_size, origin.config.resnet)
    return path, put(path, form, Features(origin.plain(network)).eval(), reference(network), images, about)


def put(
    path: Path, form: Program, traced: nn.Module, wanted: Run, images: list[Tensor], about: Mapping[str, str]
) -> float:
    """Trace a module, write it, and compare what was written with `wanted` on all `images`; see `write_program`."""
    with torch.no_grad(), quiet():
        program = torch.export.export(traced, (images[0],), dynamic_shapes={"images": _free(images)})
        data = _onnx(program, images[0], about) if form == "onnx" else _archive(program, about)
        with published(path) as draft:
            draft.write(data)
            del data, program
            draft.sync()
            return compare(open_program(draft.beside, form), wanted, images, path)


def compare(run: Run, wanted: Run, images: list[Tensor], path: Path) -> float:
    """The largest difference between two programs, of an output's largest number. ExportError above BOUND."""
    worst = 0.0
    for batch in images:
        theirs, ours = run(batch), wanted(batch)
        for name in OUTPUTS:
            shape = " x ".join(map(str, batch.shape))
            if theirs[name].shape != ours[name].shape:
                raise ExportError(
                    f"{path}: {name} of {shape} is {list(theirs[name].shape)}, not {list(ours[name].shape)}"
                )
            difference = float((theirs[name] - ours[name]).abs().max() / ours[name].abs().max().clamp_min(TINY))
            if not difference <= BOUND:  # a NaN is no number that is small enough
                raise ExportError(
                    f"{path} was not written: its {name} of {shape} differs from torch's by {difference:.1e} of the largest "
                    f"number, more than {BOUND:.0e}; report it, and take --format timm meanwhile"
                )
            worst = max(worst, difference)
    return worst


def open_program(path: Path, form: Program) -> Run:
    """A written program as a function of images."""
    if form == "torch-export":
        with path.open("rb") as file:
            module = torch.export.load(cast(Any, file)).module()
        return cast(Run, module)
    runner = _onnxruntime(path) or _evaluator(path)
    return lambda images: dict(zip(OUTPUTS, map(torch.from_numpy, runner({"images": images.numpy()})), strict=True))


def _onnxruntime(path: Path) -> Callable[[Any], list[Any]] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: cast(list[Any], session.run(list(OUTPUTS), given))


def _evaluator(path: Path) -> Callable[[Any], list[Any]]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_model(str(path)))
    return lambda given: cast(list[Any], evaluator.run(list(OUTPUTS), given))


def _onnx(program: Any, images: Tensor, about: Mapping[str, str]) -> bytes:
    made: Any = torch.onnx.export(
        program, (images,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(OUTPUTS),
        verbose=False,
    )  # fmt: skip
    model = made.model_proto
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def _archive(program: Any, about: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"gristmill.json": json.dumps(dict(about))})
    return file.getvalue()


def _images(size: tuple[int, int], resnet: bool) -> list[Tensor]:
    """What is compared on; the first is what is traced with. Sizes differ where the program may take any."""
    height, width = size
    shapes = [(2, height, width), (1, height, width), (3, height, width)]
    if resnet:
        height, width = max(height, 2 * SMALLEST), max(width, 2 * SMALLEST)
        shapes = [(2, height, width), (1, height + 32, width), (3, SMALLEST, width + 33)]
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, high, wide, generator=draw) for count, high, wide in shapes]


def _free(images: list[Tensor]) -> dict[int, Any]:
    """Which sides of the images may be others than those traced with: those in which the images differ."""
    sides = {side for side in (0, 2, 3) if len({each.shape[side] for each in images}) > 1}
    return {side: torch.export.Dim("batch") if side == 0 else torch.export.Dim.DYNAMIC for side in sides}


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(
                f"--format onnx needs the package {package}, which is not here: pip install 'gristmill[export]'"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' own remarks are about their insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
