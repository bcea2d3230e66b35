"""The frame of every page that Dori writes: one form, one style sheet, shared tables; every text is escaped."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2


def page(template: str, *, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """A template of this package as HTML.

    Args:
        template: its path under `dori`, such as "report/template.html".
        filters: what the template may send values through, by name.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("dori").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(values)
