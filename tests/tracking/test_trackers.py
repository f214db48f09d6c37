"""What the trackers show, read back from what they wrote."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import wandb
import yaml
from conftest import ROOT, read_metrics, run_script, start_script, wait_for
from test_checkpoint import run_until
from test_training import run

from lib.tracking.logged_lines import EVALUATED, STEP
from lib.tracking.trackers import Trackers, tracker_names
from lib.tracking.wandb_run import run_id


@pytest.fixture
def tracked(flags, monkeypatch):
    """A small run that is tracked; nothing of the environment decides how."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    yield [*flags, "--report_to=wandb", "--num_train_epochs=2", "--logging_steps=3"]
    wandb.teardown()  # ends what a test gave up, which the next one would go on with


def inspect(folder):
    """All records of the offline segments of a run, in the order of their starts."""
    records = []
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        file = next(path.glob("*.wandb"), None)
        if file is None:
            continue  # killed as it began
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def history(records):
    """The rows of the lines of metrics.jsonl: (kind, update, values)."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if "train/loss" in row or "eval/loss" in row]


def as_lines(rows):
    """Rows as metrics.jsonl has them, without wandb's own."""
    lines = []
    for row in rows:
        line = {"update": row[STEP]}
        for name, value in row.items():
            if name.startswith("train/") and name != STEP:
                line[name.removeprefix("train/")] = value
            elif name.startswith("eval/") and name != EVALUATED:
                line["eval_" + name.removeprefix("eval/")] = value
        lines.append(line)
    return lines


def test_an_offline_run_holds_all_of_it(tracked, tmp_path, capfd):
    run(tracked, tmp_path, "--run_name=mine", "--run_group=seeds", "--tags", "a", "b")
    assert capfd.readouterr().err.count("wandb is offline: no API key") == 1
    records = inspect(tmp_path)
    assert as_lines(history(records)) == [
        {name: pytest.approx(value) for name, value in line.items()}
        for line in read_metrics(tmp_path)
    ]
    first = next(record["run"] for record in records if record["type"] == "run")
    assert first["run_id"] == (tmp_path / "wandb_run_id").read_text().strip()
    assert first["project"] == "train_mrpc"
    assert first["display_name"] == "mine"
    assert first["run_group"] == "seeds"
    assert first["tags"] == ["a", "b"]
    summary = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert summary["final/eval/accuracy"] == pytest.approx(results["eval_accuracy"])
    assert summary["eval/accuracy_ci95_low"] == pytest.approx(results["eval_accuracy_ci95"][0])
    for chart in ("confusion_matrix", "precision_recall", "roc", "calibration", "pairs"):
        assert any(f"eval/{chart}" in json.dumps(record) for record in records), chart
    assert any(record["type"] == "artifact" for record in records)
    ends = [record["exit"] for record in records if record["type"] == "exit"]
    assert [end.get("exit_code", 0) for end in ends] == [0]


