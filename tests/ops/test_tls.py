"""Metrics over https with certificates that are made here: who is refused, what is renewed, and a real Prometheus."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from gristmill.ops.monitor import client
from gristmill.ops.monitor.exporter import CONNECTIONS, Exporter
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.serving import serve
from gristmill.ops.monitor.tls import Secured, TLSError
from gristmill.ops.recipe import MetricsConfig, TLSConfig

from ..servers import end, kept_ports
from ..waiting import wait_for

DEPLOY = Path(__file__).parents[2] / "ops" / "deploy" / "prometheus"


@dataclass
class Certificates:
    """An authority's, a server's for 127.0.0.1, a client's, and those of an authority that nobody here knows."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def make(self, name: str, authority: str | None, *more: str) -> None:
        """NAME.pem and NAME.key, signed by AUTHORITY.pem, or by itself."""
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
        command += [
            "-subj",
            f"/CN=gristmill {name}",
            "-keyout",
            self[f"{name}.key"],
            "-out",
            self[f"{name}.pem"],
            *more,
        ]
        if authority:
            command += ["-CA", self[f"{authority}.pem"], "-CAkey", self[f"{authority}.key"]]
        subprocess.run(command, check=True, capture_output=True)

    def config(self, *, mutual: bool = True) -> TLSConfig:
        ca = Path(self["ca.pem"]) if mutual else None
        return TLSConfig(certificate=Path(self["server.pem"]), key=Path(self["server.key"]), client_ca=ca)


SERVER = ("-nodes", "-addext", "subjectAltName=IP:127.0.0.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl: `make system` installs it")
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    for ca in ("ca", "other"):
        made.make(ca, None, "-nodes", "-addext", "basicConstraints=critical,CA:TRUE")
    made.make("server", "ca", *SERVER)
    made.make("client", "ca", "-nodes")
    made.make("stranger", "other", "-nodes")
    made.make("locked", "ca", "-passout", "pass:secret")
    return made


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("run", {"world": 1})
    metrics.observe_step({"loss": 2.5})
    return metrics


@pytest.fixture
def kept() -> Iterator[int]:
    with kept_ports(1) as [port]:
        yield port


@pytest.fixture
def mutual(made: Certificates, metrics: Metrics) -> Iterator[Exporter]:
    with Exporter(metrics.registry, 0, tls=Secured(made.config()).context) as exporter:
        yield exporter


def test_only_clients_with_a_certificate_of_the_authority_are_answered(made: Certificates, mutual: Exporter):
    assert mutual.url.startswith("https://127.0.0.1:")
    ca, own = made["ca.pem"], (made["client.pem"], made["client.key"])
    assert b"gristmill_mixture_loss 2.5\n" in client.get(mutual.url, ca, *own, timeout=30)
    for refused in ((), (made["stranger.pem"], made["stranger.key"])):
        with pytest.raises((OSError, HTTPException)):
            client.get(mutual.url, ca, *refused, timeout=30)
    with pytest.raises((OSError, HTTPException)):  # plain http at an https port
        client.get(mutual.url.replace("https", "http"), timeout=30)
    assert b"gristmill_mixture_loss 2.5\n" in client.get(mutual.url, ca, *own, timeout=30)


def test_a_client_knows_whom_it_asks(made: Certificates, mutual: Exporter):
    own = (made["client.pem"], made["client.key"])
    for wrong in (made["other.pem"], None):
        with pytest.raises(ssl.SSLCertVerificationError):
            client.get(mutual.url, wrong, *own, timeout=30)
    named = mutual.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
        client.get(named, made["ca.pem"], *own, timeout=30)
    with pytest.raises(ValueError, match="encrypted"):
        client.get(mutual.url, made["ca.pem"], made["locked.pem"], made["locked.key"], timeout=30)


def test_without_client_ca_it_is_https_for_everybody(made: Certificates, metrics: Metrics):
    with Exporter(metrics.registry, 0, tls=Secured(made.config(mutual=False)).context) as exporter:
        assert client.get(exporter.url, made["ca.pem"], timeout=30)
        assert exporter.tls is not None
        assert exporter.tls.minimum_version == ssl.TLSVersion.TLSv1_2


