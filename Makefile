# What a person or a CI machine runs; needs Python 3.11 or later, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
PEERS := .venv-peers
MODEL_FOLDER := from embeddings_mcp.embedders.local.locate import find_bundled; from embeddings_mcp.models import DEFAULT_MODEL; print(find_bundled(DEFAULT_MODEL))

.PHONY: run test lint types unit test-all test-gpu soak fuzz bench-peers mcpb published format lock clean help

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP) ## Install, start the server as an MCP host would, and ask it a few things
	$(BIN)/embeddings-mcp demo

test: lint types unit ## All checks: lint, types, tests

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(PYTEST) -m "not node and not bench"

test-all: lint types $(STAMP) ## The same, the benchmarks on tiny sizes, and the checks of the protocol's makers (npm)
	$(PYTEST)

test-gpu: $(STAMP) ## What needs an NVIDIA GPU
	$(BIN)/pytest -m gpu

soak: $(STAMP) ## Five minutes under fire: mixed, broken and hostile callers, kill -9; prints what it saw
	$(BIN)/python -m tests.soak --minutes 5

fuzz: $(STAMP) ## Thousands of requests made from the OpenAPI document
	test -x .venv-fuzz/bin/st || { $(PYTHON) -m venv .venv-fuzz && .venv-fuzz/bin/pip install --quiet schemathesis==4.32.5; }
	$(BIN)/python -m tests.fuzz .venv-fuzz/bin/st

bench-peers: $(STAMP) ## Install what `python -m benchmarks.NAME` compares with, in .venv-peers
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	$(PEERS)/bin/python -m benchmarks.export_onnx "$$($(BIN)/python -c "$(MODEL_FOLDER)")"

mcpb: $(STAMP) ## Pack the bundle for Claude Desktop, from what is committed (needs npx)
	rm -rf build/mcpb && mkdir -p build/mcpb dist
	git archive HEAD pyproject.toml README.md LICENSE server skills | tar -x -C build/mcpb
	cp packaging/mcpb/manifest.json build/mcpb/
	npx --yes --package node@22 --package @anthropic-ai/mcpb@2.1.2 mcpb pack build/mcpb dist/embeddings-mcp.mcpb

published: $(STAMP) ## Make anew what is made from the code: manifests, schemas, reference pages
	$(BIN)/python -m embeddings_mcp.publish

format: $(STAMP) ## Put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## Pin what is installed now in constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## Remove the environment and all caches
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# torch first and by its exact version: where a CPU wheel of it is at hand, pip takes that one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[local,bundled,dev]'
	touch $@
