"""A whole run on a GPU: trained there by DALI's crops, watched, stopped, killed, moved to a CPU and back, evaluated, exported.

What a run may promise on a GPU: the same samples as on a CPU to the last key, the same crops bit for bit wherever it goes
on, losses that agree to rounding. Kernels need not be deterministic; whether losses came out equal to the bit is printed.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gristmill.ops.evaluate.subject import open_subject
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from safetensors.torch import load_file

from .gpu_case import (
    BARE,
    BATCH,
    EVERY,
    HELD,
    PRECISIONS,
    RECIPE,
    STAGES,
    STEPS,
    STOP,
    WATCH,
    WITHOUT,
    Runs,
    Told,
)

pytestmark = pytest.mark.gpu
PROBED = ("knn", "retrieval", "purity")
# Files whose lines may wait for the device within a step: what they send there, and what decides the shape of rows.
WAITING = ("ops/guard.py", "ops/monitor/sample.py", "objectives/local_group.py")
EXPORT = "first.safetensors"
CHECKED = ("gpu", "dali", "communication", "memory")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 96 pixels, packed."""
    folder = tmp_path_factory.mktemp("pictures")
    make_demo_images(folder / "images", images=384, size=96)
    ingest_folder(folder / "images", folder / "data", shard_samples=32)
    return folder / "data" / "train"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All commands that do not need another one's run are on their way; the slowest first."""
    runs = Runs(tmp_path_factory.mktemp("runs"), data)
    try:
        runs.begin("main", runs.on_gpu)
        runs.begin("stopped", runs.stopped)
        runs.begin("killed", runs.killed)
        runs.begin("stopped on a CPU", runs.stopped, changed=WITHOUT)
        runs.begin("full", runs.full)
        for stage in STAGES:
            for precision in PRECISIONS:
                # ZeRO 3 is where DeepSpeed would like to compile something.
                bare = BARE if (precision, stage) == ("fp32", 3) else None
                settings = (f"precision={precision}", f"engine.zero={stage}")
                runs.begin(f"{precision} {stage}", runs.whole, settings, bare)
        for executor in ("dali", "cpu"):
            runs.begin(f"{executor} on a CPU", runs.whole, (f"stream.augment={executor}",), WITHOUT)
        runs.begin("watched", runs.watched)
        runs.begin("places", runs.whole, ("probes.at=[1.0]", "probes.names=[correspondence]"))
        runs.begin("cpu on a GPU", runs.whole, ("stream.augment=cpu",))
        checked = [word for name in CHECKED for word in ("--only", name)]
        runs.begin("doctor", runs.simple, "doctor", "--json", *checked)
        for name, of, changed in (("to a CPU", "stopped", WITHOUT), ("to a GPU", "stopped on a CPU", None)):
            runs.begin(f"{name}, unasked", runs.elsewhere, of, (), changed)
            runs.begin(f"{name}, by dali", runs.elsewhere, of, ("stream.augment=dali",), changed)
        runs.begin("to a CPU, by cpu", runs.elsewhere, "stopped", ("stream.augment=cpu",), WITHOUT)
        asked = [f"--data={data}", "--holdout=0.25", "--json", *(word for name in PROBED for word in ("--only", name))]
        for device in ("cuda", "cpu"):
            own = (f"--device={device}", f"--cache={runs.folder / device}")
            runs.begin(f"eval {device}", runs.simple, "eval", *asked, *own, of="main")
        runs.begin("export", runs.simple, "export", "--out", runs.folder / EXPORT, of="main", changed=WITHOUT)
        yield runs
    finally:
        runs.close()


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Told:
    """In fp32, never stopped."""
    return runs["fp32 0"].fine()


def close(ours: dict[int, float], theirs: dict[int, float], bound: float) -> None:
    """The same steps, and losses that differ by a share of at most `bound`."""
    assert ours.keys() == theirs.keys()
    apart = {position: abs(loss / theirs[position] - 1) for position, loss in ours.items()}
    assert max(apart.values()) <= bound, apart


