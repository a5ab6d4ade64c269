"""The index of finished tasks, against a dictionary."""

from __future__ import annotations

import random

import numpy as np
import pytest

from orchestrator import key_index
from orchestrator.key_index import ABSENT, KeyIndex

Key = tuple[int, int]
TOP = 2**64 - 1


def random_keys(rng: random.Random, count: int) -> list[Key]:
    """Return keys of which many share their first word, some at the ends of what it can be."""
    firsts = [0, 1, TOP, 2**63, *(rng.getrandbits(64) for _ in range(count // 3))]
    seconds = [0, TOP, *(rng.getrandbits(64) for _ in range(count // 3))]
    return [(rng.choice(firsts), rng.choice(seconds)) for _ in range(count)]


def as_array(keys: list[Key]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.array(keys, np.uint64).reshape(-1, 2)


@pytest.mark.parametrize("seed", range(30))
def test_it_agrees_with_a_dictionary(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(key_index, "_BUFFER", rng.choice([1, 3, 50, 10_000]))
    index = KeyIndex()
    known: dict[Key, int] = {}
    pool = random_keys(rng, 60)
    for _ in range(40):
        step = rng.choice(["extend", "add", "add", "lookup", "get", "items", "len"])
        if step == "extend":
            keys = [rng.choice(pool) for _ in range(rng.randrange(12))]
            codes = [rng.randrange(9) for _ in keys]
            index.extend(as_array(keys), np.array(codes, np.uint8))
            for key, code in zip(keys, codes, strict=True):
                known[key] = min(known.get(key, ABSENT), code)
        elif step == "add":
            key, code = rng.choice(pool), rng.randrange(9)
            assert index.add(*key, code) is (key not in known)
            known.setdefault(key, code)
        elif step == "lookup":
            asked = [rng.choice(pool) for _ in range(20)] + random_keys(rng, 5)
            expected = [known.get(key, ABSENT) for key in asked]
            assert index.lookup(as_array(asked)).tolist() == expected
        elif step == "get":
            key = rng.choice(pool)
            assert index.get(*key) == known.get(key, ABSENT)
        elif step == "items":
            keys_found, codes_found = index.items()
            pairs = [tuple(pair) for pair in keys_found.tolist()]
            assert pairs == sorted(known)
            assert codes_found.tolist() == [known[pair] for pair in sorted(known)]
        else:
            assert len(index) == len(known)


def test_an_empty_index_knows_nothing() -> None:
    index = KeyIndex()
    assert len(index) == 0
    assert index.get(0, 0) == ABSENT
    assert index.lookup(as_array([(0, 0), (TOP, TOP)])).tolist() == [ABSENT, ABSENT]
    assert index.lookup(as_array([])).tolist() == []


def test_many_keys_take_little_memory() -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, (300_000, 2), np.uint64)
    index = KeyIndex()
    index.extend(keys, np.zeros(len(keys), np.uint8))
    held = sum(array.nbytes for array in (index._hi, index._lo, index._code))
    assert held == 17 * 300_000
    assert not index.lookup(keys).any()
    assert (index.lookup(keys ^ np.uint64(1)) == ABSENT).all()


def test_many_keys_are_added_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "_BUFFER", 50)
    rng = random.Random(5)
    one, many = KeyIndex(), KeyIndex()
    keys = random_keys(rng, 60)
    for _ in range(20):
        some = rng.choices(keys, k=30)
        expected = [one.add(*key) for key in some]
        assert many.add_all(as_array(some)).tolist() == expected
    assert len(one) == len(many)
