"""Run all images through all backends and count which pixels each of them labels correctly.

Modules in reading order:

- `preprocessing`: images to normalized network inputs
- `postprocessing`: logits to train ids, and on to confusion matrices
- `metrics`: confusion matrices to IoU and accuracy
- `scores`: what the evaluation loop returns
- `runtime`: the device and the data loading options
- `compilation`: memory formats and torch.compile
- `loop`: the evaluation loop, `evaluate`
"""
