"""The ledger of the wall clock: for any sequence of attempts its states sum to the wall time, and none ever falls."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from gristmill.ops.monitor.goodput import FILE, Goodput, Ledger, cause_of, read_ledger
from gristmill.ops.monitor.labels import SPENT
from gristmill.ops.report.attempts import Attempt, Attempts, read_attempts
from hypothesis import given, settings
from hypothesis import strategies as st

SECONDS = st.floats(0, 1e5)
ANY = st.floats(-1e5, 1e5) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(ANY, st.sampled_from(SPENT), st.dictionaries(st.sampled_from(SPENT), ANY, max_size=4)), max_size=20
    )
)
def test_whatever_is_booked_sums_to_the_time_that_passed(entries: list[tuple[float, str, dict[str, float]]]):
    ledger = Ledger(1000.0, 1000.0)
    for until, rest, claims in entries:
        if math.isfinite(until):
            ledger.book(until, rest, claims)
        assert sum(ledger.spent.values()) == pytest.approx(ledger.until - ledger.began, rel=1e-9, abs=1e-6)
        assert min(ledger.spent.values()) >= 0.0
    assert ledger.until == max([1000.0, *(until for until, _, _ in entries if math.isfinite(until))])


@dataclass
class Clock:
    now: float = 1e9

    def __call__(self) -> float:
        return self.now


# What an attempt does, one after another: (what, seconds that it takes, seconds that are claimed of them).
ACTS = st.lists(
    st.tuples(st.sampled_from(["step", "bad", "probe", "checkpoint", "save"]), st.floats(0, 500), st.floats(0, 500)),
    max_size=6,
)
ENDS = st.sampled_from(["done", "asked to stop by SIGTERM", "OSError: disk", "killed", "killed before it began"])


@settings(max_examples=100)
@given(st.data())
def test_any_sequence_of_attempts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Attempts with kills, errors, signals, clocks set back and ledgers lost, in a real folder."""
    folder, clock = tmp_path_factory.mktemp("run"), Clock()
    before, first, seen, position, killed = [], None, dict.fromkeys(SPENT, 0.0), 0, 0
    for number in range(data.draw(st.integers(1, 5))):
        started = clock.now
        clock.now += data.draw(st.floats(0, 100))  # imports, loading
        goodput = Goodput(folder, before, started=started, clock=clock)
        first = started if first is None else first
        assert goodput.attempts == number + 1
        assert goodput.interruptions["killed"] == killed
        told = goodput.save()
        assert all(told[state] >= seen[state] - 1e-6 for state in SPENT), "a counter fell across a restart"
        began, why = clock.now, data.draw(ENDS)
        if why != "killed before it began":
            goodput.begin()
        position = data.draw(st.integers(0, position)) if position else 0  # the checkpoint that it goes on from
        taken = position
        for what, seconds, part in data.draw(ACTS) if why != "killed before it began" else []:
            clock.now += seconds
            if what in ("step", "bad"):
                goodput.step(position, position + 8, part, bad=what == "bad")
                position += 8
            elif what == "save":
                told = goodput.save()
            else:
                goodput.claim(what, part)
            spent = goodput.ledger.spent
            assert sum(spent.values()) == pytest.approx(goodput.ledger.until - first, abs=1e-3)
            assert min(spent.values()) >= 0.0
        if not why.startswith("killed"):
            clock.now += data.draw(st.floats(0, 50))
            goodput.end(failed="Error" in why)
            told = goodput.save()
            assert sum(told.values()) == pytest.approx(max(goodput.ledger.until, clock.now) - first, abs=1e-3)
        killed += why.startswith("killed")
        seen = told
        # As read_attempts has it: a killed one ended when its log was last written.
        before.append(Attempt(began, clock.now, taken, why="" if why.startswith("killed") else why))
        clock.now += data.draw(st.floats(-200, 5000))  # down, or the clock set back


