# `make demo` and `make test` are the two commands a newcomer needs. Both make .venv from the
# project's files when it is missing or outdated. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
MIN := .venv-min
# An active environment or PYTHONPATH must not get in the way.
RUN := env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV
FAST := -m "not slow and not gpu"
# Two processes of one thread each are faster than one of two; whole files stay in one process, which
# keeps what their tests share; tests/conftest.py puts the long ones first.
JOBS ?= 2
PYTEST = env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV OMP_NUM_THREADS=1 \
  $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
FULL_LOG := benchmarks/results/test-full.log
MIN_LOG := benchmarks/results/test-min.log
FAULTS := tests/data $(addprefix tests/,$(addsuffix .py,artifact/test_artifact \
  artifact/test_graph_json artifact/test_output clip/test_weights))

.PHONY: demo docs test faults check lint types layering test-full test-min bench environment clean
.NOTPARALLEL:

demo: environment
	@$(RUN) $(VENV)/bin/qwt-fx demo --output qwt-fx-demo

# The fast tier holds the layering too.
test: lint types
	@echo "== tests: fast tier"
	@$(call PYTEST,$(VENV)) $(FAST)

# What could go wrong, every tier (docs/reliability.md).
faults: environment
	@echo "== tests: faults"
	@$(call PYTEST,$(VENV)) -m "not gpu" --durations=10 tests/faults $(FAULTS)

check: lint types layering

lint: environment
	@echo "== ruff"
	@$(RUN) $(VENV)/bin/ruff check --quiet .
	@$(RUN) $(VENV)/bin/ruff format --quiet --diff .

# mypy cannot find packages mapped by package_dir: it checks a copy laid out as they are installed.
types: environment
	@echo "== mypy"
	@rm -rf build/types && mkdir -p build/types
	@cp -r qwt_fx passes backends build/types && mv build/types/passes build/types/backends build/types/qwt_fx
	@cd build/types && $(RUN) MYPYPATH=. ../../$(VENV)/bin/mypy --no-error-summary \
	  --config-file ../../setup.cfg --cache-dir ../../.mypy_cache -p qwt_fx

layering: environment
	@echo "== layering"
	@$(RUN) $(VENV)/bin/python -m pytest tests/test_layering.py

# Every tier. The log is kept in the repository.
test-full: check
	@echo "== tests: every tier"
	@mkdir -p $(dir $(FULL_LOG))
	@$(call PYTEST,$(VENV)) -rs --durations=15 > $(FULL_LOG) 2>&1; \
	  status=$$?; tail -n 40 $(FULL_LOG); exit $$status

# The oldest supported versions, in an environment of their own. The log is kept too.
test-min:
	@PYTHON="$(PYTHON)" bash scripts/environment.sh $(MIN) scripts/constraints-min.txt
	@echo "== tests: fast tier, oldest versions"
	@mkdir -p $(dir $(MIN_LOG))
	@$(call PYTEST,$(MIN)) $(FAST) -rs > $(MIN_LOG) 2>&1; \
	  status=$$?; tail -n 40 $(MIN_LOG); exit $$status

bench: environment
	@for script in $(filter-out benchmarks/common.py benchmarks/rivals.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(RUN) $(VENV)/bin/python "$$script" || exit 1; done

# Into build/docs, links checked, no network: only the extra is installed, once.
docs: environment
	@$(RUN) $(VENV)/bin/python -c "import furo, myst_parser, sphinx" 2> /dev/null || \
	  $(RUN) $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	  --no-build-isolation --editable '.[docs]'
	@echo "== links"
	@$(RUN) $(VENV)/bin/python docs/check_links.py
	@echo "== pages"
	@$(RUN) $(VENV)/bin/python -m sphinx -q -W --keep-going -E -b html -d build/doctrees docs build/docs
	@echo "== links of the built pages"
	@$(RUN) $(VENV)/bin/python docs/check_links.py build/docs
	@echo "build/docs/index.html"

environment:
	@PYTHON="$(PYTHON)" bash scripts/environment.sh $(VENV) constraints.txt

clean:
	rm -rf $(VENV) $(MIN) build qwt-fx-demo
