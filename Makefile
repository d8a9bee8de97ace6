# Five words: install, check, test, bench, notebooks. PYTHON is the interpreter of your environment.
PYTHON ?= python

.PHONY: install check test bench notebooks
install:
	$(PYTHON) -m pip install -c constraints.txt -e '.[test]'
check:
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy
test:
	$(PYTHON) -m pytest -n auto --dist loadfile
bench:
	$(PYTHON) -m bench
notebooks:
	$(PYTHON) -m tests.notebooks
