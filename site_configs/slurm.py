"""Any SLURM cluster: settings come from the user's site file, or from the environment.

Copy `jobs/site_slurm.toml`, or set BASIN_ACCOUNT, BASIN_PARTITION, BASIN_QOS, BASIN_CONSTRAINT and
BASIN_WALLTIME and name the site `slurm`.
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import PoolSettings, SiteSettings

SETTINGS: Final = SiteSettings(scheduler="slurm", pools={"cpu": PoolSettings()})
