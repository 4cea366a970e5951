"""The report as one HTML page that needs no network."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ffnet.evaluation.bootstrap import Interval
from ffnet.labels import CLASSES, COLORS
from ffnet.report.charts import class_chart, npu_chart, recovery_chart, sensitivity_chart
from ffnet.results.images import MARKS
from ffnet.results.result import BackendResult, Result, miou_drop, miou_drops

FOLDER = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(result: Result) -> str:
    """Return the page as text. Nothing in `result`, however it is named, becomes markup."""
    first, *others = result.backends
    matrices = {name: confusion_percentages(entry) for name, entry in result.backends.items()}
    return render_page(
        "report.html.j2",
        result=result,
        first=first,
        others=others,
        matrices=matrices,
        changes=np.subtract(matrices[others[0]], matrices[first]).tolist() if others else None,
        marks=MARKS.values(),
        class_chart=class_chart,
        sensitivity_chart=sensitivity_chart,
        npu_chart=npu_chart,
        recovery_chart=recovery_chart,
        miou_drop=miou_drop,
        miou_drops=miou_drops,
    )


def render_page(template: str, **values: Any) -> str:
    """Return a page from a template that extends base.html.j2; `values`: what the template shows."""
    script = (FOLDER / "report.js").read_text("utf-8")
    return ENVIRONMENT.get_template(template).render(
        class_colors=dict(zip(CLASSES, map(tuple, COLORS.tolist()), strict=True)),
        style=(FOLDER / "report.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def confusion_percentages(entry: BackendResult) -> list[list[float]]:
    """Return a confusion matrix in percent of each class's labelled pixels; zeros if there are none."""
    matrix = np.array(entry.confusion_matrix, np.float64)
    totals = matrix.sum(1, keepdims=True)
    return (100 * np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)).tolist()


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Return a number as text, with a minus sign instead of a hyphen; a dash for None."""
    return "–" if value is None else f"{value:{sign}z.{digits}f}".replace("-", "−")


def interval(limits: Interval | None) -> str:
    """Return an interval as text without a line break; a dash for None."""
    return f"[{number(limits[0])},\N{NO-BREAK SPACE}{number(limits[1])}]" if limits else "–"


def data_uri(content: bytes | str, mime: str) -> str:
    """Return a data URI, which holds its content."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


ENVIRONMENT.filters |= {"number": number, "interval": interval, "data_uri": data_uri}
