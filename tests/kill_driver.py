"""Commands of hcd_nb in forks of one process that has imported everything: killed at a moment, signalled, held, short of room, or given numbers that are none.

Lines on standard input are jobs in JSON; each is answered with the number of its process, and `{"wait": number}` with how it ended. See `Jobs` in test_kills.py."""
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path


class Moments:
    "Counts what happens to the files of a folder: opened to be written, half written, written, renamed, removed, brought to the disk"
    def __init__(self, folder, at=None, number=signal.SIGKILL, log=None):
        self.folder, self.at, self.number, self.log, self.count = os.path.realpath(folder), at, number, log, 0

    def name(self, path):
        if isinstance(path, int): path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.realpath(os.fsdecode(path))
        return os.path.relpath(path, self.folder) if path == self.folder or path.startswith(self.folder + os.sep) else None

    def note(self, what, path):
        name = self.name(path)
        if name is None or name == ".lock": return False
        self.count += 1
        if self.log is not None:
            with open(self.log, "a") as f: f.write(json.dumps([what, name]) + "\n")
        return self.count == self.at

    def moment(self, what, path):
        if self.note(what, path): os.kill(os.getpid(), self.number)

    def audit(self, event, words):
        if event == "open" and isinstance(words[0], (str, bytes)) and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): self.moment("opening", words[0])
        elif event == "os.rename": self.moment("renaming", words[1])
        elif event in ("os.remove", "os.link"): self.moment("removing" if event == "os.remove" else "linking", words[0])

    def written(self, function, place):
        "A function that writes a file in one go: before, with half of it there, and after"
        def write(*args, **kwargs):
            path = place(*args, **kwargs)
            if not isinstance(path, (str, bytes, os.PathLike)): return function(*args, **kwargs)
            self.moment("writing", path)
            result = function(*args, **kwargs)
            if self.note("half written", path):
                os.truncate(path, os.path.getsize(path)//2)
                os.kill(os.getpid(), self.number)
            self.moment("written", path)
            return result
        return write

    def around(self, function, what, n=0):
        def call(*args, **kwargs):
            self.moment(f"before {what}", args[n])
            result = function(*args, **kwargs)
            self.moment(f"after {what}", args[n])
            return result
        return call

    def watch(self, savers):
        import pandas as pd
        sys.addaudithook(self.audit)
        os.fsync = self.around(os.fsync, "sync")
        os.replace = self.around(os.replace, "replace", 1)
        for module in savers: module.save_file = self.written(module.save_file, lambda tensors, file, *a, **k: file)
        pd.DataFrame.to_csv = self.written(pd.DataFrame.to_csv, lambda self, file=None, *a, **k: file)
        pd.DataFrame.to_parquet = self.written(pd.DataFrame.to_parquet, lambda self, file=None, *a, **k: file)
        for kind in ("write_text", "write_bytes"): setattr(Path, kind, self.written(getattr(Path, kind), lambda self, *a, **k: self))


def hold(name, reached, until):
    "Opening a file of this name waits for another to appear; the first to come says so"
    def audit(event, words):
        if event == "open" and isinstance(words[0], (str, bytes)) and os.fsdecode(words[0]).endswith(name) and not os.path.exists(until):
            Path(reached).touch()
            while not os.path.exists(until): time.sleep(.02)
    sys.addaudithook(audit)


class Ruined:
    "A loss, or its gradient, that is no number in one iteration"
    def __init__(self, iteration, what):
        from hcd_nb import training
        import torch
        class Ruin(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x.clone() if what == "gradient" else x*float("nan")
            @staticmethod
            def backward(ctx, g): return g*float("nan")
        old = training.Method.loss
        def loss(method, t, *args):
            value, *rest = old(method, t, *args)
            return (Ruin.apply(value) if t.iteration == iteration else value, *rest)
        training.Method.loss = loss


def carry_out(job):
    import importlib
    out, err = (open(job[k], "w", buffering=1) for k in ("out", "err"))
    os.dup2(out.fileno(), 1); os.dup2(err.fileno(), 2)
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
    os.chdir(job["cwd"])
    module, function = job["command"].split(":")
    main = getattr(importlib.import_module(module), function)
    if job.get("file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],)*2)
    if job.get("ruin"): Ruined(*job["ruin"])
    if job.get("hold"): hold(*job["hold"])
    if job.get("folder"): Moments(job["folder"], job.get("at"), job.get("number", signal.SIGKILL), job.get("log")).watch([m for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("hcd_nb.") and hasattr(m, "save_file")])
    sys.argv[0] = function
    return main(job["words"])


def serve():
    import hcd_nb.command, hcd_nb.doctor, hcd_nb.export, hcd_nb.report, hcd_nb.search, hcd_nb.tables, hcd_nb.training, hcd_nb.byol, hcd_nb.moco, hcd_nb.odc, hcd_nb.spcl, hcd_nb.deepcluster, hcd_nb.local_aggregation, hcd_nb.mmt, hcd_nb.moco_v2, hcd_nb.simclr  # noqa
    import torch
    import torch._dynamo  # noqa: as the first optimiser would
    torch.set_num_threads(1)
    say = lambda what: print(json.dumps(what), flush=True)
    say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            status = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
            say(status)
            continue
        number = os.fork()
        if not number:
            try: status = carry_out(job) or 0
            except SystemExit as e: status = e.code if isinstance(e.code, int) else 2
            except BaseException:
                import traceback
                traceback.print_exc()
                status = 1
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(status)
        say(number)


if __name__ == "__main__": serve()
