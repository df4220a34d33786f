"""One self-contained HTML page on a folder of scores."""
