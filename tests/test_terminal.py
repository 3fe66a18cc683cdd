"""What commands print: nothing of other people's text controls the terminal, and no encoding ends a command."""

import json
import os
import pty
import re
import subprocess
from contextlib import suppress

import pytest

from orchestration.terminal.output import printable, printable_output, table_console
from tests.test_cli import REFINERY, environment, refinery

#: Sets the window's title, colours text, and turns it around.
HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egnp\r"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Ünïcode, 日本語, 👩‍💻\n\tindented", None),
        ("\x1b[2J", "\\u001b[2J"),
        ("a\rb\x08\x00\x7f\x9b", "a\\u000db\\u0008\\u0000\\u007f\\u009b"),
        ("\u202eabc\u2066\u200f\u061c", "\\u202eabc\\u2066\\u200f\\u061c"),
        ("\u2028\u2029", "\\u2028\\u2029"),
    ],
)
def test_what_is_printable(text, shown):
    assert printable(text) == (text if shown is None else shown)


def test_json_stays_json():
    said = {"text": HOSTILE}
    assert json.loads(printable(json.dumps(said, ensure_ascii=False))) == said


def test_output_is_escaped_whoever_prints(capsys):
    with printable_output():
        print(HOSTILE)
        table_console().print(f"[bold]{HOSTILE}[/] :smile:")
        print("after")
    print("not ours")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines() == [
        printable(HOSTILE),
        # Names hold brackets, which are no markup. Rich itself leaves out the bell and the return.
        "[bold]\\u001b]0;owned\\u001b[31m\\u009b2J\\u202egnp[/] :smile:",
        "after",
        "not ours",
    ]


@pytest.fixture
def hostile(workspace, tmp_path):
    """A catalog whose source names a folder that is not there."""
    model = {"name": "m", "source": f"{tmp_path}/ä{HOSTILE}", "task": "embedding"}
    workspace.catalog_path.write_text(json.dumps({"models": [model]}))
    return workspace


def on_a_terminal(workspace, *arguments):
    """What a command writes to a terminal of its own."""
    main, side = pty.openpty()
    with subprocess.Popen([REFINERY, *arguments], env=environment(workspace), stdout=side, stderr=side):
        os.close(side)
        out = b""
        with suppress(OSError):  # the other end is closed
            while part := os.read(main, 65536):
                out += part
    os.close(main)
    return out.decode()


@pytest.mark.parametrize("arguments", [("models",), ("optimize", HOSTILE)])
def test_names_do_not_control_a_terminal(hostile, arguments):
    out = on_a_terminal(hostile, *arguments)
    assert "1b]0;owned" in re.sub(r"[\s│]", "", out)
    for sign in ("\x1b]", "\x1b[31m", "\x9b", "\x07", "\u202e", "gnp\r"):
        assert sign not in out.replace("\r\n", "\n")


@pytest.mark.parametrize("arguments", [("models",), ("plan",)])
def test_ascii_output_ends_no_command(hostile, arguments):
    """As Python has it in containers without a locale, if told so."""
    code, out, err = refinery(hostile, *arguments, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert "Traceback" not in out + err
    assert code == (0 if arguments[0] == "models" else 1)
    assert (out + err).isascii()
    assert "\\xe4" in out
