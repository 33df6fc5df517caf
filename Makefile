# Every target builds .venv first if it is missing or older than what defines it.

.PHONY: install demo test check evidence evidence-training evidence-trust evidence-runtimes \
	evidence-firmware pi-check \
	bench zoo screenshots fuzz docs lock sbom clean
.DEFAULT_GOAL := test

BIN := .venv/bin
STAMP := .venv/installed
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Each writes sections of docs/results/trust.md.
TRUST := tests/evidence/test_trust.py tests/evidence/test_installed.py

# tflite-runtime ends with Python 3.11, so that one is tried first. Override with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

ifeq ($(CACTUS_EDGE_DATA),)
ifneq ($(wildcard ../shared/data),)
export CACTUS_EDGE_DATA := $(abspath ../shared/data)
endif
endif

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/install_torch.py
	@test -n "$(PYTHON)" || { echo "cactus-edge needs Python 3.11 or newer with the venv module;\
	 found `python3 --version 2>&1`. Install it (Debian: python3.11 python3.11-venv) or run\
	 make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing every extra into .venv, once: about 3 GB, some minutes"
	$(BIN)/python tools/install_torch.py
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

demo: $(STAMP)
	$(BIN)/cactus-edge demo --output build/demo --force

# Bytecode is kept, whatever the environment says: some hundred processes import the package.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal --benchmark-disable

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	@mkdir -p build
	$(BIN)/cactus-edge supported-ops --write build/operators.md --force
	diff -u docs/operators.md build/operators.md
	$(MKDOCS)

evidence: $(STAMP)
	$(BIN)/pytest -m evidence -s --ignore tests/evidence/test_training.py \
		$(addprefix --ignore ,$(TRUST)) \
		--ignore tests/evidence/test_runtimes.py

# Hours; CACTUS_EDGE_SEEDS=0 trains one seed of three.
evidence-training: $(STAMP)
	$(BIN)/pytest -m evidence -s tests/evidence/test_training.py

# Kills, faults, changed bytes, endurance, the same bytes on an emulated Arm, installed wheels, and
# fuzzing long enough for ten million executions, hours of it.
evidence-trust: $(STAMP)
	$(BIN)/pytest -m evidence -s -rs $(TRUST)
	CACTUS_EDGE_FUZZ_SECONDS=$${CACTUS_EDGE_FUZZ_SECONDS:-300} $(MAKE) fuzz

# Models, versions of runtimes, modes and emulated processors; goes on where it was stopped.
evidence-runtimes: $(STAMP)
	$(BIN)/pytest -m evidence -s tests/evidence/test_runtimes.py

# Generated firmware on emulated boards: instructions, sizes, verdicts, faults.
evidence-firmware: $(STAMP)
	$(BIN)/pytest -m evidence -s tests/evidence/test_firmware.py

# The models of the repository on emulated CPUs of Raspberry Pis, bit for bit.
pi-check: $(STAMP)
	$(BIN)/pytest -m evidence -s -rs tests/evidence/test_raspberry_pi.py

bench: $(STAMP)
	$(BIN)/pytest -m evidence -s tests/evidence/test_performance.py

# The models of the repository; under an hour on two cores.
zoo: $(STAMP)
	$(BIN)/python tools/zoo.py

# The dependencies of a release with their hashes, and its bill of materials.
lock sbom: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[release]'
	$(BIN)/python tools/release.py $@

# The pictures of docs/report.md; needs a Chromium (Debian: apt-get install chromium).
screenshots: $(STAMP)
	$(BIN)/pytest -m evidence -s tests/evidence/test_report.py

# Coverage-guided; CACTUS_EDGE_FUZZ_SECONDS for each target.
fuzz: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz

# The documentation as a site in build/site; no page of it needs a network.
docs: $(STAMP)
	$(BIN)/cactus-edge supported-ops --write docs/operators.md --force
	$(BIN)/python tools/picture.py
	$(MKDOCS)
	@echo "python3 -m http.server --bind 127.0.0.1 --directory build/site   shows it"

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find cactus_edge firmware_sim tests tools -name __pycache__ -prune -exec rm -rf {} +
