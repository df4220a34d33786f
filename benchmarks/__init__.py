"""Benchmarks of vig_kernels: `python -m benchmarks`. Every contender is verified before it is timed."""
