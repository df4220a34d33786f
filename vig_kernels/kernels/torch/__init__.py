"""Chunked PyTorch: any device, no compiler."""
