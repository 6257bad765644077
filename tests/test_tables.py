"""hcd_tables: a small world from nothing to a table, and the committed tables agree with the committed records."""
from pathlib import Path

import pandas as pd
import pytest
from hcd_nb.command import configure, parser
from hcd_nb.results import TABLES, World, adapted_run, embedded_world, find_records, runs_of, s_table_1, write_table
from hcd_nb.tables import made_again, main, missing_runs, run_all, submit_all, words_of
from hcd_nb.training import train
from test_command import TINY, world  # noqa: F401 (world is a fixture)

root = Path(__file__).parents[1]
SETTINGS = dict(s.split("=") for s in TINY[3::2]) | dict(pretrain=0, iterations=6)


@pytest.fixture
def small(world):  # noqa: F811
    return World("small", {"target": str(world/"target"), "source": str(world/"source")}, {"target": "T", "source": "S"}, "demo", SETTINGS,
                 start={**SETTINGS, "method": "direct", "pretrain": 6}, odc=dict(n_classes=8), slow=dict(ema=.99), seeds=(0,), sweep_seeds=(0,))


@pytest.mark.timeout(900)
def test_from_nothing_to_a_table(small, tmp_path, capsys):
    cells = [c for c in s_table_1(small) if c.column == "T" and c.row in ("before: trained on the other set", "BYOL", "HCD")]
    starts, others, lacking = missing_runs(cells, small, {}, tmp_path)
    assert (list(starts), sorted(others), lacking) == (["start-target-0"], ["target-byol-0", "target-hcd-0"], set())
    assert run_all(starts, small, tmp_path, "cpu") == []

    byol = others["target-byol-0"]    # begun before, and stopped: it is continued
    config = configure(parser().parse_args(words_of(byol, small, tmp_path, "cpu")))
    from hcd_nb.byol import BYOL
    assert not train(config, tmp_path/"small"/byol.name, progress=False, stop_at=3, method=BYOL).done
    assert run_all(others, small, tmp_path, "cpu", jobs=2) == []
    assert capsys.readouterr().out.count(": done") == 3

    records = find_records(small, tmp_path)
    assert missing_runs(cells, small, records, tmp_path) == ({}, {}, set())
    table = write_table("1", small, records, tmp_path/"tables")
    assert table[table["mean"].notna() & (table["metric"] == "mAP")]["row"].tolist() == ["before: trained on the other set", "BYOL", "HCD"]
    assert made_again("target-hcd-0", small, records, tmp_path, "cpu") == "target-hcd-0: every figure is the same to the last digit."


@pytest.mark.timeout(600)
def test_runs_as_jobs_of_a_cluster(small, tmp_path):
    run = adapted_run(small, "target", 0, "moco", method="moco", **small.slow)
    alone = {run.name: type(run)(run.name, run.settings)}    # from random weights
    assert submit_all(alone, small, tmp_path, "cpu", cluster="local", options=["timeout_min=5"]) == []
    assert run.name in find_records(small, tmp_path)


@pytest.mark.timeout(300)
def test_a_run_that_fails_is_named_and_says_why(small, tmp_path, capsys):
    bad = adapted_run(small, "target", 0, "odc", method="odc", n_classes=5000)
    assert run_all({bad.name: type(bad)(bad.name, bad.settings)}, small, tmp_path, "cpu") == [bad.name]
    assert "failed, see" in capsys.readouterr().out
    assert "5000 classes for 96 images" in (tmp_path/"small"/bad.name/"output.txt").read_text()


@pytest.mark.parametrize("number", TABLES)
def test_committed_tables_are_those_of_the_committed_records(number, tmp_path):
    w = embedded_world()
    write_table(number, w, find_records(w, ""), tmp_path)
    for made in tmp_path.iterdir():
        kept = root/"data"/"tables"/made.name
        if made.suffix == ".csv": pd.testing.assert_frame_equal(pd.read_csv(made), pd.read_csv(kept))
        elif made.suffix != ".png": assert made.read_text() == kept.read_text(), f"hcd_tables --out data/tables"


def test_committed_records_are_those_of_the_plan():
    w = embedded_world()
    planned = {n for make in TABLES.values() for n in runs_of(make(w))}
    assert set(find_records(w, "")) <= planned


def test_market_world_reads_what_there_is(tmp_path, capsys):
    """Nobody has run it here: every cell is blank, the published numbers stand beside, and what is missing is said."""
    words = ["--world", "market", "--table", "1", "--runs", str(tmp_path), "--out", str(tmp_path)]
    assert main([*words, "--market", str(tmp_path/"nosuch")]) == 2 and "is no folder" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main([*words, "--market", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left blank: DukeMTMC-reID" in out and "85 runs are missing (time unknown: no record yet)" in out
    assert "| HCD, the paper's form |" in out and "78.1" in out
