# make reproduce [PROFILE=cpu]   install into .venv, run every notebook, write tables and figures
# make test                      all checks, in an environment of its own (build/test)
# make lint                      ruff on notebooks, tests and docs, without changing them
# make format                    ruff formats notebooks and tests; exports the library again
# make docs                      the documentation site, with the page of `make try` if it is there
# make test-lowest               inference tests with the lowest versions that pyproject.toml allows
# make test-demo                 tests of the two pages, with gradio and Chromium
# make try                       the page that upscales in the browser: build/try, for any web host
# make clean                     remove what tests and builds made; .venv and runs/ stay
PROFILE ?= cpu
VENV    ?= .venv
JOBS    ?= 2
PYTHON  ?= $(shell for p in python3.13 python3.12 python3.11 python3.14 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
SHELL   := /bin/sh
MAKEFLAGS += --no-print-directory
unexport PYTHONPATH
.PHONY: help reproduce lint format clean test test-install test-lint test-export test-notebooks \
	test-pytest test-wheel test-lowest test-demo try docs

help:
	@sed -n 's/^# make/make/p' Makefile

# $(call timed,heading,commands): heading, output, seconds; stops at the first failure
timed = @printf '\n== %s\n' '$(1)'; start=$$(date +%s); { $(2); } \
	&& printf '== %s: %s s\n' '$(1)' $$(($$(date +%s) - start))

# $(call venv,folder,options): a virtual environment, or what is missing for one
venv = { test -n '$(PYTHON)' || { echo 'no Python >= 3.11 with venv found:' \
	'apt install python3-venv, or give PYTHON=/path/to/python'; exit 1; }; } \
	&& { test -x $(1)/bin/python || '$(PYTHON)' -m venv $(2) $(1); }

# Variables, because a comma would end an argument of $(call).
EXTRAS = dev,metrics,plots,search,train
TESTED = $(EXTRAS),onnx,text
PIP    = -m pip install --quiet --disable-pip-version-check
# $(call install,python,extras): the project with the pinned versions. pyiqa brings two builds of
# OpenCV that overwrite each other; where the desktop build lacks its libraries, the other one goes
# on top.
install = $(1) $(PIP) -c constraints.txt -e '.[$(2)]' && { $(1) -c 'import cv2' 2>/dev/null \
	|| $(1) $(PIP) -c constraints.txt --no-deps --force-reinstall opencv-python-headless; }

# once, and again when the requirements change
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call timed,install,$(call venv,$(VENV)) \
	&& $(call install,$(VENV)/bin/python,$(EXTRAS)) && touch $@)

reproduce: $(VENV)/.installed
	@$(VENV)/bin/tocsr reproduce --profile $(PROFILE)

# $(call ruff,folder of the environment's programs)
ruff = $(1)/ruff format --check nbs tests docs && $(1)/ruff check nbs tests docs tocsr

lint: $(VENV)/.installed
	@$(call ruff,$(VENV)/bin)

format: $(VENV)/.installed
	@$(VENV)/bin/ruff check --fix nbs tests docs; $(VENV)/bin/ruff format nbs tests docs
	@$(VENV)/bin/nbdev_export && $(VENV)/bin/nbdev_clean

try: $(VENV)/.installed
	@$(call install,$(VENV)/bin/python,onnx) && mkdir -p build \
	&& $(VENV)/bin/tocsr export web build/try --overwrite

# Everything below happens in build/: environments, a run store and copies of its own.
T    := $(CURDIR)/build/test
PY    = $(T)/venv/bin/python
ENV   = PATH=$(T)/venv/bin:$$PATH TOCSR_RUNS=$(T)/runs TOCSR_PROFILE=smoke MPLBACKEND=agg \
	OMP_NUM_THREADS=1

test: test-install test-lint test-export test-notebooks test-pytest test-wheel
	@printf '\nall tests passed\n'

test-install:
	$(call timed,clean environment,rm -rf $(T) && mkdir -p $(T) && $(call venv,$(T)/venv) \
	&& $(call install,$(PY),$(TESTED)))

test-lint:
	$(call timed,lint,$(call ruff,$(T)/venv/bin))

