"""A run of Weights & Biases: its id is kept in the run folder, so that a run that goes on is the same one there.

What was sent is not sent again (the server does not take a step twice, and neither shall an offline run): `wandb.json`
holds up to which image steps and probes were sent. After kill -9 the last points may be missing: wandb writes in blocks,
of which it loses the one under way. An online run asks the server how far it came. Of the machine, the environment, the command and the code nothing is
sent, since all of these have been seen to hold keys; the recipe goes without its secrets.
"""

from __future__ import annotations

import json
import os
import secrets
from typing import TYPE_CHECKING, Any

import wandb
from PIL import Image

from .redacted import without_secrets

if TYPE_CHECKING:
    from .run import Run

FILE = "wandb.json"
PATIENCE = 60.0  # seconds that beginning and ending may take


class WandbRun:
    """Begins or goes on with the run of this folder. Raises wandb's errors: no key, no network."""

    name = "Weights & Biases"

    def __init__(self, run: Run) -> None:
        config = run.recipe.log.wandb
        assert config is not None
        self.path = run.folder / FILE
        kept: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.id: str = kept.get("id") or secrets.token_hex(4)
        self.sent: dict[str, int] = kept.get("sent", {})
        self._keep()
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            finish_timeout_raises=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run.folder.resolve().name,
            mode=config.mode,
            id=self.id,
            resume="allow",
            dir=run.folder,
            config=without_secrets(run.recipe.model_dump(mode="json")),
            settings=settings,
        )
        if self._run.resumed and not self._run.offline:
            self.sent = {kind: min(at, self._run.starting_step - 1) for kind, at in self.sent.items()}

    def take(self, kind: str, position: int, values: dict[str, float]) -> None:
        if position <= self.sent.get(kind, -1):
            return
        self.sent[kind] = position
        self._keep()  # before it is sent: rather a point too few than one twice
        self._run.log(values, step=position)

    def picture(self, name: str, image: Image.Image) -> None:
        path = self.path.with_name(f"{name.replace('/', '-')}.png")
        image.save(path)
        self._run.log({name: wandb.Image(str(path))}, step=0)  # which copies it
        path.unlink()

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _keep(self) -> None:
        beside = self.path.with_suffix(".json.writing")
        beside.write_text(json.dumps({"id": self.id, "sent": self.sent}))
        os.replace(beside, self.path)
