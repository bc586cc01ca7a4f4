"""Render HTML pages from the package's templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Return a page rendered from one of the package's templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
