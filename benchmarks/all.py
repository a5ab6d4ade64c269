"""Every benchmark, one after the other (`make bench`); those of chains in short forms.

Their figures in BENCHMARKS.md come from runs of half an hour and more, by the commands given there.
Left out are `scale` (a million molecules) and those that need a SLURM: `chaos`, `utilisation`.

python -m benchmarks.all
"""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    ("startup",),
    ("guard",),
    ("query",),
    ("relaxation",),
    ("diffusion",),
    ("driver",),
    ("efficiency",),
    (
        *("metropolis", "--repeats", "2", "--steps", "100", "--sampling-steps", "1000"),
        *("--ladder-steps", "50"),
    ),
    ("diffusion_chains", "speed", "--steps", "16", "--molecules", "4"),
    ("boltzmann", "--molecules", "2", "--steps", "3000", "--burn-in", "600"),
)


def main() -> None:
    """Run each in a process of its own, so that none measures another's memory."""
    failed = [
        module
        for module, *options in COMMANDS
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *options], check=False
        ).returncode
    ]
    if failed:
        sys.exit(f"benchmarks that did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
