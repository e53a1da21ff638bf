# Short names for the commands in CONTRIBUTING.md. Everything runs in .venv (make setup).
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup serve test lint types imports format key-tables try-models watch-cost test-1 test-2 test-3 test-4 test-8 test-guides test-endurance test-launchers test-openapi test-lm-eval test-aiperf test-agents faults fault-figures

setup: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu,test]'
	touch $@

serve: setup
	mpirun -n 4 python -m launch.serve --tp 2 --pp 2

test: setup
	tests/run.sh

format: setup
	ruff format .
	ruff check --fix .

lint: setup
	ruff format --check .
	ruff check .

types: setup
	mypy

imports: setup
	PYTHONPATH=tools/tree lint-imports

key-tables: setup
	python tools/key_tables.py
	python -m tools.engine_matrix

# Configs, tokenizers and templates of a directory of downloaded models: make try-models DIR=...
try-models: setup
	python tools/try_models.py $(DIR)

test-1: setup
	python -m pytest

test-2 test-3 test-4 test-8: test-%: setup
	tests/run_mpi.sh $*

# A thousand random JSON schemas: every completed answer validates.
test-guides: setup
	python -m pytest -q -s -m slow tests/runtime/test_guides.py

# Many clients, many faults, ten minutes of mixed load (PHALANX_SOAK_SECONDS): prints the figures of docs/serving.md.
test-endurance: setup
	python -m pytest -q -s -m slow tests/server/test_endurance.py

# Signals and missing ranks at every moment of every command, with whichever MPI is installed.
test-launchers: setup
	python -m pytest -q -m "slow or not slow" tests/launch/test_signals.py tests/launch/test_missing_rank.py \
		tests/launch/test_user_files.py tests/server/test_failures.py tests/server/test_two_hosts.py \
		tests/launch/test_results.py tests/server/test_unusual_faults.py tests/server/test_pulse.py tests/parallel/test_scripts.py

# schemathesis over all operations of /openapi.json (PHALANX_SCHEMATHESIS_EXAMPLES each), from an environment of its own.
test-openapi: setup
	python3 -m venv .schemathesis && .schemathesis/bin/pip install -q 'schemathesis==4.32.5'
	PHALANX_SCHEMATHESIS_EXAMPLES=$${PHALANX_SCHEMATHESIS_EXAMPLES:-1000} PHALANX_SCHEMATHESIS=$(CURDIR)/.schemathesis/bin/schemathesis \
		python -m pytest -q -s -m slow tests/server/test_schemathesis.py

# lm-eval as a client, from an environment of its own (0.8 GB): log-likelihoods within 1e-4 of a float64 reference.
test-lm-eval: setup
	python3 -m venv .lm-eval && .lm-eval/bin/pip install -q 'lm-eval[api]'
	PHALANX_LM_EVAL_PYTHON=$(CURDIR)/.lm-eval/bin/python python -m pytest -q -m slow tests/server/test_lm_eval.py

# AIPerf as a client, from an environment of its own (1.2 GB): 100 requests over each protocol of OpenAI without an error.
test-aiperf: setup
	python3 -m venv .aiperf && .aiperf/bin/pip install -q aiperf
	PHALANX_AIPERF=$(CURDIR)/.aiperf/bin/aiperf python -m pytest -q -m slow tests/server/test_aiperf.py

# LiteLLM and OpenAI's Agents SDK as clients, from an environment of their own.
test-agents: setup
	python3 -m venv .agents && .agents/bin/pip install -q litellm openai-agents
	PHALANX_AGENTS_PYTHON=$(CURDIR)/.agents/bin/python python -m pytest -q -m slow tests/server/test_agents.py

faults: setup
	PHALANX_FAULT_ROUNDS=100 PHALANX_FAULT_SEED=$${PHALANX_FAULT_SEED:-2026} python -m pytest -q tests/server/test_random_faults.py

# What it costs that ranks watch each other: step rate and processor of idle ranks, by processor time.
watch-cost: setup
	python -m tools.watch_cost

# How long faults take to be told and cleaned up, with whichever MPI is installed; PHALANX_FAULT_ROUNDS each.
fault-figures: setup
	python -m pytest -q -m slow tests/server/test_fault_figures.py
