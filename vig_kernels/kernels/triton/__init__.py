"""Triton kernels for GPUs, and for Triton's interpreter."""
