# What differs from site to site. Copy to slurm/settings.sh and edit; every script here sources it.

# Directory that every node sees: endpoint files, results.
SHARED_DIR=$SLURM_SUBMIT_DIR

# Environment with Phalanx in it. With the site's MPI: install mpi4py only, load the module, and mpi4py finds its library.
source "$SLURM_SUBMIT_DIR/.venv/bin/activate"
# module load openmpi

# How ranks start: keep the line for the MPI library of the environment (srun --mpi=list says what this Slurm speaks). Ranks are
# numbered node by node (block), so that a tensor-parallel group stays inside a node. Open MPI, and most site builds:
LAUNCHER=(srun --mpi=pmix --kill-on-bad-exit=1 --distribution=block)
# MPICH, and the mpich package from PyPI:
# LAUNCHER=(srun --mpi=pmi2 --kill-on-bad-exit=1 --distribution=block)
# Either, where Slurm's PMI does not fit it; submit with sbatch --signal=B:USR1@120 then, as the warning must reach mpirun:
# LAUNCHER=(mpirun)
# In a container, Slurm still starts the ranks and the MPI inside must speak the same PMI:
# LAUNCHER+=(apptainer exec --nv "$SHARED_DIR/phalanx.sif")
# LAUNCHER+=(--container-image="$SHARED_DIR/phalanx.sqsh")    # Enroot with Pyxis

# Hugging Face directory, or a directory written by launch.split (each rank then reads only its own file).
MODEL=$SHARED_DIR/models/llama-3-8b

# The server listens to other machines, so it needs keys: one per line, a file that only you can read.
API_KEY_FILE=$HOME/.config/phalanx/keys
PORT=0    # 0 = any free one; clients read it from the endpoint file
SERVE_OPTIONS=(--max-num-seqs 256)

# launch.generate: JSON lines in, JSON lines out.
PROMPTS=$SHARED_DIR/prompts.jsonl
GENERATE_OPTIONS=(--max-tokens 256)

# Slurm 22.05 and later do not hand --cpus-per-task of sbatch on to srun by themselves.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Compiled kernels and GEMM timings: a shared directory saves the next job's start.
export PHALANX_CACHE_DIR=$SHARED_DIR/.phalanx-cache
# Between nodes NCCL needs the right network; look at its choice once with NCCL_DEBUG=INFO.
# export NCCL_SOCKET_IFNAME=ib0
