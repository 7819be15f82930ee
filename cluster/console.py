"""What a person reads while a sweep runs. The rest, Ray's messages above all, goes to the log."""

import sys


def say(text: str = "", end: str = "\n") -> None:
    """Prints past `sys.stdout`, which a session turns into its log."""
    print(text, end=end, file=sys.__stdout__, flush=True)
