"""Render conversations with a chat template of Hugging Face, in a process of its own.

    stdin: {"template", "names", "now", "conversations": [{"messages", "prompt"}]}
    stdout: [{"text"} or {"error"}] in the same order

The template is a Jinja program from outside. It runs in jinja2's sandbox, as in ``transformers``, and in this process,
whose time and memory are limited: the sandbox does not stop a loop that never ends. ``chat_template`` starts this file
by its path, so it imports only the standard library and jinja2.

Source: ``transformers`` 5.24, ``utils/chat_template_utils.py``, for the extensions, filters and globals.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_SECONDS = 20
_MOST_BYTES = 1 << 30
_MOST_LETTERS = 1 << 20
"""Largest length of a rendered conversation."""


class _Generation(jinja2.ext.Extension):
    """The block ``{% generation %}``, which marks answers for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own protocol

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _render(template: Any, names: dict[str, str], conversation: dict[str, Any]) -> dict[str, str]:
    values = {"tools": None, "documents": None, "add_generation_prompt": conversation["prompt"], **names}
    try:
        text = template.render(messages=conversation["messages"], **values)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error!s:.200}"}
    return {"text": text} if len(text) <= _MOST_LETTERS else {"error": "the text is too long"}


def main() -> None:
    """Render the conversations of stdin and write the results to stdout."""
    resource.setrlimit(resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    task = json.load(sys.stdin)
    try:
        template = _environment(datetime.fromisoformat(task["now"])).from_string(task["template"])
    except jinja2.TemplateError as error:
        results = [{"error": f"{type(error).__name__}: {error!s:.200}"}] * len(task["conversations"])
    else:
        results = [_render(template, task["names"], one) for one in task["conversations"]]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
