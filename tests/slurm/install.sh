#!/usr/bin/env bash
# Installs what tests/slurm needs (Debian, Ubuntu; as root): Slurm's daemons and commands, munge, PMIx. No service is started.
set -euo pipefail
apt-get update --quiet
apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge libpmix2
