"""Tells what quantization does to an FFNet: mIoU on Cityscapes in FP32 and, simulated and executed, in INT8.

python ffnet_quanteval.py --demo
python ffnet_quanteval.py --dataset-path /data/cityscapes --model-name segmentation_ffnet40S_dBBB_mobile
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import chosen
import command_line
from datasets import DatasetError
from ffnet.errors import UserError
from ffnet.variants import VARIANTS


def main(argv=None):
    """Runs the evaluation that `argv` asks for, prints its report and returns what result.json says."""
    open_closed_streams()
    try:
        args = command_line.parse_args(argv)
        if args.list_models:
            return list_models()
        result = score_onnx(args) if args.onnx else quantize_and_score(args)
    except UserError as error:
        fail(error)
    except DatasetError as error:
        fail(f"{error}; the demo draws its scenes anew where their folder is deleted" if args.demo else error)
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if result and args.fail_under is not None:
        fail_under(result, args.fail_under)
    return result


def open_closed_streams():
    """Who started the program with stdout or stderr closed wants to read nothing there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def say(*lines):
    """Prints the lines to stdout, or none where its reader has left: who read the report has seen enough."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(reason):
    """One line on stderr and exit status 2."""
    print(f"ffnet_quanteval.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


def quantize_and_score(args):
    """A checkpoint in FP32 and INT8; None in all processes but the first that torchrun started."""
    from ffnet import biases, encodings, quantize, ranks
    from ffnet.lower import lower

    times = {}
    me, device = ranks.join(chosen.choose_device(args))
    recipe = chosen.choose_recipe(args)
    given = encodings.read_encodings(args.encodings) if args.encodings else None
    with stage(times, "open"):
        images, calibration_images = ranks.first_first(me, lambda: chosen.open_images(args))
        chosen.check_outputs(args, images, me)
    with stage(times, "load"):
        loaded = ranks.first_first(me, lambda: chosen.load_model(args))
        fp32 = loaded.model.to(device)
        quantize.check_finite(fp32, loaded.path)
    with stage(times, "equalize and simulate"):
        sim = quantize.simulate(quantize.equalize(fp32, recipe.cle and not loaded.equalized), recipe)
    with stage(times, "calibrate"):
        origin = set_encodings(sim, given, calibration_images, me, device, args)
        raised = biases.fit_biases(sim) if args.export or args.execute else {}
    facts = describe(args, images, device, loaded.equalized, raised) | describe_network(args, loaded, origin)
    with contextlib.ExitStack() as cleanup:
        lowered = lower(sim)
        passes = {"FP32": fp32, "INT8": lowered}
        if args.export or args.execute:
            with stage(times, "export"):
                passes |= export(sim, images, facts, me, args, cleanup)
        scores, how = score(passes, images, me, device, args, times)
        if not me.is_first:
            return None
        facts["notes"] += [facts["calibration"], f"FP32 and INT8 {how}"]
        if scores.batch_size:
            facts["notes"].append(f"out of GPU memory: batches of {scores.batch_size} images at the end")
        with stage(times, "explain"):
            reasons, notes, failure = attempt(
                lambda: explain(sim, lowered, passes, images, calibration_images, scores, device, args)
            )
    facts["notes"] += notes
    result = deliver(facts | {"times": times}, scores, images, reasons, args)
    if failure:
        raise failure
    return result


def score(passes, images, me, device, args, times):
    """(Scores of all processes for the first one, None for the others; how the passes were run)."""
    from ffnet import evaluate, fast, ranks

    with stage(times, "compile"):
        quick = fast.make_fast(passes, images.pixels() // me.world, args.batch_size, device, args.compile)
        evaluate.warm_up(quick, (images.height, images.width), args.batch_size, device)
    with stage(times, "evaluate"):
        batches = evaluate.loader(ranks.shard(images, me), args.batch_size, args.num_workers, device)
        writer = chosen.prediction_writer(args, images, me)
        progress = not args.quiet and me.is_first
        scores = ranks.gather(evaluate.sweep(quick.passes, batches, device, quick.top_two, writer, progress), me)
    ranks.leave(me)
    return scores, quick.reason


def attempt(work):
    """(reasons, notes, None) of `work`, or nothing and what it failed with: the figures come first."""
    try:
        return *work(), None
    except KeyboardInterrupt as interrupt:
        return Reasons(), [], interrupt
    except Exception as error:
        return Reasons(), [], UserError(f"the figures are reported, but explaining them failed: {error}")


def score_onnx(args):
    """An exported ONNX file, without a checkpoint; None in all processes but the first that torchrun started."""
    import torch

    from ffnet import execute, ranks

    times = {}
    me, device = ranks.join(torch.device("cpu"))
    with stage(times, "open"):
        images, _ = ranks.first_first(me, lambda: chosen.open_images(args))
        chosen.check_outputs(args, images, me)
    with stage(times, "load"):
        passes = {"ONNX": execute.OnnxNetwork(args.onnx)}
        found = execute.inspect(args.onnx)
    scores, _ = score(passes, images, me, device, args, times)
    if not me.is_first:
        return None
    facts = describe(args, images, device) | {"model": str(args.onnx), "published": {}}
    facts["notes"] += found.lines()
    return deliver(facts | {"times": times}, scores, images, Reasons(), args)


@contextlib.contextmanager
def stage(times, name):
    """Notes in `times` how many seconds the stage took."""
    begin = time.perf_counter()
    yield
    times[name] = time.perf_counter() - begin


def list_models():
    from ffnet import tables

    say(tables.list_models())


def fail_under(result, drop):
    """Exit status 1 where an INT8 pass lies more than `drop` points below FP32, or can't be compared with it."""
    from ffnet import report

    mious = {name: entry["miou"] for name, entry in result["passes"].items()}
    for name in mious:
        found = report.drop(mious, name)
        if name != "FP32" and (found is None or found > drop):
            shown = "no mIoU" if found is None else f"a drop of {found:.2f} points"
            print(f"ffnet_quanteval.py: {name} has {shown}; --fail-under allows {drop:g}", file=sys.stderr)
            sys.exit(1)


