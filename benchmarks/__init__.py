"""What longnet costs, measured: ``python -m benchmarks`` from the root of a checkout.

No number without a green check: everything that is timed is first compared with the float64 definition.
"""
