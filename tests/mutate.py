"""Damage of every kind, seeded; and a process of its own that reads what was damaged, watched for time and memory."""
import copy
import csv
import dis
import io
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import traceback
import unicodedata
from pathlib import Path

HERE, LIBRARY = Path(__file__).parent, Path(__file__).parents[1]/"hcd_nb"
DEEP = "\0deep\0"    # stands for a text too deep for `json.dumps`
NAMES = ["$$.png", "$x_1^2$.jpg", "日本.png", "<!--<script>.jpg", "+1.jpg", "=cmd|' C'!A0.jpg", "-1.jpg", "@x.png", "a\nb.jpg", "a\tb.png", "\\frac.png", "%s%n.png", "{0}.jpg", "'\".png",
         "a,b;c.jpg", " .png", ".jpg", "..jpg", "\u202egpj.png", "x"*251 + ".jpg", "é"*120 + ".png", "0001_c1s1_.jpg", "99999999999999999999_c1s1_1.jpg", "0001_c99999999999999999999s1_1.jpg", "-1_c1_0.jpg", "con.jpg", "\x1b[31m.png"]
NASTY = [None, True, False, 0, -1, 1, -0., .5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, -2**63 - 1, 10**30, 9999, [9999, 9999], [10**9, 10**9], [-1, 4], [0, 0], [True, True],
         "", "x", "x"*100_000, "../../../../etc/passwd", "<!--<script>", "\0", "\ud800", "9"*30, "NaN", "None", [], {}, [[]], [None], {"a": 1}, {"tensor": "nowhere"}, {"tensor": 3}, {"": {}}, list(range(300)), DEEP]
CELLS = ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(1)", "nan", "NaN", "inf", "-inf", "1e400", "1e9", "0", "-1", "1.5", "0x10", "9"*40, "", " ", "\t", '"', "'", '"x', ",", ";", "\0", "\r", "a\nb", "é", "日本", "\ufeff", "../../../etc/passwd",
         "/etc/passwd", "/dev/zero", ".", "x"*10_000, "<script>", "$$", "NULL", "None", "True", "١", "²"]


# ---- bytes

def flip(b, r):
    "One to eight bits"
    b = bytearray(b)
    for _ in range(r.choice((1, 1, 2, 8))):
        if b: b[r.randrange(len(b))] ^= 1 << r.randrange(8)
    return bytes(b)


def flip_first(b, r):
    "A bit among the first bytes, where formats say what they are"
    b = bytearray(b)
    if b: b[r.randrange(min(len(b), 96))] ^= 1 << r.randrange(8)
    return bytes(b)


def overwrite(b, r, n=4096):
    "A run of bytes, by zeros, ones or noise"
    at, n = r.randrange(max(1, len(b))), min(n, len(b))
    return b[:at] + r.choice((bytes(n), b"\xff"*n, r.randbytes(n)))[:len(b) - at] + b[at + n:]


