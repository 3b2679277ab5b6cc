"""Texts that exporters write: YAML in a fixed order with comments, and shell commands, one argument a line."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

import msgspec
import yaml

_WIDTH = 116


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """Files by their names, and what of the deployment the target does not have."""

    target: str
    files: dict[str, str]
    warnings: tuple[str, ...] = ()


class _Dumper(yaml.SafeDumper):
    """Lists are indented below their keys, strings of several lines are blocks, and nothing is an alias."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(value: Any) -> str:
    """In the order of the dictionaries, which is the order that people write."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def comment(lines: Iterable[str], mark: str = "#") -> str:
    """Each a paragraph; a line that begins with a space is kept as it is: a command to copy."""
    out: list[str] = []
    for line in lines:
        parts = [line] if line.startswith(" ") else wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)
        out += [f"{mark} {part}".rstrip() for part in parts or [""]]
    return "".join(f"{line}\n" for line in out)


def documents(head: Iterable[str], parts: Sequence[tuple[str, Any]]) -> str:
    """Several YAML documents in one file; each with the comment that says what it is for."""
    text = comment(head)
    for why, value in parts:
        text += "---\n" + (comment([why]) if why else "") + to_yaml(value)
    return text


def command(words: Sequence[str], arguments: Sequence[str], indent: str = "  ") -> str:
    """A command over several lines: each flag stands on one with its value. Quoted for a shell, but `${...}` is left
    for it to fill in."""
    rows = [" ".join(map(quote, words))]
    for argument in arguments:
        if argument.startswith("--") or not rows[1:]:
            rows.append(quote(argument))
        else:
            rows[-1] += f" {quote(argument)}"
    return f" \\\n{indent}".join(rows)


def quote(word: str) -> str:
    if "${" in word:
        return '"' + word.replace('"', '\\"') + '"'
    return shlex.quote(word)
