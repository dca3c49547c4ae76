# The first target that needs the environment creates it in .venv; later ones find it ready.
# Another Python for the environment: make PYTHON=python3.12 lab
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help lab test demo notebooks package check
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

lab: $(VENV)/.ready ## open the first lesson in JupyterLab
	$(PY) -m jupyterlab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

# Two files at a time, each on one thread: on two cores that is faster than one file on both.
test: $(VENV)/.ready ## run the unit tests and every notebook
	OMP_NUM_THREADS=1 $(PY) -m pytest tests notebooks -n 2 --dist loadfile --nbval --nbval-current-env \
		--nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600

demo: $(VENV)/.ready ## draw digits from prompts with the shipped weights into demo.png
	$(PY) -m minildm demo

notebooks: $(VENV)/.ready ## execute every notebook and store its outputs
	$(PY) tools/run_notebooks.py

package: $(VENV)/.ready ## write minildm/ from the notebooks
	$(PY) tools/export.py

check: $(VENV)/.ready-dev ## lint, check the format, and compare minildm/ with the notebooks
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) tools/export.py --check

# An environment is marked unfinished until its last package is in: one that was interrupted is made anew.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'minildm needs Python 3.11 or newer: name one, as in "make PYTHON=python3.12 test".' >&2; exit 1; }
	@if [ -e $(VENV)/.unfinished ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.unfinished
	@echo 'Setting up $(VENV): this happens once and takes a few minutes.'
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[lab,test]'
	@mv $(VENV)/.unfinished $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(PIP) --editable '.[dev]'
	@touch $@
