# Everything a checkout needs. Each target makes `.venv` on its first call and reuses it afterwards; it is brought up to
# date when pyproject.toml or constraints.txt change. PYTHON=python3.12 chooses the interpreter of a new `.venv`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

DEMO := --preset tiny --context 8192 --minutes 8 --lr 3e-3 --clip 0.3 --schedule linear --warmup 40

.PHONY: help demo test lint type docs older pytest bench figures format clean

help:
	@echo "make demo     train a small LongNet on Python's own source code and write runs/demo/report.html"
	@echo "make test     everything that must pass: lint, types, the documentation and the tests"
	@echo "make lint     ruff: rules and formatting          make format   let ruff mend what it can"
	@echo "make type     mypy                                make pytest   the tests alone, the import ladder among them"
	@echo "make bench    measure speed and memory            make figures  draw the pictures of the README"
	@echo "make older    tests of longnet.hf with the oldest transformers that is supported"
	@echo "make docs     the documentation site: open build/docs/index.html in a browser"
	@echo "make clean    delete caches and build outputs (never .venv or runs)"

# torch comes first and by itself: pinned by the constraints, it satisfies the package's own requirement afterwards.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "longnet needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) -V 2>&1`: try make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@if test -e runs/demo/run.json; then \
		echo "runs/demo holds a run: going on with it. For a new one: rm -r runs/demo"; \
		$(BIN)/longnet train --out runs/demo --resume; \
	else \
		$(BIN)/longnet train $(DEMO) --out runs/demo; \
	fi
	@echo "Done: open runs/demo/report.html in a browser"

# One after the other also under `make -j`, so that the output ends with pytest's summary.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory type
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory older
	@$(MAKE) --no-print-directory pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

# The oldest transformers that is supported, with what it needs and the newest one has no more, beside the rest of .venv.
OLDER := .venv/transformers-5.17
$(OLDER)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(OLDER) \
		transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 sniffio==1.3.1
	@touch $@

older: $(OLDER)/.installed
	PYTHONPATH=$(OLDER) $(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadgroup tests/hf

pytest: $(INSTALLED)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

figures: $(INSTALLED)
	$(BIN)/python scripts/make_figures.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
