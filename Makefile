# Every target works in .venv, which is built from requirements.lock (exact versions).
SHELL    := /bin/bash
# The newest Python that runs here; one lock holds for all of them.
PYTHON   ?= $(shell for v in 3.14 3.13 3.12 3.11; do python$$v -c "" 2>/dev/null && command -v python$$v && break; done)
BIN      := .venv/bin
STAMP    := .venv/installed
RUN      ?= runs/demo
SITE     := _docs

# Threads that wait for others spin for a short time only: with other work, they take its cores.
export GOMP_SPINCOUNT ?= 2000

.PHONY: help install demo test bench docs pdf lab readme pages export sample encoder clean
.DEFAULT_GOAL := help

help: ## what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): requirements.lock settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "av1nb needs Python 3.11 to 3.14, and none is on the PATH: install one, or name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { echo "$(PYTHON) is not Python 3.11 to 3.14: name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	mkdir -p runs  # papermill writes its notebooks there, and makes no folder
	touch $@

install: $(STAMP) ## install the locked packages and av1nb into .venv

demo: $(STAMP) ## train and evaluate every stage on the shipped sample (about ten minutes on two cores)
	$(BIN)/av1nb demo --run-dir $(RUN)

test: $(STAMP) ## every notebook's assertions, then the tests of whole runs
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

bench: $(STAMP) ## run the benchmark notebooks and collect their ratios in one file
	$(BIN)/av1nb bench --run-dir runs/bench

# The notebooks as nbdev prepares them for a site, in _proc; and that site as smalldocs renders it.
PREPARE := $(BIN)/python -c "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
define RENDER
sed -i '/^bibliography:\|^link-citations:/d' _proc/_quarto.yml && \
  find _proc -name '*.ipynb' -exec sed -i '/"output-file: .*\\n",/d' {} + && \
  $(BIN)/python -c "from av1nb import pages; pages.resolve_citations('_proc')" && \
  $(BIN)/smalldocs render _proc --quiet
endef

docs: $(STAMP) ## render the site to _docs/ (Quarto where installed, else smalldocs)
	$(PREPARE)
	if command -v quarto >/dev/null; then quarto render _proc --no-cache; else $(RENDER); fi
	rm -rf $(SITE) && mv _proc/$(SITE) $(SITE)
	@echo "The site is in $(SITE)/index.html"

pdf: $(STAMP) ## print the whole site into _book/av1nb.pdf (some minutes; needs the system library Pango)
	$(PREPARE)
	$(RENDER)
	$(BIN)/python -c "from av1nb import pages; print(pages.print_site('_proc/$(SITE)', '_quarto.yml', 'nbs/book.css', '_book/av1nb.pdf', pages.edition()), 'pages')"
	@echo "The book is _book/av1nb.pdf"

lab: $(STAMP) ## open the notebooks in JupyterLab (LAB="…": its own options, such as --no-browser, or --allow-root in a container)
	$(BIN)/jupyter lab nbs $(LAB)

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout --TagRemovePreprocessor.enabled=True nbs/index.ipynb | sed -E 's#\]\((images/|[a-z0-9_/]+\.ipynb)#](nbs/\1#g' > README.md.part
	mv README.md.part README.md

pages: $(STAMP) ## store the outputs of the runs (RUN=$(RUN) for 000 to 009, runs/joint and runs/build for the others) in the stage notebooks, for the site
	$(BIN)/python -c "from av1nb import runs; runs.publish_pages('$(RUN)')"
	$(BIN)/nbdev_clean

export: $(STAMP) ## write av1nb/ from the notebooks, clean the notebooks
	$(BIN)/nbdev_export
	rm -f pyproject.toml  # nbdev adds one; here setup.py holds the metadata
	$(BIN)/nbdev_clean

sample: $(STAMP) ## rebuild the shipped sample from its sources (needs the package index; about half an hour)
	$(BIN)/av1nb run build_sample --run-dir runs/build

encoder: $(STAMP) ## build libaom with the partition hook into the cache (SOURCE=folder that holds its tarball, else apt-get fetches it; STOCK=1: without the hook, to compare with)
	$(BIN)/python libaom/build.py $(if $(STOCK),--stock) $(if $(SOURCE),--source "$(SOURCE)")

clean: ## remove what can be rebuilt, keep runs/ and .venv
	rm -rf _docs _proc _book build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
