"""Probes of the paper: what a model takes from the image, before and after it was tuned."""