def say(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n  {line}")


def series(page: str, name: str) -> dict[str, float]:
    """Values by labels of one metric."""
    lines = [line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_run_on_a_gpu_ends_well(runs: Runs):
    told, _ = runs["main"]
    told.fine()
    assert list(told.losses) == list(range(0, 384, 32))
    assert all(map(math.isfinite, told.losses.values()))
    assert told.saved.position == 384
    (start,) = told.starts
    assert start["devices"] == f"1 x {torch.cuda.get_device_name()}"
    assert start["topology"]["device"] == "cuda"
    assert start["topology"]["executor"] == "dali"
    assert {place for note in told.seen for place in note["where"]} == {"cuda"}
    probes = [line for line in map(json.loads, (told.run / "metrics.jsonl").open()) if line["kind"] == "probe"]
    assert [line["who"] for line in probes] == ["chance", "pixels", "random", "teacher"]
    assert "Traceback" not in told.err


def test_patches_are_probed_while_it_trains(runs: Runs):
    """The one probe that looks through the network again, at pictures, and not at features."""
    told = runs["places"].fine()
    (found,) = (line for line in map(json.loads, (told.run / "metrics.jsonl").open()) if line["kind"] == "probe")
    assert 0 < found["correspondence_cell"] <= 1
    assert 0 < found["correspondence_pck"] <= 1


def test_metrics_know_the_gpu(runs: Runs):
    told, page = runs["main"]
    told.fine()
    memory = series(page, "gristmill_cuda_memory_bytes")
    by_kind = {
        kind: value
        for labels, value in memory.items()
        for kind in ("allocated", "reserved", "peak")
        if f'"{kind}"' in labels
    }
    assert 0 < by_kind["allocated"] <= min(by_kind["peak"], by_kind["reserved"])
    (position,) = series(page, "gristmill_position_samples").values()
    assert position == HELD
    (flops,) = series(page, "gristmill_model_flops_total").values()
    (peak,) = series(page, "gristmill_peak_flops_per_second").values()  # of an H100, H200 or A100, in bf16
    (seconds,) = series(page, "gristmill_rank_own_seconds_total").values()  # by the GPU's own clock
    assert flops > 0
    assert 1e14 < peak < 1e16
    spent = sum(series(page, "gristmill_step_phase_seconds_total").values())
    assert 0 < seconds < spent
    assert flops / spent < peak


def test_a_step_waits_for_the_device_where_it_must(runs: Runs, capsys: pytest.CaptureFixture[str]):
    """The verdict is read once a step, and the teacher's sample about once a second; the rest is what is known to wait."""
    found = {site: count for site, count in runs["watched"].items() if site.startswith("MainThread")}
    for site, count in sorted(runs["watched"].items()):
        say(capsys, f"{count} times in {(WATCH[1] - WATCH[0]) // BATCH} steps: {site}")
    assert any("ops/guard.py" in site for site in found)
    steps = (WATCH[1] - WATCH[0]) // BATCH
    # Once in all of them: a checkpoint's copy, or the counting itself.
    strange = [site for site, count in found.items() if count > 1 and not any(known in site for known in WAITING)]
    assert strange == []
    assert max(found.values()) <= steps


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_precision_under_every_stage(runs: Runs, precision: str, stage: int):
    told = runs[f"{precision} {stage}"].fine()
    assert list(told.losses) == list(range(0, BATCH * STEPS, BATCH))
    assert all(map(math.isfinite, told.losses.values()))
    assert told.saved.position == BATCH * STEPS
    assert told.saved.state["topology"]["zero"] == stage
    assert told.fed == runs["fp32 0"].fed  # the same crops, bit for bit


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_learn_alike(runs: Runs, straight: Told, stage: int):
    """Also in the networks: what a loss cannot see yet is in the weights."""
    told = runs[f"fp32 {stage}"].fine()
    close(told.losses, straight.losses, 1e-4)
    # In the mean a weight has moved by 1e-4 or so, and its teacher's by a hundredth of that.
    for group, bound in (("student", 1e-6), ("teacher", 1e-7)):
        ours, theirs = told.saved.assembled(group), straight.saved.assembled(group)
        assert ours.keys() == theirs.keys()
        apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
        assert float(apart.mean()) < bound, group


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_low_precision_learns_what_fp32_learns(runs: Runs, straight: Told, precision: str):
    close(runs[f"{precision} 0"].fine().losses, straight.losses, 0.05)


@pytest.mark.parametrize("executor", ["dali", "cpu"])
def test_a_cpu_sees_the_same_samples(runs: Runs, straight: Told, executor: str, capsys: pytest.CaptureFixture[str]):
    """The order and the draws; pixels are another matter, since decoders and resamplers round in their own ways."""
    told = runs[f"{executor} on a CPU"].fine()
    assert told.saved.state["topology"]["device"] == "cpu"
    assert told.keys == straight.keys
    assert told.saved.state["cursor"] == straight.saved.state["cursor"]
    apart = max(abs(loss / straight.losses[position] - 1) for position, loss in told.losses.items())
    say(capsys, f"losses on a GPU and on a CPU with {executor} differ by {apart:.2e} at most")
    close(told.losses, straight.losses, 0.05)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_going_on_is_as_if_never_stopped(runs: Runs, straight: Told, how: str, capsys: pytest.CaptureFixture[str]):
    if how == "stopped":
        _, left, told = runs[how]
        assert left.code == 75, left.err
        assert "the same command goes on from there" in left.err
        at = f"going on from image {STOP}"
    else:
        told = runs[how]
        at = f"going on from image {2 * EVERY}"
    told.fine()
    assert at in told.err or f"going on from image {EVERY}" in told.err  # a checkpoint is written beside training
    assert "not bit for bit" not in told.err
    assert told.keys == straight.keys
    assert told.fed == straight.fed
    ours, theirs = told.saved, straight.saved
    assert ours.position == theirs.position == BATCH * STEPS
    assert ours.state["cursor"] == theirs.state["cursor"]
    close(told.losses, straight.losses, 1e-3)
    same = "equal to the bit" if told.losses == straight.losses else "not equal to the bit"
    files = "equal" if ours.digests == theirs.digests else "different"
    say(capsys, f"{how}: losses {same}, checkpoints {files}")


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(runs: Runs, straight: Told):
    """By request: the views would come from another executor."""
    refused = runs["to a CPU, unasked"]
    assert refused.code == 2, refused.err
    for word in ("views by dali", "stream.augment=dali", "stream.augment=cpu"):
        assert word in refused.err
    assert "Traceback" not in refused.err
    for executor in ("dali", "cpu"):
        told = runs[f"to a CPU, by {executor}"].fine()
        assert "not bit for bit as before" in told.err
        assert "device cuda -> cpu" in told.err
        assert f"going on from image {STOP}" in told.err
        assert told.keys == {position: keys for position, keys in straight.keys.items() if position >= STOP}
        assert told.saved.state["cursor"] == straight.saved.state["cursor"]
        close(told.losses, straight.losses, 0.05)


def test_a_checkpoint_of_a_cpu_goes_on_on_a_gpu(runs: Runs, straight: Told):
    _, _, whole = runs["stopped on a CPU"]
    refused = runs["to a GPU, unasked"]
    assert refused.code == 2, refused.err
    assert "views by cpu" in refused.err
    assert "stream.augment=dali" in refused.err
    told = runs["to a GPU, by dali"].fine()
    assert "device cpu -> cuda" in told.err
    assert "executor cpu -> dali" in told.err
    assert told.keys == {position: keys for position, keys in straight.keys.items() if position >= STOP}
    assert {place for note in told.seen for place in note["where"]} == {"cuda"}
    close(told.losses, whole.fine().losses, 0.05)


def test_the_cpus_executor_feeds_a_gpu_the_same_bits(runs: Runs, straight: Told):
    told = runs["cpu on a GPU"].fine()
    assert {place for note in told.seen for place in note["where"]} == {"cuda"}
    assert told.fed == runs["cpu on a CPU"].fine().fed
    close(told.losses, straight.losses, 0.05)


def test_eval_gives_on_a_gpu_what_it_gives_on_a_cpu(runs: Runs):
    found = {device: json.loads(runs[f"eval {device}"].fine().out) for device in ("cuda", "cpu")}
    assert all(results["settings"]["device"] == device for device, results in found.items())
    ours, theirs = (found[device]["probes"] for device in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    for who in ours:
        assert ours[who].keys() == theirs[who].keys()
        for name, value in ours[who].items():
            # Shares of 96 questions; what is chosen by them may be another of two that are as good.
            if not name.endswith(("_k", "_temperature")):
                assert value == pytest.approx(theirs[who][name], abs=0.03), (who, name)


def test_an_export_of_a_gpus_run_needs_none(runs: Runs):
    runs["export"].fine()
    told, out = runs["main"][0], runs.folder / EXPORT
    weights, trained = load_file(out), told.saved.assembled("teacher")
    assert weights
    assert all(torch.equal(weights[name], trained[f"backbone.{name}"]) for name in weights)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    there, here = (open_subject(str(where)).to(device) for where, device in ((told.run, "cuda"), (out, "cpu")))
    torch.testing.assert_close(there.features(images).cpu(), here.features(images), rtol=1e-2, atol=1e-2)


def test_doctor_finds_this_machine_fit(runs: Runs):
    told = runs["doctor"]
    found = {finding["name"]: finding for finding in json.loads(told.out)["findings"]}
    assert set(CHECKED) <= found.keys()
    bad = {name: finding["found"] for name, finding in found.items() if finding["state"] == "bad"}
    assert bad == {}
    assert told.code == 0
    assert torch.cuda.get_device_name() in found["gpu"]["found"]
    assert "nccl" in json.dumps(found["communication"]).lower()


def test_plan_foresees_the_memory_of_a_step(runs: Runs, capsys: pytest.CaptureFixture[str]):
    """ViT-S/16 with all crops, queues and memories, 8 images. What DALI holds is not torch's, and not measured here."""
    told, planned = runs["full"]
    told.fine()
    assert planned["recipe"] == RECIPE
    assert planned["batch"]["micro"] == 8
    measured = max(note["peak"] for note in told.seen[2:])  # of the second step and later ones: moments are there
    foreseen = sum(
        size for name, size in planned["memory"]["training"].items() if name not in ("DALI", "batches ready")
    )
    say(capsys, f"a step takes {measured / 2**20:.0f} MiB, plan says {foreseen / 2**20:.0f}")
    assert measured == pytest.approx(foreseen, rel=0.3)
