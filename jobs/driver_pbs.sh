#!/bin/bash -l
# The driver of campaign 'quickstart', which submits the blocks that compute.
#PBS -N basin.driver.quickstart
#PBS -A chem
#PBS -q serial
#PBS -l select=1:ncpus=2:mem=7630mb
#PBS -l walltime=24:00:00
#PBS -r n
#PBS -j oe
#PBS -o /home/you/quickstart/logs/

module load python/3.12
export PATH=/home/you/basin/.venv/bin:"$PATH"
cd /home/you/basin || exit 2

# From these the driver knows its own end, and drains before it.
export BASIN_DRIVER_JOB=$PBS_JOBID
export BASIN_BLOCK_START=$(date +%s) BASIN_BLOCK_WALLTIME_S=86400
exec >> "/home/you/quickstart/logs/driver-${PBS_JOBID}.log" 2>&1

# --chain: a follow-up job waits for this one, and goes on where it ends unfinished.
exec basin run /home/you/basin/jobs/quickstart.toml --site /home/you/mycluster.toml --store /home/you/quickstart --chain /home/you/quickstart/control/driver.sh
