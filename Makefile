# sRPC. `make demo` and `make test` need nothing but a clone: the virtual environment is made here, with Debian's Python.
# As root both work in namespaces of their own with throwaway users; as an ordinary user they do what they can.

# The system's interpreter, and not what PATH says: gates and workers run it as other users, who could not reach one in
# somebody's home.
PYTHON := /usr/bin/python3
VENV := .venv
RUN := $(VENV)/bin/python
MADE := $(VENV)/.made
# The product's module, and those of the example and of the tests, which the virtual machine loads besides.
POLICY := policy/srpc.pp policy/payroll.pp policy/srpctest.pp
DEB := dist/srpc_$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)_$(shell dpkg --print-architecture).deb

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

.PHONY: help demo test test-vm test-vm-whole lint bench deb clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a daemon with throwaway users on loopback, shown at work"
	@echo "make test    all tests; what can't be done here is named at the end"
	@echo "make test-vm the package in a virtual machine: systemd, SELinux enforcing; as root only"
	@echo "make test-vm-whole  the same, and all of the functional suite that can run in there"
	@echo "make lint    ruff and mypy --strict"
	@echo "make bench   sRPC beside its peers, about a quarter of an hour; writes docs/performance.md (BENCH=--quick: just a look)"
	@echo "make deb     a Debian package, in dist/"
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

# The compiler is for a PAM module that asks several questions, strace for the cost of a call; without them those tests
# are left out.
test: $(MADE)
	@$(call apt,command -v gcc || command -v cc,gcc) || true
	@$(call apt,command -v strace,strace) || true
	@$(RUN) -m pytest

# The image, and what is needed for it, is kept in .vm by the hash of what it is made from.
test-vm test-vm-whole: $(MADE) deb $(POLICY)
	@$(call apt,command -v mmdebstrap && command -v qemu-system-x86_64 && command -v qemu-img && command -v mke2fs \
		&& command -v ssh,mmdebstrap qemu-system-x86 qemu-utils e2fsprogs openssh-client)
	@$(RUN) -m tests.vm test $(if $(filter test-vm-whole,$@),--all)

lint: $(MADE)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

BENCH := --write

# Compilers and gRPC's libraries are for the peers in C and C++, strace and perf for the profile; each is left out without.
bench: $(VENV)/.bench
	@$(call apt,command -v gcc && command -v g++,gcc g++ libc6-dev) || true
	@$(call apt,command -v grpc_cpp_plugin && ls /usr/include/grpcpp/grpcpp.h /usr/include/google/protobuf/message.h,\
		libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc) || true
	@$(call apt,command -v strace && command -v perf,strace linux-perf) || true
	@$(RUN) -m bench $(BENCH)

$(POLICY): $(wildcard policy/srpc.[fit]? policy/examples/*/*.?? policy/tests/*) policy/Makefile
	@$(call apt,test -f /usr/share/selinux/devel/Makefile,selinux-policy-dev)
	$(MAKE) -C policy $(notdir $@)

# build/deb keeps the libraries that are fetched for the package, by the hash of what names them.
DEB_SOURCES := $(shell find srpcd srpc_client systemd docs policy/examples README.md CHANGELOG.md -type f -not -path '*/__pycache__/*')
$(DEB): $(DEB_SOURCES) pyproject.toml policy/srpc.pp policy/srpc.if
	@$(call apt,$(PYTHON) -c "import ensurepip",python3-venv)
	$(PYTHON) -I systemd/debian/build.py build/deb $@

deb: $(DEB)
	@echo $(DEB)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .vm build dist policy/tmp policy/*.pp *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
