"""Two passes of the model over batches of samples, in memory or into a folder that resumes."""
