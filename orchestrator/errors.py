"""Errors that the orchestrator raises, each with the exit status its command ends with.

    BasinError                  1   anything Basin itself reports; never shown as a traceback
    |-- CampaignError           2   the campaign file, or what it names, is not usable
    |-- SiteError               2   the site configuration is missing, broken or refused
    |-- StoreError              3   the store cannot be opened, read or written
    |   |-- StoreLockedError        another driver holds the store
    |   |-- StoreVersionError       the store's schema is newer or older than this Basin
    |   |-- StoreFullError          the file system has no room left
    |   `-- CorruptShardError       a shard is truncated or its content fails its checksum
    `-- RunError                4   the run stopped before its end

A molecule that fails is not an error in this sense: it is a row, and its classes are in
`kernels.errors`.
"""

from __future__ import annotations

from typing import ClassVar


class BasinError(Exception):
    """Root of everything Basin reports to a person; the message is all that is shown."""

    exit_code: ClassVar[int] = 1


class CampaignError(BasinError):
    """The campaign file, or a file it names, cannot be used as written."""

    exit_code: ClassVar[int] = 2


class SiteError(BasinError):
    """The site configuration is missing, broken, or asks for what is not there."""

    exit_code: ClassVar[int] = 2


class StoreError(BasinError):
    """The store cannot be opened, read or written."""

    exit_code: ClassVar[int] = 3


class StoreLockedError(StoreError):
    """Another driver is writing this store."""


class StoreVersionError(StoreError):
    """The store was written with a schema that this version of Basin does not read."""


class StoreFullError(StoreError):
    """The file system of the store has no room left."""


class CorruptShardError(StoreError):
    """A shard is truncated, or its content does not match its checksum."""


class RunError(BasinError):
    """The run ended before its work was done."""

    exit_code: ClassVar[int] = 4
