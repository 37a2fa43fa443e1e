"""The command line: the demo by the installed command in a process of its own, everything else in this one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adaround_plugin import Analysis
from adaround_plugin.cli import main
from adaround_plugin.cli.sources import Images, importing_from_here, load_data, load_model
from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError
from adaround_plugin.report import LayerReport, Report

NETS = """
import torch
from torch import nn

ready = 3

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))

def traced():
    return torch.fx.symbolic_trace(make())

class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def branches():
    return Branches()

def keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
        def forward(self, x, shift=None):
            return self.layer(x) + shift
    return Named()

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(8, 3, 6, 6, generator=generator) for _ in range(3)]

def one_tensor():
    return torch.rand(8, 3, 6, 6)

def labelled():
    return [(torch.rand(8, 3, 6, 6), torch.zeros(8))]

def wide():
    return [torch.rand(8, 3, 6, 6), torch.rand(8, 3, 7, 7)]

def singles():
    return [torch.rand(1, 3, 6, 6), *batches()]

def made_beside():
    from sibling_nets import make

    return make()

def batches_beside():
    from sibling_nets import batches

    yield from batches()

class Halves(nn.Module):
    # the bias of one is computed, so that it cannot be analyzed

    def __init__(self):
        super().__init__()
        self.a, self.weight = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.a(x) + nn.functional.linear(x, self.weight, self.bias * 2)

def halves():
    return Halves()

def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(32, 4, generator=generator)]

