# make demo   compress the model that the project ships and print what became of it
# make test   lint and the test suite, as CI runs them;  make test-slow adds the slow tests
# make families   every Mixture-of-Experts family of transformers through the toolkit (within the
#                 hour on two cores), and docs/families.md, which says what works
# make docs   the documentation as a site, in build/site;  make docs-serve shows it while it is edited
# make lint, make format, make hooks, make clean
#
# The first target that needs one makes a virtual environment in $(VENV) with the versions of
# constraints.txt, and refreshes it when pyproject.toml or constraints.txt change.
# Another interpreter: make demo PYTHON=python3.12. An environment of your own: make test VENV=path

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# Plain lines are enough for a log, and a version check on every call is noise. Compiled once here,
# libraries start in a second where they would take seven in an environment that keeps no bytecode.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --compile -q

.PHONY: demo test test-slow families docs docs-serve lint format hooks clean
.DELETE_ON_ERROR:

# One stamp per set of extras. It is written last, so a set-up that was interrupted is taken up
# again; an environment left without pip by such an interruption is made anew.
# torch comes first and by itself: under the constraint pip takes the build that the machine's
# package index offers for it (a CPU one where there is one) and later requirements find it there.
define install
@echo "Installing mctk[$(1)] into $(VENV) (a few minutes the first time)"
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
@$(PIP) -c constraints.txt torch
@$(PIP) -c constraints.txt -e ".[$(1)]"
@touch $@
endef

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,eval$(comma)figures)

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,test$(comma)dev)

comma := ,

# Original and compressed at 20, 40 and 60 % of the experts' parameters removed, side by side. One
# thread: the demo's matrices are too small for more. What is finished already is not run again.
demo: export OMP_NUM_THREADS = 1
demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.demo
	@set -e; run=0; for method in d2moe svdllm svd; do for remove in 0.2 0.4 0.6; do \
		run=$$((run + 1)); echo "Run $$run of 9: $$method, $$remove of the experts removed"; \
		$(BIN)/mctk run recipes/$${method}_demo.yaml --set budget.remove=$$remove \
			--output runs/demo/$$method-$$remove >/dev/null; \
	done; done
	@$(BIN)/mctk report runs/demo/*

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A process for each core, one thread each: the tests' matrices are too small for more.
test test-slow: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -q -n logical --dist loadfile

test-slow: lint
	$(BIN)/python -m pytest -q -n logical --dist loadfile --slow

families: $(VENV)/.test
	$(BIN)/python -m tests.families

# What mkdocs prints of its successor is no matter of the pages.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.test
	$(BIN)/python -m mkdocs build

docs-serve: $(VENV)/.test
	$(BIN)/python -m mkdocs serve

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

hooks: $(VENV)/.test
	$(BIN)/pre-commit install

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info runs/demo
	find toolkit plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
