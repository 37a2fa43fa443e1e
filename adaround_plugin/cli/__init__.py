"""The `adaround` command.

`main`: commands and their options, errors and exit codes. `commands`: what each does. `sources`: models and data by
name. `flow`: from a model to a saved program, by PT2E. Imports everything below, and nothing imports it.
"""

from adaround_plugin.cli.main import main

__all__ = ["main"]
