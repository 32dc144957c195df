# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test install clean

demo: $(VENV)/.runtime  ## start a local cluster, ask one question without a picture and one about a picture, stop it
	@$(VENV)/bin/python examples/04_images.py

test: $(VENV)/.dev  ## everything that CI checks
	@$(VENV)/bin/python scripts/check.py

$(VENV)/.runtime: pyproject.toml constraints.txt scripts/setup.py
	@$(PYTHON) scripts/setup.py $(VENV) runtime

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.py
	@$(PYTHON) scripts/setup.py $(VENV) dev

install: $(VENV)/.runtime  ## only install

clean:  ## remove what `make` installed here
	rm -rf $(VENV)
