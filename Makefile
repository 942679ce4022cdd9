# Every task of the project. `make` lists them. All of them need Python 3.11 or newer with its venv module.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=
STREAMLIT_SERVER_PORT ?= 8501
STREAMLIT_SERVER_ADDRESS ?= 127.0.0.1
export STREAMLIT_SERVER_PORT STREAMLIT_SERVER_ADDRESS

.DEFAULT_GOAL := help
.PHONY: help app test test-browser test-cluster check format bench bench-ui bench-gpu docs clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

app: $(VENV)/.runtime ## run the dashboard on http://127.0.0.1:8501 (STREAMLIT_SERVER_PORT changes the port)
	$(BIN)/python -m streamlit run app.py --server.headless true

test: $(VENV)/.dev ## run every test but those that drive a browser or a cluster
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not e2e" $(PYTEST_ARGS)

test-browser: $(VENV)/.dev ## drive the whole app in a browser; needs chromium
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)

test-cluster: $(VENV)/.cluster ## run the tests that need a Ray cluster, on one of this machine; installs requirements-cluster.txt
	$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

check: $(VENV)/.dev ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow and not e2e" $(PYTEST_ARGS)

format: $(VENV)/.dev ## rewrite the files the way `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## measure speed and promises (BENCH_ARGS="--json FILE --only NAME")
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-ui: $(VENV)/.dev ## what people wait for in a browser, alone and eight at once; needs chromium
	$(BIN)/python -m bench --only pages --only crowd $(BENCH_ARGS)

bench-gpu: $(VENV)/.dev ## one edit of each method in the shapes of GPT-2 XL and Llama 2 7B; needs a CUDA device
	$(BIN)/python -m bench --only gpu $(BENCH_ARGS)

docs: $(VENV)/.runtime ## write docs/methods.md and docs/metrics.md, the references of methods and metrics, from the code
	@$(BIN)/python -m mega_core methods --markdown > docs/.methods.md && mv docs/.methods.md docs/methods.md
	@$(BIN)/python -c 'from mega_core.evaluation.reference import markdown as page; print(page(), end="")' > docs/.metrics.md && mv docs/.metrics.md docs/metrics.md

clean: ## remove caches of the tools and the virtual environment; results in cache/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call start at once: nothing is installed again until a requirements file changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime

$(VENV)/.cluster: requirements-cluster.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-cluster.txt
	@touch $@