def test_what_a_restart_takes_again_is_lost_and_nothing_before_falls(tmp_path: Path):
    clock = Clock(100.0)
    first = Goodput(tmp_path, [], started=90.0, clock=clock)
    first.begin()
    for position in range(0, 40, 8):
        clock.now += 10.0
        first.step(position, position + 8, 2.0, bad=position == 8)
    told = first.save()
    assert told == dict.fromkeys(SPENT, 0.0) | {"startup": 10.0, "productive": 32.0, "data_wait": 8.0, "bad": 10.0}
    clock.now += 3.0  # of a step that never ends: killed, having been heard of a second ago
    attempts = [Attempt(100.0, clock.now - 1.0, 0)]
    clock.now += 20.0
    second = Goodput(tmp_path, attempts, started=clock.now - 5.0, clock=clock)
    second.begin()
    for position in range(16, 48, 8):  # from the checkpoint at 16: three steps again, one new
        clock.now += 10.0
        second.step(position, position + 8, 2.0, bad=False)
    clock.now += 4.0
    second.claim("probe", 3.0)
    second.end(failed=False)
    told = second.save()
    expected = {"startup": 10.0 + 5.0 + 1.0, "productive": 32.0 + 8.0, "data_wait": 10.0, "bad": 10.0, "probe": 3.0}
    assert told == dict.fromkeys(SPENT, 0.0) | expected | {"lost": 2.0 + 30.0, "down": 1.0 + 15.0}
    assert second.interruptions == {"killed": 1, "signal": 0, "error": 0}


def test_an_error_loses_the_step_under_way(tmp_path: Path):
    clock = Clock(0.0)
    goodput = Goodput(tmp_path, [], clock=clock)
    goodput.begin()
    clock.now = 7.0
    goodput.end(failed=True)
    assert goodput.save()["lost"] == 7.0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"began": 1}', '{"began": 0, "until": 5, "reached": 0, "spent": {"lost": 5}}', "nan"]
)
def test_a_damaged_ledger_is_made_anew_from_the_attempts(tmp_path: Path, text: str):
    (tmp_path / FILE).write_text(text)
    assert read_ledger(tmp_path / FILE) is None
    attempts = [Attempt(1000.0, 1100.0, 0, 16, 30.0), Attempt(1150.0, 1200.0, 32, why="asked to stop by SIGTERM")]
    goodput = Goodput(tmp_path, attempts, started=1250.0, clock=Clock(1260.0))
    assert goodput.save() == dict.fromkeys(SPENT, 0.0) | {"productive": 120.0, "lost": 30.0, "down": 100.0}
    assert goodput.ledger.reached == 48
    assert read_ledger(tmp_path / FILE) == goodput.ledger


def test_numbers_that_do_not_add_up_are_not_believed(tmp_path: Path):
    spent = dict.fromkeys(SPENT, 1.0)
    for until in (9.5, -1.0, math.inf, 1e300):
        (tmp_path / FILE).write_text(json.dumps({"began": 0.0, "until": until, "reached": 0, "spent": spent}))
        assert read_ledger(tmp_path / FILE) is None
    (tmp_path / FILE).write_text(json.dumps({"began": 0.0, "until": 9.0, "reached": 0, "spent": spent}))
    assert read_ledger(tmp_path / FILE) is not None


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path):
    goodput = Goodput(tmp_path / "gone", [], clock=Clock(5.0))
    goodput.begin()
    assert sum(goodput.save().values()) == 0.0
    assert not (tmp_path / "gone").exists()


def test_why_attempts_ended():
    causes = [cause_of(Attempt(0.0, 1.0, 0, why=why)) for why in ("", "done", "asked to stop by SIGINT", "OSError: x")]
    assert causes == ["killed", None, "signal", "error"]
    assert cause_of(Attempt(0.0, 1.0, 0, why="KeyboardInterrupt: ")) == "signal"


def test_the_attempts_before_are_known_before_the_log_is_cut(tmp_path: Path):
    attempts = Attempts(tmp_path)
    assert attempts.before == []
    attempts.begin(0)
    (tmp_path / "metrics.jsonl").write_text("")
    again = Attempts(tmp_path)
    assert read_attempts(tmp_path)[0].ended is None
    (one,) = again.before
    assert one.ended == max(one.began, (tmp_path / "metrics.jsonl").stat().st_mtime)
    assert cause_of(one) == "killed"
