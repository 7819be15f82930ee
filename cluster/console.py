"""What a person reads while a sweep runs. The rest, Ray's messages above all, goes to the log."""

import shlex
import sys
from pathlib import Path


def say(text: str = "", end: str = "\n") -> None:
    """Prints past `sys.stdout`, which a session turns into its log."""
    print(text, end=end, file=sys.__stdout__, flush=True)


def this_command() -> str:
    """What was typed to start this process, without --fresh, which would throw away what is to be resumed."""
    program = Path(sys.executable)
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return shlex.join([str(shown), *(argument for argument in sys.argv if argument != "--fresh")])
