"""The command line, in a process of its own."""

import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adaround_plugin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_demo_shows_that_learned_rounding_keeps_the_accuracy() -> None:
    result = run("demo", "--bits", "2")
    assert result.returncode == 0, result.stderr
    top1 = {line.split()[0]: float(line.split()[3]) for line in result.stdout.splitlines()[2:]}
    assert top1["float"] > 95
    assert top1["AdaRound"] > top1["float"] - 2
    assert top1["nearest"] < top1["AdaRound"] - 10


def test_bits_out_of_range_are_refused_by_name() -> None:
    result = run("demo", "--bits", "9")
    assert result.returncode == 2
    assert "--bits" in result.stderr
    assert "from 2 to 8" in result.stderr


def test_a_command_is_required() -> None:
    assert run().returncode == 2
