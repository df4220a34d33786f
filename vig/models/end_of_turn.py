"""Which end-of-turn tokens belong to the answers. Imports nothing: the command line reads the table."""

from __future__ import annotations

END_OF_TURN = {
    "add": "the answer's text and the end-of-turn token after it, written there if the template writes none",
    "template": "exactly what the template marks",
    "drop": "the answer's text alone",
}
DEFAULT = "add"  # as in LLaVA's own labels


def check_end_of_turn(end_of_turn: str) -> None:
    """Raises ValueError for what is none of END_OF_TURN."""
    if end_of_turn not in END_OF_TURN:
        raise ValueError(f"end_of_turn = {end_of_turn!r}, expected one of {', '.join(END_OF_TURN)}")
