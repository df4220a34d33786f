"""From files to samples: formats, images, workers, and files that are whole or absent."""