def overwrite_few(b, r): return overwrite(b, r, r.choice((1, 2, 4, 8, 64)))
def truncate(b, r): return b[:r.choice((0, 1, 8, r.randrange(len(b) + 1), max(0, len(b) - 1), len(b)//2))]
def insert(b, r): return b[:(at := r.randrange(len(b) + 1))] + r.choice((bytes(r.randrange(1, 64)), r.randbytes(r.randrange(1, 64)), b'"', b"[" * 50)) + b[at:]
def append(b, r): return b + r.choice((b"\0"*4096, r.randbytes(100), b))


def duplicate(b, r):
    at, n = r.randrange(len(b) + 1), r.randrange(1, 512)
    return b[:at] + b[at:at + n]*2 + b[at + n:]


def swap(b, r):
    "Two stretches change places"
    n = r.choice((1, 4, 16, 256))
    if len(b) < 2*n + 2: return b[::-1]
    i, j = sorted((r.randrange(len(b) - n), r.randrange(len(b) - n)))
    return b if j < i + n else b[:i] + b[j:j + n] + b[i + n:j] + b[i:i + n] + b[j + n:]


def whole_other(b, r): return r.choice((b"", b"\0"*100, b"not what it says", b"PK\3\4", b"\x80\2}q\0.", b"{}", b"[]", b"null", b"\xff\xfe{\0}\0", b"PAR1PAR1", b"\x89PNG\r\n\x1a\n", r.randbytes(1000)))


BYTES = [flip, flip, flip_first, overwrite, overwrite_few, truncate, insert, append, duplicate, swap, whole_other]


def changed_bytes(b, r):
    for _ in range(r.choice((1, 1, 1, 2, 3))): b = r.choice(BYTES)(b, r)
    return b


# ---- JSON

def places(tree, at=()):
    "Every place in a tree of lists and objects"
    yield at
    for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else (): yield from places(v, (*at, k))


def changed_json(tree, r, times=None):
    "A value replaced, dropped, renamed, wrapped, or doubled, at any depth"
    tree = copy.deepcopy(tree)
    for _ in range(times or r.choice((1, 1, 1, 2))):
        found = list(places(tree))
        at = r.choice(found) if r.random() < .7 else r.choice([p for p in found if len(p) <= 2])
        if not at: tree = r.choice([v for v in NASTY]) if r.random() < .3 else tree; continue
        holder = tree
        for k in at[:-1]: holder = holder[k]
        old, how = holder[at[-1]], r.randrange(12)
        if how == 0: del holder[at[-1]]
        elif how == 1 and isinstance(holder, dict): holder[r.choice(("", "x", "9"*400, "__class__", at[-1] + "_"))] = holder.pop(at[-1])
        elif how == 2: holder[at[-1]] = [old]
        elif how == 3: holder[at[-1]] = {"x": old}
        elif how == 4: holder[at[-1]] = str(old)
        elif how == 5 and isinstance(old, (int, float)): holder[at[-1]] = r.choice((-old, old*1000, old + .5, old + 1, -1, 0))
        elif how == 6 and isinstance(old, str): holder[at[-1]] = old[:-1] + chr(r.randrange(32, 0x2fff))
        else: holder[at[-1]] = copy.deepcopy(r.choice(NASTY))
    return tree


def json_bytes(tree):
    "JSON text with what the standard leaves out, and nested 100,000 deep where a value says so"
    text = json.dumps(tree)
    deep = json.dumps(DEEP)
    return text.replace(deep, "["*100_000 + "]"*100_000).encode()


def odd_json(b, r):
    "Texts that are JSON, and no record of anything"
    n = 100_000
    return r.choice((b"["*n, b"["*n + b"]"*n, b'{"a":'*n + b"1" + b"}"*n, b'{"config": ' + b"["*n + b"]"*n + b"}", b"9"*5000, b'{"seconds": ' + b"9"*5000 + b"}", b"[1,2", b"nul", b"\xff\xfe", b'"' + b"\xc3\x28" + b'"', b"\xef\xbb\xbf" + b, b" "*1000 + b, b + b, b"NaN", b'{"a":1,"a":2}'))


def changed_json_file(b, r):
    kind = r.random()
    if kind < .65: return json_bytes(changed_json(json.loads(b), r))
    return odd_json(b, r) if kind < .75 else changed_bytes(b, r)


# ---- tables of text

def changed_csv(b, r):
    "Cells replaced, columns and rows dropped, doubled and renamed"
    if r.random() < .25: return changed_bytes(b, r)
    rows = [row for row in csv.reader(io.StringIO(b.decode())) if row]
    for _ in range(r.choice((1, 1, 2, 6))):
        how, at = r.randrange(9), r.randrange(len(rows))
        if not rows[at] or not rows[0]: continue
        c = r.randrange(len(rows[at]))
        if how == 0: rows[0][r.randrange(len(rows[0]))] = r.choice((*CELLS, *rows[0]))
        elif how == 1 and len(rows) > 1: del rows[at]
        elif how == 2: rows.insert(at, list(rows[at]))
        elif how == 3: rows[at] += r.choices(CELLS, k=r.randrange(1, 4))
        elif how == 4: del rows[at][c]
        elif how == 5:
            k = r.randrange(len(rows[0]))
            for row in rows[r.randrange(2):]:
                if k < len(row): row[k] = r.choice(CELLS)
        elif how == 6: rows[at] = rows[at][::-1]
        else: rows[at][c] = r.choice(CELLS)
    out = io.StringIO()
    csv.writer(out, lineterminator=r.choice(("\n", "\n", "\r\n"))).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def changed_lines(b, r):
    "Lines of text with words replaced"
    if r.random() < .3: return changed_bytes(b, r)
    lines = b.decode().splitlines()
    for _ in range(r.choice((1, 2, 5))):
        at, words = r.randrange(len(lines)), r.choice(lines).split() or ["x"]
        words[r.randrange(len(words))] = r.choice(CELLS)
        lines[at] = r.choice((" ".join(words), lines[at] + " 1", "", lines[0], r.choice(CELLS)))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ---- safetensors

def opened(b):
    "Header and tensors of a safetensors file"
    n = int.from_bytes(b[:8], "little")
    return json.loads(b[8:8 + n]), b[8 + n:]


def closed(header, tensors, length=None):
    text = header if isinstance(header, bytes) else json_bytes(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def changed_header(b, r):
    "Shapes, types, places and names of tensors"
    header, tensors = opened(b)
    names = [k for k in header if k != "__metadata__"]
    one, two = header[name := r.choice(names)], header[other := r.choice(names)]
    how = r.randrange(11)
    if how == 0: one["shape"] = r.choice(([], [0], [-1], [2**40, 2**40], [2**63], [1]*200, [1, *one["shape"]], one["shape"][::-1], "x", [1.5]))
    elif how == 1: one["dtype"] = r.choice(("I64", "U8", "BF16", "BOOL", "F16", "F64", "C64", "F8_E4M3", "I32", "F4", "x", None))
    elif how == 2: one["data_offsets"] = r.choice(([0, 0], [-4, 0], [2**63, 2**63], [0, 2**40], one["data_offsets"][::-1], two["data_offsets"], [1], "x"))
    elif how == 3: one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    elif how == 4: header[name], header[other] = two, one
    elif how == 5: header[r.choice(("", "x", "9", name.upper(), name + "/x"))] = header.pop(name)
    elif how == 6: del header[name]
    elif how == 7: header["more"] = dict(one, data_offsets=r.choice((one["data_offsets"], [0, 0], [len(tensors), len(tensors)])))
    elif how == 8: return closed(header, tensors, r.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, len(json_bytes(header)) + 1)))
    elif how == 9: return closed(changed_json_file(json_bytes(header), r), tensors)
    elif how == 10: return closed(json_bytes(header), tensors[:len(tensors)//2] if r.random() < .5 else tensors + bytes(64))
    return closed(header, tensors)


def changed_metadata(b, r, forge=()):
    "The words kept with tensors; with `forge` without these keys, as files of an earlier version are"
    header, tensors = opened(b)
    about = header["__metadata__"]
    for k in forge: about.pop(k, None)
    key = r.choice([k for k in sorted(about) if k not in ("format", "sha256")] or [""])
    how = r.randrange(10)
    if how == 0: header["__metadata__"] = r.choice(({}, None, [], "x", {"a": 1}, {key: None}))
    elif how == 1: about.pop(key, None)
    elif how == 2: about[key] = r.choice(("", "x", "{", "null", "[]", "{}", "3", DEEP))
    elif how == 3: about[key] = odd_json(b"{}", r).decode("utf-8", "replace")
    elif about.get(key, "")[:1] in ("{", "["): about[key] = json_bytes(changed_json(json.loads(about[key]), r)).decode()
    else: about[key] = r.choice((about.get(key, "")[::-1], about.get(key, "") + "0", "é"*64))
    return closed(header, tensors)


def changed_safetensors(b, r):
    return r.choice((changed_bytes, changed_header, changed_metadata))(b, r)


# ---- how a reader takes it

def own_raise(error):
    "Whether a line of the library raised an error on purpose: the last frame is the library's, at a raise"
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, tb = frames[-1][0], error.__traceback__
    while tb.tb_next: tb = tb.tb_next
    return frame.f_code.co_filename.startswith(str(LIBRARY)) and dis.opname[frame.f_code.co_code[tb.tb_lasti]] == "RAISE_VARARGS"


def place_of(error):
    "The last lines of the library, and the last of all, on the way to an error"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(str(LIBRARY))]
    name = lambda f: f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno} {f.name}"
    return " < ".join(dict.fromkeys([name(frames[-1]), *map(name, own[:-3:-1])]))


def outcome(read):
    "accepted (and what reading gave), sentence, or trace; with type, words and place"
    try: return "accepted", "", "", "", read()
    except Exception as e:
        said = str(e)
        sentence = isinstance(e, (ValueError, OSError)) and own_raise(e) and len(said.splitlines()) == 1 and not {unicodedata.category(c) for c in said} & {"Cc", "Cs"}
        return "sentence" if sentence else "trace", type(e).__name__, said[:300], place_of(e), None


def peak():
    "The largest size of this process so far, in bytes; `getrusage` would count the process that began it"
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))*1024


