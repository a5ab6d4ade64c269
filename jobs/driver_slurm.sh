#!/bin/bash -l
# The driver of campaign 'quickstart', which submits the blocks that compute.
#SBATCH --job-name=basin.driver.quickstart
#SBATCH --account=chem
#SBATCH --partition=serial
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=7630M
#SBATCH --time=24:00:00
#SBATCH --no-requeue
#SBATCH --output=/home/you/quickstart/logs/driver-%j.log

module load python/3.12
export PATH=/home/you/basin/.venv/bin:"$PATH"
cd /home/you/basin || exit 2

# From these the driver knows its own end, and drains before it.
export BASIN_DRIVER_JOB=$SLURM_JOB_ID
export BASIN_BLOCK_START=$(date +%s) BASIN_BLOCK_WALLTIME_S=86400

# --chain: a follow-up job waits for this one, and goes on where it ends unfinished.
exec basin run /home/you/basin/jobs/quickstart.toml --site /home/you/mycluster.toml --store /home/you/quickstart --chain /home/you/quickstart/control/driver.sh
