"""The recipe: what is learned, from which data, with which numbers. YAML in, validated models out.

Each package declares the piece that it reads (views and stream in pipeline/, the student in models/, the objectives
in objectives/); here they are put together with what the loop itself needs. An unknown key is an error that names the
nearest one, and a value that cannot work is refused before anything starts. Durations are fractions of `images`, the
length of the schedules, so that a recipe keeps its shape when it is shortened.
"""

from __future__ import annotations

import copy
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from ..models.student import StudentConfig
from ..pipeline.groups import named_views
from ..pipeline.masks import MaskConfig
from ..pipeline.views import StreamConfig, View
from ..shards.errors import GristmillError
from .fitting import check_objectives
from .guard import GuardConfig
from .mistakes import mistakes
from .monitor.ports import PORT
from .objectives_config import NAMES, ObjectivesConfig, Piece
from .optimizers import OptimizerConfig
from .shipped import RECIPES, unknown
from .tiny import shrink
from .trackers import LogConfig

COMMAND_LINE = "on the command line"


class RecipeError(GristmillError):
    """A recipe that cannot be read, or that asks for something impossible.

    `everywhere`: all processes of a group find the same, so that one of them may say it for all.
    """

    def __init__(self, message: str, *, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class EngineConfig(Piece):
    """How the step is carried out. Nothing here changes what is learned, beyond rounding."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"  # auto: 0 in one process, 1 on several, 3 from a billion parameters on
    accumulate: int = Field(default=1, ge=1)  # micro-batches a step on each rank
    recompute: bool = False  # drop activations inside blocks and compute them again in backward: less memory, more time
    compile: str | None = None  # torch.compile each block with this backend, for example inductor; needs a compiler
    deepspeed: dict[str, Any] = Field(
        default_factory=dict
    )  # passed through to DeepSpeed, checked against what the engine relies on


class TeacherConfig(Piece):
    """Exponential moving average of the student."""

    momentum: tuple[float, float] = (0.996, 1.0)  # start and end of a cosine


class CheckpointConfig(Piece):
    """When to save, and what to keep."""

    every: int = Field(default=10_000, gt=0)  # images between checkpoints
    keep: int = Field(default=2, ge=1)  # so many of the newest complete ones
    keep_every: int = Field(default=0, ge=0)  # and the first at or beyond each multiple of it, for good; 0: none
    asynchronous: bool = True  # write while training goes on; the step waits for the copy to host memory only
    store: str | None = None  # folder or URL (s3://bucket/prefix?...) instead of the run folder's checkpoints/

    @field_validator("store")
    @classmethod
    def _no_secret(cls, store: str | None) -> str | None:
        # The recipe is written into the run folder and into every checkpoint.
        if store and "@" in urlsplit(store).netloc:
            raise ValueError(
                "keys do not belong into a recipe: leave them out of the URL and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return store


ProbeName = Literal["knn", "retrieval", "purity", "linear", "label_free", "correspondence"]


class ProbeConfig(Piece):
    """What is measured on the teacher, and on which data; labels are read here and nowhere else."""

    names: tuple[ProbeName, ...] = ("knn", "retrieval")  # ops/evaluate/chosen.py says what they are
    at: tuple[float, ...] = (0.0, 0.5, 1.0)  # fractions of the run
    every: int | None = Field(default=None, gt=0)  # and every so many images, at the next step
    reference: Path | None = None  # data set that neighbours are taken from (default: the training data)
    query: Path | None = None  # held-out data set (default: none, leave one out of the reference)
    size: int = Field(default=224, gt=0)  # pixels of the probed image
    images: int = Field(default=4096, gt=1)  # so many reference images at most
    neighbours: int = Field(default=20, gt=0)  # k of the weighted vote
    temperature: float = Field(default=0.07, gt=0)

    @field_validator("names")
    @classmethod
    def _some(cls, names: tuple[ProbeName, ...]) -> tuple[ProbeName, ...]:
        if not names:
            raise ValueError("name a probe at least; `probes.at=[]` is how none are made")
        return names


class TLSConfig(Piece):
    """Certificates of the metrics' port, in PEM. Files that change are read again."""

    certificate: Path  # and the chain that signed it
    key: Path  # without a password
    client_ca: Path | None = None  # an authority: only clients that show a certificate of its are answered (mTLS)


class MetricsConfig(Piece):
    """Where Prometheus finds this run. Each process of a node takes a port of its own: `port` and those after it."""

    port: int | Literal["off"] = PORT  # 0: any free port; "off": no exporter
    address: str = "127.0.0.1"  # who may ask: only this machine; 0.0.0.0: whoever reaches it
    tls: TLSConfig | None = None  # https instead of http
    targets: Path | None = None  # folder of targets for Prometheus' file_sd, beside targets/ of the run folder
    prometheus: str | None = None  # URL of a server that scrapes this run: what the page at / then shows

    @field_validator("port", mode="before")
    @classmethod
    def _off(cls, port: Any) -> Any:
        return "off" if port is False else port  # YAML reads a bare `off` as false

    @field_validator("prometheus")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://x")  # the recipe is written into the run folder and into every checkpoint
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("an http or https URL such as http://prometheus:9090, without a password")
        return url

    @model_validator(mode="after")
    def _port(self) -> MetricsConfig:
        if isinstance(self.port, int) and not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        return self


def _form(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "<several>"
    return "<url>" if isinstance(value, str) and value.startswith(("http://", "https://", "s3://")) else "<path>"


_Url: TypeAlias = Annotated[str, Tag("<url>")]
_Path: TypeAlias = Annotated[Path, Tag("<path>")]
Place: TypeAlias = Annotated[_Url | _Path, Discriminator(_form)]  # of a folder with a manifest


class DataConfig(Piece):
    """One of several data sets that are mixed, or one that is filtered."""

    path: Place
    weight: float = Field(default=1.0, ge=0)  # share of the stream, relative to the others'
    where: str = ""  # only samples for which this holds, for example `width >= 256 and format == "jpg"`


class Recipe(Piece):
    """A whole run. Shapes of the batch: global batch `batch`, one row an image, crops as `views` says."""

    name: str
    # Folder of shards with their manifest, or its url, or a list of {path, weight, where}.
    data: Annotated[_Url | _Path | Annotated[list[DataConfig], Tag("<several>")], Discriminator(_form)] | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    images: int = Field(gt=0)  # images to see: the length of the run and of its schedules
    batch: int = Field(gt=0)  # images a step, over all ranks
    threads: int = Field(default=0, ge=0)  # CPU threads a rank; 0: as many as this process may use
    # autocast: products in bf16, weights fp32. bf16: weights in bf16 as well, with fp32 masters, moments and reduction.
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    views: list[View]  # or the name of a whole set of them, such as mugs (pipeline/groups.py)
    masks: MaskConfig = MaskConfig()  # of the student's global crops, for the patch objective
    stream: StreamConfig = StreamConfig()
    student: StudentConfig
    objectives: ObjectivesConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: float = Field(
        default=600.0, ge=0
    )  # seconds without progress before a rank is named and the run ends; 0: off
    teacher: TeacherConfig = TeacherConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probes: ProbeConfig = ProbeConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()

    @field_validator("views", mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        return named_views(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _agree(cls, tree: Any) -> Any:
        """One seed for stream and networks; a head for each objective; the local group's number of neighbours."""
        if not isinstance(tree, dict):
            return tree
        if isinstance(stream := tree.get("stream", {}), dict):
            tree = {**tree, "stream": {"seed": tree.get("seed", 0), **stream}}
        if not isinstance(tree.get("student"), dict):
            return tree
        wanted = tree.get("objectives")
        if not isinstance(wanted, dict):
            return tree
        student = dict(tree["student"])
        student.setdefault("objectives", [n for n in NAMES if wanted.get(n) is not None])
        local = wanted.get("local_group")
        if isinstance(local, dict) and "neighbours" in local:
            student.setdefault("neighbours", local["neighbours"])
        return {**tree, "student": student}

    @property
    def sources(self) -> list[DataConfig]:
        """The data sets, in the order in which the cursor counts them."""
        if self.data is None:
            return []
        return self.data if isinstance(self.data, list) else [DataConfig(path=self.data)]

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch: the student's, or what its backbone's name says; 1 of a ResNet, which takes any size."""
        if self.student.resnet:
            return 1
        named = re.search(r"patch(\d+)", self.student.backbone)
        return self.student.patch_size or (int(named.group(1)) if named else 1)

    @property
    def elastic(self) -> Literal["any", "same_topology"]:
        """Whether the run may go on with another number of processes or micro-batches (DESIGN 3.4)."""
        whole_batch = self.student.batch_norm and not self.student.virtual_batch
        whole_batch |= any(getattr(config, "over_ranks_batch", False) for config in self.objectives.chosen().values())
        return "same_topology" if whole_batch else "any"

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        names = [view.name for view in self.views]
        if len(set(names)) != len(names):
            raise ValueError(f"views: every view needs its own name, but these are given: {', '.join(names)}")
        if self.objectives.needs_teacher and not any(view.role in ("teacher", "both") for view in self.views):
            raise ValueError("views: the teacher sees none; give one view the role teacher or both")
        if not any(view.role in ("student", "both") for view in self.views):
            raise ValueError("views: the student sees none; give one view the role student or both")
        chosen = self.objectives.names()
        if not chosen:
            raise ValueError(f"objectives: none is given; name at least one of {', '.join(NAMES)}")
        strange = sorted(set(self.objectives.weights) - set(chosen))
        if strange:
            raise ValueError(f"objectives.weights.{strange[0]}: no such objective here; there are {', '.join(chosen)}")
        if set(self.student.objectives) != set(chosen):
            raise ValueError(
                f"student.objectives {list(self.student.objectives)} differ from objectives {chosen}; leave the former out"
            )
        check_objectives(self)
        if self.batch % self.engine.accumulate:
            raise ValueError(
                f"engine.accumulate: {self.batch} images cannot be cut into {self.engine.accumulate} equal parts"
            )
        if self.engine.zero == 0 and self.precision == "bf16" and self.engine.accumulate > 1:
            raise ValueError(
                "engine.accumulate: without ZeRO DeepSpeed adds up bf16 gradients in bf16; set engine.zero to 1 or more"
            )
        if self.images < self.batch:
            raise ValueError(f"images: {self.images} is less than one batch of {self.batch}")
        return self


def load_recipe(source: str | Path, overrides: typing.Sequence[str] = (), tiny: bool = False) -> Recipe:
    """Read a recipe by name (`demo`) or file, apply `key=value` overrides, and check it.

    Raises RecipeError for an unknown recipe, key or value; the message names the nearest valid one.
    """
    path = Path(source)
    if not path.suffix:
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        raise RecipeError(unknown(source))
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no keys; see {RECIPES / 'demo.yaml'} for an example")
    _name_views(tree, f"{path}:\n ")
    if tiny:
        tree = shrink(tree)
    written = copy.deepcopy(tree)
    for override in overrides:
        apply_override(tree, override)
        _name_views(tree, f"{COMMAND_LINE}:")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_blame(mistakes(Recipe, error), written, path)) from error


def _blame(told: list[str], written: dict[str, Any], path: Path) -> str:
    """Which mistakes stand in the file already, and which came with the command line."""
    try:
        Recipe.model_validate(written)
        of_file: list[str] = []
    except ValidationError as error:
        of_file = mistakes(Recipe, error)
    there = [line for line in told if line in of_file]
    here = [line for line in told if line not in of_file]
    parts = ["\n  ".join([f"{path}:", *there])] if there else []
    if here:
        parts.append(f"{COMMAND_LINE}: {here[0]}" if len(here) == 1 else "\n  ".join([f"{COMMAND_LINE}:", *here]))
    return "\n".join(parts)


def _name_views(tree: dict[str, Any], origin: str) -> None:
    """Spell out views that are given by name, so that overrides and `--tiny` reach into them."""
    if isinstance(views := tree.get("views"), str):
        try:
            tree["views"] = named_views(views)
        except ValueError as error:
            raise RecipeError(f"{origin} views: {error}") from error


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate nested dictionaries; `origin` is named in the error."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n  ".join([f"{origin}:", *mistakes(Recipe, error)])) from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; list items are named by index or by their `name` (`views.local.size=32`)."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r}: write it as key=value, for example optimizer.lr=0.001")
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = _item(node, part, path)
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {text!r} is no value that YAML can read") from error
    if isinstance(node, list):
        raise RecipeError(f"override {override!r}: name a key of one item, for example views.0.size=64")
    node[last] = value


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as resolved, as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _item(items: list[Any], part: str, path: str) -> Any:
    for index, item in enumerate(items):
        if part == str(index) or (isinstance(item, dict) and item.get("name") == part):
            return item
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise RecipeError(f"override {path}: there is no {part!r}; it has {', '.join(names)}")
