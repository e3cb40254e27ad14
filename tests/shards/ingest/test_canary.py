"""Secrets in addresses: needed to fetch, kept where only the owner reads, and told to nobody else."""

import re
import threading
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pyarrow.parquet as pq
import pytest

from ...workers import Worker, Workers
from .sets import encoded, ledger, scene
from .web import Page, Web

CANARY = "c4nary"


def told(root: Path, *, own: bool = False) -> dict[str, str]:
    """All that the files of a folder say, names included; Parquet is unpacked. `own`: only what an ingest keeps for itself."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name.startswith(".ingest/") == own:
            with path.open("rb") as file:
                parquet = file.read(4) == b"PAR1"
            data = str(pq.read_table(path).to_pylist()) if parquet else path.read_bytes().decode("latin-1")
            found[name] = name + data
    return found


def scraped(worker: Worker, web: Web) -> list[str]:
    """Metrics pages, as long as the command serves them; the servers that it asks answer once one knows of inputs."""
    opener, pages = build_opener(ProxyHandler({})), []
    while worker.poll() is None:
        if url := re.search(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", worker.output()):
            try:
                pages.append(opener.open(url[1], timeout=5).read().decode())
            except OSError:
                break
            if web.gate is not None and "gristmill_ingest_inputs" in pages[-1]:
                web.gate.set()
        time.sleep(0.02)
    return pages


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_leaves_the_work_folder(tmp_path: Path, workers: Workers, form: str, closed_port: int) -> None:
    pages = {f"/{number}.jpg": Page(body=encoded(scene(number))) for number in range(6)}
    pages |= {"/gone.jpg": Page(404, body=CANARY.encode()), "/ill.jpg": Page(503), "/text.jpg": Page(body=b"<html>")}
    pages["/away.jpg"] = Page(302, (("Location", f"http://{CANARY}:{CANARY}@127.0.0.1/x?{CANARY}"),))
    pages["/robots.jpg"] = Page(200, (("X-Robots-Tag", "noai"),))
    with Web(pages) as web:
        host = f"127.0.0.1:{web.port}"
        lines = [f"http://{host}{name}?sig={CANARY}-{n}&x=1#{CANARY}" for n, name in enumerate(pages)]
        lines += [f"http://user:{CANARY}pass@{host}/{number}.jpg" for number in range(3)]
        lines += [f"http://{CANARY}@{host}/4.jpg", f"ftp://u:{CANARY}@{host}/x", f"http://{host}:bad/{{}}?{CANARY}"]
        lines += [f"http://u:{CANARY}@127.0.0.1:{closed_port}/down.jpg?{CANARY}"]
        quoted = [f'"{line}","a caption http://x.example/y?key={CANARY}"' for line in lines]
        (tmp_path / "urls.csv").write_text("\n".join(["url,caption", *quoted]))
        arguments = [
            "ingest",
            str(tmp_path / "urls.csv"),
            "--out",
            str(tmp_path / "out"),
            "--keep",
            "*",
            "--tries",
            "1",
        ]
        arguments += ["--allow-private", "--workers", "1"] + (["--json"] if form == "json" else ["--metrics-port", "0"])
        web.gate = threading.Event() if form == "text" else None
        worker = workers.start("command(arguments)", arguments=arguments)
        seen = scraped(worker, web)
        assert worker.join() == 0, worker.output()
        asked = [one.path for one in web.seen]
        refused = workers.start("command(arguments)", arguments=[*arguments[:4], "--append", "--near", "3", "--json"])
        refused.join()
    assert sum(CANARY in path for path in asked) == len(pages), "the servers were asked with the keys"
    assert {one.headers.get("authorization", "")[:6] for one in web.seen} == {"", "Basic "}
    outcomes = {row["outcome"] for row in ledger(tmp_path / "out", 0)}
    assert {"kept", "gone", "server_error", "not_an_image", "bad_url", "no_connection", "opted_out"} <= outcomes
    assert CANARY not in worker.output()
    assert CANARY not in refused.output()
    if form == "text":
        assert any("gristmill_ingest_inputs" in page for page in seen)
        assert not any(CANARY in page for page in seen)
    public = told(tmp_path / "out")
    assert any(name.endswith(".tar") for name in public)
    assert [name for name, text in public.items() if CANARY in text] == []

    own = told(tmp_path / "out", own=True)
    with_secret = {name.split("/")[2] for name, text in own.items() if CANARY in text}
    assert with_secret == {"inputs"}, "where they must be, for --retry-failed, and nowhere else"
    assert (tmp_path / "out" / ".ingest").stat().st_mode & 0o777 == 0o700


def test_a_source_with_a_password(tmp_path: Path, workers: Workers) -> None:
    """The list itself lies behind a presigned url with a user in it; one command works and one is refused."""
    with Web({"/0.jpg": Page(body=encoded(scene(0)))}) as web:
        web.pages["/list.txt"] = Page(body=web.url("/0.jpg").encode())
        source = f"http://user:{CANARY}@127.0.0.1:{web.port}/list.txt?sig={CANARY}"
        arguments = ["ingest", source, "--out", str(tmp_path / "out"), "--allow-private", "--workers", "1"]
        worker = workers.start("command(arguments)", arguments=arguments)
        assert worker.join() == 0, worker.output()
        lost = workers.start(
            "command(arguments)", arguments=["ingest", source.replace("list", "lost"), *arguments[2:3], "x"]
        )
        again = workers.start("command(arguments)", arguments=[*arguments, "--append", "--image-column", CANARY[::-1]])
        assert lost.join() == 2
        again.join()
    for one in (worker, lost, again):
        assert CANARY not in one.output()
    assert [name for name, text in told(tmp_path / "out").items() if CANARY in text] == []
