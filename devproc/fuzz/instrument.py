"""Coverage: device modules compiled with a store into a map at the start of every block (PEP 302, ast).

A block is the body of a function that is more than a text, of a branch (also of an `if` without `else`, not
taken), a loop, a handler or a `case`.  Numbers follow the source text alone, so that two processes mean the
same block by the same number. Left out: conditional expressions and comprehensions, which are part of the
block they stand in.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Final

from devproc.catalog import Entry

MAP: Final = "__cov__"
"""The global of an instrumented module that holds the map: anything that takes an int at an index."""
WORDS: Final = "__words__"
"""The global that holds the integers the module is written with: a dictionary for mutation."""
BLOCKS_MAX: Final = 1 << 14
_END: Final = "__blocks_end__"
VIRTIO_MODULES: Final = tuple(f"devproc.virtio.{m}" for m in ("device", "chain", "split", "packed"))


@dataclass(frozen=True)
class Block:
    """The lines of a block, which those of later blocks inside it are not part of.

    `taken` is false for the way past an `if` that has no `else`, which has the line of the `if`.
    """

    module: str
    function: str
    line: int
    end: int
    taken: bool = True

    def __str__(self) -> str:
        return f"{self.module}:{self.line} ({self.function}{'' if self.taken else ', not taken'})"


@functools.cache  # before the jail, in which no source can be read
def modules(entry: Entry) -> tuple[str, ...]:
    """The modules whose coverage counts for a device: its own, those it is derived from, virtio's."""
    with open(source(entry.module), encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    imported = [node.module for node in body if isinstance(node, ast.ImportFrom) and node.module]
    bases = [name for name in imported if name.startswith(("devproc.devices.", "devproc.virtio.vhost_user"))]
    if entry.virtio is None:
        return (entry.module, *bases)
    # The rings of a function that another program serves are never looked at.
    shared = VIRTIO_MODULES[:1] if any(d.kind == "back-end" for d in entry.descriptors) else VIRTIO_MODULES
    return (entry.module, *bases, *shared)


def source(module: str) -> str:
    """The path of a module's source; nothing of it is run.

    Raises:
        ImportError: there is none.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no source of {module}")
    return spec.origin


def blocks(entry: Entry) -> list[Block]:
    """Every block of a device's modules, by number."""
    found: list[Block] = []
    for module in modules(entry):
        with open(source(module), encoding="utf-8") as f:
            _Marker(module, len(found), found).visit(ast.parse(f.read()))
    return found


def load(entry: Entry) -> type[Any]:
    """A device's model from instrumented modules; their map is one that nobody reads until `attach`."""
    names = modules(entry)
    if not all(hasattr(sys.modules.get(name), MAP) for name in names):
        for name in names:
            sys.modules.pop(name, None)
        finder = _Finder(entry)
        sys.meta_path.insert(0, finder)
        try:
            for name in names:
                importlib.import_module(name)
        finally:
            sys.meta_path.remove(finder)
    model: type[Any] = getattr(sys.modules[entry.module], entry.model)
    return model


def attach(loaded: Sequence[ModuleType], cov: Any) -> bytes:
    """Have the blocks of these modules, those of an entry, store into `cov`; what loading them has stored."""
    total: int = max(getattr(module, _END) for module in loaded)
    reached = 0
    for module in loaded:
        reached |= int.from_bytes(getattr(module, MAP)[:total], "little")
        setattr(module, MAP, cov)
    return reached.to_bytes(total, "little")


class _Finder(MetaPathFinder):
    """Has each of `modules` loaded by a `_Loader`."""

    def __init__(self, entry: Entry) -> None:
        self._loaders: dict[str, _Loader] = {}
        numbered = blocks(entry)
        assert len(numbered) <= BLOCKS_MAX
        for name in modules(entry):
            first = next((n for n, b in enumerate(numbered) if b.module == name), 0)
            self._loaders[name] = _Loader(name, source(name), first)

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        loader = self._loaders.get(fullname)
        if loader is None:
            return None
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, first: int) -> None:
        super().__init__(fullname, path)
        self._first = first

    def get_code(self, fullname: str) -> CodeType:  # and no .pyc, neither read nor written
        tree = self._parse()
        _Marker(fullname, self._first, []).visit(tree)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        found: list[Block] = []
        tree = self._parse()
        numbers = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int)
        setattr(module, WORDS, sorted({n for n in numbers if n >> 64 == 0}))
        _Marker(module.__name__, self._first, found).visit(tree)
        setattr(module, _END, self._first + len(found))
        setattr(module, MAP, bytearray(BLOCKS_MAX))
        super().exec_module(module)

    def _parse(self) -> ast.Module:
        return ast.parse(self.get_data(self.path))


class _Marker(ast.NodeTransformer):
    """Puts the stores into a tree, and says into `found` where."""

    def __init__(self, module: str, first: int, found: list[Block]) -> None:
        self._module = module
        self._next = first
        self._found = found
        self._where: list[str] = []

    def _mark(self, body: list[ast.stmt], line: int, taken: bool = True) -> None:
        """Begin `body` with the store of a new block."""
        end = (body[-1].end_lineno or line) if body else line
        self._found.append(Block(self._module, ".".join(self._where), line, end, taken))
        store = ast.Assign(
            targets=[
                ast.Subscript(
                    value=ast.Name(MAP, ast.Load()), slice=ast.Constant(self._next), ctx=ast.Store()
                )
            ],
            value=ast.Constant(1),
            lineno=line,
            col_offset=0,
        )
        self._next += 1
        body.insert(1 if body and _is_text(body[0]) else 0, store)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._where.append(node.name)
        self.generic_visit(node)
        self._where.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._where.append(node.name)
        if len(node.body) > 1 or not _is_text(node.body[0]):
            self._mark(node.body, node.lineno)
        self.generic_visit(node)
        self._where.pop()
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if self._where:
            self._mark(node.body, node.body[0].lineno)
            if node.orelse:
                self._mark(node.orelse, node.orelse[0].lineno)
            else:
                self._mark(node.orelse, node.lineno, taken=False)
        self.generic_visit(node)
        return node

    def _visit_body(self, node: ast.For | ast.While | ast.ExceptHandler | ast.match_case) -> ast.AST:
        if self._where:
            self._mark(node.body, node.body[0].lineno)
        self.generic_visit(node)
        return node

    visit_For = visit_While = visit_ExceptHandler = visit_match_case = _visit_body


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
