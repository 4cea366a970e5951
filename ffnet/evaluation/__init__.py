"""Run all images through all backends and count which pixels each of them labels correctly.

In reading order: `preprocessing` (images to network inputs), `postprocessing` (logits to train ids and confusion
matrices), `metrics` (confusion matrices to IoU and accuracy), `scores` (what the evaluation loop returns), `runtime`
(device and data loading), `compilation` (memory formats and torch.compile), `loop` (the evaluation loop).
"""
