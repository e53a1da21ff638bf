#!/usr/bin/env bash
# Installs what tests/slurm needs (Debian, Ubuntu; as root): Slurm's daemons and commands, munge, PMIx. No service is started.
set -euo pipefail
apt-get update --quiet
apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge libpmix2
# Slurm's plugin for --mpi=pmix opens the library by a name that only libpmix-dev, with twelve more packages, would bring.
library=$(readlink -f /usr/lib/*/libpmix.so.2)
ln -sf libpmix.so.2 "$(dirname "$library")/libpmix.so"
