"""Run the images through the backends of all models at once, and keep the scores of every image as they come."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Subset

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation.backends import FP32, INT8_SIMULATED, Backend
from ffnet.evaluation.compilation import PreparedBackends, compile_backends, prepare_backends
from ffnet.evaluation.loop import score_batches, warm_up
from ffnet.evaluation.scores import Scores, merge_shards
from ffnet.run.records import ScoreCollector
from ffnet.run.session import Run, timed
from ffnet.run.storage import IMAGES
from ffnet.system.text import count

logger = logging.getLogger(__name__)


def prepare(backends: Mapping[str, Backend], images: CityscapesSplit, run: Run) -> PreparedBackends:
    """Prepare the backends for speed, and compile those that are worth it, or those that the resumed run compiled."""
    with run.stage("compile"):
        prepared = _prepare_alike(backends, images, run)
        warm_up(prepared, (images.height, images.width), run.runtime)
    prepared = replace(prepared, model="" if run.config.model.onnx else run.config.model.name)
    if run.ranks.is_main:
        run.progress.keep_compilation(prepared.compiled, prepared.reason)
    if FP32 in backends:
        run.notes.append(f"{FP32} and {INT8_SIMULATED}: {prepared.reason}.")
    return prepared


def _prepare_alike(backends: Mapping[str, Backend], images: CityscapesSplit, run: Run) -> PreparedBackends:
    """Prepare the backends, and compile on every rank the same ones: those of the resumed run or the main process.

    Every process would otherwise decide by times of its own.
    """
    kept, ranks = run.progress.kept.compilation, run.ranks
    if kept:
        compiled, reason = kept
        return replace(compile_backends(backends, run.runtime, compiled), reason=reason)
    share, size = len(images) // ranks.world_size, (images.height, images.width)
    wish = run.config.runtime.compile
    prepared = prepare_backends(backends, run.runtime, wish, share, size) if ranks.is_main else None
    chosen = ranks.share(prepared.compiled if prepared else None)
    return prepared or compile_backends(backends, run.runtime, chosen)


def score(models: Sequence[PreparedBackends], runs: Sequence[Run], images: CityscapesSplit) -> list[Scores | None]:
    """Run the images through all backends of all models, apart from those that an earlier run has kept.

    Args:
        models: the backends of each model.
        runs: of the models, in the same order.
        images: that are scored.

    Returns:
        The scores of each model on all images, of all ranks; None in processes that are not the main one.
    """
    if not models:
        return []
    ranks, runtime = runs[0].ranks, runs[0].runtime
    if not runtime.on_gpu:  # where the backends take single images anyway: less is lost if the run is stopped
        runtime = replace(runtime, batch_size=1)
    remaining = [run.progress.remaining(IMAGES, np.arange(len(images))) for run in runs]
    own = ranks.share_of(np.unique(np.concatenate(remaining)))
    wanted = np.array([np.isin(own, indices) for indices in remaining])
    title = "evaluate" if len(models) == 1 else f"evaluate {count(len(models), 'model')}"
    with timed("evaluate", *(run.stage_seconds for run in runs)), contextlib.ExitStack() as stack:
        collectors = [
            ScoreCollector(
                prepared.backends, stack.enter_context(run.progress.records(IMAGES)), run.prediction_writer(images)
            )
            for prepared, run in zip(models, runs, strict=True)
        ]
        with saying_how_to_resume(runs[0]):
            for batch in score_batches(models, Subset(images, own.tolist()), runtime, title, wanted):
                collectors[batch.model].add(own[batch.positions], batch)
        shards = ranks.gather([collector.shard() for collector in collectors])
    if shards is None:
        return [None] * len(models)
    merged = [merge_shards(of_model) for of_model in zip(*shards, strict=True)]
    complete = [run.progress.with_earlier(IMAGES, shard).scores for run, shard in zip(runs, merged, strict=True)]
    for run, scores in zip(runs, complete, strict=True):
        run.notes += [*scoring_notes(scores), *node_notes(run)]
    return list(complete)


@contextlib.contextmanager
def saying_how_to_resume(run: Run) -> Iterator[None]:
    """If the evaluation is interrupted, say on stderr that `--resume` goes on with the images that were done."""
    try:
        yield
    except KeyboardInterrupt:
        if run.progress.folder and run.ranks.is_main:
            logger.warning("Interrupted. The images that were done are kept: the same command with --resume goes on.")
        raise


def node_notes(run: Run) -> list[str]:
    """Return a note on where the predictions are if processes on several machines have written them."""
    folder = run.config.output.save_predictions
    if folder is None or not run.ranks.several_nodes:
        return []
    return [
        f"--save-predictions: the processes ran on several nodes. Each node has written the predictions of its own "
        f"images to its own {folder}; copy them together unless the nodes share that folder."
    ]


def scoring_notes(scores: Scores) -> list[str]:
    """Return notes on missing labels and on the batch size after backoff."""
    notes = []
    if not any(matrices.any() for matrices in scores.confusion_matrices.values()):
        notes.append(
            "There is no mIoU, because no pixel has the label of a class that is scored. For example, the labels of "
            "Cityscapes' test split are not published."
        )
    if scores.batch_size:
        notes.append(f"The GPU ran out of memory: the last batches had {count(scores.batch_size, 'image')}.")
    return notes
