"""Machines that Basin runs on: one module per machine type, each giving a Parsl configuration."""
