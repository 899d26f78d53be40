"""Templates of `recipes/templates/`, rendered strictly: a variable that is missing is an error, not nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.topology import cpulist


def render_template(name: str, templates: Mapping[str, str], variables: Mapping[str, Any], what: str) -> str:
    """Render the template `name`; `templates` maps the names of all that it may include to their texts.

    Filters beside jinja's own: `sh` makes one shell word (a list is joined by spaces first), `cpulist` a list in
    the kernel's format. In templates that end in `.xml.j2` or `.html.j2` everything is escaped. Raises `UserError`,
    which begins with `what`, when a variable is missing or a template is wrong.
    """
    # Imported here, since every run of doit loads this module and few render anything.
    from jinja2 import DictLoader, Environment, StrictUndefined, TemplateError, select_autoescape

    environment = Environment(
        loader=DictLoader(dict(templates)),
        undefined=StrictUndefined,
        # Most of it is shell and configuration, where quoting is the filter's.
        autoescape=select_autoescape(enabled_extensions=["xml.j2", "html.j2"], default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # In shell "{#" is how a length begins.
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters |= {"sh": _shell_word, "cpulist": cpulist}
    try:
        return environment.get_template(name).render(variables)
    except TemplateError as error:
        raise UserError(
            f"{what}: {type(error).__name__}: {error}", f"look at the template {name} and what it includes"
        ) from error


def _shell_word(value: str | int | Iterable[str | int]) -> str:
    if not isinstance(value, str | int):
        value = " ".join(map(str, value))
    return shlex.quote(str(value))