def set_encodings(sim, given, images, me, device, args):
    """Gives every process's simulation its encodings, the `given` ones or by calibration: result.json's words on it."""
    from ffnet import encodings, ranks

    origin = {}
    found = encodings.load_encodings(sim, given, args.partial_encodings) if given else None
    if me.is_first:
        count = len(images) if found is None or found.missing else 0
        if count:
            batch_size = calibrate(sim, images, device, args)
        origin = {"calibration_images": count, "calibration": encodings_note(found, count, args)}
        if count and batch_size < args.batch_size:
            origin["calibration"] += f"; out of GPU memory: in batches of {batch_size} images"
    ranks.share_encodings(sim, me)
    return origin


def encodings_note(found, count, args):
    """Where the encodings are from, for the report; `found`: what a file of them left over, or None."""
    if args.calibration_split == args.split:
        where = f"{count} of the very images that are scored"
        remark = ", as the published figures were; --calibration-split train is the clean protocol"
    else:
        where, remark = f"{count} images of the {args.calibration_split} split", ", none of them scored"
    if found is None:
        return f"calibrated on {where}{remark}"
    lists = {
        f"left out, so calibrated on {where}": found.missing,
        "not used, since no quantizer takes them": found.surplus,
        "set apart, though AIMET 2 would share them": found.untied,
    }
    extra = [f"; {words}: {', '.join(names[:8])} ({len(names)})" for words, names in lists.items() if names]
    return f"encodings, bit widths and symmetry from {args.encodings}{''.join(extra)}"


def calibrate(sim, images, device, args):
    """Calibrates, from the start with half the batch size where the GPU's memory does not suffice; the batch size."""
    import torch

    from ffnet import evaluate, quantize

    batch_size = args.batch_size
    while True:
        batches = evaluate.loader(images, batch_size, args.num_workers, device)
        try:
            quantize.calibrate(sim, evaluate.calibration_inputs(batches, device, not args.quiet))
            return batch_size
        except torch.cuda.OutOfMemoryError as error:
            batch_size = evaluate.halved(batch_size, error)


