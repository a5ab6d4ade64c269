"""Replica exchange over a ladder of temperatures, by hand:

    mpiexec -n 18 python jobs/replica_exchange.py molecule.xyz --temperatures 10:400:18

`--help` tells the rest. The program is the package's own, so that installed copies have it too.
"""

import sys

from kernels.sampling.exchange_program import main

if __name__ == "__main__":
    sys.exit(main())
