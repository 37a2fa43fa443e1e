"""What the folders promise: who imports whom, where private names of others stand, how large things may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "adaround_plugin"
ROOT = Path(__file__).parents[1]

# a folder, or a file at the top, and what it may import of the package beside itself; errors and options serve all
MAY_IMPORT = {
    "errors": "",
    "_version": "",
    "compiled": "",
    "files": "",
    "digests": "",
    "storage": "digests files _version",
    "names": "",
    "process_memory": "",
    "report": "files",
    "options": "",
    "rounding": "compiled",
    "solvers": "rounding compiled",
    "graph": "rounding digests",
    "processes": "graph",
    "hosts": "graph rounding names",
    "deployment": "hosts graph rounding names report digests",
    "regions": "hosts graph solvers rounding names digests processes",
    "learning": "regions hosts graph solvers rounding report process_memory storage files digests processes",
    "saving": "hosts graph rounding report storage files digests",
    "guidance": "learning regions hosts graph solvers rounding names files report _version",
    "equalization": "regions graph rounding",
    "paper": "regions hosts graph rounding names report",
    "api": "learning regions hosts graph solvers names report files digests processes _version",
    "sequential": "api deployment hosts graph names report files",
    "inc": "sequential deployment api learning hosts graph solvers rounding files names report digests",
    "demo": "api hosts report",
    "cli": "demo api deployment guidance learning hosts rounding names report files _version",
    "": "api equalization guidance hosts learning report saving _version",
}
FOR_ALL = {"errors", "options"}
# parts of hosts: what is common to both, each host, and the one file that tells them apart
HOSTS = {"": "", "fx": "", "pt2e": "", "open": "fx pt2e", "learned": "open"}
MATHEMATICS = {"rounding", "solvers"}
# loops that numba compiles
COMPILED = ("rounding/gather_numba.py", "solvers/sweep_numba.py")
# where names stand that others keep to themselves: those of torch, of torchao, and of Neural Compressor
COMPATIBILITY = {"graph/compat.py", "hosts/pt2e/compat.py", "inc/compat.py"}
# the package's own names that look like another's
OWN = {"_version", "_weight", "_scale", "_zero_point", "_adaround", "_adaround_weight_", "_bias_"}


def sources() -> dict[str, ast.Module]:
    """The syntax tree of every file of the package but its tests, by its path in the package."""
    paths = [path for path in sorted(ROOT.rglob("*.py")) if "tests" not in path.relative_to(ROOT).parts]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


SOURCES = sources()


def imports(file: str) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in its text."""
    for node in ast.walk(SOURCES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(file: str) -> str:
    """The folder of a file, or the file itself where it stands at the top; empty for the package."""
    return file.split("/")[0].removesuffix(".py").removesuffix("__init__")


def imported(file: str) -> set[str]:
    """What a file imports of the package, as paths without an ending."""
    own = {name.removeprefix(f"{PACKAGE}.") for name in imports(file) if name.startswith(f"{PACKAGE}.")}
    return {name.replace(".", "/") for name in own}


def test_folders_import_only_what_they_may() -> None:
    assert {room(file) for file in SOURCES} == MAY_IMPORT.keys()
    for file in SOURCES:
        allowed = {room(file), *MAY_IMPORT[room(file)].split(), *FOR_ALL}
        found = {name.split("/")[0] for name in imported(file)}
        assert found <= allowed, f"{file} imports {sorted(found - allowed)}"


def test_folders_and_files_have_no_circles() -> None:
    """Rooms are listed from the ground up: none imports one that stands later."""
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in allowed.split()), name
    modules = {file.removesuffix(".py").removesuffix("/__init__"): file for file in SOURCES}

    def targets(file: str) -> set[str]:
        found = (modules.get(name) or modules.get(name.rpartition("/")[0]) for name in imported(file))
        return {target for target in found if target is not None and target != file}

    left = {file: targets(file) for file in SOURCES}
    while free := {file for file, others in left.items() if not others & left.keys()}:
        left = {file: others for file, others in left.items() if file not in free}
    assert not left, f"imports in a circle: {sorted(left)}"


def test_hosts_know_nothing_of_each_other() -> None:
    parts = HOSTS.keys() - {""}

    def part(path: str) -> str:
        first = path.removeprefix("hosts/").split("/")[0].removesuffix(".py")
        return first if first in parts else ""

    for file in (file for file in SOURCES if room(file) == "hosts"):
        allowed = {"", part(file), *HOSTS[part(file)].split()}
        found = {part(name) for name in imported(file) if name.startswith("hosts/")}
        assert found <= allowed, f"{file} imports hosts/{sorted(found - allowed)}"


def test_mathematics_needs_torch_alone() -> None:
    """No host, no graph; Triton and numba only where they run."""
    kernels = {"solvers/sweep_triton.py": {"triton"}, **{file: {"numpy"} for file in COMPILED}}
    for file in (file for file in SOURCES if room(file) in MATHEMATICS):
        outside = {name.split(".")[0] for name in imports(file)} - {"torch", PACKAGE, *sys.stdlib_module_names}
        assert outside <= kernels.get(file, set()), file
        assert not [name for name in imports(file) if name.startswith(("torch.ao", "torch.fx", "torch.nn.mod"))], file


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names with a leading underscore that are not the file's own: imported, read off an object, or written out."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_private_names_of_others_stand_in_the_compatibility_modules() -> None:
    for file in SOURCES.keys() - COMPATIBILITY:
        found = {name for name in private_names(SOURCES[file]) if re.fullmatch(r"_(?!_)\w*[a-z]\w*", name)}
        assert found <= OWN, f"{file} names {sorted(found - OWN)}"


def test_neural_compressor_is_imported_in_one_place() -> None:
    named = {file for file in SOURCES for name in imports(file) if name.split(".")[0] == "neural_compressor"}
    assert named == {"inc/compat.py"}


def test_every_file_says_what_it_is_and_what_is_public() -> None:
    for file, tree in SOURCES.items():
        assert ast.get_docstring(tree) or file == "_version.py", f"{file} has no docstring"
        public = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
        empty = all(isinstance(node, ast.Expr) for node in tree.body)
        assert public or empty or file == "_version.py", f"{file} has no __all__"


@pytest.mark.parametrize(("kind", "most"), [(ast.ClassDef, 240), (ast.FunctionDef, 80)])
def test_nothing_is_longer_than_can_be_read(kind: type[ast.ClassDef | ast.FunctionDef], most: int) -> None:
    """Lines of a class or function, its docstring left out."""
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                prose = node.body[0] if ast.get_docstring(node) else None
                said = 0 if prose is None else prose.end_lineno - prose.lineno + 1
                lines = node.end_lineno - node.lineno + 1 - said
                assert lines <= most, f"{file}: {node.name} has {lines} lines"
