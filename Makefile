# make reproduce [PROFILE=cpu]   environment, every notebook, every table and figure
# make test                      all checks, from a clean environment
PROFILE ?= cpu
VENV    ?= .venv
PYTHON  ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
SHELL   := /bin/sh
MAKEFLAGS += --no-print-directory
.PHONY: help reproduce test clean test-install test-export test-notebooks test-pytest test-wheel

help:
	@sed -n 's/^# make/make/p' Makefile

# $(call timed,heading,commands): heading, output, seconds; stops at the first failure
timed = @printf '\n== %s\n' '$(1)'; start=$$(date +%s); { $(2); } && printf '== %s: %s s\n' '$(1)' $$(($$(date +%s) - start))

# $(call venv,folder): a virtual environment, or what is missing for one
venv = { test -n '$(PYTHON)' || { echo 'no Python 3.11-3.13 with venv found: apt install python3-venv, or give PYTHON=/path/to/python'; exit 1; }; } \
	&& { test -x $(1)/bin/python || '$(PYTHON)' -m venv $(1); }
# what notebooks and tests need; a variable, for a comma would end an argument of $(call)
EXTRAS = dev,metrics,search
TESTED = $(EXTRAS),onnx
PIP     = -m pip install --quiet --disable-pip-version-check -c constraints.txt
# $(call install,python,extras): the project, then once more OpenCV's headless build, over which facexlib (of pyiqa) lays the desktop's, which wants X libraries
install = $(1) $(PIP) -e '.[$(2)]' && $(1) $(PIP) --no-deps --force-reinstall opencv-python-headless

# once, and again when the requirements change
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call timed,install,$(call venv,$(VENV)) && $(call install,$(VENV)/bin/python,$(EXTRAS)) && touch $@)

reproduce: $(VENV)/.installed
	@$(VENV)/bin/tocsr reproduce --profile $(PROFILE)

# Everything below happens in build/test: an environment, a run store and copies of its own.
T      := $(CURDIR)/build/test
PY      = $(T)/venv/bin/python
SITE    = $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
ENV     = PATH=$(T)/venv/bin:$$PATH TOCSR_RUNS=$(T)/runs TOCSR_PROFILE=smoke MPLBACKEND=agg OMP_NUM_THREADS=1

test: test-install test-export test-notebooks test-pytest test-wheel
	@printf '\nall tests passed\n'

test-install:
	$(call timed,clean environment,rm -rf $(T) && mkdir -p $(T) && $(call venv,$(T)/venv) && $(call install,$(PY),$(TESTED)))

test-export: COPY = $(T)/export
test-export:
	$(call timed,export and clean leave no difference,mkdir -p $(COPY) && cp -r nbs tocsr settings.ini pyproject.toml $(COPY) \
	&& (cd $(COPY) && $(ENV) nbdev_export && $(ENV) nbdev_clean) && for d in nbs tocsr; do diff -r -x __pycache__ -x .ipynb_checkpoints $$d $(COPY)/$$d || exit 1; done)

test-notebooks:
	$(call timed,notebooks,$(ENV) $(T)/venv/bin/nbdev_test --n_workers 2 --timing)

test-pytest:
	$(call timed,pytest,$(ENV) $(PY) -m pytest -p no:cacheprovider --durations 5)

# The wheel in an environment of its own; the other one's libraries are lent by a .pth file, so that torch is not installed twice.
test-wheel:
	$(call timed,wheel,$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(T)/dist . && rm -rf build/lib build/bdist.* \
	&& $(call venv,$(T)/wheel) && echo $(SITE) > $$($(T)/wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth \
	&& $(T)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(T)/dist/tocsr-*.whl \
	&& away=$$(mktemp -d) && cp tests/installed.py $$away && cd $$away && $(ENV) $(T)/wheel/bin/python installed.py && rm -r $$away)

clean:
	rm -rf build dist *.egg-info
