"""The pictures of docs/pictures, from the demo's report: `python docs/make_pictures.py [DEMO]`.

DEMO is a folder that `vig demo -o DEMO` wrote; without it the demo's tuning data are scored and selected from anew.
Takes two views of the report in a headless Chromium (Debian's chromium and chromium-driver, pip's selenium): its upper
part, and the list of samples. A minute on one core. Look at them before you commit them.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import browser  # noqa: E402 - of the tests

WIDTH, HEIGHT = 1240, 1130
VIEWS = {"report-figures": None, "report": "samples-heading"}  # name -> id of the element at its top


def score_demo(folder: Path) -> None:
    """The demo's scores and selection."""
    import torch

    from vig import Scorer, score_dataset, select
    from vig.demo.arms import CHECKPOINT
    from vig.demo.dataset import DATA_SEED, SAMPLES, tuning_records, write_records

    torch.set_num_threads(1)
    data = write_records(folder, "tune", tuning_records(SAMPLES, DATA_SEED))
    score_dataset(Scorer(str(CHECKPOINT)), data, folder / "scores")
    select(folder / "scores", 70, out=folder / "selection")


def take(page: Path, folder: Path) -> None:
    """PNG files of VIEWS, of the light page."""
    with browser.chromium(WIDTH, HEIGHT) as driver:
        driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        browser.media(driver, prefers_color_scheme="light")
        driver.get(page.absolute().as_uri())
        for name, top in VIEWS.items():
            place = (
                f"document.getElementById({top!r}).getBoundingClientRect().top + scrollY - 20" if top else "0"
            )
            driver.execute_script(f"scrollTo(0, {place})")
            driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
            shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
            (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    from vig import report

    if (reason := browser.why_not()) is not None:
        sys.exit(f"make_pictures: {reason}")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, nargs="?", help="folder of `vig demo`; scored anew without it")
    demo = parser.parse_args().demo
    with tempfile.TemporaryDirectory() as made:
        if demo is None:
            score_demo(Path(made))
        os.chdir(demo or made)  # the page names its scores as its reader would
        take(report("scores", Path(made) / "report.html", selection="selection"), DOCS / "pictures")


if __name__ == "__main__":
    main()
