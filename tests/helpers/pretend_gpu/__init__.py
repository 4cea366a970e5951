"""A pretend GPU: tensors that say cuda:N and lie in the CPU's memory, so that the CUDA path runs without a GPU.

What fails on a GPU because of where a tensor is fails here: operands on two devices, `.numpy()` of a tensor on the
device, a GPU that is not there, memory that does not suffice. Rounding, speed, races and code that is compiled for a
GPU are not shown.

In reading order: `guard` (the driver's bookkeeping of devices, in C++), `kernels` (CUDA's operators, run on the CPU),
`device` (both together, and torch.cuda's functions), `program` and `__main__` (the program on it), `mistakes` (to be
planted in the program), `halves` (AIMET's kernels for GPUs, by Triton's interpreter).

torch keeps the guard for the rest of the process: use the pretend GPU in processes of their own.
"""
