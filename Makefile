# Two commands do all the set-up: `make demo` runs RLHF on a real model and real ratings, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# d3rlpy asks for an old Gymnasium but runs with this one (examples/d3rlpy_cql.py): pip is not asked what it wants.
D3RLPY := d3rlpy gym gym-notices
# PyTorch for a GPU brings its own Triton. Without a GPU this one's interpreter runs the kernels in the tests.
TRITON := triton==3.9.0
SETUP := pyproject.toml constraints.txt

.PHONY: demo test lint types wheel clean

demo: $(VENV)/rlhf.done
	$(BIN)/textrl rlhf $(ARGS)

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.done
	$(BIN)/mypy

# The built wheel in an environment of its own, without extras, under the tests that a file, an entry point or a
# dependency left out of it would fail.
WHEEL_TESTS := test_imports.py test_envs_conformance.py test_cli.py test_plugins.py test_report.py test_render.py
wheel: $(VENV)/test.done
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)-wheel/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		dist/*.whl pytest pytest-xdist
	cd tests && ../$(VENV)-wheel/bin/python -P -m pytest -n auto -c ../pyproject.toml --rootdir=. -m "not slow" $(WHEEL_TESTS)

# torch first and by version: a ready CPU build is taken where one is offered.
$(VENV)/base.done: $(SETUP)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/rlhf.done: $(VENV)/base.done
	$(PIP) --editable ".[rlhf]"
	touch $@

$(VENV)/test.done: $(VENV)/base.done
	$(PIP) --editable ".[test]"
	$(PIP) colorama dataclasses-json scikit-learn structlog
	$(PIP) --no-deps $(D3RLPY)
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps $(TRITON)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel build dist
