"""Kernels that no GPU has yet found right and faster. `python -m benchmarks gpu` tries them; the library has none.

A module has NAME, `why_not(device)` (None, or why it cannot run there) and `linear_nll(hidden, weight, target)`.
"""
