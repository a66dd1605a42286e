# sRPC. `make demo` and `make test` need nothing but a clone: the virtual environment is made here, with Debian's Python.
# As root both work in a private mount namespace with throwaway users; as an ordinary user they do what they can.

# The system's interpreter, and not what PATH says: gates and workers run it as other users, who could not reach one in
# somebody's home.
PYTHON := /usr/bin/python3
VENV := .venv
RUN := $(VENV)/bin/python
MADE := $(VENV)/.made

# $(call apt,COMMAND THAT SUCCEEDS IF IT IS THERE,PACKAGES): as root they are installed, others are told what to ask for.
apt = if ! ( $(1) ) >/dev/null 2>&1; then \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing $(2)"; \
		DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(2) >/dev/null; \
	else \
		echo "$(2) is missing: as root, run 'apt-get install $(2)', then this again" >&2; false; \
	fi; \
fi

.PHONY: help demo test lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a daemon with throwaway users on loopback, shown at work"
	@echo "make test    all tests; what can't be done here is named at the end"
	@echo "make lint    ruff and mypy --strict"
	@echo "make bench   echo calls beside grpcio's"
	@echo "make clean   removes the virtual environment and all caches"

# umask: other users' processes read the packages. No cache: nothing is left outside the checkout.
$(MADE): pyproject.toml
	@$(call apt,$(PYTHON) -c "import ensurepip",python3-venv)
	umask 022 && $(PYTHON) -m venv $(VENV)
	umask 022 && $(RUN) -m pip install --quiet --no-cache-dir --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(MADE)
	umask 022 && $(RUN) -m pip install --quiet --no-cache-dir --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

demo: $(MADE)
	@$(RUN) -m docs.demo

# The compiler is for a PAM module that asks several questions; without one that test is left out.
test: $(MADE)
	@$(call apt,command -v gcc || command -v cc,gcc) || true
	@$(RUN) -m pytest

lint: $(MADE)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

bench: $(VENV)/.bench
	@$(RUN) -m bench

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
