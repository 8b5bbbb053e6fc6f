"""A shipped checkpoint, changed in 1,000 random ways: refused with one clear line, or loaded to the right tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ROOT

# Memory is the peak of the process's resident pages (VmHWM, reset before each load), in a process of its own where
# malloc serves Python's objects too, and maps and gives back every block of 64 KiB or more by itself.
PROGRAM = """
import collections, gc, json, random, sys, tempfile
from pathlib import Path

import torch

import zoo
from zoo import records


def same(model, tensors):
    found, bits = ({k: x.reshape(-1).view(torch.uint8) for k, x in y.items()} for y in (model.state_dict(), tensors))
    return found.keys() == bits.keys() and all(torch.equal(found[key], bits[key]) for key in bits)


NAME, COUNT = "tanh_deq.digits", 1000
shipped = records.weights_dir()
good = (shipped / f"{NAME}.safetensors").read_bytes()
other = (shipped / "mdeq_nano.digits.safetensors").read_bytes()
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
(folder / f"{NAME}.json").write_text((shipped / f"{NAME}.json").read_text())
records.weights_dir = lambda: folder
records.all_records.cache_clear()
recorded, plain = folder / f"{NAME}.safetensors", folder / "mine.safetensors"


def split(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header, data, length=None):
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def flip(rng):
    bad = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        where = rng.choice([rng.randrange(len(bad)), rng.randrange(len(split(good)[0])), rng.randrange(8)])
        bad[where] ^= 1 << rng.randrange(8)
    return bytes(bad)


def cut(rng):
    start = rng.randrange(len(good))
    return rng.choice([good[:start], good[start:], good[:start] + good[start + rng.randint(1, 4096) :]])


def grow(rng):
    more = rng.randbytes(rng.choice([1, 8, 4096, 10**6]))
    where = rng.choice([0, 8, len(good), rng.randrange(len(good))])
    return good[:where] + more + good[where:]


def swap(rng):
    mine, theirs = split(good), split(other)
    return rng.choice([joined(theirs[0], mine[1]), joined(mine[0], theirs[1]), theirs[0] + mine[1]])


def length(rng):
    header, data = split(good)
    here = len(header)
    lengths = [0, 1, here - 1, here + 1, here + 8, len(good), 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2 * here)]
    return joined(header, data, rng.choice(lengths))


def edited(rng, edit):
    header, data = split(good)
    found = json.loads(header)
    names = [name for name in found if name != "__metadata__"]
    edit(found, rng.choice(names), rng.choice(names))
    return joined(json.dumps(found).encode(), data)


def offsets(rng):
    def edit(header, name, _):
        some = rng.choice([-8, -1, 1, 4, 2**31, 2**63, -(2**63), 10**30])
        header[name]["data_offsets"][rng.randrange(2)] += some

    return edited(rng, edit)


def shape(rng):
    def edit(header, name, _):
        shape = header[name]["shape"]
        rng.choice([lambda: shape.append(rng.choice([0, 1, 2, 2**40])), lambda: shape.reverse(), shape.clear])()

    return edited(rng, edit)


def dtype(rng):
    def edit(header, name, _):
        dtypes = ["F64", "F16", "BF16", "I32", "U32", "I64", "BOOL", "U8", "F4", "", None, []]
        header[name]["dtype"] = rng.choice(dtypes)

    return edited(rng, edit)


def names(rng):
    def edit(header, a, b):
        header[a], header[b] = header[b], header[a]
        if rng.random() < 0.3:
            del header[a]

    return edited(rng, edit)


def words(rng):
    def edit(header, *_):
        made_of = json.loads(header["__metadata__"]["deq_zoo"])
        change = rng.choice([
            {"model": "os.system"}, {"model": "mdeq_nano"}, {"digest": "0" * 64}, {"digest": None}, {"digest": []},
            {"arguments": {}}, {"arguments": {**made_of["arguments"], "width": 10**9}}, {"arguments": None},
            {"arguments": {**made_of["arguments"], "solver": {"class_path": "os.system", "init_args": {}}}},
        ])
        header["__metadata__"]["deq_zoo"] = json.dumps({**made_of, **change})

    return edited(rng, edit)


def spaces(rng):
    "What changes no tensor."
    header, data = split(good)
    found = list(json.loads(header).items())
    rng.shuffle(found)
    return joined(json.dumps(dict(found), indent=rng.choice([None, 0, 2])).encode() + b" " * rng.randrange(9), data)


def peak():
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024


def load(source):
    gc.collect(1)  # of what is young, which the load before has left
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()[1]
    try:
        outcome = zoo.load_pretrained(source)
    except zoo.WeightsError as error:
        outcome = str(error)
    return outcome, peak()[0] - before


recorded.write_bytes(good)
expected = load(NAME)[0].state_dict()
for data in (good, good[:-1]):  # what is imported when it is needed first is not of a file's size
    plain.write_bytes(data)
    load(str(plain))
seen = collections.defaultdict(collections.Counter)
most = {"refused": (0, ""), "loaded": (0, "")}
for i in range(COUNT):
    rng = random.Random(i)
    change = [flip, cut, grow, swap, length, offsets, shape, dtype, names, words, spaces][i % 11]
    bad = change(rng)
    for path, source in ((plain, str(plain)), (recorded, NAME)):
        path.write_bytes(bad)
        outcome, memory = load(source)
        for _ in range(2):  # pages of programs that the system had put aside come back once; what a load takes, again
            if memory > 2 * max(len(bad), len(good)):
                outcome, memory = load(source)
        what = "refused" if isinstance(outcome, str) else "loaded"
        if what == "refused":
            assert str(path) in outcome and "\\n" not in outcome and len(outcome) < 1000, (i, change, outcome)
            assert "nothing was loaded" in outcome or "damaged" in outcome, (i, change, outcome)
        else:
            assert same(outcome, expected), (i, change)
        seen[change.__name__][f"{what} by {'path' if path is plain else 'name'}"] += 1
        most[what] = max(most[what], (memory / max(len(bad), len(good)), f"{i} {change.__name__} {path.name}"))
        del outcome
print(json.dumps({"seen": seen, "most": most}))
"""

MALLOC = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see a load's peak of memory")
def test_a_thousand_mutations(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **MALLOC},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    seen = {change: set(outcomes) for change, outcomes in found["seen"].items()}
    assert seen.pop("spaces") == {"loaded by path", "refused by name"}
    never = {"flip", "cut", "grow", "swap", "length", "offsets", "dtype", "words"}
    assert all(seen[change] == {"refused by path", "refused by name"} for change in never)
    # Two names of which one is the other change nothing, and neither does a square shape that is turned round.
    assert all(seen[change] <= {"refused by path", "refused by name", "loaded by path"} for change in seen)
    assert sum(sum(outcomes.values()) for outcomes in found["seen"].values()) == 2000
    assert found["most"]["refused"][0] <= 2, found
    assert found["most"]["loaded"][0] <= 2, found
