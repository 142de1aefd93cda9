# `make demo` and `make test` are the two commands a newcomer needs; both make the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV
SLOW_LOG := benchmarks/results/test-full.log

.PHONY: demo test check lint types test-full test-min bench clean

demo: environment
	@$(RUN) $(BIN)/qwt-fx demo

test: check
	@echo "== tests (fast tier)"
	@$(RUN) $(BIN)/python -m pytest -m "not slow and not gpu"

check: environment lint types
	@echo "== layering"
	@$(RUN) $(BIN)/python -m pytest tests/test_layering.py

lint:
	@echo "== ruff"
	@$(RUN) $(BIN)/ruff check .
	@$(RUN) $(BIN)/ruff format --check .

# mypy cannot see packages mapped by package_dir in an editable install: it checks an installed tree.
types:
	@echo "== mypy"
	@rm -rf build/types build/lib
	@$(RUN) $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/types . \
	  > build/types.log 2>&1 || { cat build/types.log; exit 1; }
	@cd build/types && $(RUN) MYPYPATH=. ../../$(BIN)/mypy --config-file ../../setup.cfg -p qwt_fx

test-full: check
	@echo "== tests (every tier)"
	@mkdir -p $(dir $(SLOW_LOG))
	@$(RUN) $(BIN)/python -m pytest -rs --durations=15 > $(SLOW_LOG) 2>&1; \
	  status=$$?; tail -n 40 $(SLOW_LOG); exit $$status

test-min:
	@$(RUN) PYTHON=$(PYTHON) bash scripts/environment.sh .venv-min scripts/constraints-min.txt
	@$(RUN) .venv-min/bin/python -m pytest -m "not slow and not gpu"

bench: environment
	@for script in benchmarks/*.py; do $(RUN) $(BIN)/python $$script || exit 1; done

.PHONY: environment
environment:
	@$(RUN) PYTHON=$(PYTHON) bash scripts/environment.sh $(VENV) constraints.txt

clean:
	rm -rf $(VENV) .venv-min build qwt-fx-demo
