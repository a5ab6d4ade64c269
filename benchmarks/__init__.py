"""Benchmarks: each module prints one table, with every ratio measured in one run."""
