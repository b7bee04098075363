"""What longnet costs on a GPU: ``python -m benchmarks gpu``. Needs torch and triton alone."""
