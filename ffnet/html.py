"""report.html: one file that needs no network, for people to look at."""

import base64
import hashlib
import shlex
from pathlib import Path

import numpy as np

from datasets.cityscapes import CLASSES, COLORS
from ffnet import charts, pictures
from ffnet.output import write_whole

HERE = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "report.html.j2", HERE / "report.css", HERE / "report.js"
FULL_CHANGE = 5  # points of a confusion's change that are shown in full colour
BOTH_WAYS = ("cle", "compile", "execute")  # options that are --name or --no-name
VALUED = ("use_cuda",)  # truth values that are written out


def write_html(path, result, rows=(), sensitivity=None):
    """Writes the report under `path`, whole or not at all; returns the path.

    `result`: what result.json holds, as report describes it. `rows`: of pictures.render_rows. `sensitivity`: a
    sensitivity.Sensitivity.
    """
    return write_whole(path, render(result, rows, sensitivity))


def render(result, rows=(), sensitivity=None):
    """The page as text. Nothing in `result`, however named, becomes markup."""
    script = SCRIPT.read_text("utf-8")
    first, *others = result["passes"]
    matrices = {name: confusion_shares(entry) for name, entry in result["passes"].items()}
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            result=result,
            rows=rows,
            sensitivity=sensitivity,
            first=first,
            others=others,
            classes=CLASSES,
            swatches=["#{:02x}{:02x}{:02x}".format(*color) for color in COLORS],
            marks=[(words, "#{:02x}{:02x}{:02x}".format(*color)) for words, color in _legend()],
            class_chart=charts.class_chart(result) if others else None,
            sensitivity_chart=charts.sensitivity_chart(sensitivity) if sensitivity else None,
            matrices=matrices,
            changes=np.subtract(matrices[others[0]], matrices[first]).tolist() if others else None,
            full_change=FULL_CHANGE,
            command=command_line(result["arguments"]),
            style=STYLE.read_text("utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _legend():
    return [*pictures.MARKS.values(), pictures.VOID]


def confusion_shares(entry):
    """A pass's confusion matrix in percent of each row, of a class's labelled pixels; zeros where there are none."""
    matrix = np.array(entry["confusion_matrix"], np.float64)
    totals = matrix.sum(1, keepdims=True)
    return (100 * np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)).tolist()


def command_line(arguments):
    """The command that repeats the run, from `arguments`, {option's name with underscores: value or None}."""
    words = ["python", "ffnet_quanteval.py"]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if name in BOTH_WAYS and value is not None:
            words.append(option if value else option.replace("--", "--no-", 1))
        elif name in VALUED and value is not None:
            words += [option, str(value).lower()]
        elif value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, str(value)]
    return shlex.join(words)


def _environment():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "data": data_uri}
    return environment


def number(value, digits=2, sign=""):
    """A figure as text; a dash where there is none."""
    if value is None:
        return "–"
    value = round(value, digits)
    return f"{value:{sign}.{digits}f}".replace("-", "−") if value else f"{0:.{digits}f}"


def data_uri(content, mime):
    """Bytes, or text, as an address that needs no file."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
