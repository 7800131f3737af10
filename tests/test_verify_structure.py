"""No single check of an operator's name stands alone between a near miss and a wrong fusion.

Recognition compares names of operators in many places. Here each comparison in `find/` and `bind/`
is switched off in turn (it always holds, then it never does) and near misses are fused:
none may be, because execution decides. A sample runs here; `python -m tests.test_verify_structure`
runs all comparisons on all near misses.
"""

import ast
import contextlib
import functools
import importlib
import itertools
import logging
import pkgutil
import sys
import types
from pathlib import Path

import pytest

from sfa_onnx import fuse
from sfa_onnx.errors import FaultError
from sfa_onnx.passes import bind, find
from tests.zoo.catalogue import cases

FAMILIES = ("scoremiss", "heads", "finite")  # written by hand: no exporter runs
PER_CHECK = 3
# Roundings are told by structure alone: float64 does not show them (docs/verification.md).
ROUNDING = ("bind.precision",)


def _modules():
    names = [
        f"{room}.{module.name}"
        for room, package in (("find", find), ("bind", bind))
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return [name for name in names if name not in ROUNDING]


def _comparisons(tree):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "op_type" in ast.unparse(node)
    ]


@functools.cache
def _checks():
    """(module, number of the comparison, what it becomes)."""
    found = []
    for name in _modules():
        module = importlib.import_module(f"sfa_onnx.passes.{name}")
        count = len(_comparisons(ast.parse(Path(module.__file__).read_text())))
        found += itertools.product([name], range(count), (True, False))
    return found


class _Fixed(ast.NodeTransformer):
    """Puts a constant in place of one comparison."""

    def __init__(self, target, value):
        self.target, self.value = target, value

    def visit_Compare(self, node):
        if node is self.target:
            return ast.copy_location(ast.Constant(self.value), node)
        return self.generic_visit(node)


def _codes(code):
    """Qualified name -> code of every function in `code`."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant.co_qualname, constant
            yield from _codes(constant)


def _functions(module):
    for value in list(vars(module).values()):
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            yield from (f for f in vars(value).values() if isinstance(f, types.FunctionType))


@contextlib.contextmanager
def _without(name, number, value):
    """The module with one comparison switched off; functions keep their identity."""
    module = importlib.import_module(f"sfa_onnx.passes.{name}")
    tree = ast.parse(Path(module.__file__).read_text())
    changed = ast.fix_missing_locations(_Fixed(_comparisons(tree)[number], value).visit(tree))
    codes = dict(_codes(compile(changed, module.__file__, "exec")))
    before = {}
    for function in _functions(module):
        new = codes.get(function.__qualname__)
        if new is not None and new.co_freevars == function.__code__.co_freevars:
            before[function] = function.__code__
            function.__code__ = new
    try:
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


@functools.cache
def _near_misses(families=FAMILIES):
    return [c for c in cases() if c.expect in ("refuse", "leave") and c.family in families]


def _fused(case, models={}):  # noqa: B006 - a cache
    if case.name not in models:
        models[case.name] = case.build()
    try:
        return [s.site_id for s in fuse(models[case.name]).fused]
    except Exception as error:  # a crash is no wrong fusion, and recognition reports it elsewhere
        return [] if "fused" not in str(error) else [str(error)]


@pytest.fixture(autouse=True)
def _quiet():
    """Recognition warns of its own faults, which are made here on purpose."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", _modules())
def test_no_name_check_stands_alone(name):
    misses = _near_misses()
    numbered = enumerate(check for check in _checks() if check[0] == name)
    for turn, check in numbered:
        chosen = [misses[(7 * turn + k * 41) % len(misses)] for k in range(PER_CHECK)]
        with _without(*check):
            wrong = [case for case in chosen if _fused(case)]
        assert not [case.name for case in wrong if not _fused(case)], check


def test_the_checks_are_switched_off():
    """Else the test above would show nothing: some near miss is then refused for another reason."""
    some = _near_misses()[::29]
    told = {case.name: _reasons(case) for case in some}
    for check in itertools.islice(_checks(), 0, None, 4):
        with _without(*check):
            if any(_reasons(c) != told[c.name] for c in some):
                return
    pytest.fail("no check that was switched off changed a reason")


def _reasons(case):
    try:
        return [site.reason for site in fuse(case.build()).refused]
    except FaultError:  # a check that is off may have kept the code from what is not there
        return ["stopped"]


def _main(words):
    logging.disable(logging.ERROR)
    families = frozenset(c.family for c in cases())
    misses = _near_misses(families)[:: int(words[0]) if words else 1]
    for turn, check in enumerate(_checks()):
        with _without(*check):
            wrong = [case.name for case in misses if _fused(case)]
        if wrong or turn % 20 == 0:
            print(turn, check, wrong, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
