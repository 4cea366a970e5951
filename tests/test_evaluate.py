"""One sweep: whatever the batches, every image is counted once."""

import numpy as np
import pytest
import torch
from torch import nn

from datasets.cityscapes import CityscapesSplit
from ffnet import evaluate, fast, quantize
from ffnet.errors import UserError
from ffnet.evaluate import loader, normalize, sweep
from ffnet.lower import lower
from tests.conftest import write_tree
from tests.test_quantize import DEMO, network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    write_tree(root, "val", 7)
    return CityscapesSplit(root, "val")


class Tiny(nn.Module):
    """Stands for a network; raises what a full GPU raises above `limit` images."""

    def __init__(self, limit=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 19, 8, stride=8)
        self.limit = limit
        self.seen = 0

    def forward(self, x):
        if self.limit is not None and len(x) > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.seen += len(x)
        return torch.cat([self.conv(image) for image in x.split(1)])  # the same bits whatever the batch


def run(images, model=None, batch_size=2, workers=0, **more):
    passes = {"FP32": model or Tiny(), "INT8": Tiny(seed=1)}
    return sweep(passes, loader(images, batch_size, workers, CPU), CPU, **more)


def assert_equal(scores, others):
    for found, expected in ((scores.confusions, others.confusions), (scores.agreements, others.agreements)):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_normalization_is_the_published_one():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert torch.allclose(normalize(image).flatten(), torch.tensor(expected), atol=1e-6)


def test_scores_are_an_image_each_in_order(images):
    scores = run(images)
    assert scores.confusions["FP32"].shape == (7, 19, 19) and scores.pixels == 64 * 128
    for index, (image, labels) in enumerate(images):
        with torch.no_grad():
            fp32, int8 = (
                evaluate.predict(model(normalize(image[None])), labels.shape)[0] for model in (Tiny(), Tiny(seed=1))
            )
        assert scores.confusions["FP32"][index].sum() == (labels < 19).sum()
        assert np.trace(scores.confusions["FP32"][index]) == (fp32 == labels).sum()
        assert scores.agreements["FP32", "INT8"][index] == (fp32 == int8).sum()


@pytest.mark.parametrize(("batch_size", "workers"), ((1, 0), (3, 0), (8, 0), (2, 2)))
def test_batches_and_workers_change_nothing(images, batch_size, workers):
    assert_equal(run(images, batch_size=batch_size, workers=workers), run(images))


def test_batches_change_no_bit_of_a_real_networks_logits(images):
    """Images as small as these are where oneDNN's sums depend on the batch size."""
    (run,) = fast.make_fast({"FP32": network(DEMO)}, 1, 8, CPU).passes.values()
    batch = normalize(torch.stack([image for image, _ in images]))
    with torch.inference_mode():
        logits = run(batch)
        for size in (1, 3):
            assert torch.equal(torch.cat([run(chunk) for chunk in batch.split(size)]), logits)


def test_the_order_changes_nothing(images):
    order = [3, 1, 6, 0, 5, 2, 4]
    shuffled = run(torch.utils.data.Subset(images, order))
    assert np.array_equal(shuffled.confusions["INT8"], run(images).confusions["INT8"][order])


def test_a_writer_that_fails_costs_no_figures(images):
    written = []

    def writer(index, predictions):
        if index == 3:
            raise OSError(28, "No space left on device", "a.png")
        written.append((index, list(predictions)))

    scores = run(images, writer=writer)
    assert_equal(scores, run(images))
    assert scores.unsaved == "a.png: No space left on device"
    assert written == [(index, ["FP32", "INT8"]) for index in range(3)]


@pytest.mark.parametrize("limit", (1, 2, 3))
def test_out_of_memory_halves_the_batch_and_loses_no_image(images, capsys, limit):
    model = Tiny(limit)
    scores = run(images, model, batch_size=5)
    assert_equal(scores, run(images))
    assert model.seen == 7
    assert scores.batch_size == {1: 1, 2: 2, 3: 2}[limit]
    assert "Out of GPU memory" in capsys.readouterr().err


@pytest.mark.parametrize("limit", (1, 2, 4))
def test_compiled_passes_get_smaller_too(images, limit):
    """A batch that is filled up to the compiled size must not stay too large, nor the other passes' batches."""
    model, other = Tiny(limit), fast.Filled(Tiny(seed=1), 5)
    passes = {"FP32": fast.Filled(model, 5), "INT8": other}
    assert_equal(sweep(passes, loader(images, 5, 0, CPU), CPU), run(images))
    assert other.batch_size <= limit and other.network.seen < 7 + limit


def test_logits_that_are_no_numbers_are_an_error(images):
    model = Tiny()
    model.conv.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="FP32: its logits"):
        run(images, model)


def test_one_image_too_large_is_an_error(images):
    with pytest.raises(UserError, match="memory"):
        run(images, Tiny(0))


def test_short_runs_stay_eager_and_long_ones_compile(monkeypatch):
    monkeypatch.setattr(fast, "compiler_problem", lambda device: None)
    passes = {"FP32": Tiny()}
    for count, wish, compiled in ((10, None, False), (500, None, True), (10, True, True), (500, False, False)):
        quick = fast.make_fast(passes, count * 1024 * 2048, 8, CPU, wish)
        assert quick.compiled is compiled and quick.reason


def test_without_a_compiler_the_run_stays_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(fast, "compiler_problem", lambda device: "no compiler")
    assert "no compiler" in fast.make_fast({}, 10**12, 8, CPU).reason
    with pytest.raises(UserError, match="no compiler"):
        fast.make_fast({}, 1, 8, CPU, compile=True)


@pytest.mark.slow
def test_compiled_passes_agree_with_eager_ones(images):
    passes = {"FP32": network(DEMO)}
    quick = fast.make_fast(passes, images.pixels(), 2, CPU, compile=True)
    compiled = sweep(quick.passes, loader(images, 2, 0, CPU), CPU, quick.top_two)
    eager = sweep(passes, loader(images, 2, 0, CPU), CPU)
    moved = np.abs(compiled.total("FP32") - eager.total("FP32")).sum() / 2
    assert moved <= 0.001 * eager.total("FP32").sum()


@pytest.mark.cuda
def test_gpu_scores_like_the_cpu(images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    totals = [scores_on(torch.device(name), images) for name in ("cpu", "cuda")]
    for key, share in (("FP32", 0.001), ("INT8", 0.01)):
        on_cpu, on_gpu = (scores.total(key) for scores in totals)
        assert np.abs(on_cpu - on_gpu).sum() / 2 <= share * on_cpu.sum() and on_gpu.sum() == on_cpu.sum()


def scores_on(device, images):
    """Scores of network and lowered simulation, calibrated there as well."""
    model = network(DEMO).to(device)
    batches = loader(images, 2, 0, device)
    sim = quantize.quantize(model, quantize.Recipe(), evaluate.calibration_inputs(batches, device))
    quick = fast.make_fast({"FP32": model, "INT8": lower(sim)}, images.pixels(), 2, device)
    return sweep(quick.passes, batches, device)
