"""The Triton backend: general kernels, and kernels for Hopper GPUs where they fit."""
