"""Chat templates: from a list of messages to the text the model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowtide.errors import LowtideError


def find_template(config: Mapping[str, Any], jinja_file: bytes | None = None) -> str | None:
    """The chat template out of `chat_template.jinja` or `tokenizer_config.json`; None if there is none."""
    if jinja_file is not None:
        return jinja_file.decode("utf-8", "replace")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one for plain chat is called "default"
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def render(template: str | None, messages: Sequence[Mapping[str, str]], config: Mapping[str, Any]) -> str:
    """Text of a conversation, ending where the assistant is to speak.

    Templates come out of model files, so they run in jinja2's sandbox.

    Args:
        template: from `find_template`.
        messages: dicts with "role" (system, user, assistant) and "content".
        config: `tokenizer_config.json`; its special tokens are visible to the template.

    Raises:
        LowtideError: no template, a broken one, or one that refuses these messages.
    """
    if template is None:
        raise LowtideError(
            "this artifact has no chat template (chat_template in tokenizer_config.json); use `lowtide generate`"
        )
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        text: str = env.from_string(template).render(messages=list(messages), add_generation_prompt=True, **tokens)
        return text
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise LowtideError(f"chat template: {' '.join(str(error).split())}") from error


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _token_text(value: object) -> str:
    """Special tokens are stored as text, or as a dict with the text under "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
