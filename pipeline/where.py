"""The language of `where:`: which rows of a manifest a recipe trains on.

    where: width >= 128 and height >= 128 and 0.5 <= width / height <= 2 and format in ("jpg", "png")

Comparisons (also chained), `in`, `and`, `or`, `not`, `is None`, and + - * / between numbers, over the manifest's
columns. The text is read by Python's parser, but only as a tree, of which a few kinds of nodes are understood and all
others refused: nothing is ever evaluated as code. Each node becomes an Arrow kernel over whole columns. A comparison
with a missing value is unknown, as in SQL (Kleene's logic), and unknown rows are left out: a quick index has no sizes.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..shards.errors import GristmillError, nearest

MAX_TEXT = 2000  # characters

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}


class WhereError(GristmillError, ValueError):
    """A filter that cannot be read, names no column, compares what cannot be compared, or selects nothing."""


@dataclass(frozen=True)
class _Part:
    """A piece of the expression: what it yields ("number", "text", "truth" or "null") and how."""

    kind: str
    run: Callable[[pa.Table], Any]


class Where:
    """A filter that was read and checked against columns. `columns` are those that it needs.

    `schema` tells the columns and their types. WhereError, naming the piece at fault, for anything else than a truth.
    """

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = text.strip()
        self._schema = schema
        self._used: set[str] = set()
        if not self.text or len(self.text) > MAX_TEXT:
            raise WhereError(f"where: {len(self.text)} characters long; write 1 to {MAX_TEXT}, or leave it out")
        try:
            # A filter may run over several lines of YAML, which mean nothing here.
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings, which harm nobody
                tree = ast.parse(self.text.replace("\n", " "), mode="eval")
        except SyntaxError as error:
            raise self._error(f"cannot be read ({error.msg})") from error
        except (RecursionError, MemoryError, ValueError) as error:
            raise self._error(f"cannot be read ({error})") from error
        try:
            part = self._read(tree.body)
        except RecursionError as error:
            raise self._error("is nested too deeply") from error
        if part.kind != "truth":
            raise self._error(f"gives a {part.kind} and no yes or no")
        self._run = part.run
        self.columns = tuple(sorted(self._used))

    def __call__(self, table: pa.Table) -> tuple[np.ndarray, int]:
        """bool [n], which rows of a table of n rows are selected, and for how many the answer is unknown."""
        answer = self._run(table)
        if isinstance(answer, pa.Scalar):  # no column in it
            value = answer.as_py()
            return np.full(table.num_rows, bool(value)), table.num_rows if value is None else 0
        return pc.fill_null(answer, False).to_numpy(zero_copy_only=False), answer.null_count

    def _error(self, problem: str, node: ast.AST | None = None) -> WhereError:
        piece = ast.unparse(node) if node is not None else self.text
        return WhereError(
            f"where: `{piece}` {problem}. An example of a filter: width >= 128 and format in ('jpg', 'png')"
        )

    def _read(self, node: ast.expr) -> _Part:
        match node:
            case ast.BoolOp():
                return self._logic(node)
            case ast.UnaryOp(op=ast.Not()):
                inner = self._truth(node.operand)
                return _Part("truth", lambda table: pc.invert(inner(table)))
            case ast.UnaryOp(op=ast.USub()):
                inner = self._number(node.operand)
                return _Part("number", lambda table: pc.negate(_float(inner(table))))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                kernel = _ARITHMETIC[type(node.op)]
                left, right = self._number(node.left), self._number(node.right)
                # In floats: no overflow, and a division by zero is infinite or unknown instead of an error.
                return _Part(
                    "number",
                    lambda table: _known(pc.call_function(kernel, [_float(left(table)), _float(right(table))])),
                )
            case ast.Compare():
                return self._compare(node)
            case ast.Name():
                return self._column(node)
            case ast.Constant():
                return self._constant(node)
        raise self._error("is not part of the language (comparisons, in, and, or, not, + - * /)", node)

    def _logic(self, node: ast.BoolOp) -> _Part:
        kernel = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        parts = [self._truth(value) for value in node.values]

        def run(table: pa.Table) -> Any:
            answer = parts[0](table)
            for part in parts[1:]:
                answer = kernel(answer, part(table))
            return answer

        return _Part("truth", run)

    def _compare(self, node: ast.Compare) -> _Part:
        links = []
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            links.append(self._link(left, operator, right, node))
            left = right

        def run(table: pa.Table) -> Any:
            answer = links[0](table)
            for link in links[1:]:
                answer = pc.and_kleene(answer, link(table))
            return answer

        return _Part("truth", run)

    def _link(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, whole: ast.Compare) -> Callable:
        one = self._read(left)
        if isinstance(operator, ast.In | ast.NotIn):
            return self._member(one, left, operator, right)
        other = self._read(right)
        if isinstance(operator, ast.Is | ast.IsNot):
            if other.kind != "null":
                raise self._error("needs None on its right: for values write == or !=", whole)
            kernel = pc.is_null if isinstance(operator, ast.Is) else pc.is_valid
            return lambda table: kernel(one.run(table))
        if one.kind != other.kind or one.kind == "null":
            raise self._error(f"compares a {one.kind} with a {other.kind}", whole)
        kernel = _COMPARE[type(operator)]
        return lambda table: pc.call_function(kernel, [one.run(table), other.run(table)])

    def _member(self, one: _Part, left: ast.expr, operator: ast.In | ast.NotIn, right: ast.expr) -> Callable:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
            raise self._error("needs a list behind `in`, such as ('jpg', 'png')", right)
        parts = []
        for item in right.elts:
            part = self._read(item)
            if part.kind != one.kind:
                raise self._error(f"looks for a {part.kind} in {ast.unparse(left)}, which is a {one.kind}", right)
            parts.append(part)

        def run(table: pa.Table) -> Any:
            value = one.run(table)
            answer = pc.equal(value, parts[0].run(table))
            for part in parts[1:]:
                answer = pc.or_kleene(answer, pc.equal(value, part.run(table)))
            return answer if isinstance(operator, ast.In) else pc.invert(answer)

        return run

    def _truth(self, node: ast.expr) -> Callable:
        part = self._read(node)
        if part.kind != "truth":
            raise self._error(f"is a {part.kind}, where a comparison is needed", node)
        return part.run

    def _number(self, node: ast.expr) -> Callable:
        part = self._read(node)
        if part.kind != "number":
            raise self._error(f"is a {part.kind}, where a number is needed", node)
        return part.run

    def _column(self, node: ast.Name) -> _Part:
        name = node.id
        if name not in self._schema.names:
            hint = nearest(name, self._schema.names, cutoff=0.4)
            raise WhereError(
                f"where: there is no column {name!r}: {hint}The manifest has {', '.join(self._schema.names)}"
            )
        kind = _kind(self._schema.field(name).type)
        if kind is None:
            raise self._error(f"is a column of {self._schema.field(name).type}, which cannot be compared", node)
        self._used.add(name)
        wide = {"number": _wide, "text": _text, "truth": lambda column: column}[kind]
        return _Part(kind, lambda table: wide(table[name]))

    def _constant(self, node: ast.Constant) -> _Part:
        value = node.value
        if value is None:
            return _Part("null", lambda _: pa.scalar(None, pa.null()))
        if isinstance(value, bool):
            return _Part("truth", lambda _: pa.scalar(value))
        if isinstance(value, str):
            return _Part("text", lambda _: pa.scalar(value, pa.string()))
        if isinstance(value, int) and abs(value) < 2**63:
            return _Part("number", lambda _: pa.scalar(value, pa.int64()))
        if isinstance(value, float) and math.isfinite(value):
            return _Part("number", lambda _: pa.scalar(value, pa.float64()))
        raise self._error("is no value that a column can have", node)


def _kind(kind: pa.DataType) -> str | None:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "truth" if pa.types.is_boolean(kind) else None


def _wide(column: Any) -> Any:
    exact = pa.types.is_integer(column.type) and not pa.types.is_uint64(column.type)
    return pc.cast(column, pa.int64()) if exact else _known(_float(column))


def _text(column: Any) -> Any:
    return pc.cast(column, pa.string())


def _float(value: Any) -> Any:
    return pc.cast(value, pa.float64(), safe=False)


def _known(value: Any) -> Any:
    """Not-a-number is no value: 0 / 0 is unknown."""
    return pc.if_else(pc.is_nan(value), pa.scalar(None, pa.float64()), value)
