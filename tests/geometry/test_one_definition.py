"""Only geometry divides positions into segments and rows: other files ask it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import longnet

PACKAGE = Path(longnet.__file__).parent
NUMBERS = {"segment_length", "segment_lengths", "dilation_rate", "dilation_rates", "period"}
# Calls that give back such a number.
PASS_ON = {"divmod", "enumerate", "int", "list", "max", "min", "sorted", "tuple", "zip"}
MAY_DIVIDE = {
    "attention/backends/triton/launches.py",  # tiles of a program
    "attention/backends/triton/hopper.py",
    "compat/attention.py",  # torchscale's padding
}


def is_about_rows(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is made of a branch's segment length or rate, or of ``names`` that hold one."""
    if isinstance(node, ast.Lambda) or (
        isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in PASS_ON)
    ):
        return False
    if isinstance(node, ast.Attribute):
        return node.attr in NUMBERS
    if isinstance(node, ast.Name):
        return node.id in names
    return any(is_about_rows(child, names) for child in ast.iter_child_nodes(node))


def assignments(scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(target, value) of everything that gives a name a value; tuples one by one."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, node.iter)]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=False)
            else:
                yield target, value


def divisions(source: str) -> Iterator[str]:
    """The expressions that divide by, or take remainders of, a branch's segment length or rate."""
    for scope in ast.walk(ast.parse(source)):
        if not isinstance(scope, ast.FunctionDef):
            continue
        names: set[str] = set()
        pairs, before = list(assignments(scope)), -1
        while len(names) > before:
            before = len(names)
            for target, value in pairs:
                if is_about_rows(value, names):
                    names |= {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
        for node in ast.walk(scope):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
                operands = [node.left, node.right]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "divmod":
                operands = node.args
            else:
                continue
            if any(is_about_rows(operand, names) for operand in operands):
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_others_ask_geometry_for_segments_and_rows() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        # Kernels state the rows of the device by themselves.
        if not name.startswith(("geometry/", "attention/backends/triton/kernels/")) and name not in MAY_DIVIDE:
            assert not list(divisions(path.read_text(encoding="utf-8"))), (
                f"{name}: expected a question to geometry/rows.py"
            )


def test_a_division_is_seen_through_names_and_loops() -> None:
    source = """
def one(branch, position):
    width, rate = branch.segment_length, branch.dilation_rate
    local = position % width
    return local // 2

def other(pattern, keep):
    return [keep // width for width in pattern.segment_lengths], divmod(keep, min(pattern.period, 8))

def none(branch, rows):
    count = branch.rows(8, 0)
    return rows // count, f"{branch.segment_length} % {rows}"
"""
    assert sorted(divisions(source)) == [
        "4: position % width",
        "5: local // 2",
        "8: divmod(keep, min(pattern.period, 8))",
        "8: keep // width",
    ]
