# Developer and CI commands. Requires Python 3.11 or later, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
PEERS := .venv-peers
FUZZ := .venv-fuzz
MODEL_FOLDER := from embeddings_mcp.embedders.local.locate import find_bundled; from embeddings_mcp.models import DEFAULT_MODEL; print(find_bundled(DEFAULT_MODEL))

.PHONY: run test lint types unit test-all test-gpu soak fuzz bench-peers mcpb published format lock clean help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP) ## Install, start the server as an MCP host would, and call its tools
	$(BIN)/embeddings-mcp demo

test: lint types unit ## Lint, type check and tests

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(PYTEST) -m "not node and not bench"

test-all: lint types $(STAMP) ## The same, plus tiny benchmarks and the official protocol checks (npx)
	$(PYTEST)

test-gpu: $(STAMP) ## Tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu

soak: $(STAMP) ## Five minutes of load from mixed, faulty and hostile callers, with kill -9; prints a report
	$(BIN)/python -m tests.soak --minutes 5

fuzz: $(STAMP) ## Thousands of requests generated from the OpenAPI document
	test -x $(FUZZ)/bin/st || { $(PYTHON) -m venv $(FUZZ) && $(FUZZ)/bin/pip install --quiet schemathesis==4.32.5; }
	$(BIN)/python -m tests.fuzz $(FUZZ)/bin/st

bench-peers: $(STAMP) ## Install the peers of `python -m benchmarks.NAME` in .venv-peers
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	$(PEERS)/bin/python -m benchmarks.export_onnx "$$($(BIN)/python -c "$(MODEL_FOLDER)")"

mcpb: $(STAMP) ## Build the bundle for Claude Desktop from the last commit (needs npx)
	rm -rf build/mcpb && mkdir -p build/mcpb dist
	git archive HEAD pyproject.toml README.md LICENSE server skills | tar -x -C build/mcpb
	cp packaging/mcpb/manifest.json build/mcpb/
	npx --yes --package node@22 --package @anthropic-ai/mcpb@2.1.2 mcpb pack build/mcpb dist/embeddings-mcp.mcpb

published: $(STAMP) ## Regenerate manifests, schemas and reference pages from the code
	$(BIN)/python -m embeddings_mcp.publish

format: $(STAMP) ## Format the code and apply ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## Pin the installed versions in constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## Remove the environments and all caches
	rm -rf $(VENV) $(PEERS) $(FUZZ) .schemathesis .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# torch comes first, pinned to its exact version, so that pip uses a CPU wheel if one is available.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,bundled,dev]'
	touch $@
