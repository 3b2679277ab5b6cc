"""What a command refuses to do."""

from __future__ import annotations


class CommandError(Exception):
    """The message is for the user, in one line: what is wrong, and what to do next."""
