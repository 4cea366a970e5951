"""AIMET's TF-Enhanced calibration, the same encodings in fewer passes over each tensor.

AIMET's own analyzer reads an activation some ten times a batch and searches for the best range after every batch,
though activations pass through unquantized and only the last search counts. A weight it reads channel by channel.
"""

import torch
from aimet_torch.quantization.encoding_analyzer import TfEnhancedEncodingAnalyzer, _Histogram

EXACT = 2**24  # values up to which histc's float32 counts are exact whatever the order


def quicken(sim):
    """Gives the quantizers of sim.model's layers the analyzer below where they have AIMET's TF-Enhanced one."""
    layers = [module for module in sim.model.modules() if hasattr(module, "param_quantizers")]
    for layer in layers:
        groups = (layer.input_quantizers, layer.output_quantizers, layer.param_quantizers)
        for quantizer in (quantizer for group in groups for quantizer in group.children()):
            analyzer = quantizer.encoding_analyzer
            if type(analyzer) is TfEnhancedEncodingAnalyzer and not analyzer.observer.block_size:
                quantizer.encoding_analyzer = QuickTfEnhanced(analyzer.observer.shape)


class QuickTfEnhanced(TfEnhancedEncodingAnalyzer):
    """Histograms of 512 bins, their range from the first batch, as AIMET collects them.

    Only for quantizers that let values pass while they are calibrated: a single batch's encodings are not computed.
    """

    _searched = (None, None, None)  # a histogram, how it was searched, and the encodings found

    @torch.no_grad()
    def update_stats(self, input_tensor):
        """Counts a float tensor; returns the histograms if they are the first, else none."""
        rows = _rows(input_tensor, self.observer.shape)
        kept = self.observer.get_stats()
        first = kept[0].histogram is None
        if rows is None or not (first or len(kept) == 1):
            return super().update_stats(input_tensor)
        lows, highs = rows.aminmax(dim=1) if len(rows) > 1 else (bound[None] for bound in rows.aminmax())
        if not (lows.isfinite().all() and highs.isfinite().all()):
            return super().update_stats(input_tensor)
        if first:
            self.observer.merge_stats(self._histograms(rows, lows, highs), input_tensor)
            return self.observer.get_stats()
        self._merge(kept[0], rows[0], lows[0], highs[0])
        return []

    def compute_encodings_from_stats(self, stats, num_steps, is_symmetric):
        """As AIMET's, but once for the same histograms; for none, what it answered last."""
        how = num_steps, is_symmetric
        if stats and not (self._searched[0] is stats[0] and self._searched[1] == how):
            self._searched = stats[0], how, super().compute_encodings_from_stats(stats, *how)
        return self._searched[2]

    def _histograms(self, rows, lows, highs):
        """A _Histogram for every row of finite values, as _HistogramObserver.collect_stats makes it."""
        bins = self.observer.num_bins
        edges = self.observer._create_bin_edges(lows[:, None], highs[:, None], rows.device)
        bounds = edges[:, [0, -1]].tolist()
        counts = torch.stack([torch.histc(row.float(), bins, *pair) for row, pair in zip(rows, bounds, strict=True)])
        # The last edge is rounded, so that values may lie above it; the first one is exact.
        counts[:, -1] += (rows > edges[:, -1:]).sum(1)
        return [_Histogram(*parts) for parts in zip(counts, edges, lows, highs, strict=True)]

    def _merge(self, kept, values, low, high):
        """Adds finite values to the one histogram that there is, as _HistogramObserver.merge_stats does."""
        left, right = self.observer._histogram_range_limit[0]
        least, most = low.clamp(left, kept.bin_edges[0]), high.clamp(kept.bin_edges[-1], right)
        if least != kept.min or most != kept.max:  # the range grows: seldom, so AIMET's own way will do
            self.observer.merge_stats([_Histogram(min=low, max=high)], values)
            return
        counts = torch.histc(values.float(), self.observer.num_bins, least, most)
        counts += kept.histogram
        if low < least:
            counts[0] += (values < least).sum()
        if high > most:
            counts[-1] += (values > most).sum()
        self.observer.stats[0] = _Histogram(counts, kept.bin_edges, kept.min, kept.max)


def _rows(values, shape):
    """The values as one row a histogram; None where the histograms are of another axis than the first."""
    if all(length == 1 for length in shape):
        # As they lie in memory, without a copy; where a bin may outgrow float32's integers, the order matters.
        if values.dim() == 4 and values.numel() <= EXACT and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)
        return values.reshape(1, -1)
    if shape == (len(values), *[1] * (values.dim() - 1)):
        return values.reshape(len(values), -1)
    return None
