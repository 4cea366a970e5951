"""The report as text for the console, and as one HTML page that needs no network."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ffnet.config import Config
from ffnet.evaluation.metrics import FEW_IMAGES
from ffnet.options import option_values
from ffnet.report import charts, layer_charts, tables
from ffnet.report.tables import Value
from ffnet.results.comparison import ModelComparison
from ffnet.results.images import MARKS
from ffnet.results.published import MIOU_DEVICE, MIOU_IMAGES
from ffnet.results.result import DEMO_NOTE, Result
from ffnet.results.verdict import Verdict, judged_backend, verdict
from ffnet.system.text import count, describe_size, format_interval, format_number, printable

SENSITIVE_QUANTIZERS, RAISED_QUANTIZERS, PLACED_TENSORS = 10, 12, 10  # rows that the console shows of these tables
SHORT_STAGE = 0.1  # seconds; the console leaves out shorter stages
LEGEND = """\
Pareto front: no other model has at most the same cost (GMACs: 10**9 multiply-accumulates of one image, or ms: published
latency) and at least the same mIoU in the simulation.
Gain: in percentage points over the next cheaper model of the front, with its paired 95 % confidence interval (CI)."""

MINUS = re.compile(r"(?<![\w-])-(?=\d)")  # a hyphen that stands for a minus sign in a sentence
FOLDER = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def format_console(result: Result) -> str:
    """Return the report on a run: heading and notes, and the tables."""
    recovery, sensitivity = result.recovery, result.details.diagnostics.sensitivity
    parts = [
        tables.result_table(result).format(),
        tables.baseline_table([result]).format(),
        tables.agreement_table("agreement", result.agreement).format(),
    ]
    if recovery:
        parts += [tables.recovery_table(recovery).format(), tables.raised_table(recovery).format(RAISED_QUANTIZERS)]
    several = len(result.npu_chips) > 1  # then the first table has what matters of the others
    parts += [table.format() for table in tables.npu_tables(result)[: 1 if several else None]]
    parts.append(tables.classes_table(result).format())
    if sensitivity:
        parts.append(tables.sensitivity_table(sensitivity).format(SENSITIVE_QUANTIZERS))
    parts.append(tables.placement_table(result.details.diagnostics.placement).format(PLACED_TENSORS))
    parts.append(f"{tables.times_table(result, SHORT_STAGE).format()}\n{result.describe_speed()}")
    parts.append(format_verdict(verdict(result)))
    title = f"{result.model} on {count(result.images, 'image')} of {result.dataset}, {result.device}"
    return _document(title, result.notes, parts)


def format_verdict(found: Verdict) -> str:
    """Return the verdict on a run: sentences, the classes that certainly lose, and next steps."""
    losses = [f"{loss.name} {format_number(loss.change)} {format_interval(loss.interval)}" for loss in found.losses
              if loss.is_certain]  # fmt: skip
    classes = f"Classes that lose most, with 95 % CI: {', '.join(losses)}." if losses else "No class loses measurably."
    steps = [line for step in found.next_steps for line in (f"- {step.text}", f"  {step.command}") if step.command]
    return "\n".join([*found.sentences, found.numbers, classes, *(["", "Next:", *steps] if steps else [])])


def format_comparison(comparison: ModelComparison) -> str:
    """Return the comparison of several models: heading and notes, the tables, and which model to deploy."""
    fronts, last = comparison.fronts(), comparison.last
    parts = [tables.models_table(comparison).format(), tables.compared_backends_table(comparison).format()]
    parts.append(tables.baseline_table([model.result for model in comparison.models]).format())
    if fronts:
        parts += [*(tables.front_table(front).format() for front in fronts), LEGEND]
        parts.append("\n".join(front.describe(last.images) for front in fronts))
    where = f"{count(last.images, 'image')} of {last.dataset}, {comparison.image_sizes}, {last.device}"
    return _document(f"Comparison of {count(len(comparison.models), 'model')} on {where}", comparison.notes(), parts)


def _document(title: str, notes: Sequence[str], parts: Sequence[str]) -> str:
    heading = "\n".join(map(printable, (title, *(f"Note: {note}" for note in notes))))
    return "\n\n".join((heading, *filter(None, parts)))


def pills(result: Result) -> list[tuple[str, str]]:
    """Return the conditions of a run that the header shows, each with the beginning of the note that explains it."""
    options, calibration = result.options, result.calibration
    found = [("W8A8" if result.precision == "INT8" else result.precision, "")] if result.precision else []
    found += [(count(result.images, "image"), ""), (describe_size(result.details.image_size), "")]
    found.append(("demo: not Cityscapes", DEMO_NOTE) if options["demo"] else (result.dataset, ""))
    if calibration and calibration.images and options["calibration_split"] == options["split"]:
        found.append(("calibrated on scored images", calibration.description))
    return found


def render(result: Result) -> str:
    """Return the page of a run. Nothing in `result`, however it is named, becomes markup."""
    calibration, checkpoint = result.calibration, result.checkpoint
    settings: dict[str, Any] = {"model": result.model}
    if calibration:
        settings["calibration images"] = calibration.images
    if checkpoint:
        settings |= {f"checkpoint {name}": value for name, value in vars(checkpoint).items()}
    return _render_page(
        "report.html.j2",
        result,
        settings=settings,
        options=result.options,
        notes=result.notes,
        diagnostics=result.details.diagnostics,
        marks=[*MARKS.values(), ("not scored", (0, 0, 0))],
        pills=pills(result),
        verdict=verdict(result),
        judged=judged_backend(result)[0],
    )


def render_comparison(comparison: ModelComparison) -> str:
    """Return the page of a comparison. Nothing in `comparison`, however it is named, becomes markup."""
    return _render_page(
        "comparison.html.j2",
        comparison.last,
        settings={"image size": comparison.image_sizes},
        options=comparison.options,
        notes=comparison.notes(),
        comparison=comparison,
        pills=pills(comparison.last),
    )


def _render_page(
    template: str, run: Result, settings: Mapping[str, Any], options: Mapping[str, Any], **values: Any
) -> str:
    """Return a page from a template that extends base.html.j2."""
    script = (FOLDER / "report.js").read_text("utf-8")
    defaults = option_values(Config())
    return ENVIRONMENT.get_template(template).render(
        run=run,
        settings={"dataset": run.dataset, "device": run.device, **settings, **run.versions},
        class_colors={label: entry.color for label, entry in run.classes.items()},
        style=(FOLDER / "report.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=charts,
        layer_charts=layer_charts,
        tables=tables,
        few_images=FEW_IMAGES,
        ai_hub=f"{MIOU_DEVICE} and {MIOU_IMAGES} images",
        options={f"--{key.replace('_', '-')}": value for key, value in options.items() if value != defaults.get(key)},
        **values,
    )


def typeset(text: str) -> str:
    """Return a number or an interval with minus signs instead of hyphens and without line breaks; a dash for "-"."""
    return "–" if text == "-" else text.replace("-", "−").replace(" ", "\N{NO-BREAK SPACE}")


def data_value(value: Value) -> str:
    """Return a number in full, or an interval as a JSON list, for sorting and for programs; "" for None."""
    return "" if value is None else json.dumps(value)


def data_uri(content: bytes | str, mime: str) -> str:
    """Return a data URI, which holds its content."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


ENVIRONMENT.filters |= {
    "count": count,
    "data_uri": data_uri,
    "data_value": data_value,
    "interval": lambda limits: typeset(format_interval(limits)),
    "minus": lambda text: MINUS.sub("\N{MINUS SIGN}", text),
    "number": lambda value, digits=2: typeset(format_number(value, digits)),
    "place": lambda value, chart: chart.place(value),
    "typeset": typeset,
}
