"""`pytest --slow` also runs what takes minutes; `--cuda` what needs a GPU."""
import os

os.environ.setdefault("MPLBACKEND", "agg")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the notebook cells and tests that take minutes")
    parser.addoption("--cuda", action="store_true", help="also run the notebook cells that need a GPU")
