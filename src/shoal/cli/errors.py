"""What a command refuses to do."""

from __future__ import annotations


class CommandError(Exception):
    """The message is for the user, in one line: what is wrong, and what to do next."""


class UsageError(CommandError):
    """What was asked makes no sense, which is another exit status than an answer that is no."""
