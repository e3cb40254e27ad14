"""What a panel asks, in a form that is no text: written as PromQL for Grafana and Prometheus, evaluated over history.

A small language of nine forms, and no parser of PromQL: a query that a panel shows can be shown without Prometheus too,
since it cannot be said in any other way (history_terms.py has the other reading; tests/ops/test_board.py ties the two).
Windows of rates are the dashboard's own ($__rate_interval), so that a panel is right at any zoom and scrape interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

RATE_WINDOW = "$__rate_interval"

Fold = Literal["sum", "avg", "min", "max", "count"]
Sign = Literal["/", "-", "+"]
Order = Literal["==", ">"]


@dataclass(frozen=True)
class Take:
    """Newest value of each series of a metric; `where`: (label, anchored regular expression).

    ranked: follows the choice of ranks; what only rank 0 knows must not vanish when another rank is looked at.
    """

    metric: str
    where: tuple[tuple[str, str], ...] = ()
    ranked: bool = True


@dataclass(frozen=True)
class Rate:
    """Growth of counters a second."""

    of: Take


@dataclass(frozen=True)
class Agg:
    """Over all series that agree in `by`."""

    fold: Fold
    of: Term
    by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Top:
    """The `count` greatest at each time."""

    count: int
    of: Term


@dataclass(frozen=True)
class Age:
    """Seconds since a time stamp."""

    of: Term


@dataclass(frozen=True)
class Quantile:
    """Of a histogram: the bucket's bounds are known, inside it values count as spread evenly."""

    share: float
    metric: str  # without _bucket


@dataclass(frozen=True)
class Both:
    """left sign right, of series with equal labels; spread: the right side is one series without labels."""

    left: Term
    sign: Sign
    right: Term
    spread: bool = False


@dataclass(frozen=True)
class Only:
    """Series whose value compares so with a number."""

    of: Term
    order: Order
    than: float


@dataclass(frozen=True)
class Scaled:
    """Times a constant."""

    of: Term
    factor: float


Term = Take | Rate | Agg | Top | Age | Quantile | Both | Only | Scaled


def promql(term: Term, scope: tuple[str, ...] = ("run", "rank")) -> str:
    """The term as PromQL; `scope`: labels of the target that variables of these names choose."""
    match term:
        case Take(metric, where, ranked):
            chosen = [_chosen(label) for label in scope if ranked or label != "rank"]
            wanted = [f"{label}{_matches(pattern)}" for label, pattern in where]
            return f"{metric}{{{','.join([*wanted, *chosen])}}}"
        case Rate(of):
            return f"rate({promql(of, scope)}[{RATE_WINDOW}])"
        case Agg(fold, of, by):
            kept = f" by ({', '.join(by)}) " if by else ""
            return f"{fold}{kept}({_bare(of, scope)})"
        case Top(count, of):
            return f"topk({count}, {_bare(of, scope)})"
        case Age(of):
            return f"(time() - {promql(of, scope)})"
        case Quantile(share, metric):
            counts = Agg("sum", Rate(Take(f"{metric}_bucket")), ("le",))
            return f"histogram_quantile({share:g}, {promql(counts, scope)})"
        case Both(left, sign, right, spread):
            sign_ = f"{sign} on () group_left ()" if spread else sign
            return f"({promql(left, scope)} {sign_} {promql(right, scope)})"
        case Only(of, order, than):
            return f"({promql(of, scope)} {order} {than:g})"
        case Scaled(of, factor):
            return f"({promql(of, scope)} * {factor:g})"


def _bare(term: Term, scope: tuple[str, ...]) -> str:
    """Without the outermost parentheses: for an argument, which has its own."""
    text = promql(term, scope)
    return text[1:-1] if isinstance(term, Age | Both | Only | Scaled) else text


def _chosen(label: str) -> str:
    """Of runs one is chosen, by its name; of ranks and ingests several, which Grafana makes an expression of."""
    return f'{label}{"=" if label == "run" else "=~"}"${label}"'


def _matches(pattern: str) -> str:
    sign = "=" if re.fullmatch(r"[\w ]*", pattern) else "=~"
    return f'{sign}"' + pattern.replace("\\", "\\\\") + '"'


def samples_of(term: Term) -> Iterator[str]:
    """Names of the samples that the term reads."""
    match term:
        case Take(metric):
            yield metric
        case Quantile(_, metric):
            yield f"{metric}_bucket"
        case Both(left, _, right):
            yield from samples_of(left)
            yield from samples_of(right)
        case Rate(of) | Agg(_, of) | Top(_, of) | Age(of) | Only(of) | Scaled(of):
            yield from samples_of(of)
