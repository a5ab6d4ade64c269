"""Diffusion over geometries: networks, noise, checkpoints, and the process that relaxes."""
