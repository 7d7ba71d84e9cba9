"""What HTML pages share: templates of page/, scripts and styles in the page, and data that cannot break out."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

import mappo
from mappo.reporting.plots import Plot


def render(template: str, shown: Sequence[Plot], **values: Any) -> str:
    """A page from one of the templates, with all that it needs in it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(_text)
    )
    figures = [{"identifier": plot.identifier, "figure": json.loads(plot.figure)} for plot in shown]
    return environment.get_template(template).render(
        plots_json=embedded(figures),
        plotly=_plotly(),
        css=_safe(_text("page.css")),
        player_script=_safe(_text("player.js")),
        page_script=_safe(_text("page.js")),
        version=mappo.__version__,
        **values,
    )


def embedded(value: Any) -> Markup:
    """JSON in an element of a script's kind, which no content of it can end."""
    return _safe(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _safe(text: str) -> Markup:
    """Our own files, and JSON that was escaped."""
    return Markup(text)  # noqa: S704


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return _safe(get_plotlyjs())


def _text(name: str) -> str:
    return (files("mappo.reporting") / "page" / name).read_text()