def serve(prepare):
    "Answer lines from standard input, each JSON and so its answer, by the function that `prepare` gives"
    out, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    answer = prepare()
    base = peak()
    resource.setrlimit(resource.RLIMIT_AS, (sum(int(v) for v in Path("/proc/self/statm").read_text().split()[:1])*os.sysconf("SC_PAGE_SIZE") + 12*2**30,)*2)
    say = lambda what: os.write(out, json.dumps(what).encode() + b"\n")
    say("ready")
    for line in sys.stdin: say([*answer(*json.loads(line)), peak() - base])


class Reader:
    "A process that reads what is damaged; a new one after a hang, a crash, or too much memory"
    def __init__(self, code, limit=30, memory=2*2**30):
        self.code, self.limit, self.memory, self.process = code, limit, memory, None

    def begin(self):
        self.process = subprocess.Popen([sys.executable, "-c", self.code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(LIBRARY.parent), str(HERE)])})
        assert self.line(300) == "ready", "the reading process does not start"

    def line(self, seconds):
        "Its next answer, or None where none comes"
        if not select.select([self.process.stdout], [], [], seconds)[0]: return "hang"
        line = self.process.stdout.readline()
        return json.loads(line) if line else "crash"

    def ask(self, *question): # → kind, type, words, place
        if self.process is None: self.begin()
        self.process.stdin.write(json.dumps(question).encode() + b"\n"); self.process.stdin.flush()
        said = self.line(self.limit)
        if isinstance(said, str): kind = [said, "", f"no answer within {self.limit} s" if said == "hang" else f"the process ended", ""]
        else: kind = said[:4] if said[4] < self.memory else ["memory", said[1], f"{said[4]/2**30:.1f} GB more; {said[0]}: {said[2]}", said[3]]
        if kind[0] in ("hang", "crash", "memory"): self.end()
        return kind

    def end(self):
        if self.process: self.process.kill(); self.process.wait()
        self.process = None
