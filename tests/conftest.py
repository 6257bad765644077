"""`pytest --slow` also runs what takes minutes; `--cuda` what needs a GPU."""
import os

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")    # two workers share two cores


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the notebook cells and tests that take minutes")
    parser.addoption("--cuda", action="store_true", help="also run the notebook cells that need a GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason="takes long: run it with --slow"))
