"""`pytest --slow` also runs what takes minutes; `--cuda` what needs a GPU."""
import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")    # two workers share two cores


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the notebook cells and tests that take minutes")
    parser.addoption("--cuda", action="store_true", help="also run the notebook cells that need a GPU")
