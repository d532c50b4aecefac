"""A model's chat template: messages to the text that the model was trained to continue.

Templates are Jinja, written for Hugging Face's renderer: the environment here has what that
one has (block trimming, ``raise_exception``, ``strftime_now``, a ``tojson`` that escapes no
HTML, loop controls, ``generation`` blocks). It is sandboxed, for a template comes with
the weights and may be anyone's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import RequestError, StartupError


class ChatTemplate:
    """``variables`` are the special tokens that a template may name, such as ``bos_token``."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"the model's chat template is no valid Jinja: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the assistant speaks; RequestError where the template refuses."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the superclass)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
