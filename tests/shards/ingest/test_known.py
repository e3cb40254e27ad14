"""The index of what was kept: answers as brute force gives them, memory flat, and the last commit after any death."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gristmill.shards.ingest import known as module
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.fingerprint import distance
from gristmill.shards.ingest.known import Known, Match
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Entry = tuple[bytes, bytes | None]


class Plain:
    """The same by brute force."""

    def __init__(self, near: int | None) -> None:
        self.near, self.kept = near, list[Entry]()

    def find(self, digest: bytes, fingerprint: bytes | None) -> Match | None:
        if any(digest == earlier for earlier, _ in self.kept):
            return Match(Outcome.DUPLICATE, digest, 0)
        if self.near is None or not fingerprint:
            return None
        apart = [(distance(fingerprint, p), i) for i, (_, p) in enumerate(self.kept) if p]
        if not apart or min(apart)[0] > self.near:
            return None
        return Match(Outcome.NEAR_DUPLICATE, self.kept[min(apart)[1]][0], min(apart)[0])

    def sift(self, entries: Sequence[Entry]) -> list[Match | None]:
        answers = []
        for entry in entries:
            answers.append(self.find(*entry))
            if answers[-1] is None:
                self.kept.append(entry)
        return answers


def flipped(fingerprint: bytes, bits: Sequence[int]) -> bytes:
    number = int.from_bytes(fingerprint, "little")
    for bit in set(bits):
        number ^= 1 << bit
    return number.to_bytes(32, "little")


def drawn(seed: int, count: int, parents: int = 12, start: int = 0) -> list[Entry]:
    """Entries around few fingerprints, 0 to 45 bits away; one in eight without one, one in eight met before."""
    numbers = np.random.default_rng(seed)
    around = [numbers.bytes(32) for _ in range(parents)]
    entries: list[Entry] = []
    for _ in range(start + count):
        bits = numbers.choice(256, int(numbers.integers(0, 46)), replace=False).tolist()
        look = flipped(around[int(numbers.integers(parents))], bits)
        entry = numbers.bytes(16), None if numbers.random() < 0.12 else look
        entries.append(entries[int(numbers.integers(len(entries)))] if entries and numbers.random() < 0.12 else entry)
    return entries[start:]


def parts(entries: Sequence[Entry]) -> tuple[list[bytes], list[bytes | None]]:
    return [digest for digest, _ in entries], [fingerprint for _, fingerprint in entries]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for so few entries that segments come about and are merged."""
    monkeypatch.setattr(module, "ROOM", 60)
    monkeypatch.setattr(module, "_BLOCK", 16)


