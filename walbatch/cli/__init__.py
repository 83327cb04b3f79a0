"""The command line: `walbatch COMMAND STORE`. The only reader of the environment; everything else is passed in.

It never shows a traceback: every error ends in one line that says what to do, and in an exit code for scripts.
"""

from walbatch.cli.app import main

__all__ = ["main"]
