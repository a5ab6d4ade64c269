"""Diffusion over geometries: networks, noise, checkpoints, and the process that relaxes.

Nothing here imports torch; the modules that need it do.
"""

from typing import Final

# Versions of `process.diffuse`, `generation.generate`, `chains.diffusion_chains` and of
# `kernels.sampling.diffusion_proposal`, which enter the keys of tasks; here, so that a plan can be
# made without torch.
PROCESS_VERSION: Final = 1
GENERATION_VERSION: Final = 1
CHAINS_VERSION: Final = 1
PROPOSAL_VERSION: Final = 1
