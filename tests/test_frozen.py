"""A process that is stopped, not ended: the others wait for as long as they were told, and say so."""
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from test_command import TINY, finished, world  # noqa: F401 (world is a fixture)
from test_processes import ENVIRONMENT, torchrun

GO = """
import os, sys, time, torch
from hcd_nb.processes import all_sum, rank, started
with started("cpu"):
    for k in range(100_000):
        all_sum(torch.ones(1))
        if k == 3: open(sys.argv[1] + os.environ["RANK"], "w").write(str(os.getpid()))
        if k == 3 and rank() == 0: time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def pair(tmp_path):
    """Two processes that exchange numbers without end, and the store that torchrun would hold for them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    started = []

    def start(busy=0, patience=5):
        for rank in range(2):
            where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                         TORCHELASTIC_USE_AGENT_STORE="True", HCD_NB_TIMEOUT=str(patience))
            started.append(subprocess.Popen([sys.executable, "-c", GO, str(tmp_path/"pid"), str(busy)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                            text=True, env={**ENVIRONMENT, **where}))
        until = time.time() + 90
        while not all((tmp_path/f"pid{r}").exists() for r in range(2)):
            assert time.time() < until and all(p.poll() is None for p in started), [p.communicate()[1] for p in started if p.poll() is not None]
            time.sleep(.1)
        return started

    yield start
    for p in started:
        p.kill()
        p.communicate()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_process_is_named_after_the_time_that_was_set(pair, frozen):
    processes = pair()
    processes[frozen].send_signal(signal.SIGSTOP)
    began = time.time()
    out, err = processes[1 - frozen].communicate(timeout=60)
    assert 4 < time.time() - began < 25
    assert processes[1 - frozen].returncode == 1
    assert f"process {1 - frozen} of 2 stops: there was no sign of life from process {frozen} for 5 seconds" in err and "HCD_NB_TIMEOUT" in err, err
    assert "Traceback" not in err, err


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_long_work_of_one_and_a_pause_of_all_are_waited_for(pair):
    processes = pair(busy=15)    # the first one is at work, and the other waits, three times as long as a silent one would be waited for
    time.sleep(12)
    for p in processes: p.send_signal(signal.SIGSTOP)    # Ctrl-Z
    time.sleep(12)
    for p in processes: p.send_signal(signal.SIGCONT)    # fg
    time.sleep(12)
    assert [p.poll() for p in processes] == [None, None], [p.communicate()[1] for p in processes if p.poll() is not None]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_frozen_process_of_a_run_ends_it_with_a_sentence(world, tmp_path):  # noqa: F811
    (tmp_path/"go.py").write_text("import os, sys; open(os.environ['RANK'], 'w').write(str(os.getpid())); from hcd_nb.command import main; sys.exit(main())")
    os.chdir(tmp_path)
    ENVIRONMENT["HCD_NB_TIMEOUT"] = "10"
    try: process = torchrun(tmp_path/"go.py", *TINY, "--target", world/"target", "--iterations", 100000, "--out", "run", wait=False)
    finally: del ENVIRONMENT["HCD_NB_TIMEOUT"]
    while not (tmp_path/"run"/"checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(.2)
    os.kill(int((tmp_path/"1").read_text()), signal.SIGSTOP)
    began = time.time()
    code, out, err = finished(process)
    assert time.time() - began < 120    # ten seconds, and thirty that torchrun leaves the frozen one to end by itself
    assert code != 0 and "no sign of life from process 1 for 10 seconds" in err, err[-3000:]