def test_handshakes_that_hang_lock_nobody_out(made: Certificates, mutual: Exporter):
    before = threading.active_count()
    hanging = [socket.create_connection(("127.0.0.1", mutual.port)) for _ in range(CONNECTIONS * 2)]
    for one in hanging[::2]:
        one.sendall(b"\x16\x03\x01")
    own = (made["client.pem"], made["client.key"])
    assert client.get(mutual.url, made["ca.pem"], *own, timeout=60)
    assert len(mutual._open) <= CONNECTIONS
    assert threading.active_count() <= before + 2
    for one in hanging:
        one.close()


def test_renewed_files_are_met_by_new_connections_and_broken_ones_change_nothing(
    made: Certificates, metrics: Metrics, tmp_path: Path
):
    for name in ("server.pem", "server.key"):
        shutil.copy(made[name], tmp_path)
    secured = Secured(TLSConfig(certificate=tmp_path / "server.pem", key=tmp_path / "server.key"))
    with Exporter(metrics.registry, 0, tls=secured.context) as exporter:

        def met() -> str:
            return ssl.get_server_certificate(("127.0.0.1", exporter.port), timeout=30)

        before = met()
        secured.look()
        assert met() == before
        (tmp_path / "server.pem").write_text("half a cert")
        with pytest.raises(TLSError, match=r"server\.pem"):
            secured.look()
        (tmp_path / "server.pem").unlink()
        with pytest.raises(TLSError, match="cannot be read"):
            secured.look()
        assert met() == before
        shutil.copy(made["client.pem"], tmp_path / "server.pem")  # half of a pair: its key has not come yet
        for _ in range(2):
            with pytest.raises(TLSError, match="no certificate and its key"):
                secured.look()
            assert met() == before
        Certificates(tmp_path).make("server", None, *SERVER)
        secured.look()
        assert met() != before


@pytest.mark.parametrize(
    ("certificate", "key", "ca", "said"),
    [
        ("server.pem", "client.key", "ca.pem", "no certificate and its key"),
        ("gone.pem", "server.key", "ca.pem", "gone.pem"),
        ("locked.pem", "locked.key", "ca.pem", "without a password"),
        ("server.pem", "server.key", "server.key", "holds no certificate of an authority"),
    ],
)
def test_what_cannot_be_used_is_said_and_never_replaced_by_plain_http(
    made: Certificates, metrics: Metrics, tmp_path: Path, certificate: str, key: str, ca: str, said: str
):
    files = TLSConfig(certificate=Path(made[certificate]), key=Path(made[key]), client_ca=Path(made[ca]))
    told: list[str] = []
    config = MetricsConfig(port=0, tls=files)
    assert serve(config, metrics.registry, rank=0, world=1, folder=tmp_path, notes=told.append) is None
    assert len(told) == 1
    assert said in told[0]
    assert "metrics are not served" in told[0]
    assert list(tmp_path.iterdir()) == []


