"""TensorBoard's event files: scalars over images seen, written as they come.

SummaryWriter hands its records to a thread, which prints a traceback where the disk is full; here whoever writes gets the
error. A file of a run that goes on begins with the mark of a restart, from which its readers drop what earlier files
have of the steps that are taken again (tensorboard/backend/event_processing/event_accumulator.py, purge_orphaned_data).
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoard:
    """A new event file in `folder`, of a run that stands at `position`. Raises OSError."""

    name = "TensorBoard"

    def __init__(self, folder: Path, position: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        path = (
            folder / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        )
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        self._write(Event(wall_time=now, step=position, session_log=SessionLog(status=SessionLog.START)))

    def take(self, kind: str, position: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=position, summary=Summary(value=scalars)))

    def picture(self, name: str, image: Image.Image) -> None:
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "png")
        shown = Summary.Image(
            height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self._write(Event(wall_time=time.time(), step=0, summary=Summary(value=[Summary.Value(tag=name, image=shown)])))

    def close(self, *, failed: bool) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
