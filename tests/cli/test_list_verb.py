"""``cli.py list``: what there is, as a table, in a pipe, in a narrow terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

import cli
import zoo
from tests.command_line import ROOT, refused
from zoo.records import find_record

SHIPPED = [record.name for record in zoo.list_weights(source="shipped")]
ORIGINAL = [record.name for record in zoo.list_weights(source="original")]


def listed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert cli.main(["list", *args]) is None
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_all_weights_are_listed_those_that_ship_first(capsys: pytest.CaptureFixture[str]) -> None:
    out = listed(capsys)
    names = first_words(out)
    assert [name for name in names if name in {*SHIPPED, *ORIGINAL}] == [*SHIPPED, *ORIGINAL]
    assert "torchvision:Raft_Large_Weights.C_T_V2" in names
    (row,) = [line for line in out.splitlines() if line.startswith("tanh_deq.digits ")]
    for told in ("84,746", "scikit-learn digits: 1,257 training images", "test accuracy 0.9917", "shipped", "MIT"):
        assert told in row, "in a pipe each row is one line"
    (row,) = [line for line in out.splitlines() if line.startswith("mdeq_xl_imagenet.imagenet ")]
    assert "published: test accuracy 0.792" in row
    assert "zoo.load_pretrained('deq_flow_nano.synthetic')" in out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("*.digits",), ["mdeq_nano.digits", "tanh_deq.digits"]),
        (("tanh_deq.digits",), ["tanh_deq.digits"]),
        (("mdeq*", "--source", "shipped"), ["mdeq_nano.digits", "mdeq_nano_scenes.digit_scenes"]),
        (("--source", "original"), ORIGINAL),
    ],
)
def test_what_matches(args: tuple[str, ...], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert first_words(listed(capsys, *args)) == ["name", *expected, str(len(expected))]
    records = json.loads(listed(capsys, *args, "--json"))
    assert records == [json.loads(json.dumps(dataclasses.asdict(find_record(name)))) for name in expected]


def test_torchvisions_names_are_matched_too(capsys: pytest.CaptureFixture[str]) -> None:
    names = first_words(listed(capsys, "torchvision:*K_V2"))[1:-1]
    assert names == ["torchvision:Raft_Large_Weights.C_T_SKHT_K_V2"]


def test_a_source_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"^unknown source 'orginal'. Did you mean 'original'"):
        zoo.list_weights(source="orginal")


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "--models").splitlines()
    assert [row.split()[0] for row in rows[1:-2]] == zoo.list_models()
    (row,) = [row for row in rows if row.startswith("mdeq_nano ")]
    assert row.split() == ["mdeq_nano", "MDEQ", "109,962", "mdeq_nano.digits"]
    assert json.loads(listed(capsys, "--models", "mdeq_nano", "--json")) == [
        {"name": "mdeq_nano", "class": "MDEQ", "num_parameters": 109_962, "weights": ["mdeq_nano.digits"]}
    ]


@pytest.mark.parametrize("width", [20, 80, 140, 300])
@pytest.mark.parametrize("args", [(), ("--models", "deq_flow_huge")])
def test_no_name_is_folded_in_a_terminal(
    args: tuple[str, ...], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    out = re.sub("\033\\[.*?m", "", listed(capsys, *args))
    expected = [name for name in (*SHIPPED, *ORIGINAL) if not args or name.startswith("deq_flow_huge.")]
    assert {word.strip(",") for word in out.split()} >= set(expected)
    assert "…" not in out
    if width < 140:
        assert "\n  parameters: 13,394,752\n" in out
    else:
        assert out.startswith("name ")
        assert max(map(len, out.splitlines())) <= width


REFUSED = {
    "tanh_deq.digit": "no weights match 'tanh_deq.digit'. Did you mean 'tanh_deq.digits'? Near too: mdeq_nano.digits. "
    f"zoo.list_weights(), or cli.py list, lists all {len(SHIPPED + ORIGINAL)}.",
    "mdeq_nono* --source shipped": "no weights match 'mdeq_nono*'. Did you mean 'mdeq_nano.digits'? Known: deq_flow_na",
    "tanh_dec --models": "no models match 'tanh_dec'. Did you mean 'tanh_deq'? zoo.list_models(), or cli.py list ",
    "nothing* --json": "no weights match 'nothing*'. zoo.list_weights(), or cli.py list, lists all ",
    "torchvision* --json": "the weights that match 'torchvision*' are torchvision's, without a record: leave out",
    "*KITTI* --source shipped": "no weights match '*KITTI*'. Known: deq_flow_nano.synthetic, ",
    "tanh_deq.digits --source original": "1 weights match 'tanh_deq.digits', and none of them is original: "
    "tanh_deq.digits is shipped",
    "--models --source shipped": "--source is about weights; leave it out with --models",
    "--source mine": "argument --source: invalid choice: 'mine' (choose from",
    "--jsn": "unknown argument '--jsn'. Did you mean '--json'? Known: --help, --models, --source, --json.",
    "--jso": "unknown argument '--jso'. Did you mean '--json'?",
    "a b": "unknown argument 'b'.",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_mistyped(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "list", *typed.split()).startswith(REFUSED[typed])


def test_a_pipe_whose_reader_has_enough(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What ``| head -1`` does: the other end is closed while there is more to write, then and at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["cli.py", "list", "--json"])
        cli.console()
        pipe.write("what is left is written when it is closed")
    assert capfd.readouterr() == ("", "")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys, cli\n"
        "for args in (['--help'], *([verb, '--help'] for verb in cli.VERBS), ['x'], ['list', '--x']):\n"
        "    try: cli.main(args)\n"
        "    except SystemExit: pass\n"
        "print([name for name in ('torch', 'zoo', 'pytorch_lightning', 'jsonargparse') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in cli.SUMMARIES:
        assert f"\n  {command} " in done.stdout