def export(sim, images, facts, me, args, cleanup):
    """Writes the export, to a folder of this process alone where none was asked for; the executed pass, if wanted."""
    from ffnet.execute import OnnxNetwork
    from ffnet.export import MODEL
    from ffnet.export import export as write

    kept = args.export if me.is_first else None
    if not kept and not args.execute:
        return {}
    folder = kept or Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / "export"
    keys = ("model", "checkpoint_sha256", "dataset", "calibration", "arguments", "versions")
    try:
        write(sim, (images.height, images.width), folder, {key: facts.get(key) for key in keys}, args.force)
    except OSError as error:
        asked = f"--export {kept}" if kept else f"--execute: a temporary export, {folder},"
        raise UserError(f"{asked} can't be written ({error.strerror}); make room, or name another folder") from error
    return {"INT8 executed": OnnxNetwork(folder / MODEL)} if args.execute else {}


@dataclass(frozen=True)
class Reasons:
    """Why INT8 loses what it loses, for the report."""

    rows: tuple = ()  # pictures.Row of the images that lose most
    sensitivity: object = None  # sensitivity.Sensitivity, if asked for


def explain(sim, lowered, passes, images, calibration_images, scores, device, args):
    """(Reasons, notes): the images that lose most and the layers that cost most, as far as somebody will see them."""
    from ffnet import evaluate, pictures
    from ffnet.sensitivity import sensitivity

    rows, layers = (), None
    if args.output_dir:
        rows = pictures.render_rows(pictures.worst_images(scores, args.worst), images, passes, scores, device)
    if args.sensitivity:
        count = min(args.sensitivity_images, len(calibration_images))
        inputs = [evaluate.normalize(calibration_images[index][0][None].to(device)) for index in range(count)]
        layers = sensitivity(sim, lowered, inputs, not args.quiet)
    return Reasons(tuple(rows), layers), execution_notes(passes, lowered, images, scores)


def execution_notes(passes, lowered, images, scores):
    """What the executed pass runs in integers, and the first layer at which it parts from the simulation if it does."""
    from ffnet import evaluate, execute, part, report

    if "INT8 executed" not in passes:
        return []
    path = passes["INT8 executed"].path
    found = [f"INT8 executed: {line}" for line in execute.inspect(path).lines()]
    far = report.far_apart(scores, "INT8", "INT8 executed")
    if far:
        image = evaluate.normalize(images[0][0][None])
        layer = part.first_parting(lowered.to("cpu"), path, image)
        found.append(f"simulation and execution differ: {far}; on the first image they part at {layer or 'no layer'}")
    return found


def describe(args, images, device, equalized=False, raised=()):
    """What result.json says of any run; `raised`: layers whose weight scales biases.fit_biases changed."""
    from ffnet import report

    notes = {
        "these street scenes are drawn by this project: their figures say nothing of Cityscapes": args.demo,
        "no cross-layer equalization": not (args.cle or equalized or args.onnx),
        "the checkpoint is equalized already: batch norms are folded and CLE was not applied again": equalized,
        f"weight scales raised so that biases fit into int32: {', '.join(raised)}": raised,
    }
    return {
        "dataset": "the demo's street scenes" if args.demo else f"Cityscapes {args.split}",
        "images": len(images),
        "device": report.device_name(device),
        "notes": [note for note, holds in notes.items() if holds],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": report.versions(),
    }


def describe_network(args, loaded, origin):
    """What result.json says beside that of a network with a checkpoint."""
    from ffnet import report

    variant = VARIANTS[args.model_name]
    return {
        "model": variant.name,
        **origin,
        "checkpoint": str(loaded.path),
        "checkpoint_sha256": loaded.sha256,
        "checkpoint_form": loaded.form,
        "published": {} if variant.is_demo else report.published(variant),
    }


def deliver(facts, scores, images, reasons, args):
    """Prints the report and writes what was asked for; the result is on stdout where it can't be written."""
    from ffnet import report

    result = facts | {"passes": report.pass_entries(scores), "agreement": report.agreement(scores)}
    written, failure = [], None
    if args.output_dir:
        try:
            written = report.write_all(args.output_dir, result, scores, images.images, reasons)
        except OSError as error:
            failure = error
    say(report.console(result, reasons.sensitivity, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if failure:
        say(json.dumps(result))
        raise UserError(f"--output-dir {args.output_dir}: writing failed ({failure}); result.json is on stdout")
    if written:
        say("", f"written to {args.output_dir}: {', '.join(path.name for path in written)}")
    if scores.unsaved:
        raise UserError(f"--save-predictions: {scores.unsaved}; that image and the ones behind it are not saved")
    return result


if __name__ == "__main__":
    main()
