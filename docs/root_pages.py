"""A hook of mkdocs: CHANGELOG.md and CONTRIBUTING.md, which stand beside docs/, are pages of the site too."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File, Files

PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files: Files, config) -> Files:
    root = Path(config.config_file_path).parent
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(text: str, page, config, files: Files) -> str:
    """Links that hold in the repository hold on the site."""
    for name in PAGES:
        text = text.replace(f"](../{name}", f"]({name}")
    return text.replace("](docs/", "](") if page.file.src_uri in PAGES else text
