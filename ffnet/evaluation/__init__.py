"""Run all images through all backends and count which pixels each of them labels correctly.

In reading order: `backends` (their names and protocol), `loading` (files to network inputs), `postprocessing` (logits
to train ids and confusion matrices), `metrics` (confusion matrices to IoU and accuracy), `scores` (results),
`compilation` (memory formats and torch.compile), `loop` (the evaluation loop), `bootstrap` (confidence intervals).
"""
