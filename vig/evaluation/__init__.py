"""From predictions to measures: generation, tasks, probes."""
