"""What the findings of many ranks come to: alike ones said once, differences said, the slowest pair and rank named."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .finding import Finding, State, badness, size

if TYPE_CHECKING:
    from .group import Told

SKEW = 0.5  # seconds between clocks
APART = 3.0  # times slower than the others
SLOW = {"gloo": 50e6, "nccl": 1e9}  # bytes/s
TALK = "a step ends with sums over all ranks, and takes as long as the slowest"


def judge_together(told: Sequence[Told], world: int, lost: Sequence[int]) -> list[Finding]:
    """One finding for each check and state, with the ranks that made it; then what differs, and who is missing."""
    found: list[Finding] = []
    places = {each.rank: each.host for each in told}
    names = list(dict.fromkeys(finding.name for each in told for finding in each.findings))
    for name in names:
        of_name = [(each.rank, finding) for each in told for finding in each.findings if finding.name == name]
        states: set[State] = {finding.state for _, finding in of_name}
        for state in sorted(states, key=badness, reverse=True):
            alike = [(rank, finding) for rank, finding in of_name if finding.state == state]
            # Every text once, of the first rank that said it, but no more than three: a hundred hosts have one fault.
            texts: dict[str, list[int]] = {}
            for rank, finding in alike:
                texts.setdefault(finding.found if state != "ok" else finding.name, []).append(rank)
            for ranks in list(texts.values())[:3]:
                finding = next(finding for rank, finding in alike if rank == ranks[0])
                found.append(
                    replace(finding, ranks=tuple(sorted({rank for rank, _ in alike}) if len(texts) > 3 else ranks))
                )
    for name, key, what in (
        ("packages", "installed", "packages"),
        ("python", "version", "Python"),
        ("gpu", "cards", "GPUs"),
    ):
        apart = _apart(told, name, key)
        if apart:
            found.append(_differing(what, apart, places))
    if lost:
        shown = ", ".join(map(str, lost[:8])) + (" ..." if len(lost) > 8 else "")
        remedy = "look at what these ranks printed, and whether their hosts are up"
        why = "a group is formed of all, or not at all"
        found.append(
            Finding("ranks", "bad", f"nothing heard of rank {shown} of {world}", why, remedy, {"lost": list(lost)})
        )
    else:
        hosts = len(set(places.values()))
        found.append(
            Finding(
                "ranks", "ok", f"all {world} answer, on {hosts} host{'s' * (hosts > 1)}", "a group is formed of all"
            )
        )
    return found


def judge_talk(answers: Mapping[int, Mapping[str, Any]], world: int, lost: Sequence[int], out: bool) -> list[Finding]:
    """Findings on communication, clocks and the shared folder, by what each rank measured."""
    found: list[Finding] = []
    hosts = {rank: tree["host"] for rank, tree in answers.items()}
    if out:
        found.append(_judge_shared(answers))
    errors = {rank: tree["error"] for rank, tree in answers.items() if "error" in tree}
    errors |= {rank: "it said nothing" for rank in lost if rank not in errors}
    if errors:
        texts: dict[str, list[int]] = {}
        for rank, text in sorted(errors.items()):
            texts.setdefault(text, []).append(rank)
        said = "; ".join(f"rank {', '.join(map(str, ranks[:8]))}: {text}" for text, ranks in list(texts.items())[:3])
        remedy = (
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network (`ip addr`); open all ports between the hosts; "
        )
        remedy += "with NCCL, NCCL_DEBUG=INFO says more"
        return [*found, Finding("communication", "bad", said, TALK, remedy, {"errors": errors})]
    found.append(_judge_clocks(answers, hosts))
    backend = answers[0]["backend"]
    total = min(tree["sum"] for tree in answers.values())
    pairs = {
        (rank, int(other)): rate
        for rank, tree in answers.items()
        for other, rate in tree["pairs"].items()
        if rank < int(other)
    }
    both = {pair: min(rate, answers[pair[1]]["pairs"].get(str(pair[0]), rate)) for pair, rate in pairs.items()}
    figures: dict[str, Any] = {
        "backend": backend, "sum_bytes_per_s": total, "pair_bytes_per_s": {f"{a}-{b}": rate for (a, b), rate in both.items()}
    }  # fmt: skip
    said = f"{backend} between {world} ranks: sums at {size(total)}/s"
    if not both:
        return [*found, Finding("communication", "ok", said, TALK, "", figures)]
    (low, high), rate = min(both.items(), key=lambda item: item[1])
    middle = statistics.median(both.values())
    of_ranks = {rank: statistics.median([r for pair, r in both.items() if rank in pair]) for rank in hosts}
    slowest = min(of_ranks, key=of_ranks.__getitem__)
    figures |= {"slowest_pair": [low, high], "slowest_rank": slowest}
    said += f", pairs at {size(middle)}/s; the slowest pair is {low} and {high} ({hosts[low]}, {hosts[high]}) with {size(rate)}/s"
    said += f", the slowest rank {slowest} ({hosts[slowest]})" if world > 2 else ""
    # Ranks of one host are faster than any network: pairs are compared with those of their own kind.
    kind = [r for pair, r in both.items() if (hosts[pair[0]] == hosts[pair[1]]) == (hosts[low] == hosts[high])]
    if len(kind) > 2 and rate * APART < statistics.median(kind):
        remedy = f"look at the cable, the switch and the other programs of {hosts[slowest]}, or leave it out"
        return [*found, Finding("communication", "warn", said, TALK, remedy, figures, (low, high))]
    if total < SLOW[backend]:
        remedy = "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME or NCCL_IB_HCA name a faster network; with NCCL, NCCL_DEBUG=INFO says "
        remedy += "which one it took"
        return [*found, Finding("communication", "warn", said, TALK, remedy, figures)]
    return [*found, Finding("communication", "ok", said, TALK, "", figures)]


def _judge_clocks(answers: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> Finding:
    ahead = {rank: tree["clock"][0] for rank, tree in answers.items()}
    first, last = min(ahead, key=ahead.__getitem__), max(ahead, key=ahead.__getitem__)
    skew, within = ahead[last] - ahead[first], max(tree["clock"][1] for tree in answers.values())
    figures = {"skew_seconds": skew, "within_seconds": within, "ahead_seconds": ahead}
    why = "logs and goodput of a run are put together by wall time, and signed urls end by it"
    said = f"at most {1000 * skew:.3g} ms apart, to within {1000 * within:.2g} ms"
    if skew - within > SKEW:
        said = f"rank {last} ({hosts[last]}) is {skew:.2f} s ahead of rank {first} ({hosts[first]})"
        remedy = "let one time server set both hosts: `timedatectl set-ntp true`, or chrony"
        return Finding("clocks", "warn", said, why, remedy, figures, (first, last))
    return Finding("clocks", "ok", said, why, "", figures)


def _judge_shared(answers: Mapping[int, Mapping[str, Any]]) -> Finding:
    why = "every rank writes its part of a checkpoint, and rank 0 must see them all"
    blind = [rank for rank, tree in answers.items() if tree.get("shared") == "no"]
    if blind:
        shown = ", ".join(f"{rank} ({answers[rank]['host']})" for rank in blind[:4]) + (
            " ..." if len(blind) > 4 else ""
        )
        remedy = "name a folder on a file system that all hosts share, or put checkpoints elsewhere: checkpoint.store=s3://..."
        return Finding(
            "shared out", "bad", f"rank {shown} does not see what rank 0 wrote there", why, remedy, {}, tuple(blind)
        )
    if not any(tree.get("shared") == "yes" for tree in answers.values()):
        return Finding("shared out", "skipped", "rank 0 cannot write there", why, "see the finding on out")
    return Finding("shared out", "ok", "all ranks see what rank 0 writes", why)


def _apart(told: Sequence[Told], name: str, key: str) -> dict[int, Any]:
    """What each rank has under a figure, where they do not all have the same."""
    values = {
        each.rank: f.figures.get(key) for each in told for f in each.findings if f.name == name and key in f.figures
    }
    if name == "gpu":
        values = {rank: [(card["name"], card["total"]) for card in value] for rank, value in values.items()}
    return values if any(value != next(iter(values.values())) for value in values.values()) else {}


def _differing(what: str, values: Mapping[int, Any], hosts: Mapping[int, str]) -> Finding:
    first = min(values)
    other = next(rank for rank in values if values[rank] != values[first])
    one, two = values[first], values[other]
    if isinstance(one, dict):
        names = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
        one, two = (
            ", ".join(f"{name} {each.get(name) or 'missing'}" for name in sorted(names)[:4]) for each in (one, two)
        )
    said = f"rank {first} ({hosts[first]}) has {one}, rank {other} ({hosts[other]}) has {two}"
    why = "ranks that compute in different ways drift apart"
    return Finding(
        f"same {what}",
        "warn",
        said,
        why,
        "install the same on all hosts; one container image does",
        {},
        (first, other),
    )
