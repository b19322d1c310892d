"""Finds a dotted name in the source of a package without importing it: in the environment, or in an unpacked wheel."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """A definition and the module that holds it."""

    node: Definition
    module: str


class Sources:
    """The modules below `root`, the folder that holds the package's own folder. Each file is parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names = functools.cache(self._read)

    def find(self, name: str) -> Found | None:
        """The definition of `name` (module, then a class or function, then a member), None where there is none."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:end])
            if self._file(module) is not None:
                found = self._in_module(module, parts[end])
                for member in parts[end + 1 :]:
                    found = None if found is None else self._member(found, member)
                return found
        return None

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)

    def _read(self, module: str) -> dict[str, Definition | tuple[str, str]]:
        """What a module defines, or imports (as module and name)."""
        path = self._file(module)
        names: dict[str, Definition | tuple[str, str]] = {}
        if path is None:
            return names
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in _flat(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update({alias.asname: (alias.name, "") for alias in node.names if alias.asname})
            if isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*base, *filter(None, [node.module])])
                names.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
            names.update(dict.fromkeys(_defines(node), node))  # type: ignore[arg-type]
        return names

    def _in_module(self, module: str, name: str) -> Found | None:
        for _ in range(5):
            known = self._names(module).get(name)
            if not isinstance(known, tuple):
                return None if known is None else Found(known, module)
            module, name = known
        return None

    def _member(self, owner: Found, name: str) -> Found | None:
        """A member of a class or of its bases: in its body, or set on `self` by a method."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in _flat(owner.node):
            if name in _defines(node):
                return Found(node, owner.module)  # type: ignore[arg-type]
        for inner in ast.walk(owner.node):
            for target in _targets(inner):
                if isinstance(target, ast.Attribute) and target.attr == name and ast.unparse(target.value) == "self":
                    return Found(inner, owner.module)  # type: ignore[arg-type]
        for base in owner.node.bases:
            while isinstance(base, ast.Subscript):
                base = base.value
            module, symbol = owner.module, ast.unparse(base)
            if isinstance(base, ast.Attribute):
                origin = self._names(module).get(ast.unparse(base.value))
                module, symbol = (".".join(filter(None, origin)), base.attr) if isinstance(origin, tuple) else ("", "")
            parent = self._in_module(module, symbol)
            if parent is not None and (found := self._member(parent, name)) is not None:
                return found
        return None

    def has_member(self, owner: Found, name: str) -> bool:
        """Whether the class `owner`, or a base of it in this package, has `name`."""
        return self._member(owner, name) is not None


def parameters_of(node: Definition) -> list[str]:
    """Names of a function's parameters in order, `*args` and `**kwargs` last; empty for anything else."""
    if not isinstance(node, _FUNCTIONS):
        return []
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
    return [argument.arg for argument in named]


def annotation_of(node: Definition) -> str:
    """What a function returns, or the type of an attribute, as written; empty where nothing is."""
    annotation = node.returns if isinstance(node, _FUNCTIONS) else getattr(node, "annotation", None)
    return ast.unparse(annotation) if annotation else ""


def _flat(node: ast.Module | ast.ClassDef) -> list[ast.stmt]:
    """Statements of a body and of its `if` and `try` branches."""
    statements: list[ast.stmt] = []
    todo = list(node.body)
    while todo:
        statement = todo.pop(0)
        if isinstance(statement, (ast.If, ast.Try)):
            todo = [*statement.body, *statement.orelse, *todo]
        else:
            statements.append(statement)
    return statements


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    if not isinstance(node, ast.Assign):
        return []
    return [e for t in node.targets for e in (t.elts if isinstance(t, (ast.Tuple, ast.List)) else [t])]


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return {node.name}
    return {target.id for target in _targets(node) if isinstance(target, ast.Name)}
