"""What a run shows on a terminal, which is not what it writes to a log file."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT, SCRIPT


class Terminal:
    """A process on a terminal of its own, 120 columns wide, as a user starts it."""

    def __init__(self, command):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Ctrl-C reaches the process through its controlling terminal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, words, seconds=120):
        """Read until the words are on the screen; None reads until the process ends."""
        deadline = time.monotonic() + seconds
        while words is None or words not in self.text:
            assert time.monotonic() < deadline, self.text
            if not select.select([self.ours], [], [], 0.2)[0]:
                continue
            try:
                self.text += os.read(self.ours, 1 << 16).decode(errors="replace")
            except OSError:  # the other end is closed
                assert words is None, self.text
                break
        return self.text

    def lines(self):
        """The lines that stay on the screen: what a bar overwrites is gone."""
        lines = [line.rpartition("\r")[2] for line in self.text.replace("\r\n", "\n").split("\n")]
        return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip() for line in lines]


@pytest.fixture
def terminal():
    """Starts commands on terminals, and ends what a failing test left."""
    started = []

    def start(command):
        started.append(Terminal(command))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)  # wandb's viewer is a process of its own
        one.process.wait()
        os.close(one.ours)


def test_a_run_on_a_terminal(flags, files, tmp_path, terminal):
    """A header at once, one after the data are read, a table of evaluations, all scores."""
    out = tmp_path / "out"
    arguments = [f"--test_file={files['test']}", "--eval_every=3", f"--output_dir={out}"]
    screen = terminal([sys.executable, SCRIPT, *flags, *arguments])
    screen.read_until(None)
    assert screen.process.wait(20) == 0
    lines = screen.lines()
    headers = [line for line in lines if line.startswith("train_mrpc: ")]
    assert headers[0] == f"train_mrpc: bert0 on train.csv -> {out}"
    assert re.fullmatch(
        r"train_mrpc: bert0 \(0\.0M\) on train\.csv, 53/23/9 rows, 2 classes, 7 updates of 8 rows, "
        rf"1 x CPU \(1 thread\) -> {re.escape(str(out))}",
        headers[1],
    )
    assert "loss 0." in screen.text.partition("examples/s")[0], "the loss of the first update"
    head = next(number for number, line in enumerate(lines) if line.split()[:1] == ["update"])
    names = lines[head].split()
    assert names == ["update", "epoch", "accuracy", "f1", "combined_score", "loss"]
    table = [line for line in lines[head + 1 :] if re.match(r" +\d+ +\d\.\d\d ", line)]
    assert [row.split()[:2] for row in table] == [["3", "0.43"], ["6", "0.86"], ["7", "1.00"]]
    ends = [match.end() for match in re.finditer(r"\S+", lines[head])]
    for row in table:  # aligned with the head
        assert [match.end() for match in re.finditer(r"\S+", row)][:6] == ends
    results = json.loads((out / "all_results.json").read_text())
    best = [row for row in table if "best" in row][-1]
    assert best.split()[0] == str(results["best_update"])
    low, high = results["test_accuracy_ci95"]
    (line,) = (line for line in lines if line.split()[:2] == ["test", "accuracy"])
    assert line.split()[2:] == [
        f"{results['test_accuracy']:.4f}",
        f"({low:.4f}",
        "to",
        f"{high:.4f})",
    ]
    assert f"report: {out}/report/index.html" in lines
    assert any(line.startswith("validation  f1 of '1'") for line in lines)


def test_ctrl_c_says_at_once_that_the_run_saves(long_flags, tmp_path, terminal):
    """On a line of its own below the bar; under a launcher the prompt is back before the run."""
    screen = terminal([sys.executable, SCRIPT, *long_flags, f"--output_dir={tmp_path / 'out'}"])
    screen.read_until("examples/s")
    os.write(screen.ours, b"\x03")  # as the terminal turns it into SIGINT
    screen.read_until(None)
    assert screen.process.wait(20) == 75
    lines = screen.lines()
    said = lines.index("train_mrpc.py: SIGINT received: saving, please wait")
    stopped = next(number for number, line in enumerate(lines) if "stopped by SIGINT" in line)
    assert said < stopped
    assert screen.text.count("please wait") == 1
    assert "Traceback" not in screen.text


def test_the_viewer_of_wandb_finds_an_offline_run(flags, tmp_path, terminal):
    """`wandb leet DIR/wandb`, as docs/dashboards.md has it."""
    arguments = ["--report_to=wandb", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    subprocess.run([sys.executable, SCRIPT, *flags, *arguments], cwd=ROOT, check=True)
    assert "wandb leet DIR/wandb " in (ROOT / "docs" / "dashboards.md").read_text()
    screen = terminal([sys.executable, "-m", "wandb", "leet", str(tmp_path / "wandb")])
    # For the output folder itself it says "No runs found".
    screen.read_until((tmp_path / "wandb_run_id").read_text().strip(), seconds=60)
