"""The rendering of HTML pages: templates of page/ with their scripts, styles and safely embedded data."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

import mappo

if TYPE_CHECKING:
    from mappo.reporting.plots import Plot  # imports plotly and torch


def render(template: str, embedded_plots: "Sequence[Plot]" = (), **values: Any) -> str:
    """Return a self-contained page made from a template.

    embedded_plots: the plots whose figures the page contains. values: the other variables of the template.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(_text)
    )
    figures = [{"identifier": plot.identifier, "figure": json.loads(plot.figure)} for plot in embedded_plots]
    return environment.get_template(template).render(
        plots_json=embedded(figures),
        plotly=_plotly() if figures else "",
        scripts={name: _safe(_text(f"{name}.js")) for name in ("page", "player", "overview")},
        css=_safe(_text("page.css")),
        version=mappo.__version__,
        **values,
    )


def embedded(value: Any) -> Markup:
    """Return a value as JSON for a <script> element. Escaped `<` keeps the data from closing the element."""
    return _safe(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _safe(text: str) -> Markup:
    """Mark a text as safe HTML. Only files of this package and escaped JSON may come here."""
    return Markup(text)  # noqa: S704


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return _safe(get_plotlyjs())


def _text(name: str) -> str:
    return (files("mappo.reporting") / "page" / name).read_text()
