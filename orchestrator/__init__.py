"""Basin: relaxation and sampling campaigns over potential energy surfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.store import Store, open_store

__all__ = ["Store", "open_store"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line does not pay for numpy and h5py.
    if name in __all__:
        from orchestrator import store

        return getattr(store, name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
