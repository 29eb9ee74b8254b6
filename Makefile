# make setup   Debian packages, .venv, the kernels that guests boot (outside the tree, in ~/.cache/vmsup)
# make demo    a stock Debian kernel, every device in its own jail
# make debian  Debian's userland on a disk, with a network and a shared directory, as an ordinary user
# make test    everything; stock kernels boot in the testbed where this machine's /dev/kvm cannot
# make bench   what it costs, against C baselines and QEMU; raw data and a plot in build/
# make fuzz    the wire, the C core and the rings, FUZZ_S seconds each, from and into tests/regressions
# make clean   removes what was built in the tree, not the kernels

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# "compat" is a path; what pip does otherwise is a finder, which takes 20 ms of every start.
INSTALL := $(BIN)/pip install --quiet --config-settings editable_mode=compat --editable
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# To build: the C core and python-prctl.  pyseccomp loads libseccomp2.
PACKAGES := python3-venv python3-dev gcc libc6-dev libcap-dev libseccomp2
# For the testbed and its guests; lz4 unpacks the cloud kernel.
PACKAGES += qemu-system-x86 busybox-static lz4
# What guests' networks are made of: interfaces, a user's way out, a measure.
PACKAGES += iproute2 passt iperf3
# Independent readers of what tests make: iasl, dtc, qemu-img, e2fsck; lspci and fio run in guests.
PACKAGES += acpica-tools device-tree-compiler pciutils fio qemu-utils e2fsprogs

# libFuzzer, for `make fuzz` alone.
FUZZ_PACKAGES := clang-14 libclang-rt-14-dev
FUZZ_S ?= 600

.PHONY: setup demo debian test bench fuzz clean packages kernels

setup: $(BIN)/.ready kernels
	@$(BIN)/python -m compileall -q kvmcore devproc policies supervisor integration  # where PYTHONDONTWRITEBYTECODE is set

demo: setup
	$(BIN)/python integration/demo.py

debian: PACKAGES += mmdebstrap fakeroot uidmap
debian: setup
	$(BIN)/python integration/debian.py

# Two at a time; then the guests, which take turns in two machines of the testbed themselves.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not linux"; status=$$?; \
	$(BIN)/python -m pytest -m linux && exit $$status

bench: setup
	@mkdir -p build
	$(BIN)/python -m integration.bench --raw build/bench.json --plot build/bench.svg

fuzz: PACKAGES += $(FUZZ_PACKAGES)
fuzz: $(BIN)/.ready packages
	$(INSTALL) '.[fuzz]'
	$(BIN)/python -m integration.fuzz.run $(FUZZ_S)

clean:
	rm -rf $(VENV) build *.egg-info kvmcore/_core.*.so kvmcore/_core.*.o devproc/_*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/.ready: pyproject.toml setup.py kvmcore/_build.py kvmcore/_core.c kvmcore/_mailbox.h $(wildcard devproc/_*.[ch]) | packages
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	touch $@

packages:
	@missing=; for p in $(PACKAGES); do \
	    dpkg-query -W -f '$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || missing="$$missing $$p"; \
	done; \
	[ -z "$$missing" ] && exit; \
	echo "installing$$missing"; \
	{ $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; } || { \
	    echo "Please install these Debian packages:$$missing (or go on without them: make PACKAGES=)" >&2; exit 1; }

# apt's lists may be too old for the kernels it knows to be there still.  Without kernels, tests say so and skip.
kernels: $(BIN)/.ready
	@$(BIN)/python -m integration.boot.images || \
	    { $(SUDO) apt-get update -q && $(BIN)/python -m integration.boot.images; } || \
	    echo "No kernels to boot: going on without them." >&2
