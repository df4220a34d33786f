"""Scores and selections on disk."""
