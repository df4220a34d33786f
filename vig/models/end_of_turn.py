"""Which end-of-turn tokens belong to the answers. Imports nothing: the command line reads the table."""

from __future__ import annotations

END_OF_TURN = {
    "template": "exactly what the template marks",
    "add": "with the end-of-turn token after each answer, written there if the template writes none",
    "drop": "the answer's text alone",
}


def check_end_of_turn(end_of_turn: str) -> None:
    """Raises ValueError for what is none of END_OF_TURN."""
    if end_of_turn not in END_OF_TURN:
        raise ValueError(f"end_of_turn = {end_of_turn!r}, expected one of {', '.join(END_OF_TURN)}")
