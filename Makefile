# make demo   the main job: adapt an encoder to cameras it has never seen, without labels (about ten minutes on two cores)
# make test   every notebook and every test
# make notebooks   restart-and-run-all of every notebook, keeping the outputs; then README.md
# make check  the notebooks are clean, hcd_nb/ is exactly what they export, pages of records say what they said, README.md is their front page

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
SEED ?= 0

.PHONY: demo test notebooks readme check slow clean
demo: .venv/ready
	$(BIN)/hcd_train --preset demo --method hcd --source pedestrians/source --target pedestrians/target --seed $(SEED) --out $(RUN)

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

slow: .venv/ready
	$(BIN)/python -m pytest --slow tests

notebooks: .venv/ready
	$(BIN)/nbdev-export
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/*.ipynb
	$(BIN)/nbdev-clean
	$(MAKE) --silent --no-print-directory readme > README.md

# The front page as text: pictures and notebooks are found from the top of the repository.
readme:
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --no-input --stdout nbs/index.ipynb | sed -E -e 's#\(\.\./data/#(data/#g' -e 's#\(([0-9]{2}_[a-z0-9_]+\.ipynb)\)#(nbs/\1)#g'

check: .venv/ready
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	git diff --exit-code -- nbs hcd_nb
	$(BIN)/python -m pytest -n 2 --dist worksteal -m records tests

clean:
	rm -rf .venv build dist *.egg-info

# uv installs the same packages in a quarter of the time; where it cannot, pip does.
.venv/ready: settings.ini setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.10 or newer, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: install a newer one, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "the Python module venv is missing: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]' || $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
