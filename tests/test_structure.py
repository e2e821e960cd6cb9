"""The tree is the architecture: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import i3lm

ROOT = Path(i3lm.__file__).parent
# A row may import from itself and from the rows above it.
ROWS = [
    {"errors", "device", "files", "processes"},
    {"ops"},
    {"layers"},
    {"models"},
    {"presets"},
    {"tokenizers"},
    {"data"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"planning"},
    {"reports"},
    {"cli", "__main__"},
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
FILES = sorted(ROOT.rglob("*.py"))
# What layers and ops may import besides the standard library, and the files that are one more
# library's own, imported only where that library is wanted.
PLAIN = {"torch", "i3lm.ops", "i3lm.layers"}
SPECIAL = {
    "amx": {"numba", "numpy"},
    "amx_bridge": {"llvmlite", "numba"},
    "amx_float32": {"numba", "numpy"},
    "numba": {"numba", "numpy"},
    "numba_bridge": {"llvmlite", "numba", "numpy"},
    "numba_cache": {"numba"},
    "numba_float8": {"numba", "numpy"},
    "numba_products": {"llvmlite", "numba"},
    "numba_streams": {"llvmlite", "numba"},
    "numba_table": {"numba", "numpy"},
    "numba_team": {"llvmlite", "numba", "numpy"},
    "numba_transpose": {"llvmlite", "numba", "numpy"},
    "triton": {"triton"},
    "triton_bridge": {"triton"},
}


def name_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            modules.add(node.module)
            if node.module == "i3lm":
                modules |= {f"i3lm.{alias.name}" for alias in node.names}
    return modules - {"i3lm.__version__"}


def part_of(module: str) -> str:
    """The file or folder directly under i3lm that a module belongs to."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_has_a_docstring(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_row_imports_only_from_the_rows_above_it(path: Path):
    if path == ROOT / "__init__.py":
        return  # looks down, to list the public names
    own = part_of(name_of(path))
    assert own in ROW_OF, f"give {own} a row"
    for module in imported_by(path):
        if module.startswith("i3lm."):
            other = part_of(module)
            assert ROW_OF[other] <= ROW_OF[own], f"{name_of(path)} may not import {module}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(name_of(p) + ".") in ("ops", "layers")], ids=name_of
)
def test_ops_and_layers_need_nothing_but_torch(path: Path):
    allowed = PLAIN | SPECIAL.get(path.stem, set())
    for module in imported_by(path):
        top = module.split(".")[0]
        plain = ".".join(module.split(".")[:2]) if top == "i3lm" else top
        assert plain in allowed or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("stem", ["reference", "scan"])
def test_reference_and_scan_do_not_lean_on_compiled_kernels(stem: str):
    paths = [path for path in FILES if path.stem == stem]
    assert paths
    for path in paths:
        modules = imported_by(path)
        assert not any(module.split(".")[-1] in SPECIAL for module in modules), path


@pytest.mark.parametrize(
    "statement",
    ["import i3lm", "from i3lm.cli import main; main(['--help'])", "import i3lm.errors"],
)
def test_importing_and_helping_load_nothing_heavy(statement: str):
    heavy = ["torch", "transformers", "numpy", "numba", "datasets", "matplotlib", "tokenizers"]
    code = f"{statement}\nimport sys\nprint('LOADED', [m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_public_names_are_sorted_and_resolve():
    assert i3lm.__all__ == sorted(set(i3lm.__all__))
    for name in i3lm.__all__:
        assert getattr(i3lm, name) is not None
        assert name in dir(i3lm)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'i3lm' has no attribute 'trainn'"):
        i3lm.trainn  # noqa: B018 (looking it up is the test)
