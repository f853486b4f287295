# Every target sets up what it needs. `make demo DATA=folder` runs the demo on your own audio.
#
#   make demo    the whole story on two CPU cores, report at the end
#   make test    all tests
#   make check   formatting, lint, types, import layers, project rules
#   make bench   every benchmark
#   make clean   removes the environment and caches (not runs/)

BIN := .venv/bin
STAMP := .venv/.ready
# What installs torch; override it, for example with an --index-url of CPU builds, where pip would bring CUDA packages.
TORCH ?= torch==2.13.0
DATA ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help:
	@sed -n '3,7s/^# *//p' Makefile

# The stamp is the last step, so an interrupted set-up is taken up again; a half-made environment is made anew.
$(STAMP): pyproject.toml constraints.txt
	@found=; if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for python in python3.11 python3.12 python3.13 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "sslim needs Python 3.11 or newer; none was found on the PATH" >&2; exit 1; fi; \
	  echo "setting up .venv with $$($$found --version) (about two minutes, once)"; \
	  $$found -m venv --clear .venv; \
	fi
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/sslim demo $(if $(DATA),--data '$(DATA)')

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)
	@$(BIN)/ruff format --quiet --check --output-format concise . || { echo "run: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@layers=$$($(BIN)/lint-imports 2>&1) || { echo "$$layers"; exit 1; }
	@$(BIN)/python tools/check_rules.py
	@echo "check: formatting, lint, types, layers and project rules are fine"

bench: $(STAMP)
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python "$$benchmark" || exit 1; done

clean:
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
