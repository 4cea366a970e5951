"""A pretend GPU: tensors that say cuda:N and lie in the CPU's memory, so that the CUDA path runs without a GPU.

It shows the errors that depend on where a tensor is: operands on two devices, `.numpy()` of a tensor on the device, a
GPU that is missing, memory that does not suffice. It does not show rounding, speed, races and code compiled for a GPU.

In reading order: `guard` (the driver's bookkeeping of devices, in C++), `kernels` (CUDA's operators, run on the CPU),
`device` (both together, and torch.cuda's functions), `program` (the program on it), `mistakes` (to be planted in the
program), `halves` (AIMET's kernels for GPUs, by Triton's interpreter).

torch keeps the guard for the rest of the process: use the pretend GPU in a process of its own.
"""
