"""The report as one HTML page that needs no network."""

import base64
import hashlib
from pathlib import Path

import jinja2
import numpy as np

from datasets.cityscapes import CLASSES, COLORS
from ffnet.report.charts import class_chart, sensitivity_chart
from ffnet.report.images import MARKS, NOT_SCORED
from ffnet.report.result import BackendResult, Result, miou_drop

FOLDER = Path(__file__).parent
FULL_CHANGE = 5  # percentage points of a confusion's change that are shown in full colour


def render(result: Result) -> str:
    """Return the page as text. Nothing in `result`, however it is named, becomes markup."""
    script = (FOLDER / "report.js").read_text("utf-8")
    first, *others = result.backends
    matrices = {name: confusion_percentages(entry) for name, entry in result.backends.items()}
    sensitivity = result.details.diagnostics.sensitivity
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            result=result,
            worst_images=result.details.diagnostics.worst_images,
            sensitivity=sensitivity,
            first=first,
            others=others,
            miou_drop=miou_drop,
            class_colors={label: _css_color(color) for label, color in zip(CLASSES, COLORS, strict=True)},
            marks=[(words, _css_color(color)) for words, color in (*MARKS.values(), NOT_SCORED)],
            class_chart=class_chart(result) if others else None,
            sensitivity_chart=sensitivity_chart(sensitivity) if sensitivity else None,
            matrices=matrices,
            changes=np.subtract(matrices[others[0]], matrices[first]).tolist() if others else None,
            full_change=FULL_CHANGE,
            style=(FOLDER / "report.css").read_text("utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def confusion_percentages(entry: BackendResult) -> list[list[float]]:
    """Return a confusion matrix in percent of each class's labelled pixels; zeros if there are none."""
    matrix = np.array(entry.confusion_matrix, np.float64)
    totals = matrix.sum(1, keepdims=True)
    return (100 * np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)).tolist()


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Return a number as text; a dash for None."""
    if value is None:
        return "–"
    value = round(value, digits)
    return f"{value:{sign}.{digits}f}".replace("-", "−") if value else f"{0:.{digits}f}"


def data_uri(content: bytes | str, mime: str) -> str:
    """Return bytes or text as an address that needs no file."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _css_color(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "data_uri": data_uri}
    return environment
