"""The end-to-end example: drawn scenes, a tiny checkpoint, and every step of the pipeline on them in minutes."""
