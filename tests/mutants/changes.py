"""The small changes that are made to a module: each replaces one expression or statement of its text."""

from __future__ import annotations

import ast
import re
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from textwrap import dedent
from typing import Final, NamedTuple, TypeAlias

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

_COMPARISONS: Final[dict[type[ast.cmpop], tuple[str, str]]] = {
    ast.Lt: (r"<", "<="),
    ast.LtE: (r"<=", "<"),
    ast.Gt: (r">", ">="),
    ast.GtE: (r">=", ">"),
    ast.Eq: (r"==", "!="),
    ast.NotEq: (r"!=", "=="),
    ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"),
    ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
}
_ARITHMETIC: Final[dict[type[ast.operator], tuple[str, str]]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: (r"-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: (r"/", "*"),
    ast.FloorDiv: (r"//", "*"),
    ast.Mod: (r"%", "*"),
    ast.BitAnd: (r"&", "|"),
    ast.BitOr: (r"\|", "&"),
}
_TWINS: Final = {"min": "max", "max": "min", "any": "all", "all": "any", "startswith": "endswith"}
_LONGEST_WORD: Final = (
    30  # a constant with a blank in it, or longer, is for people: tests need not know it by heart
)


class Change(NamedTuple):
    """One change of a module's text."""

    module: str
    where: str
    """The function, ``Class.method``; empty at the top of the module."""
    line: int
    lines: range
    """Where it is: who runs one of these lines may notice. Empty for what an import runs."""
    old: str
    new: str
    start: int
    end: int
    text: str
    """What takes the place of the bytes from ``start`` to ``end``."""
    number: int
    """Which one it is of those that read alike in the function, from 1."""
    source: str
    """A hash of the function's text, or of the statement's at the top of a module."""

    @property
    def name(self) -> str:
        """What it is called in lists, whatever its line."""
        again = f" (#{self.number})" if self.number > 1 else ""
        return f"{self.module} {self.where or '-'}: {self.old} -> {self.new}{again}"

    def applied(self, source: bytes) -> bytes:
        """Return the module's text with this change made."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def changes_of(module: str, source: bytes) -> list[Change]:
    """Return every change that is made to a module, in the order of its text."""
    maker = _Maker(module, source)
    maker.visit(ast.parse(source))
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for change in sorted(maker.found, key=lambda change: (change.start, change.end, change.new)):
        key = change.where, change.old, change.new
        if maker.reads(change):
            seen[key] += 1
            found.append(change._replace(number=seen[key]))
    return found


class _Maker(ast.NodeVisitor):
    """Walks over a module and notes what could be changed."""

    def __init__(self, module: str, source: bytes) -> None:
        self.found: list[Change] = []
        self._module = module
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._bounds: dict[tuple[int, int, str], tuple[int, int]] = {}
        self._names: list[str] = []
        self._runs_later = False  # inside a function, whose lines tests run
        self._unit: ast.stmt | None = None  # the outermost function, or the statement at the top
        self._statement: ast.stmt | None = None

    def reads(self, change: Change) -> bool:
        """Whether what is changed is Python still. Only the function is parsed: a module takes 20 times as long."""
        start, end = self._bounds[change.start, change.end, change.text]
        text = self._source[start : change.start] + change.text.encode() + self._source[change.end : end]
        try:
            ast.parse(dedent(text.decode()))
        except SyntaxError:
            return False
        return True

    # text

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)

    def _text(self, node: ast.expr | ast.stmt) -> str:
        return self._source[self._start(node) : self._end(node)].decode()

    def _replace(
        self, node: ast.expr | ast.stmt, text: str, shown: ast.expr | ast.stmt | None = None
    ) -> None:
        """Note that a node's text is replaced; ``shown`` is the larger one that makes it plain to people."""
        self._note(self._start(node), self._end(node), text, shown or node)

    def _note(self, start: int, end: int, text: str, shown: ast.expr | ast.stmt) -> None:
        begin, last = self._start(shown), self._end(shown)
        old = self._source[begin:last].decode()
        new = (self._source[begin:start] + text.encode() + self._source[end:last]).decode()
        statement = self._statement
        first = statement.lineno if statement is not None and self._runs_later else shown.lineno
        unit = old
        if self._unit is not None:
            unit = self._text(self._unit)
            self._bounds[start, end, text] = self._starts[self._unit.lineno - 1], self._end(self._unit)
        self.found.append(
            Change(
                self._module,
                ".".join(self._names),
                shown.lineno,
                range(min(first, shown.lineno), (shown.end_lineno or shown.lineno) + 1)
                if self._runs_later
                else range(0),
                _short(old),
                _short(new),
                start,
                end,
                text,
                0,
                sha256(unit.encode()).hexdigest()[:16],
            )
        )

    def _swap(self, before: ast.expr, after: ast.expr, pattern: str, text: str, shown: ast.expr) -> None:
        """Replace the operator that stands between two operands."""
        start, end = self._end(before), self._start(after)
        between = self._source[start:end].decode()
        plain = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0].encode()), between)
        match = re.search(pattern, plain)
        if match:
            self._note(start + match.start(), start + match.end(), text, shown)

    # what is walked over

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            outer, self._statement = self._statement, node
            top = self._unit is None
            if top:
                self._unit = node
            super().visit(node)
            self._statement = outer
            if top:
                self._unit = None
        else:
            super().visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
            return
        unit = self._unit
        self._names.append(node.name)
        for statement in node.body:
            if not _is_docstring(statement):
                self._unit = statement
                self.visit(statement)
        self._names.pop()
        self._unit = unit

    def _visit_function(self, node: _Function) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self._names.append(node.name)
                self.visit(default)
                self._names.pop()
        later, self._runs_later = self._runs_later, True
        self._names.append(node.name)
        for statement in node.body:
            if not _is_docstring(statement):
                self.visit(statement)
        self._names.pop()
        self._runs_later = later

    visit_FunctionDef = visit_AsyncFunctionDef = _visit_function  # noqa: N815

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test, node)
        self.generic_visit(node)

    def _condition(self, test: ast.expr, shown: ast.expr | None = None) -> None:
        """Turn a condition round that no operator turns round."""
        if isinstance(test, (ast.Name, ast.Attribute, ast.Call)):
            self._replace(test, f"not {self._text(test)}", shown)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            if not isinstance(node.value, (ast.Yield, ast.YieldFrom)):
                self._replace(node, "pass")
            self.generic_visit(node)

    def _leave_out(self, node: ast.stmt) -> None:
        self._replace(node, "pass")
        self.generic_visit(node)

    visit_Raise = visit_Delete = visit_Continue = visit_Break = _leave_out  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names & {"__all__", "__slots__", "logger"}:
            return
        # Without what __init__ sets nothing works: no change that a test could miss.
        if not names and self._names[-1:] not in (["__init__"], ["_reset"]) and self._runs_later:
            self._replace(node, "pass")
        if not self._runs_later:
            self._display(node.value)
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        annotation = ast.unparse(node.annotation)
        if node.value is not None and "TypeAlias" not in annotation:
            if not self._runs_later:
                self._display(node.value)
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC and not _is_text(node.value):
            pattern, text = _ARITHMETIC[type(node.op)]
            start, end = self._end(node.target), self._start(node.value)
            match = re.search(pattern, self._source[start:end].decode())
            if match:
                self._note(start + match.start(), start + match.end(), text, node)
        self._leave_out(node)

    def visit_Return(self, node: ast.Return) -> None:
        # None for a False makes no difference, and what comes of a True is tried as any constant is.
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._replace(node.value, "None", node)
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if isinstance(node.type, ast.Tuple):
            self._without_each(node.type)
        self.generic_visit(node)

    # expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for place, operator in enumerate(node.ops):
            pattern, text = _COMPARISONS[type(operator)]
            self._swap(operands[place], operands[place + 1], pattern, text, node)
            if isinstance(operator, (ast.In, ast.NotIn)):
                self._display(operands[place + 1], node)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        pattern, text = (r"\band\b", "or") if isinstance(node.op, ast.And) else (r"\bor\b", "and")
        values = node.values
        for before, after in pairwise(values):
            self._swap(before, after, pattern, text, node)
        neutral = "True" if isinstance(node.op, ast.And) else "False"
        for value in values:
            self._replace(value, neutral, node)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(node, f"bool({self._text(node.operand)})")
        elif isinstance(node.op, ast.USub):
            self._replace(node, self._text(node.operand))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _ARITHMETIC and not _is_text(node.left) and not _is_text(node.right):
            pattern, text = _ARITHMETIC[type(node.op)]
            self._swap(node.left, node.right, pattern, text, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if name in ("cast", "TypeVar", "ParamSpec", "NewType", "getLogger", "hasattr"):
            self.visit(called)
            for argument in node.args[1:]:
                self.visit(argument)
            return
        if name in _TWINS:
            start = self._end(called) - len(name)
            self._note(start, self._end(called), _TWINS[name], node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in (
            "Literal",
            "Generic",
            "dict",
            "list",
            "tuple",
        ):
            return
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts as they are: what they say is for people."""

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value))
        elif isinstance(value, (int, float)):
            self._replace(node, str(value + 1))
        elif isinstance(value, str) and 0 < len(value) <= _LONGEST_WORD and " " not in value:
            self._replace(node, repr("XX" + value))
        elif isinstance(value, bytes) and len(value) <= _LONGEST_WORD:
            self._replace(node, repr(b"XX" + value))

    def _display(self, node: ast.expr, shown: ast.expr | None = None) -> None:
        """Leave each element of a collection out, where it is written down."""
        if isinstance(node, ast.Call) and len(node.args) == 1:
            node = node.args[0]  # frozenset({…})
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            self._without_each(node, shown)

    def _without_each(self, node: ast.Tuple | ast.List | ast.Set, shown: ast.expr | None = None) -> None:
        if len(node.elts) < 2:
            return
        left, right = ("{", "}") if isinstance(node, ast.Set) else ("[", "]")
        if isinstance(node, ast.Tuple):
            left, right = "(", ",)"
        for place in range(len(node.elts)):
            rest = ", ".join(self._text(each) for each in node.elts[:place] + node.elts[place + 1 :])
            self._replace(node, f"{left}{rest}{right}", shown)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes))
    return isinstance(node, (ast.JoinedStr, ast.Tuple, ast.List))


def _short(text: str) -> str:
    return " ".join(re.sub(r"#[^\n]*", "", text).split())
