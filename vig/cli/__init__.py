"""The commands: vig inspect | score | select | train | eval | probe | mmhal | lmms-eval | report | compare | plot |
card | demo. No logic lives here.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some samples could not be used or are not scored yet,
130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

from vig import terminal
from vig.cli import (  # noqa: F401 (each adds its commands to app)
    card,
    demo,
    evaluation,
    probing,
    reporting,
    scoring,
    selection,
    training,
)
from vig.cli.options import SOME_FAILED, STOPPED, app, err, out

__all__ = ["SOME_FAILED", "STOPPED", "app", "err", "main", "out"]


def main() -> None:
    """Runs the command line; what a user can mend is one line on stderr and exit code 1, or the error's own."""
    terminal.run_program(app, err, STOPPED)