def named():
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.rand(n, size, generator=generator) for name, size in (("x", 4), ("shift", 3))} for n in (6, 5)]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of networks and data."""
    (tmp_path / "some_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    return tmp_path


def test_demo_shows_that_learned_rounding_keeps_the_accuracy(tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    command = [Path(sysconfig.get_path("scripts")) / "adaround", "demo", "--bits", "2", "--html", page]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()[2:]
    top1 = {line.split()[0]: float(line.split()[3]) for line in table}
    assert top1["float"] > 95
    assert top1["AdaRound"] > top1["float"] - 2
    assert top1["nearest"] < top1["AdaRound"] - 10
    assert last == f"Report of AdaRound at 2 bits: {page}"
    assert "AdaRound report" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--bits", "9"], "--bits: 9 is not a bit width"),
        (["demo", "--html", "nowhere/page.html"], "--html: the folder 'nowhere' does not exist"),
        (["quantize", "nets", "--data", "some_nets:batches", "--output", "a.pt2"], "model: there is no file 'nets'"),
        (["quantize", "none_such:make", "--data", "some_nets:batches", "--output", "a.pt2"], "no module 'none_such'"),
        (["quantize", "some_nets:none", "--data", "some_nets:batches", "--output", "a.pt2"], "has no 'none'"),
        (["quantize", "some_nets.py:make", "--data", "some_nets:batches", "--output", "a.pt2"], "no module"),
        (["quantize", "some_nets:make", "--data", "nothing", "--output", "a.pt2"], "is no folder"),
        (["quantize", "some_nets:make", "--data", "some_nets:ready", "--output", "a.pt2"], "gives a int"),
        (["quantize", "some_nets:make", "--data", "some_nets:batches", "--output", "."], "--output: '.' is a folder"),
        (
            ["quantize", "some_nets:make", "--data", "some_nets:batches", "--output", "a.pt2", "--layer-bits", "3"],
            "--layer-bits: '3' is not NAME=BITS",
        ),
        (
            ["quantize", "some_nets:make", "--data", "some_nets:batches", "--output", "a.pt2", "--layer-bits", "4=3"],
            "matches none of ['0', '3']",
        ),
        (["analyze", "some_nets:make", "--data", "some_nets:batches", "--widths", "1", "--quiet"], "bits: 1 is not"),
        (["demo", "--backend", "tpu"], "--backend: 'tpu' is not known"),
        (["analyze", "some_nets:make", "--data", "some_nets:one_tensor", "--quiet"], "gives a Tensor"),
        (["analyze", "some_nets:make", "--data", ":batches", "--quiet"], "names no module"),
        (["analyze", "some_nets:make", "--data", "some_nets:batches", "--batch-size", "3"], "makes the batches itself"),
        (["analyze", "some_nets:make", "--data", "some_nets:batches", "--image-size", "3x3"], "are for folders"),
        (["analyze", "some_nets:make", "--data", "some_nets:batches", "--std", "1", "0", "1"], "--std"),
        (
            ["quantize", "some_nets:make", "--data", "some_nets:batches", "--output", "a.pt2", "--widths", "3"],
            "--widths: are those to choose from",
        ),
        (
            [
                *("quantize", "some_nets:make", "--data", "some_nets:batches", "--output", "a.pt2"),
                *("--average-bits", "4", "--layer-bits", "0=5", "--quiet"),
            ],
            "--layer-bits: 5 is not among --widths",
        ),
        (["analyze", "some_nets:make", "--data", ".", "--quiet"], "neither .npy files nor images"),
        (["report", "missing.json"], "there is no file 'missing.json'"),
        (["report", "some_nets.py"], "is not JSON"),
        (["compare", "some_nets.py", "some_nets.py"], "is not JSON"),
    ],
)
def test_what_is_refused_is_named_in_one_line(
    arguments: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("adaround: ")
    assert told in line
    assert not (here / "a.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["demo", "--bits", "two"], "--bits"),
        (["quantize", "a", "--data", "b", "--output", "c", "--memory-budget", "1.5"], "is not a number of bytes"),
        (["quantize", "some_nets:make", "--output", "a.pt2"], "--data"),
        (["analyze", "m:f", "--data", "d", "--size", "1", "--average-bits", "3"], "not allowed with"),
        (["analyze", "m:f", "--data", "d", "--image-size", "224"], "is not HxW"),
        (["analyze", "m:f", "--data", "d", "--batch-size", "0"], "'0' is not a whole number above 0"),
        (["analyze", "m:f", "--data", "d", "--batch-size", "x"], "'x' is not a whole number above 0"),
        (["analyze", "m:f", "--data", "d", "--average-bits", "-1"], "is not a finite number above 0"),
        (["analyze", "m:f", "--data", "d", "--size", "inf"], "'inf' is not a finite number above 0"),
        (["analyze", "m:f", "--data", "d", "--max-loss", "low"], "'low' is not a finite number above 0"),
        (["analyze", "m:f", "--data", "d", "--backend", "tpu"], "tpu"),
    ],
)
def test_wrong_usage_is_told_by_the_parser(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert told in capsys.readouterr().err


def test_what_fails_has_another_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "some_nets:batches", "--output", "a.pt2", "--quiet"]
    assert main(["quantize", "some_nets:branches", *given]) == 1
    assert "model: torch.export cannot export it" in capsys.readouterr().err
    assert main(["quantize", "some_nets:ready", *given]) == 1
    assert "gives a int" in capsys.readouterr().err
    for data, told in (("labelled", "batch 0: does not fit the model's inputs"), ("wide", "batch 1: does not fit")):
        assert main(["quantize", "some_nets:make", "--data", f"some_nets:{data}", *given[2:]]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


@pytest.mark.parametrize("command", [[], ["demo"], ["quantize"], ["analyze"], ["report"], ["compare"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as finished:
        main([*command, "--help"])
    assert finished.value.code == 0
    assert "usage: adaround" in capsys.readouterr().out


def run(*arguments: str) -> None:
    assert main([*arguments, "--quiet"]) == 0


def integers(file: str) -> list[int]:
    """The largest absolute integer of each weight in a saved program."""
    program = torch.export.load(file)
    found = [
        value for value in (*program.state_dict.values(), *program.constants.values()) if value.dtype == torch.int8
    ]
    return [int(value.abs().max()) for value in found if value.dim() > 1]


def declared(file: str) -> list[tuple[int, int]]:
    """The range of each weight in a saved program."""
    nodes = [node for node in torch.export.load(file).graph.nodes if "dequantize_per_channel" in str(node.target)]
    return [tuple(node.args[4:6]) for node in nodes]


def test_a_model_is_quantized_saved_reported_and_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["some_nets:make", "--data", "some_nets:batches"]
    run("quantize", *model, "--bits", "3", "--output", "three.pt2", "--html", "three.html", "--json", "three.json")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[:2] == ["page: three.html", "data: three.json"]
    assert re.fullmatch(r"three\.pt2: [12] of 2 layers learned; error of the output .*", printed.out.splitlines()[2])
    assert integers("three.pt2") == [4, 4]
    with torch.no_grad():
        assert torch.export.load("three.pt2").module()(torch.rand(11, 3, 6, 6)).shape == (11, 5)
    report = Report.from_json(Path("three.json").read_text(encoding="utf-8"))
    assert {layer.name: layer.bits for layer in report.layers} == {"0": 3, "3": 3}
    assert "AdaRound report" in Path("three.html").read_text(encoding="utf-8")
    run("quantize", *model, "--output", "more.pt2", "--json", "more.json", "--layer-bits", "3=6", "--method", "nearest")
    assert integers("more.pt2")[1] > 8
    capsys.readouterr()
    assert main(["report", "three.json", "--html", "again.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "page: again.html"
    assert Path("again.html").read_bytes() == Path("three.html").read_bytes()
    assert main(["compare", "three.json", "more.json"]) == 0
    head, first, second, *rest = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["layer", "bits"]
    assert first.split()[:4] == ["0", "3", "|", "4"]
    assert second.split()[:4] == ["3", "3", "|", "6"]
    assert [line.partition(":")[0] for line in rest] == ["A", "B", "output error, B over A"]


def test_bits_are_suggested_and_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["some_nets:make", "--data", "some_nets:batches", "--widths", "2", "4", "8", "--average-bits", "4.5"]
    run("analyze", *model, "--json", "bits.json", "--html", "bits.html")
    printed = capsys.readouterr().out
    assert "4.5" not in printed.splitlines()[0]
    last = printed.splitlines()[-1]
    assert last.endswith("(learned)")
    analysis = Analysis.from_json(Path("bits.json").read_text(encoding="utf-8"))
    assert [layer.name for layer in analysis.layers] == ["0", "3"]
    assert analysis.bits == (2, 4, 8)
    run("quantize", *model, "--output", "mixed.pt2", "--json", "mixed.json", "--layer-bits", "0=8")
    printed = capsys.readouterr().out
    assert printed.startswith("suggested bits: ")
    report = Report.from_json(Path("mixed.json").read_text(encoding="utf-8"))
    assert {layer.name: layer.bits for layer in report.layers} == {"0": 8, "3": 2}


def test_what_cannot_be_analyzed_keeps_the_bits_that_it_was_given(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["some_nets:halves", "--data", "some_nets:rows", "--output", "q.pt2", "--json", "q.json"]
    for name in ("weight", "w.*t"):
        run("quantize", *model, "--average-bits", "3", "--layer-bits", f"{name}=8")
        assert "not analyzed, and not in the budget: weight" in capsys.readouterr().out
        report = Report.from_json(Path("q.json").read_text(encoding="utf-8"))
        assert {layer.name: layer.bits for layer in report.layers}["weight"] == 8


def test_a_program_takes_any_number_of_samples_where_the_first_batch_has_one(here: Path) -> None:
    run("quantize", "some_nets:make", "--data", "some_nets:singles", "--output", "q.pt2")
    with torch.no_grad():
        assert torch.export.load("q.pt2").module()(torch.rand(5, 3, 6, 6)).shape == (5, 5)


def test_programs_keyword_batches_and_activations_are_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("quantize", "some_nets:keywords", "--data", "some_nets:named", "--output", "named.pt2", "--json", "named.json")
    assert Report.from_json(Path("named.json").read_text(encoding="utf-8")).layers[0].bits == 4
    with torch.no_grad():
        found = torch.export.load("named.pt2").module()(x=torch.rand(3, 4), shift=torch.zeros(3, 3))
    assert found.shape == (3, 3)
    sys.path.insert(0, str(here))
    try:
        import some_nets
    finally:
        sys.path.remove(str(here))
    program = torch.export.export(some_nets.make().eval(), (torch.rand(8, 3, 6, 6),), strict=True)
    torch.export.save(program, "float.pt2")
    for backend in ("x86", "xnnpack"):
        model = ["float.pt2", "--data", "some_nets:batches", "--output", "q.pt2", "--backend", backend]
        run("quantize", *model, "--json", "q.json")
        targets = {str(node.target) for node in torch.export.load("q.pt2").graph.nodes}
        assert any("quantize_per_tensor" in target for target in targets)
        assert max(integers("q.pt2")) <= 8
        settings = Report.from_json(Path("q.json").read_text(encoding="utf-8")).settings
        # XNNPACK adds biases as integers, and has convolutions of 8 bits alone
        assert settings["integer_biases"] == str(backend == "xnnpack")
        assert declared("q.pt2") == ([(-127, 127), (-8, 7)] if backend == "xnnpack" else [(-8, 7)] * 2)
        capsys.readouterr()
        run("quantize", *model, "--finetune")
        assert ("biases stay in float" in capsys.readouterr().out) == (backend == "xnnpack")
    capsys.readouterr()
    Path("broken.pt2").write_text("nothing", encoding="utf-8")
    assert main(["quantize", "broken.pt2", "--data", "some_nets:batches", "--output", "x.pt2", "--quiet"]) == 2
    assert "is no exported program" in capsys.readouterr().err
    with zipfile.ZipFile("broken.pt2", "w") as archive:
        archive.writestr("other/file", "nothing")
    assert main(["quantize", "broken.pt2", "--data", "some_nets:batches", "--output", "x.pt2", "--quiet"]) == 2
    assert "is no exported program (" in capsys.readouterr().err


def test_a_traced_model_is_exported(here: Path) -> None:
    """A graph of torch.fx is no exported program."""
    run("quantize", "some_nets:traced", "--data", "some_nets:batches", "--output", "q.pt2", "--json", "q.json")
    assert [layer.bits for layer in Report.from_json(Path("q.json").read_text(encoding="utf-8")).layers] == [4, 4]


def test_a_run_goes_on_from_its_checkpoint_within_a_memory_budget(here: Path) -> None:
    model = ["some_nets:make", "--data", "some_nets:batches", "--checkpoint", "kept", "--memory-budget", "0"]
    for name in ("one", "two"):
        run("quantize", *model, "--output", f"{name}.pt2", "--json", f"{name}.json")
    one, two = (Report.from_json(Path(f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one.recalled == 0 < two.recalled
    assert one.memory["budget"] == 0 < one.memory["spilled"]
    assert [layer.learned_error for layer in one.layers] == [layer.learned_error for layer in two.layers]


def test_progress_goes_to_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "some_nets:make", "--data", "some_nets:batches", "--widths", "4", "--json", "b.json"]) == 0
    printed = capsys.readouterr()
    assert "AdaRound" in printed.err
    assert "AdaRound" not in printed.out


# --- data in files


def test_arrays_are_joined_and_split(here: Path) -> None:
    folder = here / "arrays"
    folder.mkdir()
    values = np.arange(14.0).reshape(7, 2)
    np.save(folder / "a.npy", values[:4])
    np.save(folder / "b.npy", values[4:])
    (folder / "notes.txt").write_text("not data", encoding="utf-8")
    found = load_data("arrays", 3, Images())
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert torch.equal(torch.cat(found), torch.from_numpy(values).float())
    np.save(folder / "c.npy", np.arange(4).reshape(2, 2))
    with pytest.raises(InvalidBatchError, match=r"c\.npy: has samples of torch\.int64"):
        load_data("arrays", 3, Images())
    np.save(folder / "c.npy", np.array({"a": 1}, dtype=object), allow_pickle=True)
    with pytest.raises(InvalidBatchError, match=r"c\.npy: cannot be read"):
        load_data("arrays", 3, Images())
    (folder / "c.npy").write_bytes(b"")
    with pytest.raises(InvalidBatchError, match=r"c\.npy: cannot be read"):
        load_data("arrays", 3, Images())
    with (folder / "c.npy").open("wb") as file:
        np.savez(file, values)
    with pytest.raises(InvalidBatchError, match=r"c\.npy: holds several arrays"):
        load_data("arrays", 3, Images())
    with pytest.raises(InvalidOptionError, match="folders of images"):
        load_data("arrays", 3, Images(mean=(0.5, 0.5, 0.5)))


def test_arrays_of_another_machine_are_taken(here: Path) -> None:
    (here / "arrays").mkdir()
    for kind in (">i4", ">f8"):
        np.save(here / "arrays" / "a.npy", np.arange(6).reshape(3, 2).astype(kind))
        (found,) = load_data("arrays", None, Images())
        assert found.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_images_are_resized_and_normalized(here: Path) -> None:
    folder = here / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4), (255, 0, 51)).save(folder / "a.png")
    Image.new("L", (8, 6), 255).save(folder / "b.png")
    with pytest.raises(InvalidBatchError, match="--image-size"):
        load_data("images", 8, Images())
    (found,) = load_data("images", 8, Images((2, 3), (0.5, 0.0, 0.0), (0.5, 1.0, 2.0)))
    assert found.shape == (2, 3, 2, 3)
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.1])
    assert found[1, :, 1, 2].tolist() == pytest.approx([1.0, 1.0, 0.5])
    np.save(folder / "c.npy", np.zeros((1, 3, 2, 3)))
    with pytest.raises(InvalidOptionError, match="both arrays and images"):
        load_data("images", 8, Images())


def test_images_that_cannot_be_read_are_named(here: Path) -> None:
    folder = here / "images"
    folder.mkdir()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(folder / "deep.png")
    with pytest.raises(InvalidBatchError, match=r"deep\.png: has pixels of mode I;16"):
        load_data("images", 8, Images())
    (folder / "deep.png").write_bytes(b"no image")
    with pytest.raises(InvalidBatchError, match=r"deep\.png: cannot be read"):
        load_data("images", 8, Images())


def test_the_path_of_modules_is_as_before(here: Path) -> None:
    before = list(sys.path)
    with importing_from_here():
        assert isinstance(load_model("some_nets:make")(), torch.nn.Sequential)
        with pytest.raises(InvalidModelError, match="gives a int"):
            load_model("some_nets:ready")()
    assert sys.path == before


def test_functions_import_their_neighbours_when_they_are_called(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "sibling_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "sibling_nets", raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    run("analyze", "some_nets:made_beside", "--data", "some_nets:batches_beside", "--quiet")
    assert "Linear" in capsys.readouterr().out


@pytest.mark.parametrize("make", [load_model, lambda name: load_data(name, 1, Images())])
def test_errors_of_an_imported_module_are_its_own(here: Path, make: Callable[[str], object]) -> None:
    (here / "failing_nets.py").write_text("import none_such_package\n", encoding="utf-8")
    with importing_from_here(), pytest.raises(ModuleNotFoundError, match="none_such_package"):
        make("failing_nets:make")


def through_terminal(monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """What a command prints into a terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("COLUMNS", "100")
        assert main(command) == 0
    found = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            found += part
    os.close(ours)
    return found.decode()


def test_a_report_is_tables_in_a_terminal_where_rich_is_installed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = LayerReport("first", "Conv2d", (), (4, 3), 3, 0.1, 0.01, None, None, True, 0.25, 0.0, "kept", 10, 1.25)
    report = Report("default", "Annealing", "plain", [layer], [])
    (here / "report.json").write_text(report.to_json())
    shown = through_terminal(monkeypatch, "report", "report.json")
    assert "│" in shown
    assert "first" in shown
    assert main(["report", "report.json"]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert through_terminal(monkeypatch, "report", "report.json").splitlines() == str(report).splitlines()


def test_a_report_of_another_format_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.json").write_text(json.dumps({"format": "adaround analysis", "version": 1}), encoding="utf-8")
    assert main(["report", "other.json"]) == 2
    assert "has the format 'adaround analysis'" in capsys.readouterr().err
