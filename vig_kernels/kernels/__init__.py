"""The backends: one package each, one module an op."""