def tensorboard_losses(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "train_mrpc"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def config_of(records):
    config = {}
    for record in records:
        if record["type"] in ("run", "config"):
            part = record[record["type"]]
            config |= part.get("config", part).get("update", {})
    return config


def test_the_metric_of_the_sweep_is_logged(tracked, tmp_path):
    run(tracked, tmp_path)
    metric = yaml.safe_load((ROOT / "sweep.yaml").read_text())["metric"]["name"]
    rows = history(inspect(tmp_path))
    assert [row[metric] for row in rows if metric in row] == [
        pytest.approx(line["eval_combined_score"])
        for line in read_metrics(tmp_path)
        if "eval_combined_score" in line
    ]


@pytest.mark.parametrize("names", [("wandb", "tensorboard"), ("tensorboard", "wandb")])
def test_several_trackers_do_not_disturb_each_other(tracked, tmp_path, capfd, names):
    run(tracked, tmp_path, "--report_to", *names)
    assert "the run continues without it" not in capfd.readouterr().err
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    records = inspect(tmp_path)
    assert len(history(records)) == len(read_metrics(tmp_path))
    assert config_of(records)["num_rows"] == {"train": 53, "validation": 23}
    assert [event[0] for event in tensorboard_losses(tmp_path)] == [
        line["update"] for line in read_metrics(tmp_path) if "loss" in line
    ]


def test_the_config_tells_where_the_run_comes_from_and_not_who_ran_it(
    tracked, tmp_path, monkeypatch
):
    home = tmp_path.parent  # of the data and the model too
    monkeypatch.setenv("HOME", str(home))
    run(tracked, tmp_path / "out")
    config = config_of(inspect(tmp_path / "out"))
    assert config["learning_rate"] == 1e-3
    assert config["num_rows"] == {"train": 53, "validation": 23}
    assert config["num_parameters"] > 10_000
    assert len(config["data_fingerprint"]) == 64
    assert config["output_dir"] == f"~/{tmp_path.name}/out"
    assert "hub_token" not in config
    assert str(home) not in json.dumps(config)
    artifacts = [record.get("artifact", {}) for record in inspect(tmp_path / "out")]
    (model,) = [artifact for artifact in artifacts if artifact.get("type") == "model"]
    assert str(home) not in json.dumps(model["metadata"])


def test_a_row_for_each_pair_the_hardest_first(tracked, tmp_path):
    run(tracked, tmp_path)
    tables = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/eval/pairs_*.json"))
    table = json.loads(tables[0].read_text())
    assert table["columns"] == [
        "row", "sentence1", "sentence2", "label", "prediction", "loss", "probability",
    ]  # fmt: skip
    losses = [row[5] for row in table["data"]]
    assert losses == sorted(losses, reverse=True)
    assert sorted(row[0] for row in table["data"]) == list(range(23))


def test_stopped_twice_it_is_one_run_with_each_line_once(tracked, tmp_path):
    run_until(tracked, tmp_path, 6)
    run_until(tracked, tmp_path, 7)
    run(tracked, tmp_path)
    records = inspect(tmp_path)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3
    assert len({record["run"]["run_id"] for record in records if record["type"] == "run"}) == 1
    rows = history(records)
    assert [row[STEP] for row in rows] == [line["update"] for line in read_metrics(tmp_path)]
    assert sum(record["type"] == "preempting" for record in records) == 2
    ends = [record["exit"].get("exit_code", 0) for record in records if record["type"] == "exit"]
    assert ends == [75, 75, 0]


def test_where_the_user_wants_wandb_to_write_each_line_is_once_too(
    tracked, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    run_until(tracked, tmp_path / "out", 6)
    run(tracked, tmp_path / "out")
    updates = [row[STEP] for row in history(inspect(tmp_path / "elsewhere"))]
    assert updates == [line["update"] for line in read_metrics(tmp_path / "out")]
    assert f"wandb sync {tmp_path}/elsewhere/wandb/offline-run-*" in capfd.readouterr().err


class OnlineRun:
    """What `wandb.init` returns for a run that the server knows from an earlier start."""

    offline, resumed, id = False, True, "one"

    def __init__(self, rows):
        self.rows = rows
        self.summary = {name: value for row in rows for name, value in row.items()}

    def log(self, row, **_):
        self.rows.append(row)

    def define_metric(self, *_, **__):
        pass

    log_artifact = finish = mark_preempting = define_metric


def test_an_online_run_gets_what_its_server_lacks(tracked, tmp_path, monkeypatch):
    """Stopped in the evaluation after an epoch, of which only the line of training was logged."""
    rows = []
    monkeypatch.setattr(wandb, "init", lambda **_: OnlineRun(rows))
    monkeypatch.setattr(wandb, "config", {}, raising=False)
    online = [*tracked, "--wandb_mode=online", "--logging_steps=1"]
    run_until(online, tmp_path, 8)
    assert [(row[STEP], "eval/loss" in row) for row in rows][-1] == (7, False)
    run(online, tmp_path)
    lines = [row for row in rows if STEP in row]
    assert [row[STEP] for row in lines] == [line["update"] for line in read_metrics(tmp_path)]


def test_the_lines_of_a_run_that_is_replaced_are_not_those_of_the_new(
    tracked, tmp_path, monkeypatch
):
    run(tracked, tmp_path)
    seen = []
    monkeypatch.setattr(Trackers, "start", lambda *_, earlier, **__: seen.append(len(earlier)))
    run(tracked, tmp_path, "--max_train_steps=3", "--overwrite_output_dir")
    run(tracked, tmp_path, "--max_train_steps=3")
    assert seen == [0, 2]


def test_killed_without_a_word_no_line_is_missing_or_twice(tracked, dropout_bert, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [*tracked, f"--model_name_or_path={dropout_bert}", "--num_train_epochs=40",
                 "--checkpointing_steps=20", "--eval_every=40", f"--output_dir={out}"]  # fmt: skip
    for number in (30, 90):
        process = start_script(arguments, log=log)
        wait_for(lambda: out.exists() and (out / "metrics.jsonl").exists()
                 and any(line["update"] > number for line in read_metrics(out)))  # noqa: B023  # fmt: skip
        process.kill()
        process.wait()
    assert run_script(arguments).returncode == 0
    records = inspect(out)
    found = sorted(
        as_lines(history(records)), key=lambda line: (line["update"], "loss" not in line)
    )
    wanted = read_metrics(out)
    clocks = ("examples_per_second", "tokens_per_second")
    assert [{k: v for k, v in line.items() if k not in clocks} for line in found] == [
        {k: pytest.approx(v) for k, v in line.items() if k not in clocks} for line in wanted
    ]


def test_a_run_that_fails_is_not_a_success(tracked, bert, tmp_path):
    arguments = [
        *tracked, "--learning_rate=1", "--max_grad_norm=0", "--adam_epsilon=0",
        "--num_train_epochs=60", f"--output_dir={tmp_path}", "--logging_steps=1",
    ]  # fmt: skip
    done = run_script(arguments)
    if done.returncode == 0:
        pytest.fail("the run should not have survived this")
    ends = [record["exit"] for record in inspect(tmp_path) if record["type"] == "exit"]
    assert [end["exit_code"] for end in ends] == [1]


def test_signals_to_all_descendants_end_the_process_of_wandb_and_not_the_run(
    tracked, dropout_bert, tmp_path
):
    """As Slurm sends them under proctrack/linuxproc; the next start logs what was lost."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [*tracked, f"--model_name_or_path={dropout_bert}", "--num_train_epochs=40",
                 "--eval_every=40", f"--output_dir={out}"]  # fmt: skip
    process = start_script(arguments, log=log)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 3)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    assert run_script(arguments).returncode == 0
    updates = sorted(row[STEP] for row in history(inspect(out)))
    assert updates == [line["update"] for line in read_metrics(out)]


def children(pid):
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_are_one_run(tracked, tmp_path, num_processes):
    done = run_script([*tracked, f"--output_dir={tmp_path}"], num_processes=num_processes)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_a_given_run_id_wins(tmp_path, monkeypatch):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert run_id(tmp_path) == "given"


@pytest.fixture
def silent_server():
    """It accepts connections, and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing_server():
    """It answers, and lets nobody in."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_never_answers(tracked, tmp_path, silent_server):
    environment = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": silent_server}
    done = run_script([*tracked, f"--output_dir={tmp_path}"], environment=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("wandb is offline")]
    assert len(said) == 1
    assert "127.0.0.1 does not answer" in said[0]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in said[0]
    assert len(history(inspect(tmp_path))) == len(read_metrics(tmp_path))


def test_a_server_that_refuses(tracked, tmp_path, refusing_server):
    """It is there, but does not take the key; Accelerate's start fails half way."""
    environment = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": refusing_server}
    done = run_script([*tracked, f"--output_dir={tmp_path}"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is offline: the server refused the start") == 1
    assert len(history(inspect(tmp_path))) == len(read_metrics(tmp_path))


def test_a_home_that_cannot_be_written(tracked, tmp_path):
    environment = {"HOME": "/proc", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_script([*tracked, f"--output_dir={tmp_path / 'out'}"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert len(history(inspect(tmp_path / "out"))) == len(read_metrics(tmp_path / "out"))


def test_a_wandb_folder_that_cannot_be_written(tracked, tmp_path):
    environment = {"WANDB_DIR": "/proc", "WANDB_MODE": "offline"}
    done = run_script([*tracked, f"--output_dir={tmp_path}"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path)) == 7


def test_tensorboard_has_each_line_once_after_a_restart(tracked, tmp_path):
    more = ["--report_to=tensorboard"]
    run_until(tracked, tmp_path, 6, *more)
    run(tracked, tmp_path, *more)
    found = tensorboard_losses(tmp_path)
    wanted = [(line["update"], line["loss"]) for line in read_metrics(tmp_path) if "loss" in line]
    assert found == [(update, pytest.approx(loss)) for update, loss in wanted]


def test_trackio_has_each_line_once_whatever_a_killed_process_lost(tracked, dropout_bert, tmp_path):
    pytest.importorskip("trackio")
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [*tracked, f"--model_name_or_path={dropout_bert}", "--report_to=trackio",
                 "--num_train_epochs=40", "--checkpointing_steps=20", "--eval_every=40",
                 f"--output_dir={out}"]  # fmt: skip
    process = start_script(arguments, log=log)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 20)
    process.kill()
    process.wait()
    done = run_script(arguments)
    assert done.returncode == 0, done.stderr
    run_name = f"out-{(out / 'wandb_run_id').read_text().strip()}"
    for kind, name in (("train", "loss"), ("eval", "eval_loss")):
        shown = subprocess.run(
            [sys.executable, "-m", "trackio.cli", "get", "metric", "--json",
             "--project=train_mrpc", f"--run={run_name}", f"--metric={kind}/loss"],
            env={**os.environ, "TRACKIO_DIR": str(out / "trackio")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        values = json.loads(shown.stdout)["values"]
        found = sorted((value["step"], value["value"]) for value in values)
        lines = [line for line in read_metrics(out) if name in line]
        assert found == [(line["update"], pytest.approx(line[name])) for line in lines]


def test_a_tracker_that_fails_is_given_up(tracked, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(wandb.Run, "log", fail)
    results = run(tracked, tmp_path)
    assert results["num_updates"] == 14
    said = "wandb: OSError: no space; the run continues without it"
    assert capsys.readouterr().err.count(said) == 1
    assert len(read_metrics(tmp_path)) == 7


def test_a_tracker_that_is_not_installed_is_an_error_only_if_it_was_named(monkeypatch, capsys):
    monkeypatch.setattr("lib.tracking.trackers.get_available_trackers", lambda: ["tensorboard"])
    assert tracker_names(True, ()) == ["tensorboard"]
    assert capsys.readouterr().err == "wandb is not installed: nothing is logged to it\n"
    with pytest.raises(ValueError, match="wandb: it is not installed: pip install wandb"):
        tracker_names(False, ("wandb",))


def test_without_wandb_a_run_says_so_and_has_all_its_results(tracked, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    arguments = [flag for flag in tracked if flag != "--report_to=wandb"]
    done = run_script(
        [*arguments, "--with_tracking", f"--output_dir={tmp_path / 'out'}"],
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is not installed: nothing is logged to it") == 1
    assert len(read_metrics(tmp_path / "out")) == 7
    assert not (tmp_path / "out" / "wandb").exists()


def test_the_default_names_of_the_best_are_maxima(tracked, tmp_path):
    run(tracked, tmp_path)
    metrics = [record["metric"] for record in inspect(tmp_path) if record["type"] == "metric"]
    by_name = {metric.get("name") or metric.get("glob_name"): metric for metric in metrics}
    assert by_name["eval/accuracy"]["summary"] == {"max": True}
    assert by_name["eval/loss"]["summary"] == {"min": True}
    assert by_name["*"]["step_metric"] == STEP
