"""The command line: the demo by the installed command in a process of its own, what is refused in this one."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from adaround_plugin.cli import main


def test_demo_shows_that_learned_rounding_keeps_the_accuracy() -> None:
    command = [Path(sysconfig.get_path("scripts")) / "adaround", "demo", "--bits", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    top1 = {line.split()[0]: float(line.split()[3]) for line in result.stdout.splitlines()[2:]}
    assert top1["float"] > 95
    assert top1["AdaRound"] > top1["float"] - 2
    assert top1["nearest"] < top1["AdaRound"] - 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--bits", "9"], "--bits"),
        (["demo", "--bits", "9"], "from 2 to 8"),
        (["demo", "--bits", "two"], "--bits"),
        ([], "command"),
    ],
)
def test_what_is_refused_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert told in capsys.readouterr().err
