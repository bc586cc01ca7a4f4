"""Render HTML pages from the package's templates."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

__all__ = ["render"]

_TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """Return a page rendered from one of the package's templates, with the script that sorts its tables.

    The page's security policy names the script by its SHA-256, so a browser runs no other.

    Raises:
        KeyError: the template asks for a value that is not there.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "sort.js.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    try:
        return environment.get_template(template).render(
            script=Markup(script), script_hash=Markup(f"sha256-{digest}"), **values
        )
    except UndefinedError as error:
        # as a dictionary says it
        raise KeyError(error.message) from error
