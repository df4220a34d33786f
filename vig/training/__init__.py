"""Selective training: the masked loss, the collator, the trainers and the lean loop."""
