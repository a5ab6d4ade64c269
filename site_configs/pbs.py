"""Any PBS Pro or OpenPBS cluster: settings come from the user's site file, or the environment.

Copy `jobs/site_pbs.toml`, or set BASIN_ACCOUNT, BASIN_QUEUE and BASIN_WALLTIME and name the site
`pbs`.
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import PoolSettings, SiteSettings

SETTINGS: Final = SiteSettings(scheduler="pbs", pools={"cpu": PoolSettings()})
