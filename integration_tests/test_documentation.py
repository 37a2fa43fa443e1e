"""The documentation is true: every Python block runs, every link resolves, every public name is described."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import adaround_plugin
from adaround_plugin import deployment, inc, solvers
from adaround_plugin.deployment.decomposed import convert_to_decomposed_fx
from adaround_plugin.deployment.onnx_translations import get_onnx_translations
from adaround_plugin.deployment.onnx_weights import pack_onnx_weights
from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.hosts import pt2e
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.task_loss import expand_task_loss
from adaround_plugin.paper.weights import best_of_draws, round_weights, write_integers
from adaround_plugin.report import Report
from adaround_plugin.rounding.qubo import Qubo
from adaround_plugin.sequential.blocks import adaround_blocks
from integration_tests.documentation_site import build_site

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*([README] if README.exists() else []), *DOCS]
API = ROOT / "docs" / "reference" / "api.md"
DOCSTRINGS = ROOT / "docs" / "reference" / "docstrings.md"

# described under the names of their modules: what not every user imports
_BY_MODULE = (
    convert_to_decomposed_fx,
    get_onnx_translations,
    pack_onnx_weights,
    to_torchao,
    adaround_blocks,
    best_of_draws,
    round_weights,
    write_integers,
    CrossEntropy,
    LayerForms.of,
    expand_task_loss,
    Qubo.of,
)

# pages with examples that compile C++
_NEEDS_COMPILER = {ROOT / "docs" / "how-to" / "servers.md"}

# languages of fenced blocks; what a reader could take for Python must be Python that runs
_LANGUAGES = {"python", "diff", "sh", "text", "math", "json", ""}
_MACHINE_PATH = re.compile(r"(?<![\w/.:])/(?:home|root|tmp|usr|var|opt|mnt|work|Users)/|\b[A-Z]:\\")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language line, its text, and the number of the text's first line in the file."""

    info: str
    text: str
    line: int
    before: str


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith(("```", "~~~")):
            continue
        if opened is None:
            opened = number
            continue
        before = next((text for text in reversed(lines[: opened - 1]) if text.strip()), "")
        info = lines[opened - 1].lstrip()[3:].strip()
        yield Block(info, "\n".join(lines[opened : number - 1]), opened + 1, before)
        opened = None
    assert opened is None, f"{_name(page)}:{opened}: the block is not closed"


def _prose(page: Path) -> str:
    """The page without its fenced blocks and inline code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.fixture
def _restored_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


# torch's own warning while it saves and loads quantized tensors
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
# torch's own, in Inductor
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.usefixtures("_restored_engine")
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in _NEEDS_COMPILER and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor needs a compiler")
    module = ModuleType(re.sub(r"\W", "_", _name(page)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in _blocks(page):
        if block.info != "python":
            continue
        # empty lines in front: tracebacks and syntax errors carry the page's own line numbers
        source = "\n" * (block.line - 1) + block.text + "\n"
        try:
            exec(compile(source, str(page), "exec"), module.__dict__)
        except BaseException as error:
            error.add_note(f"in the Python block at {_name(page)}:{block.line}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_block_escapes_being_run(page: Path) -> None:
    for block in _blocks(page):
        at = f"{_name(page)}:{block.line - 1}"
        assert block.info in _LANGUAGES, f"{at}: unknown block {block.info!r}, one of {sorted(_LANGUAGES)} is expected"
        if block.info == "python":
            assert not block.before.rstrip().endswith("-->"), f"{at}: a comment in front of a Python block"
        else:
            code = re.search(r"^(>>> |import \w|from \w+(\.\w+)* import )", block.text, re.MULTILINE)
            assert not code, f"{at}: Python in a block that is not run"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), f"{_name(page)}: {target} leaves the repository"
        assert found.exists(), f"{_name(page)}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{_name(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_paths_of_a_machine(page: Path) -> None:
    found = _MACHINE_PATH.search(page.read_text(encoding="utf-8"))
    assert found is None, f"{_name(page)}: {found.group() if found else ''}"


def test_every_page_is_on_the_map() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(index))
        if not re.match(r"[a-z]+:", target)
    }
    assert [_name(page) for page in DOCS if page != index and page.resolve() not in linked] == []


def test_the_site_is_built_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    built = build_site(tmp_path / "site")
    assert len(built) > len(DOCS) - 1
    for page in built:
        text = page.read_text(encoding="utf-8")
        # what a browser loads by itself: scripts, pictures, style sheets, fonts; not what a reader may click on
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link\b[^>]*\brel="(?:stylesheet|icon|preload|preconnect)"[^>]*\bhref="([^"]+)"', text)
        loaded += re.findall(r'<link\b[^>]*\bhref="([^"]+)"[^>]*\brel="(?:stylesheet|icon|preload|preconnect)"', text)
        assert [one for one in loaded if re.match(r"(https?:)?//", one)] == [], page.name
        assert "```" not in text, f"{page.name} shows a fence"


def _documented() -> list[tuple[str, object]]:
    names = [(name, getattr(module, name)) for module in (adaround_plugin, solvers, inc) for name in module.__all__]
    names += [(f"pt2e.{name}", getattr(pt2e, name)) for name in pt2e.__all__]
    names += [(f"deployment.{name}", getattr(deployment, name)) for name in deployment.__all__]
    names += [(f"Report.{name}", value) for name, value in vars(Report).items() if not name.startswith("_")]
    names += [(f"{one.__module__.removeprefix('adaround_plugin.')}.{one.__qualname__}", one) for one in _BY_MODULE]
    return names


def _section(name: str) -> str:
    """What the reference says under the heading of a name."""
    text = API.read_text(encoding="utf-8")
    heading = re.search(rf"^#+ `{re.escape(name)}`$", text, re.MULTILINE)
    assert heading is not None, f"{name} has no heading in {_name(API)}"
    return re.split(r"^#+ ", text[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_site_has_the_docstrings_of_all_public_names() -> None:
    shown = set(re.findall(r"^::: (\S+)$", DOCSTRINGS.read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for name, value in _documented():
        # plain data has no docstring
        if callable(value):
            parts = f"{value.__module__}.{value.__qualname__}".split(".")
            # itself, its class or its module
            if shown.isdisjoint(".".join(parts[:length]) for length in range(1, len(parts) + 1)):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize(("name", "value"), _documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_names_and_their_arguments_are_described(name: str, value: object) -> None:
    section = _section(name)
    if not callable(value) or (isinstance(value, type) and issubclass(value, Exception)):
        return
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("| `")}
    described = {row.strip("`") for row in rows}
    taken = {
        parameter.name: parameter.default
        for parameter in inspect.signature(value).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and parameter.name != "self"
    }
    assert described == taken.keys()
    for argument, default in taken.items():
        if default is None or isinstance(default, str | int | float):
            shown = repr(default).replace("'", '"')
            assert f"| `{shown}` |" in rows[f"`{argument}`"], f"{name}: the default of {argument!r} is {shown}"
