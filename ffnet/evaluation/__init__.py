"""Run all images through all backends and count which pixels each of them labels correctly.

In reading order: `loading` (files to network inputs), `postprocessing` (logits to train ids and confusion matrices),
`metrics` (confusion matrices to IoU, accuracy and confidence intervals), `scores` (backends and results),
`compilation` (memory formats and torch.compile), `loop` (the evaluation loop).
"""
