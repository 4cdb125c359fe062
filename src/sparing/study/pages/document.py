"""What every report page shares: a template environment that escapes everything, and a write that is whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2


def page_environment() -> jinja2.Environment:
    """The templates of this room, escaping on, unknown names an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparing.study.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Embedded data keeps its order and wastes no space.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def write_page(page: str, path: Path) -> None:
    """Write a page so that `path` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
