# Everything a checkout needs. Each target makes `.venv` on its first call and reuses it afterwards; it is brought up to
# date when pyproject.toml or constraints.txt change. PYTHON=python3.12 chooses the interpreter of a new `.venv`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Threads of OpenMP that wait sleep instead of spinning, as the longnet command sets it.
export OMP_WAIT_POLICY ?= PASSIVE
export KMP_BLOCKTIME ?= 0

# torch.compile compiles in the process that asks for it: every worker would start a pool of compilers, each importing torch.
export TORCHINDUCTOR_COMPILE_THREADS ?= 1

# Tests start many processes, and each would compile the library anew: they are twice as slow without byte code.
unexport PYTHONDONTWRITEBYTECODE

# One worker more than there are processors: some tests wait for processes or for the clock.
PYTEST = $(BIN)/python -m pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 8 --dist loadgroup

DEMO := --preset tiny --tokenizer runs/demo-tokenizer --context 2560 --short-context 256 --minutes 8 \
	--optimizer muon --lr 1e-2 --clip 0.3 --schedule linear --warmup 40

.PHONY: help demo test quick lint type docs transformers pytest portable older newest bench learning-small figures format clean

help:
	@echo "make demo     train a small LongNet on Python's own source code and write runs/demo/report.html"
	@echo "make test     everything that must pass: lint, types, the documentation and the tests"
	@echo "make quick    lint and the tests that take no seconds each: for daily work"
	@echo "make lint     ruff: rules and formatting          make format   let ruff mend what it can"
	@echo "make type     mypy                                make pytest   the tests alone, the import ladder among them"
	@echo "make bench    measure speed and memory            make figures  draw the pictures of the README"
	@echo "make learning-small   train patterns of the comparison at toy size, and draw its pictures"
	@echo "make transformers   tests of longnet.hf with the oldest transformers that is supported; part of make test"
	@echo "make portable the tests as on other processors: without AVX, with AVX2, with AVX-512, oneDNN limited, one thread"
	@echo "make older    the tests with the oldest torch and transformers; makes .venv-older (several GB)"
	@echo "make newest   the tests with the newest torch and transformers of the index; makes .venv-newest (several GB)"
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
		test -e runs/demo-tokenizer/tokenizer.json || $(BIN)/longnet tokenizer train --vocab 2048 --out runs/demo-tokenizer && \
		$(BIN)/longnet train $(DEMO) --out runs/demo; \
	fi
	@echo "Done: open runs/demo/report.html in a browser"

# The tests come last and by themselves, so that the output ends with pytest's summary.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory -j3 lint type docs transformers
	@$(MAKE) --no-print-directory pytest

quick: $(INSTALLED)
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -q -m "not slow"

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
OLDEST := .venv/transformers-5.17
$(OLDEST)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) \
		transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 sniffio==1.3.1
	@touch $@

transformers: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(PYTEST) -q tests/hf

pytest: $(INSTALLED)
	$(PYTEST)

PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
portable: $(INSTALLED)
	@for setting in $(PROCESSORS); do echo "== $$setting"; env $$setting $(PYTEST) -q || exit 1; done

# Triton 3.6, which torch 2.11 brings along, needs numpy < 2.4.
.venv-older/.installed: pyproject.toml
	@test -x .venv-older/bin/python || $(PYTHON) -m venv .venv-older
	.venv-older/bin/python -m pip install --disable-pip-version-check torch==2.11.0 'numpy<2.4' transformers==5.17.0 -e '.[dev]'
	@touch $@

older: BIN := .venv-older/bin
older: .venv-older/.installed
	$(PYTEST)

newest: BIN := .venv-newest/bin
newest:
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv-newest
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager torch -e '.[dev]'
	$(PYTEST)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# One pattern of each kind: a run takes half a minute.
LEARNING_SMALL := "dense,dense with middle keys shifted,window,window+dense 1/2,longnet,window+longnet shifted,window+stride 4,$\
	window+stride 4 blocks of 32,half the heads dense,growing strides,window+dilated 2,dense then window+stride 4 middle quarter"

learning-small: $(INSTALLED)
	$(BIN)/python -m benchmarks.learning --small --data src --out build/learning --arms $(LEARNING_SMALL)
	$(BIN)/python -m benchmarks.learning.report build/learning --to build/learning

figures: $(INSTALLED)
	$(BIN)/python scripts/make_figures.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
