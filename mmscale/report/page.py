"""Render a page as one file, with styles, charts and scripts inlined.

The content security policy allows only the inlined script, by its hash, so text on the page cannot run as a script.
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
        template: A template file of this package, or of a package whose templates include those of this one.
        values: Variables of the template. All text is escaped. A missing variable raises ``UndefinedError``.
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
    media = "img-src data:; media-src data:"
    policy = f"default-src 'none'; {media}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    style = (_FOLDER / "uplot/uPlot.min.css").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(
        script=Markup(script), policy=policy, chart_style=Markup(style), **values
    )


def _jpeg_url(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
