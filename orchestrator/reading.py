"""Understanding records on several cores, in their order, whatever some of them do to RDKit.

A reading process is this module run by itself: batches of records come in on its standard input,
entries go out, until its input ends (so it ends with whoever started it).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from kernels.errors import InputError
from orchestrator.molecules import Entry, Record

BATCH = 256
# So few are understood before other processes could have started.
_ALONE = 512
_MOST_PROCESSES = 8


def processes() -> int:
    """Return how many reading processes pay here."""
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


class Reading:
    """Makes entries of records in ``processes`` processes; use as a context manager.

    ``yielding``: they leave the cores to whoever has other work to do.
    """

    def __init__(self, processes: int, *, yielding: bool = False) -> None:
        self._n = processes
        self._arguments = ["--yielding"] if yielding else []
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(processes)
        self._over = False

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
            process.wait()
        self._threads.shutdown()
        for process in self._all:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def entries(self, records: Iterator[Record]) -> Iterator[Entry]:
        """Yield the entry of each record, in order."""
        for record in itertools.islice(records, _ALONE if self._n > 1 else None):
            yield record.entry()
        waiting: deque[Future[list[Entry]]] = deque()
        for batch in iter(lambda: list(itertools.islice(records, BATCH)), []):
            if not self._all:
                for _ in range(self._n):
                    self._start()
            waiting.append(self._threads.submit(self._understand, batch))
            if len(waiting) > 3 * self._n:
                yield from waiting.popleft().result()
        for answer in waiting:
            yield from answer.result()

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.reading", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A Ctrl-C at the terminal is for whoever started this.
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._all.append(process)
        self._free.put(process)

    def _understand(self, batch: list[Record]) -> list[Entry]:
        if self._over:
            return []
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(batch, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            entries: list[Entry] = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            process.wait()
            if self._over:
                return []
            self._start()
        else:
            self._free.put(process)
            return entries
        if len(batch) > 1:
            half = len(batch) // 2
            return self._understand(batch[:half]) + self._understand(batch[half:])
        error = InputError(f"takes down the program that reads it (exit {process.returncode})")
        one = batch[0]
        return [Entry(one.source, one.line, one.text, one.name, None, None, error)]


def main() -> None:
    """Understand batches of records until there are no more."""
    if "--yielding" in sys.argv:
        os.nice(10)
    # What RDKit or a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    batch: list[Record]
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: list[Any] = [record.entry() for record in batch]
        try:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # whoever asked is gone, and what is left in the buffer with it


if __name__ == "__main__":
    main()