test-export: COPY = $(T)/export
test-export:
	$(call timed,export and clean leave no difference,mkdir -p $(COPY) \
	&& cp -r nbs tocsr settings.ini pyproject.toml $(COPY) \
	&& (cd $(COPY) && $(ENV) nbdev_export && $(ENV) nbdev_clean) \
	&& for d in nbs tocsr; do \
	diff -r -x __pycache__ -x .ipynb_checkpoints $$d $(COPY)/$$d || exit 1; done)

test-notebooks:
	$(call timed,notebooks,$(ENV) $(T)/venv/bin/nbdev_test --n_workers $(JOBS) --timing)

# Times are measured by themselves, after the rest.
test-pytest: PYTEST = $(ENV) $(PY) -m pytest -p no:cacheprovider --durations 5
test-pytest:
	$(call timed,pytest,$(PYTEST) -n $(JOBS) --dist loadfile --ignore tests/bench && \
	$(PYTEST) tests/bench)

# The wheel in an environment that holds the core dependencies and nothing else.
test-wheel: WHEEL = $(T)/wheel/bin/python
test-wheel:
	$(call timed,wheel,rm -rf $(T)/wheel $(T)/dist && $(call venv,$(T)/wheel,--without-pip) \
	&& $(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(T)/dist . \
	&& rm -rf build/lib build/bdist.* && $(PY) tests/slim_environment.py $(WHEEL) \
	&& $(PY) -m pip --python $(WHEEL) install --quiet --no-deps --no-index $(T)/dist/*.whl \
	&& $(PY) -m pip --python $(WHEEL) check && cp tests/installed.py $(T)/dist \
	&& (cd $(T)/dist && $(WHEEL) installed.py))

# gradio requires an older Pillow than constraints.txt pins: both go into an environment of their own
# that sees the packages of the first one.
D    := $(CURDIR)/build/demo
test-demo: SITE = import sysconfig; print(sysconfig.get_path("purelib"))
test-demo:
	$(call timed,demo,{ test -x $(PY) || $(MAKE) test-install; } && mkdir -p $(D) \
	&& $(call venv,$(D)/venv) \
	&& $(PY) -c '$(SITE)' > $$($(D)/venv/bin/python -c '$(SITE)')/tested.pth \
	&& grep -v -i '^pillow==' constraints.txt > $(D)/constraints.txt \
	&& $(D)/venv/bin/python $(PIP) -c $(D)/constraints.txt -e '.[demo]' \
	&& $(ENV) TOCSR_RUNS=$(D)/runs $(D)/venv/bin/python -m pytest -p no:cacheprovider \
	tests/test_demo.py tests/test_web_page.py)

L    := $(CURDIR)/build/lowest
test-lowest:
	$(call timed,lowest versions,mkdir -p $(L) && $(call venv,$(L)/venv) \
	&& $(L)/venv/bin/python tests/lowest_bounds.py > $(L)/constraints.txt \
	&& $(L)/venv/bin/python $(PIP) -c $(L)/constraints.txt -e . pytest \
	&& TOCSR_RUNS=$(L)/runs $(L)/venv/bin/python -m pytest -p no:cacheprovider \
	tests/test_pipeline.py tests/test_upscale.py)

# A site of the notebooks as committed and of docstrings: it needs none of the library's requirements,
# so its environment holds the extra `docs` alone. Warnings, such as of a broken link, are errors.
# Where `make try` has written its page, the site contains it and links to it.
S      := $(CURDIR)/build/docs-venv
SPHINX  = $(S)/bin/python -m sphinx -q -W --keep-going -j $(JOBS) -c docs
DOCS    = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["optional-dependencies"]["docs"])
docs:
	$(call timed,docs,$(call venv,$(S)) \
	&& $(S)/bin/python $(PIP) -c constraints.txt $$($(S)/bin/python -c '$(DOCS)') \
	&& $(S)/bin/python docs/pages.py build/docs-source \
	&& $(SPHINX) -d build/docs-cache build/docs-source build/docs && rm -rf build/docs/try \
	&& { ! test -f build/try/index.html || cp -r build/try build/docs/try; })

clean:
	rm -rf build dist *.egg-info .ruff_cache .pytest_cache _docs _proc