def answered(parts: list[bytes], *, pause: float = 0.0) -> tuple[str, Callable[[], object]]:
    """A server that answers one request with these parts, and how to end it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            for part in parts:
                try:
                    connection.sendall(part)
                except OSError:
                    return
                time.sleep(pause)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/metrics", lambda: (thread.join(30), listening.close())


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], OSError, "HTTP 404 Not Found"),
        ([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"], OSError, "HTTP 302"),
        ([b"SSH-2.0-x\r\n"], HTTPException, "no HTTP"),
        ([], HTTPException, "without an answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"abc"], HTTPException, "97 bytes before its end"),
    ],
)
def test_a_client_says_what_is_wrong_with_an_answer(parts: list[bytes], error: type[Exception], said: str):
    url, end = answered(parts)
    with pytest.raises(error, match=said):
        client.get(url, timeout=30)
    end()


def test_a_client_waits_so_long_and_no_longer_however_the_answer_drips():
    url, end = answered([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 400], pause=0.05)
    with pytest.raises(TimeoutError):
        client.get(url, timeout=0.4)
    end()


@pytest.mark.parametrize("url", ["ftp://x/", "http://", "file:///etc/passwd", "http://127.0.0.1:1/a\r\nX: y", "x"])
def test_a_client_asks_http_only(url: str):
    with pytest.raises(ValueError, match="URL"):
        client.get(url)


@pytest.mark.system
@pytest.mark.program("prometheus")
def test_a_real_prometheus_finds_a_run_by_its_target_and_scrapes_through_mtls(
    made: Certificates, metrics: Metrics, tmp_path: Path, kept: int
):
    """With the configuration that is shipped: ranks each for itself, and a node's page; then the run is killed."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    jobs = [
        next(j for j in yaml.safe_load((DEPLOY / name).read_text())["scrape_configs"] if "file_sd_configs" in j)
        for name in ("prometheus.yml", "nodes.yml")
    ]
    targets = tmp_path / "shared"
    for job in jobs:
        job["file_sd_configs"] = [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}]
        job["tls_config"] = {"ca_file": made["ca.pem"], "cert_file": made["client.pem"], "key_file": made["client.key"]}
        job["scrape_interval"] = job["scrape_timeout"] = "1s"
    jobs[1]["relabel_configs"].append({"target_label": "via", "replacement": "node"})  # not as the target's own
    del config["alerting"], config["rule_files"]
    (tmp_path / "prometheus.yml").write_text(json.dumps({**config, "scrape_configs": jobs}))  # JSON is YAML
    address = f"127.0.0.1:{kept}"
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'db'}"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    run = tmp_path / "vit-s 7"
    run.mkdir()
    wished = MetricsConfig(port=0, tls=made.config(), targets=targets)
    serving = serve(wished, metrics.registry, rank=0, world=1, folder=run, notes=print)
    assert serving is not None
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)

    def query(expression: str) -> list[dict[str, Any]] | None:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            page = client.get(f"http://{address}/api/v1/query?{urlencode({'query': expression})}", timeout=5)
        except (OSError, HTTPException):
            return None  # not up yet
        return json.loads(page)["data"]["result"]

    def found(expression: str) -> list[dict[str, Any]]:
        return wait_for(lambda: query(expression) or [], 60)

    try:
        wanted = {"job": "gristmill", "run": "vit-s 7", "rank": "0", "node": socket.gethostname()}
        for via in ("", "node"):
            name = f'run="vit-s 7", via="{via}"'
            [loss] = found(f"gristmill_mixture_loss{{{name}}} == 2.5")
            assert wanted.items() <= loss["metric"].items()
            assert found(f'gristmill_run_info{{exported_run="run", {name}}}')
        assert found('gristmill_node_rank_up{rank="0", run="vit-s 7"} == 1')
        assert found('up{run="vit-s 7"} == 1')
        serving.close(clean=False)  # as if it had failed: its target stays
        assert found('up{run="vit-s 7"} == 0')
        serving.close(clean=True)
        assert wait_for(lambda: query('up{run="vit-s 7"}') == [], 60)  # answered, and with nothing
    finally:
        end(server)


@pytest.mark.system
@pytest.mark.program("promtool")
def test_promtool_takes_the_configurations_with_the_rules_beside_them(tmp_path: Path):
    (tmp_path / "rules").mkdir()
    shutil.copy(DEPLOY.parents[1] / "monitor" / "rules" / "gristmill.yml", tmp_path / "rules")
    for source in sorted(DEPLOY.glob("*.yml")):
        config = yaml.safe_load(source.read_text())
        for job in config["scrape_configs"]:
            # Debian's promtool is built without Kubernetes: all but this one field is checked.
            if job.pop("kubernetes_sd_configs", None):
                job["static_configs"] = [{"targets": ["127.0.0.1:9464"]}]
        (tmp_path / source.name).write_text(yaml.safe_dump(config))
        said = subprocess.run(["promtool", "check", "config", tmp_path / source.name], capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "1 rule files found" in said.stdout
