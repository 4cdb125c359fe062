"""What every report page shares: a template environment that escapes everything, and a write that is whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def _environment() -> jinja2.Environment:
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


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template of this room as HTML. Everything that comes from a model, a study or a text is escaped.

    Args:
        template: its file.
        filters: what the template calls by name, beside jinja's own.
        values: what it shows.
    """
    environment = _environment()
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


def render_record(
    template: str,
    figures: Mapping[str, Any],
    run: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]],
    **values: Any,
) -> str:
    """The page of one command's run: its figures, and its record in full at the end.

    Args:
        template: its file.
        figures: the command's figures, as `plain` has them.
        run: the run's record: command, versions, hardware.
        filters: as in `render_page`.
        values: what else the template shows.
    """
    record = json.dumps({name: value for name, value in run.items() if name != "figures"}, indent=2, default=str)
    return render_page(template, filters, f=figures, run=run, run_json=record, **values)


def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures through JSON, so that fresh ones and those read from `run.json` are the same."""
    return json.loads(json.dumps(figures, default=str))


def write_page(page: str, path: Path) -> None:
    """Write a page so that `path` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
