"""The comparison of several models as one HTML page that needs no network."""

import os
from urllib.parse import quote

from ffnet.report.comparison_charts import LABELED_MODELS, front_chart
from ffnet.report.html import ENVIRONMENT, render_page
from ffnet.results.comparison import ModelComparison, class_rows
from ffnet.results.comparison_notes import all_notes


def render_comparison(comparison: ModelComparison) -> str:
    """Return the page as text. Nothing in `comparison`, however it is named, becomes markup."""
    return render_page(
        "comparison.html.j2",
        comparison=comparison,
        notes=all_notes(comparison),
        fronts=comparison.fronts(),
        other_backends=comparison.other_backends(),
        class_rows=class_rows(comparison),
        front_chart=front_chart,
        labeled_models=LABELED_MODELS,
    )


def relative_url(path: str) -> str:
    """Return a relative path as the URL of a link, which can name neither a scheme nor a host."""
    return f"./{quote(os.fsencode(path))}"


ENVIRONMENT.filters["relative_url"] = relative_url
