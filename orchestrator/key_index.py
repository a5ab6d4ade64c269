"""Millions of task keys in little memory: sorted words, searched in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ABSENT = 255
_BUFFER = 65536


class KeyIndex:
    """Keys (K, 2) uint64 with one small code each; about 17 bytes a key.

    Sorted by the first word; the rare keys that share it are told apart by the second.
    """

    def __init__(self) -> None:
        self._hi = np.zeros(0, np.uint64)
        self._lo = np.zeros(0, np.uint64)
        self._code = np.zeros(0, np.uint8)
        self._new: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._hi) + len(self._new)

    def extend(self, keys: NDArray[np.uint64], codes: NDArray[np.uint8]) -> None:
        """Add keys (K, 2) with their codes (K,); of equal keys the smallest code counts."""
        self._flush()
        self._merge(keys, codes)

    def _merge(self, keys: NDArray[np.uint64], codes: NDArray[np.uint8]) -> None:
        hi = np.concatenate([self._hi, keys[:, 0]])
        lo = np.concatenate([self._lo, keys[:, 1]])
        code = np.concatenate([self._code, codes])
        order = np.lexsort((code, lo, hi))
        hi, lo, code = hi[order], lo[order], code[order]
        first = np.ones(len(hi), bool)
        first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
        self._hi, self._lo, self._code = hi[first], lo[first], code[first]

    def add(self, hi: int, lo: int, code: int = 0) -> bool:
        """Add one key; return False if it was there already."""
        if (hi, lo) in self._new or self.get(hi, lo) != ABSENT:
            return False
        self._new[hi, lo] = code
        if len(self._new) >= _BUFFER:
            self._flush()
        return True

    def add_all(self, keys: NDArray[np.uint64], code: int = 0) -> NDArray[np.bool_]:
        """Add keys (K, 2) one after the other; tell (K,) which of them were not there."""
        known = (self._find(keys) != ABSENT).tolist()
        fresh = np.zeros(len(keys), bool)
        for row, (hi, lo) in enumerate(keys.tolist()):
            if not known[row] and (hi, lo) not in self._new:
                self._new[hi, lo] = code
                fresh[row] = True
        if len(self._new) >= _BUFFER:
            self._flush()
        return fresh

    def _flush(self) -> None:
        if self._new:
            new = np.array(list(self._new), np.uint64)
            codes = np.array(list(self._new.values()), np.uint8)
            self._new = {}
            self._merge(new, codes)

    def items(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return all keys (K, 2), sorted, and their codes (K,)."""
        self._flush()
        return np.stack([self._hi, self._lo], axis=1), self._code

    def get(self, hi: int, lo: int) -> int:
        """Return the code of one key, or ABSENT."""
        code = self._new.get((hi, lo))
        if code is not None:
            return code
        return int(self._find(np.array([[hi, lo]], np.uint64))[0])

    def lookup(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return the codes (K,) of keys (K, 2); ABSENT where a key is not known."""
        self._flush()
        return self._find(keys)

    def _find(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = np.full(len(keys), ABSENT, np.uint8)
        if not len(self._hi):
            return found
        at = np.searchsorted(self._hi, keys[:, 0])
        inside = at < len(self._hi)
        same = np.zeros(len(keys), bool)
        same[inside] = self._hi[at[inside]] == keys[inside, 0]
        exact = np.zeros(len(keys), bool)
        exact[same] = self._lo[at[same]] == keys[same, 1]
        found[exact] = self._code[at[exact]]
        for row in np.flatnonzero(same & ~exact):
            found[row] = self._scan(int(at[row]), keys[row])
        return found

    def _scan(self, at: int, key: NDArray[Any]) -> int:
        while at < len(self._hi) and self._hi[at] == key[0]:
            if self._lo[at] == key[1]:
                return int(self._code[at])
            at += 1
        return ABSENT
