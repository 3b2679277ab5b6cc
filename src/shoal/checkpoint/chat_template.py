"""Chat templates: Jinja as the model's authors wrote it, in a sandbox, with bounds on time and output.

The environment is the one that templates on the hub are written for: trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, and a `tojson` that neither escapes HTML nor sorts keys.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

_MAX_OUTPUT = 4 << 20
"""Characters; more than any context window holds."""


class TemplateError(Exception):
    """The template refused the messages, or failed on them."""


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`special_tokens` are template variables: bos_token, eos_token, ..."""
        self.source = source
        self._special_tokens = special_tokens
        self._compiled: Any = None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        import jinja2

        if self._compiled is None:
            self._compiled = _compile(self.source)
        parts, size = [], 0
        try:
            for part in self._compiled.generate(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **(self._special_tokens | variables),
            ):
                parts.append(part)
                size += len(part)
                if size > _MAX_OUTPUT:
                    raise TemplateError(f"the chat template made more than {_MAX_OUTPUT} characters")
        except TemplateError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise TemplateError(f"the chat template failed on these messages: {error}") from None
        except RecursionError:
            raise TemplateError("the chat template failed on these messages: nested too deeply") from None
        return "".join(parts)


def _compile(source: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the model's chat template does not parse: {error}") from None
