"""Boltzmann sampling by Markov chains: one temperature, a ladder of them, and what proposes moves.

Submodules are imported one by one; `metropolis` and `replica_exchange` load no engine, no torch
and no MPI.
"""
