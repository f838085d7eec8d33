# Everything here sets itself up in .venv; nothing outside the repository is changed.
#
#   make demo     images in over HTTP, captions out of a persistent engine (no GPU needed)
#   make test     lint, types, import rules and all tests that need no GPU
#   make bench    the figures of docs/benchmarks.md, measured on this machine
#   make bench-gpu  vlmq beside raw lmdeploy, on a machine with a GPU and vlmq[api,inference]
#   make lint     ruff, mypy --strict, import-linter
#   make lock     resolve the dependencies again and rewrite locks/
#   make clean    remove .venv and caches
#
# PYTHON      the interpreter to build .venv with (3.11 or 3.12); found by itself when not given.
# GPU_PYTHON  the interpreter of bench-gpu: whichever has lmdeploy (default: python3).
# TEST_JOBS   files of tests that run at once (default: 3; they wait more than they compute).
# ARGS        arguments of bench and bench-gpu: make bench-gpu ARGS="--quick --backends turbomind"
# TORCH_ARGS  more arguments for `pip install torch`. The default index may serve a CUDA build of
#             several gigabytes; PyTorch's own index has the small CPU build:
#               make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := api,cpu,parquet,training,dev
TORCH_ARGS ?=
GPU_PYTHON ?= python3
ARGS ?=
TEST_JOBS ?= 3
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# A name on PATH may be a shim that cannot run, so each candidate has to prove itself.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	"$$p" -c '$(FITS)' >/dev/null 2>&1 && command -v "$$p" && break; done)
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' locks/cpu.txt)
# As nodes do for what they start (workers/devices.py): the tests compute themselves, too.
PATIENT := GOMP_SPINCOUNT=5000
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" pyproject.toml

.PHONY: demo test bench bench-gpu lint lock clean
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/python -m cli.demo

test: lint
	@$(PATIENT) $(BIN)/python -m pytest -q -m "not gpu" -n $(TEST_JOBS) --dist loadfile

bench: $(READY)
	@$(BIN)/python -m benchmarks.run $(ARGS)

# Not in .venv, which has the CPU build of torch: lmdeploy cannot share an environment with it.
bench-gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu.run $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }
	@echo "lint: ruff, mypy --strict and import rules are clean"

lock: $(READY)
	@$(COMPILE) --extra api --extra cpu --extra parquet --extra training --extra dev -o locks/cpu.txt
	@$(COMPILE) --extra cpu --extra training -o locks/training.txt
	@$(COMPILE) --extra api --extra inference --extra parquet -o locks/inference.txt
	@wc -l locks/*.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml locks/cpu.txt
	@test -n "$(PYTHON)" || { echo "vlmq needs Python 3.11 or 3.12 with venv" \
		"(Debian: apt install python3 python3-venv), or say make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || { echo "set-up: $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "set-up: $(TORCH) (the largest download)"
	@# First and alone, so that nothing else may pull in another build of it.
	@$(PIP) install $(TORCH_ARGS) "$(TORCH)"
	@echo "set-up: vlmq[$(EXTRAS)] at the versions of locks/cpu.txt"
	@$(PIP) install -c locks/cpu.txt -e '.[$(EXTRAS)]'
	@touch $@