@pytest.mark.usefixtures("small")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), near=st.sampled_from([None, 0, 7, 15, 16, 24, 31]), cut=st.integers(0, 300),
    parents=st.sampled_from([3, 12, 200]),
)  # fmt: skip
def test_answers_are_those_of_brute_force(seed: int, near: int | None, cut: int, parents: int):
    """Whatever was searched in memory or in segments, and wherever the process went on after a commit."""
    entries = drawn(seed, 300, parents)
    plain = Plain(near)
    with tempfile.TemporaryDirectory() as folder:
        with Known(Path(folder, "k"), near) as known:
            assert known.sift(*parts(entries[:cut])) == plain.sift(entries[:cut])
            known.commit(cut)
        with Known(Path(folder, "k"), near) as known:
            assert (known.mark, known.entries) == (cut, len(plain.kept))
            for entry in entries[:cut:7] + entries[cut : cut + 5]:
                assert known.find(*entry) == plain.find(*entry)
            assert known.sift(*parts(entries[cut:])) == plain.sift(entries[cut:])
            assert known.segments == 0 or known.entries > 44


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("near", [15, 31])
def test_no_pattern_of_bits_is_missed(tmp_path: Path, near: int):
    """Distances spread over the bands in the worst way: as evenly as they can be."""
    numbers = np.random.default_rng(near)
    originals = [(numbers.bytes(16), numbers.bytes(32)) for _ in range(100)]
    with Known(tmp_path, near) as known:
        assert known.sift(*parts(originals)) == [None] * 100
        for digest, fingerprint in originals:
            shift = int(numbers.integers(256))
            spread = [(shift + i * 256 // near) % 256 for i in range(near)]
            worst = [16 * (i % 16) + int(numbers.integers(8)) + 8 * (i // 16) for i in range(near)]
            for bits in (spread, worst):
                match = Match(Outcome.NEAR_DUPLICATE, digest, len(set(bits)))
                assert known.find(b"q" * 16, flipped(fingerprint, bits)) == match
                further = flipped(fingerprint, [*bits, next(b for b in range(256) if b not in bits)])
                assert known.find(b"q" * 16, further) is None


def test_equal_bytes_come_first_then_the_nearest_then_the_earliest(tmp_path: Path):
    look = bytes(range(32))
    with Known(tmp_path, 10) as known:
        known.add(b"a" * 16, flipped(look, [1, 2, 3]))
        known.add(b"b" * 16, flipped(look, [4, 5]))
        known.add(b"c" * 16, flipped(look, [6, 7]))
        known.add(b"d" * 16)
        assert known.find(b"a" * 16, look) == Match(Outcome.DUPLICATE, b"a" * 16, 0)
        assert known.find(b"d" * 16, look) == Match(Outcome.DUPLICATE, b"d" * 16, 0)
        assert known.find(b"e" * 16, look) == Match(Outcome.NEAR_DUPLICATE, b"b" * 16, 2)
        assert known.find(b"e" * 16, b"") is None
        assert known.entries == 4


def test_what_is_near_only_to_what_was_not_kept_is_kept(tmp_path: Path):
    look = bytes(32)
    chain = [(bytes([i]) * 16, flipped(look, range(20 * i))) for i in range(4)]
    with Known(tmp_path, 20) as known:
        found = known.sift(*parts(chain))
    assert [match and match.digest[0] for match in found] == [None, 0, None, 2]


def test_large_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As many as are really merged; every tenth is asked for again, changed in as many bits as are allowed."""
    monkeypatch.setattr(module, "ROOM", 1 << 13)
    count, numbers = 5 << 13, np.random.default_rng(1)
    digests = np.frombuffer(numbers.bytes(16 * count), "S16").astype(object)
    looks = numbers.integers(0, 256, (count, 32), dtype=np.uint8)
    keys = [bytes(d).ljust(16, b"\0") for d in digests]
    with Known(tmp_path, 31) as known:
        assert known.sift(keys, [look.tobytes() for look in looks]) == [None] * count
        assert known.segments <= 3
        asked = range(0, count, 997)
        for i in asked:
            changed = flipped(looks[i].tobytes(), numbers.choice(256, 31, replace=False).tolist())
            assert known.find(b"?" * 16, changed) == Match(Outcome.NEAR_DUPLICATE, keys[i], 31)
            assert known.find(keys[i]) == Match(Outcome.DUPLICATE, keys[i], 0)


WRITER = """
import sys, numpy as np
from pathlib import Path
from gristmill.shards.ingest import known as module
module.ROOM, module._BLOCK = 700, 100
numbers = np.random.default_rng(0)
with module.Known(Path(sys.argv[1]), 31) as known:
    start = known.mark + 1
    for unit in range(10**6):
        digests = [numbers.bytes(16) for _ in range(100)]
        looks = [numbers.bytes(32) for _ in range(100)]
        if unit >= start:
            assert known.sift(digests, looks) == [None] * 100
            known.commit(unit)
            print(unit, flush=True)
"""


def test_after_a_kill_it_is_as_it_was_at_the_last_commit(tmp_path: Path):
    said = -1
    for turn in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "k")], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert writer.stdout is not None
        for _ in range(3 + 7 * turn):
            line = writer.stdout.readline()
            assert line, "the writer died by itself"
            said = int(line)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        said = max([said, *(int(line) for line in writer.stdout)])
        writer.stdout.close()
        with Known(tmp_path / "k", 31) as known:
            assert known.mark in (said, said + 1)
            assert known.entries == 100 * (known.mark + 1)
            said = known.mark
            names = {path.name for path in (tmp_path / "k").iterdir()}
            assert sum(name.endswith(".segment") for name in names) == known.segments
            assert not any(name.endswith(".partial") for name in names)
    numbers = np.random.default_rng(0)
    with Known(tmp_path / "k", 31) as known:
        for _ in range(said + 1):
            digests = [numbers.bytes(16) for _ in range(100)]
            looks = [numbers.bytes(32) for _ in range(100)]
            assert known.find(digests[3]) == Match(Outcome.DUPLICATE, digests[3], 0)
            assert known.find(b"?" * 16, looks[5]) == Match(Outcome.NEAR_DUPLICATE, digests[5], 0)


@pytest.mark.usefixtures("small")
def test_what_was_not_committed_is_gone_and_can_be_added_again(tmp_path: Path):
    entries = drawn(3, 300, 200)
    plain = Plain(31)
    with Known(tmp_path, 31) as known:
        plain.sift(entries[:90])
        known.sift(*parts(entries[:90]))
        known.commit(7)
        known.sift(*parts(entries[90:]))
    with Known(tmp_path, 31) as known:
        assert (known.mark, known.entries) == (7, len(plain.kept))
        assert known.sift(*parts(entries[90:])) == plain.sift(entries[90:])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("victim", ["*.segment", "*.tail", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_index_opens_empty(tmp_path: Path, victim: str, damage: str):
    entries = drawn(5, 120, 100)
    with Known(tmp_path, 31) as known:
        known.sift(*parts(entries))
        known.commit(3)
    path = next(iter(sorted(tmp_path.glob(victim))))
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        data = bytearray(path.read_bytes())
        data[2] ^= 0x55
        path.write_bytes(data)
    with Known(tmp_path, 31) as known:
        assert (known.mark, known.entries, list(tmp_path.iterdir())) == (-1, 0, [])
        assert known.sift(*parts(entries)) == Plain(31).sift(entries)


def test_an_index_without_fingerprints_is_not_taken_for_one_with(tmp_path: Path):
    with Known(tmp_path, None) as known:
        known.add(b"a" * 16, bytes(32))
        known.commit(0)
        assert known.find(b"b" * 16, bytes(32)) is None
    with Known(tmp_path, None) as known:
        assert (known.mark, known.entries) == (0, 1)
    with Known(tmp_path, 3) as known:
        assert (known.mark, known.entries) == (-1, 0)


def test_one_process_at_a_time(tmp_path: Path):
    with Known(tmp_path / "k", 31), pytest.raises(IngestError, match="another process"):
        Known(tmp_path / "k", 31)
    with pytest.raises(IngestError, match="give 0 to 31"):
        Known(tmp_path / "k", 32)


def test_wrong_lengths_are_errors(tmp_path: Path):
    with Known(tmp_path, 31) as known:
        for call in (
            lambda: known.add(b"a"), lambda: known.find(b"a" * 16, b"b"), lambda: known.sift([b"a" * 16], []),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="digest"):
                call()
        assert known.entries == 0


def test_clear_and_destroy(tmp_path: Path):
    with Known(tmp_path / "k", 31) as known:
        known.add(b"a" * 16)
        known.commit(4)
        known.clear()
        assert (known.mark, known.entries, known.find(b"a" * 16)) == (-1, 0, None)
        known.add(b"b" * 16)
        known.commit(5)
    known = Known(tmp_path / "k", 31)
    assert (known.mark, known.entries) == (5, 1)
    known.destroy()
    assert not (tmp_path / "k").exists()


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_an_error_and_the_last_commit_stays(small_disk: Path):
    """A segment has tables of over 4 MB: more than this disk holds."""
    entries = drawn(8, 200, 100)
    with Known(small_disk / "k", 31) as known:
        known.sift(*parts(entries[:10]))
        known.commit(1)
        before = known.entries
        with pytest.raises(OSError, match="No space"):
            known.sift(*parts(entries))
        assert not list((small_disk / "k").glob("*.partial"))
    with Known(small_disk / "k", 31) as known:
        assert (known.mark, known.entries) == (1, before)


GROWTH = """
import sys
from pathlib import Path
import numpy as np
from gristmill.shards.ingest import known as module

module.ROOM = 1 << 12
numbers = np.random.default_rng(2)

def some(count):
    return [numbers.bytes(16) for _ in range(count)], [numbers.bytes(32) for _ in range(count)]

def anonymous():  # kB of memory of this process that no file backs
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

with module.Known(Path(sys.argv[1]), 15) as known:
    known.sift(*some(1 << 13))
    before = anonymous()
    for _ in range(15):
        known.sift(*some(1 << 12))
    print(known.entries, anonymous() - before)
"""


def test_memory_does_not_grow(tmp_path: Path):
    """In a process of its own, whose heap nobody has used before."""
    answer = subprocess.run([sys.executable, "-c", GROWTH, tmp_path], capture_output=True, text=True, check=True)
    entries, grown = map(int, answer.stdout.split())
    assert entries == 17 << 12
    assert grown < 6 << 10  # the entries alone are 3 MB, their tables 30
