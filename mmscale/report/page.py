"""Pages that are one file each: templates, styles, charts and scripts inlined.

A page may run the inlined script alone: the content security policy names its hash, so no text of a page ever runs.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmscale.metrics.format import format_count, format_seconds

_FOLDER = Path(__file__).parent


def render_page(template: Path, **values: Any) -> str:
    """Return a page as text.

    Args:
        template: A file of this package, or of one that includes templates of this one.
        values: Variables of the template. All text is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = format_count
    environment.filters["duration"] = format_seconds
    environment.filters["jpeg_url"] = _jpeg_url
    script = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("uplot/uPlot.iife.min.js", "charts.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    style = (_FOLDER / "uplot/uPlot.min.css").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(
        script=Markup(script), policy=policy, chart_style=Markup(style), **values
    )


def _jpeg_url(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()
