"""The sources that rows come from, as small numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

REST = "other sources"


class Sources:
    """Codes of source names, in order of first appearance.

    most: sources that are told apart; all beyond share one more code, named "other sources".
    """

    def __init__(self, most: int | None = None):
        self.most = most
        self.names: list[str] = []
        self._codes: dict[str, int] = {}

    def codes(self, column: pa.Array) -> np.ndarray:
        """(R,) int64 of a column of names; new names are added, null counts as ""."""
        encoded = column.fill_null("").dictionary_encode()
        found = np.array([self._code(name) for name in encoded.dictionary.to_pylist()], np.int64)
        return found[encoded.indices.to_numpy(zero_copy_only=False)] if len(found) else np.empty(0, np.int64)

    def _code(self, name: str) -> int:
        code = self._codes.get(name)
        if code is None:
            if self.most is not None and len(self._codes) >= self.most:
                if len(self.names) == len(self._codes):
                    self.names.append(REST)
                return self.most
            code = self._codes[name] = len(self.names)
            self.names.append(name)
        return code
