"""Imports go down, and the mathematics needs nothing but torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "adaround_plugin"
ROOT = Path(__file__).parents[1]

# a module imports from layers above its own line only; inside one layer, from what stands before it
LAYERS: list[list[str]] = [
    [
        "_version",
        "errors",
        "activation_range",
        "grid",
        "hessian",
        "moments",
        "names",
        "schemes",
        "soft_rounding",
        "weighted_op",
        "channel_scales",
    ],
    [
        "problem",
        "qubo",
        "solvers._triton_visit",
        "solvers._sweep",
        "solvers.nearest",
        "solvers.sequential",
        "solvers.coordinate_descent",
    ],
    [
        "solvers.annealing",
        "solvers.cross_entropy",
        "solvers.relaxation",
        "solvers",
        "presets",
        "reconstruction",
        "refinement",
    ],
    ["scale", "observers", "activation_observer", "qconfig"],
    ["layer", "report", "calibration"],
    ["graph", "graph.compat", "graph.operators", "graph.streams", "graph.transforms", "graph.calls", "graph.host"],
    ["graph.paths", "graph.importance", "graph.samples", "graph.regions", "graph.blocks"],
    ["graph.checks", "graph.clamps", "graph.quantizers", "graph.grids", "graph.fx_nodes", "graph.prepared_fx"],
    [
        "capped_relu",
        "graph.homogeneous",
        "graph.scaled_layers",
        "graph.layer_pairs",
        "channel_ranges",
        "equalization_report",
        "equalization",
    ],
    ["pt2e.observers", "pt2e.quantizers", "pt2e", "graph.pt2e_nodes", "graph.prepared_pt2e", "graph.hosts"],
    ["task_loss", "weights", "forms"],
    ["learner", "learn"],
    ["inc.compat", "inc.recording", "inc.layers", "inc.parts", "inc.config"],
    ["inc.packing", "inc.programs", "inc.observed", "inc.saving", "inc.native", "inc.exported", "inc.weight_only"],
    ["inc.algorithm", "inc"],
    ["demo", "cli", "__main__"],
]
MATHEMATICS = {
    *LAYERS[0],
    *LAYERS[1],
    "solvers.annealing",
    "solvers.cross_entropy",
    "solvers.relaxation",
    "solvers",
    "scale",
    "layer",
}
MATHEMATICS |= {"reconstruction", "refinement"}
ALLOWED_OUTSIDE = {"torch", PACKAGE, *sys.stdlib_module_names}
ORDER = [name for layer in LAYERS for name in layer]


def modules() -> dict[str, Path]:
    """Dotted names inside the package of every module of it, the tests and the package itself left out."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests" and parts != ("__init__",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports, wherever in its text."""
    package = [PACKAGE, *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full.removeprefix(PACKAGE + ".") in modules() else source


MODULES = modules()


def inside(name: str) -> set[str]:
    """Modules of the package that `name` imports."""
    found = {full for full in imports(name, MODULES[name]) if full.split(".")[0] == PACKAGE}
    return {full.removeprefix(PACKAGE).removeprefix(".") for full in found}


def test_every_module_has_its_layer():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    position = ORDER.index(name)
    above = {target for target in inside(name) if target not in ORDER[:position]}
    assert not above, f"{name} imports {sorted(above)}"


@pytest.mark.parametrize("name", sorted(MATHEMATICS & MODULES.keys()))
def test_mathematics_imports_torch_alone(name):
    allowed = ALLOWED_OUTSIDE | ({"triton"} if name == "solvers._triton_visit" else set())
    outside = {full.split(".")[0] for full in imports(name, MODULES[name])} - allowed
    assert not outside
    deep = {full for full in imports(name, MODULES[name]) if full.startswith(("torch.ao", "torch.fx", "torch.nn.mod"))}
    assert not deep, "no host and no graph"
    assert inside(name) <= MATHEMATICS


def test_private_names_of_torch_are_in_one_place():
    for name, path in MODULES.items():
        private = [
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
            for alias in node.names
            if alias.name.startswith("_")
        ]
        assert not private or name == "graph.compat", f"{name} imports {private}"


def test_neural_compressor_is_named_in_one_place():
    for name, path in MODULES.items():
        named = [full for full in imports(name, path) if full.split(".")[0] == "neural_compressor"]
        assert not named or name == "inc.compat", f"{name} imports {named}"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"_version", "graph", "__main__", "cli", "demo"}))
def test_every_module_says_what_is_public(name):
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree)
    assert any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
