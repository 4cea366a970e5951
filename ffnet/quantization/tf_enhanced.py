"""AIMET's TF-Enhanced calibration: the same encodings with fewer reads of each tensor.

AIMET's own analyzer reads an activation about ten times per batch, and searches for the best range after every batch
although nothing is quantized meanwhile and only the last search counts. It reads a weight channel by channel.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from aimet_torch.quantization.encoding_analyzer import TfEnhancedEncodingAnalyzer, _Histogram
from aimet_torch.quantsim import QuantizationSimModel

# Histograms searched at the same time on a CPU: with AIMET's 64, temporary tensors leave the processor's caches.
CPU_HISTOGRAMS = 32
EXACT = 2**24  # number of values up to which histc's float32 counts are exact in any order


def use_fast_analyzers(sim: QuantizationSimModel) -> None:
    """Replace the TF-Enhanced analyzers of a simulation's quantizers with the faster one."""
    for quantizer in sim.quantizers():
        analyzer = quantizer.encoding_analyzer
        if _has_fast_version(analyzer) and not isinstance(analyzer, FastTfEnhancedAnalyzer):
            quantizer.encoding_analyzer = FastTfEnhancedAnalyzer(analyzer.observer.shape)


def _has_fast_version(analyzer: object) -> bool:
    return isinstance(analyzer, TfEnhancedEncodingAnalyzer) and not analyzer.observer.block_size


class FastTfEnhancedAnalyzer(TfEnhancedEncodingAnalyzer):
    """Collects histograms of 512 bins, whose range comes from the first batch, as AIMET's analyzer does.

    Only for quantizers that do not quantize during calibration: encodings of a single batch are not computed.
    """

    # The histogram last searched, (number of steps, symmetric), and the encodings found.
    _last_search: tuple[Any, Any, Any] = (None, None, None)

    @torch.no_grad()
    def update_stats(self, input_tensor: torch.Tensor) -> Sequence[Any]:
        """Count the values of a float tensor; return the histograms if they are the first, and none otherwise."""
        rows = _rows(input_tensor, self.observer.shape)
        current = self.observer.get_stats()
        first = current[0].histogram is None
        if rows is None or not (first or len(current) == 1):
            return super().update_stats(input_tensor)
        lows, highs = rows.aminmax(dim=1) if len(rows) > 1 else (bound[None] for bound in rows.aminmax())
        if not (lows.isfinite().all() and highs.isfinite().all()):
            return super().update_stats(input_tensor)
        if first:
            self.observer.merge_stats(self._histograms(rows, lows, highs), input_tensor)
            return self.observer.get_stats()
        self.observer.stats[0] = self._merged(current[0], rows[0], lows[0], highs[0])
        return []

    def compute_encodings_from_stats(self, stats: Sequence[Any], num_steps: int, is_symmetric: bool) -> Any:
        """Return AIMET's encodings; search once per histogram, and return the last result if `stats` is empty."""
        how = num_steps, is_symmetric
        if stats and stats[0].histogram is not None and stats[0].histogram.device.type == "cpu":
            self.max_parallelism = CPU_HISTOGRAMS
        if stats and not (self._last_search[0] is stats[0] and self._last_search[1] == how):
            self._last_search = stats[0], how, super().compute_encodings_from_stats(stats, *how)
        return self._last_search[2]

    def _histograms(self, rows: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> list[_Histogram]:
        """Return a histogram of every row of finite values, as _HistogramObserver.collect_stats makes it."""
        bins = self.observer.num_bins
        edges = self.observer._create_bin_edges(lows[:, None], highs[:, None], rows.device)
        bounds = edges[:, [0, -1]].tolist()
        counts = torch.stack([histogram(row, bins, *pair) for row, pair in zip(rows, bounds, strict=True)])
        # The last edge is rounded, so that values may lie above it; the first one is exact.
        counts[:, -1] += (rows > edges[:, -1:]).sum(1)
        return [_Histogram(*fields) for fields in zip(counts, edges, lows, highs, strict=True)]

    def _merged(self, current: _Histogram, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> _Histogram:
        """Return a histogram to which finite values from `low` to `high` are added, as merge_stats does.

        The range grows to these values as far as AIMET's limit allows. Values beyond it count in the outermost bins.
        """
        left, right = self.observer._histogram_range_limit[0]
        least, most = low.clamp(left, current.bin_edges[0]), high.clamp(current.bin_edges[-1], right)
        if least != current.min or most != current.max:
            current = self._extended(current, low, high)
        counts = histogram(values, self.observer.num_bins, least.item(), most.item()) + current.histogram
        if low < least:
            counts[0] += (values < least).sum()
        if high > most:
            counts[-1] += (values > most).sum()
        return _Histogram(counts, current.bin_edges, current.min, current.max)

    def _extended(self, current: _Histogram, low: torch.Tensor, high: torch.Tensor) -> _Histogram:
        """Return a histogram spread over a range that grows to the values `low` and `high`, as merge_stats does.

        It does so on the CPU, because a GPU may add counts in any order.
        """
        observer, limit = copy.copy(self.observer), self.observer._histogram_range_limit
        observer.stats, observer._histogram_range_limit = [_moved(current, "cpu")], limit.cpu()
        observer.merge_stats([_Histogram(min=low.cpu(), max=high.cpu())], torch.empty(0))
        return _moved(observer.stats[0], low.device)


def _moved(current: _Histogram, device: torch.device | str) -> _Histogram:
    return _Histogram(*(value.to(device) for value in (current.histogram, current.bin_edges, current.min, current.max)))


def histogram(values: torch.Tensor, bins: int, low: float, high: float) -> torch.Tensor:
    """Return how many values lie in each of `bins` equal bins from `low` to `high`, float32; the same in every run.

    A GPU may count in any order. It therefore counts pieces, in which float32 is exact, and adds them up as float64.
    """
    if values.is_cpu or len(values) <= EXACT:
        return torch.histc(values.float(), bins, low, high)
    return exact_histogram(values, bins, low, high)


def exact_histogram(values: torch.Tensor, bins: int, low: float, high: float) -> torch.Tensor:
    """Return what `histogram` does, rounded only once."""
    pieces = [torch.histc(piece.float(), bins, low, high) for piece in values.split(EXACT)]
    return torch.stack(pieces).sum(0, dtype=torch.float64).float()


def _rows(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """Return the values as one row per histogram; None if the histograms belong to another axis than the first."""
    if all(length == 1 for length in shape):
        # In memory order, which saves a copy. Only up to EXACT values: float32 counts of more depend on the order.
        if values.dim() == 4 and values.numel() <= EXACT and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)
        return values.reshape(1, -1)
    if shape == (len(values), *[1] * (values.dim() - 1)):
        return values.reshape(len(values), -1)
    return None
