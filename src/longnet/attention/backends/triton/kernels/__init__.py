"""Triton kernels of the ``triton`` backend. Importing the modules in here needs triton."""
