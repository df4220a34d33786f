"""The sources that rows come from, as small numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

MOST = 64  # sources told apart; the rest stand together
REST = "other sources"


class Sources:
    """Codes of source names, in order of first appearance; all beyond the first 64 share the last code."""

    def __init__(self):
        self._codes: dict[str, int] = {}
        self.names: list[str] = []

    def codes(self, column: pa.Array) -> np.ndarray:
        """(R,) int64 of a column of names; new ones are added."""
        encoded = column.dictionary_encode()
        found = np.array([self._code(name or "") for name in encoded.dictionary.to_pylist()], np.int64)
        if not len(found):
            return np.zeros(len(column), np.int64)
        places = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.where(places < 0, self._code("") if (places < 0).any() else 0, found[places])

    def _code(self, name: str) -> int:
        code = self._codes.get(name)
        if code is None:
            if len(self.names) >= MOST:
                if self.names[-1] != REST:
                    self.names.append(REST)
                return MOST
            code = self._codes[name] = len(self.names)
            self.names.append(name)
        return code
