"""Chat templates: Jinja as the model's authors wrote it, in a sandbox, with bounds on time and output.

The environment is the one that templates on the hub are written for (Hugging Face transformers,
`utils/chat_template_utils.py`): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `generation` block,
and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any, NoReturn

MAX_CHARACTERS = 4 << 20
"""Of output; more than any context window holds."""
MAX_SECONDS = 2.0
"""Of rendering. A conversation takes milliseconds; a template that loops over loops is stopped."""

_DEADLINE = "_shoal_deadline"


class TemplateError(Exception):
    """The template refused the messages, or failed on them. The message is for the client."""


class ChatTemplate:
    """Compiled when it is first used. May be shared by threads."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`special_tokens` are template variables: bos_token, eos_token, ..."""
        self.source = source
        self._special_tokens = special_tokens
        self._compiled: Any = None

    def render(
        self,
        /,  # a variable may be called `self`
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt. `variables` are for the template, such as `enable_thinking`. Raises TemplateError.

        Time is looked at whenever the template enters a block (the body of a loop, a branch) or yields text.
        """
        import jinja2

        if self._compiled is None:
            self._compiled = _compile(self.source)
        given = {"documents": None, **self._special_tokens, **variables}
        given |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        deadline = given[_DEADLINE] = time.monotonic() + MAX_SECONDS
        parts, size = [], 0
        try:
            for part in self._compiled.generate(given):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS:
                    raise TemplateError(f"the chat template made more than {MAX_CHARACTERS} characters")
                check_time(deadline)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(f"the chat template failed on these messages: {error}") from None
        except RecursionError:
            raise TemplateError("the chat template failed on these messages: nested too deeply") from None
        return "".join(parts)


def check_time(deadline: float) -> None:
    """Called by compiled templates, and between their parts."""
    if time.monotonic() > deadline:
        raise TemplateError(f"the chat template took longer than {MAX_SECONDS:g} s")


def _compile(source: str) -> Any:
    import jinja2

    environment = _environment()
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the model's chat template does not parse: {error}") from None


def _environment() -> Any:
    """Classes are made here because Jinja is imported on first use."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class TimedCodeGenerator(CodeGenerator):
        """Puts a look at the clock at the beginning of every block of the compiled template."""

        def blockvisit(self, body: Any, frame: Frame) -> None:
            self.writeline(f"environment.globals['check_time'](context.resolve({_DEADLINE!r}))")
            super().blockvisit(body, frame)

    class GenerationBlock(Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is just its content."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = TimedCodeGenerator

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["check_time"] = check_time
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
