"""The trackers show what metrics.jsonl holds, as read back from their own files."""

import contextlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
import wandb
import yaml
from conftest import (
    CLOCKS,
    ROOT,
    last_update,
    read_metrics,
    run_script,
    start_script,
    wait_for,
)
from runs import run, run_until
from tracker_files import as_lines, config_of, history, inspect, tensorboard_losses
from wandb_server import wandb_server

from lib.tracking.logged_lines import STEP, key_of, named
from lib.tracking.trackers import Trackers, tracker_names
from lib.tracking.wandb_run import lines_on_disk, run_id


@contextlib.contextmanager
def wandb_environment():
    """No variable decides how wandb runs, and the next test finds no run that this one left."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MODE", "API_KEY", "RUN_ID", "PROJECT", "ENTITY", "NAME", "TAGS", "RUN_GROUP"):
            patch.delenv(f"WANDB_{name}", raising=False)
        patch.setenv("NETRC", os.devnull)
        yield patch
        wandb.teardown()


@pytest.fixture
def environment():
    with wandb_environment() as patch:
        yield patch


@pytest.fixture(scope="module")
def wandb_flags(flags):
    return [*flags, "--report_to=wandb", "--num_train_epochs=2", "--logging_steps=3"]


@pytest.fixture
def tracked(wandb_flags, environment):
    """A small run that is tracked."""
    return wandb_flags


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def offline(wandb_flags, home):
    """A finished run in a home folder: its folder, wandb's records, and what it printed."""
    printed = io.StringIO()
    more = ["--report_to", "wandb", "tensorboard", "--run_name=mine", "--run_group=seeds"]
    with wandb_environment() as patch, contextlib.redirect_stderr(printed):
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        run(wandb_flags, home / "out", *more, "--tags", "a", "b")
    return home / "out", inspect(home / "out"), printed.getvalue()


def test_an_offline_run_holds_everything(offline):
    folder, records, printed = offline
    assert printed.count("wandb is offline: no API key") == 1
    assert as_lines(history(records)) == [
        {name: pytest.approx(value) for name, value in line.items()}
        for line in read_metrics(folder)
    ]
    first = next(record["run"] for record in records if record["type"] == "run")
    assert first["run_id"] == (folder / "wandb_run_id").read_text().strip()
    assert first["project"] == "train_mrpc"
    assert first["display_name"] == "mine"
    assert first["run_group"] == "seeds"
    assert first["tags"] == ["a", "b"]
    summary = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    results = json.loads((folder / "all_results.json").read_text())
    assert summary["final/eval/accuracy"] == pytest.approx(results["eval_accuracy"])
    assert summary["eval/accuracy_ci95_low"] == pytest.approx(results["eval_accuracy_ci95"][0])
    for chart in ("confusion_matrix", "precision_recall", "roc", "calibration", "pairs"):
        assert any(f"eval/{chart}" in json.dumps(record) for record in records), chart
    assert any(record["type"] == "artifact" for record in records)
    ends = [record["exit"] for record in records if record["type"] == "exit"]
    assert [end.get("exit_code", 0) for end in ends] == [0]


USERS = {
    "WANDB_PROJECT": "team", "WANDB_ENTITY": "us", "WANDB_NAME": "me", "WANDB_TAGS": "a,b",
    "WANDB_RUN_GROUP": "seeds", "WANDB_NOTES": "try", "WANDB_JOB_TYPE": "sweep",
    "TRACKIO_PROJECT": "ours", "TRACKIO_DIR": "theirs",
}  # fmt: skip


def test_the_environment_names_the_run_where_no_flag_does(tracked, environment, tmp_path):
    for name, value in USERS.items():
        environment.setenv(name, value)
    run(tracked, tmp_path, "--max_train_steps=3")
    (first,) = (record["run"] for record in inspect(tmp_path) if record["type"] == "run")
    names = ("project", "entity", "display_name", "tags", "run_group", "notes", "job_type")
    assert [first[name] for name in names] == [
        "team", "us", "me", ["a", "b"], "seeds", "try", "sweep",
    ]  # fmt: skip


def test_flags_win_over_the_environment(tracked, environment, tmp_path):
    for name, value in USERS.items():
        environment.setenv(name, value)
    flags = ["--wandb_project=p", "--wandb_entity=e", "--run_name=n", "--run_group=g", "--tags=t"]
    run(tracked, tmp_path, *flags, "--max_train_steps=3")
    (first,) = (record["run"] for record in inspect(tmp_path) if record["type"] == "run")
    names = ("project", "entity", "display_name", "run_group", "tags", "notes")
    assert [first[name] for name in names] == ["p", "e", "n", "g", ["t"], "try"]


def test_the_environment_names_the_project_of_each_tracker(tracked, environment, tmp_path):
    pytest.importorskip("trackio")
    for name, value in USERS.items():
        environment.setenv(name, value)
    started = {}
    environment.setattr(
        Trackers, "_init", lambda _, name, project, *__: started.update({name: project})
    )
    more = ["--report_to", "wandb", "trackio", "tensorboard", "--max_train_steps=1"]
    run(tracked, tmp_path / "one", *more)
    assert started == {"wandb": "team", "trackio": "ours", "tensorboard": "train_mrpc"}
    run(tracked, tmp_path / "other", *more, "--wandb_project=given")
    assert set(started.values()) == {"given"}


def test_logs_the_metric_of_the_sweep(offline):
    folder, records, _ = offline
    metric = yaml.safe_load((ROOT / "sweep.yaml").read_text())["metric"]["name"]
    assert [row[metric] for row in history(records) if metric in row] == [
        pytest.approx(line["eval_combined_score"])
        for line in read_metrics(folder)
        if "eval_combined_score" in line
    ]


def assert_in_both_trackers(folder, records, printed):
    assert "the run continues without it" not in printed
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert len(history(records)) == len(read_metrics(folder))
    assert config_of(records)["num_rows"] == {"train": 53, "validation": 23}
    assert [event[0] for event in tensorboard_losses(folder)] == [
        line["update"] for line in read_metrics(folder) if "loss" in line
    ]


def test_wandb_and_tensorboard_do_not_disturb_each_other(offline):
    assert_in_both_trackers(*offline)


def test_tensorboard_and_wandb_do_not_disturb_each_other(tracked, tmp_path, capfd):
    run(tracked, tmp_path, "--report_to", "tensorboard", "wandb")
    assert_in_both_trackers(tmp_path, inspect(tmp_path), capfd.readouterr().err)


def test_the_config_holds_the_origin_of_the_run_and_not_its_user(offline, home):
    _, records, _ = offline
    config = config_of(records)
    assert config["learning_rate"] == 1e-3
    assert config["num_rows"] == {"train": 53, "validation": 23}
    assert config["num_parameters"] > 10_000
    assert len(config["data_fingerprint"]) == 64
    assert config["output_dir"] == "~/out"
    assert "hub_token" not in config
    assert str(home) not in json.dumps(config)
    artifacts = [record.get("artifact", {}) for record in records]
    (model,) = [artifact for artifact in artifacts if artifact.get("type") == "model"]
    assert str(home) not in json.dumps(model["metadata"])


def test_a_table_has_a_row_for_each_pair_the_hardest_first(offline):
    tables = list(offline[0].glob("wandb/offline-run-*/files/media/table/eval/pairs_*.json"))
    table = json.loads(tables[0].read_text())
    assert table["columns"] == [
        "row", "sentence1", "sentence2", "label", "prediction", "loss", "probability",
    ]  # fmt: skip
    losses = [row[5] for row in table["data"]]
    assert losses == sorted(losses, reverse=True)
    assert sorted(row[0] for row in table["data"]) == list(range(23))


def test_a_run_stopped_twice_is_one_wandb_run_with_each_line_once(tracked, tmp_path):
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


def test_finds_the_lines_of_a_second_start_within_one_second(offline, tmp_path):
    """Folders are named after the second of the start; wandb appends -1 to the second one."""
    folder = shutil.copytree(offline[0], tmp_path / "out")
    (start,) = (folder / "wandb").glob("offline-run-*")
    start.rename(f"{start}-1")
    found, _ = lines_on_disk(folder)
    assert found == {key_of(named(line)) for line in read_metrics(folder)}


def test_each_line_is_once_in_a_wandb_folder_of_the_user(tracked, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    run_until(tracked, tmp_path / "out", 6)
    run(tracked, tmp_path / "out")
    updates = [row[STEP] for row in history(inspect(tmp_path / "elsewhere"))]
    assert updates == [line["update"] for line in read_metrics(tmp_path / "out")]
    assert f"wandb sync {tmp_path}/elsewhere/wandb/offline-run-*" in capfd.readouterr().err


class OnlineRun:
    """Stands in for a `wandb.Run` that the server knows from an earlier start."""

    offline, resumed, id = False, True, "one"

    def __init__(self, rows):
        self.rows = rows
        self.summary = {name: value for row in rows for name, value in row.items()}

    def log(self, row, **_):
        self.rows.append(row)

    def define_metric(self, *_, **__):
        pass

    log_artifact = finish = mark_preempting = define_metric


def test_sends_an_online_run_what_its_server_lacks(tracked, tmp_path, monkeypatch):
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


@pytest.fixture
def server(environment):
    with wandb_server() as server:
        environment.setenv("WANDB_BASE_URL", server.url)
        environment.setenv("WANDB_API_KEY", "k" * 40)
        environment.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "1")
        yield server
        wandb.teardown()


def lines_of(server):
    rows = [row for row in server.history if "train/loss" in row or "eval/loss" in row]
    return [row[STEP] for row in rows]


@pytest.mark.processes
def test_every_machine_adds_its_system_metrics_to_the_run(tracked, server, tmp_path):
    """Two processes, each of which believes to be on a machine of its own."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket\n"
        "if 'RANK' in os.environ: socket.gethostname = lambda: 'node' + os.environ['RANK']\n"
    )
    done = run_script(
        [*tracked, "--wandb_shared", "--log_model=none", f"--output_dir={tmp_path / 'out'}"],
        num_processes=2,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert lines_of(server) == [line["update"] for line in read_metrics(tmp_path / "out")]
    names = {name for row in server.events for name in row if name.startswith("system.")}
    assert {name.rpartition("/l:")[2] for name in names} == {"node0", "node1"}
    assert server.ends == [0]  # only the main process says how the run ended


def test_a_shared_run_that_is_stopped_has_each_line_once(tracked, server, two_nodes, tmp_path):
    # The server knows no artifacts, which the tables of a finished run are.
    two_nodes.setattr("lib.tracking.run_log.RunLog.results", lambda *_: None)
    flags = [*tracked, "--wandb_shared"]
    run_until(flags, tmp_path, 6)
    run(flags, tmp_path)
    assert len(server.runs) == 1
    assert lines_of(server) == [line["update"] for line in read_metrics(tmp_path)]
    assert server.ends == [75, 0]


@pytest.fixture
def two_nodes(environment):
    """The process believes that another one, on another machine, runs with it."""
    environment.setattr("lib.tracking.run_log.machine_names", lambda _: ["node0", "node1"])
    return environment


def said_alone(printed):
    return [line for line in printed.splitlines() if "system metrics of" in line]


def test_says_that_offline_runs_have_no_shared_mode(tracked, two_nodes, tmp_path, capfd):
    run([*tracked, "--wandb_mode=offline"], tmp_path, "--wandb_shared", "--max_train_steps=2")
    (line,) = said_alone(capfd.readouterr().err)
    assert line.endswith(f"{socket.gethostname()} only: wandb is offline")
    assert len(history(inspect(tmp_path))) == len(read_metrics(tmp_path))


def test_goes_on_alone_if_the_server_refuses_the_shared_mode(
    tracked, two_nodes, tmp_path, monkeypatch, capfd
):
    rows, modes = [], []

    def init(mode, **_):
        modes.append(mode)
        if mode == "shared":
            raise wandb.errors.CommError("unknown mode")
        return OnlineRun(rows)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "config", {}, raising=False)
    run(tracked, tmp_path, "--wandb_shared", "--wandb_mode=online", "--max_train_steps=2")
    assert modes == ["shared", "online"]
    (line,) = said_alone(capfd.readouterr().err)
    assert line.endswith("only: the server refused the shared mode")
    assert [row[STEP] for row in rows if STEP in row] == [
        line["update"] for line in read_metrics(tmp_path)
    ]


def test_an_overwriting_run_does_not_take_over_the_lines_before(tracked, tmp_path, monkeypatch):
    run(tracked, tmp_path)
    seen = []
    monkeypatch.setattr(Trackers, "start", lambda *_, earlier, **__: seen.append(len(earlier)))
    run(tracked, tmp_path, "--max_train_steps=3", "--overwrite_output_dir")
    run(tracked, tmp_path, "--max_train_steps=3")
    assert seen == [0, 2]


@pytest.fixture(scope="module")
def restarted(wandb_flags, dropout_bert, tmp_path_factory):
    """A run in wandb and trackio, killed twice; between, its descendants got a signal each.

    As Slurm sends it under proctrack/linuxproc, which ends wandb's own process.
    """
    folder = tmp_path_factory.mktemp("restarted")
    out, log = folder / "out", folder / "log"
    trackers = ["wandb"] + ["trackio"] * (importlib.util.find_spec("trackio") is not None)
    arguments = [*wandb_flags, f"--model_name_or_path={dropout_bert}", "--num_train_epochs=40",
                 "--checkpointing_steps=20", "--eval_every=40", "--report_to", *trackers,
                 f"--output_dir={out}"]  # fmt: skip
    with wandb_environment():
        for update, name in ((30, "SIGKILL"), (80, "SIGTERM"), (130, "SIGKILL")):
            process = start_script(arguments, log=log)
            wait_for(lambda: last_update(out) > update)  # noqa: B023
            if name == "SIGTERM":
                for pid in children(process.pid):
                    os.kill(pid, signal.SIGTERM)
            process.send_signal(signal.Signals[name])
            status = process.wait(60)
            assert status == (75 if name == "SIGTERM" else -signal.SIGKILL), log.read_text()
            if name == "SIGTERM":
                assert json.loads((out / "status.json").read_text())["status"] == "preempted"
        done = run_script(arguments)
        assert done.returncode == 0, done.stderr
    return out


def children(pid):
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]


@pytest.mark.processes
def test_no_line_is_missing_from_wandb_or_twice_after_kills_and_signals(restarted):
    found = sorted(
        as_lines(history(inspect(restarted))),
        key=lambda line: (line["update"], "loss" not in line),
    )
    assert [{k: v for k, v in line.items() if k not in CLOCKS} for line in found] == [
        {k: pytest.approx(v) for k, v in line.items() if k not in CLOCKS}
        for line in read_metrics(restarted)
    ]


@pytest.mark.processes
def test_no_line_is_missing_from_trackio_or_twice_after_kills_and_signals(restarted):
    pytest.importorskip("trackio")
    run_name = f"out-{(restarted / 'wandb_run_id').read_text().strip()}"
    for kind, name in (("train", "loss"), ("eval", "eval_loss")):
        shown = subprocess.run(
            [sys.executable, "-m", "trackio.cli", "get", "metric", "--json",
             "--project=train_mrpc", f"--run={run_name}", f"--metric={kind}/loss"],
            env={**os.environ, "TRACKIO_DIR": str(restarted / "trackio")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        values = json.loads(shown.stdout)["values"]
        found = sorted((value["step"], value["value"]) for value in values)
        lines = [line for line in read_metrics(restarted) if name in line]
        assert found == [(line["update"], pytest.approx(line[name])) for line in lines]


@pytest.mark.processes
def test_wandb_shows_a_failed_run_as_failed(tracked, tmp_path):
    arguments = [
        *tracked, "--learning_rate=1", "--max_grad_norm=0", "--adam_epsilon=0",
        "--num_train_epochs=60", f"--output_dir={tmp_path}", "--logging_steps=1",
        "--wandb_alerts",
    ]  # fmt: skip
    assert run_script(arguments).returncode == 1
    records = inspect(tmp_path)
    ends = [record["exit"] for record in records if record["type"] == "exit"]
    assert [end["exit_code"] for end in ends] == [1]
    texts = {title: text for title, text, _ in alerts(records)}
    assert re.match(r"the loss or the gradient of update \d+ is not", texts["Loss not finite"])


def alerts(records):
    found = [record["alert"] for record in records if record["type"] == "alert"]
    return [(alert["title"], alert["text"], alert["level"]) for alert in found]


def test_alerts_once_in_the_life_of_a_run(tracked, tmp_path):
    """Of a model that never learns, and is stopped twice."""
    flags = [*tracked, "--learning_rate=0", "--eval_every=1", "--wandb_alerts"]
    run_until(flags, tmp_path, 12)
    run_until(flags, tmp_path, 12)
    run(flags, tmp_path)
    found = alerts(inspect(tmp_path))
    assert [(title, level) for title, _, level in found] == [
        ("Collapsed classifier", "WARN"),
        ("Preempted", "WARN"),
    ]
    assert re.match("After update 1, every row is predicted as '.*': the model", found[0][1])


def test_alerts_nobody_who_has_not_asked(offline):
    assert alerts(offline[1]) == []


def test_a_given_run_id_wins(tmp_path, monkeypatch):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert run_id(tmp_path) == "given"


@pytest.fixture
def silent_server():
    """Accepts connections, and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing_server():
    """Answers, and takes no key."""

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


def test_is_offline_if_the_server_never_answers(
    tracked, environment, tmp_path, silent_server, capfd
):
    environment.setenv("WANDB_API_KEY", "k" * 40)
    environment.setenv("WANDB_BASE_URL", silent_server)
    environment.setattr("lib.tracking.wandb_run.SERVER_SECONDS", 1.0)
    run(tracked, tmp_path)
    printed = capfd.readouterr().err
    said = [line for line in printed.splitlines() if line.startswith("wandb is offline")]
    assert len(said) == 1
    assert "127.0.0.1 does not answer" in said[0]
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in said[0]
    assert len(history(inspect(tmp_path))) == len(read_metrics(tmp_path))


def test_is_offline_if_the_server_takes_no_key(
    tracked, environment, tmp_path, refusing_server, capfd
):
    """Accelerate's start fails half way."""
    environment.setenv("WANDB_API_KEY", "k" * 40)
    environment.setenv("WANDB_BASE_URL", refusing_server)
    run(tracked, tmp_path)
    assert capfd.readouterr().err.count("wandb is offline: the server refused the start") == 1
    assert len(history(inspect(tmp_path))) == len(read_metrics(tmp_path))


@pytest.mark.processes
def test_tracks_offline_without_a_writable_home(tracked, tmp_path):
    environment = {"HOME": "/proc", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_script([*tracked, f"--output_dir={tmp_path / 'out'}"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert len(history(inspect(tmp_path / "out"))) == len(read_metrics(tmp_path / "out"))


def test_trains_without_a_writable_wandb_folder(tracked, environment, tmp_path):
    environment.setenv("WANDB_DIR", "/proc")
    environment.setenv("WANDB_MODE", "offline")
    run(tracked, tmp_path)
    assert len(read_metrics(tmp_path)) == 7


def test_tensorboard_has_each_line_once_after_a_restart(tracked, tmp_path):
    more = ["--report_to=tensorboard"]
    run_until(tracked, tmp_path, 6, *more)
    run(tracked, tmp_path, *more)
    found = tensorboard_losses(tmp_path)
    wanted = [(line["update"], line["loss"]) for line in read_metrics(tmp_path) if "loss" in line]
    assert found == [(update, pytest.approx(loss)) for update, loss in wanted]


def test_drops_a_tracker_that_fails(tracked, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(wandb.Run, "log", fail)
    results = run(tracked, tmp_path)
    assert results["num_updates"] == 14
    said = "wandb: OSError: no space; the run continues without it"
    assert capsys.readouterr().err.count(said) == 1
    assert len(read_metrics(tmp_path)) == 7


def test_only_a_named_tracker_must_be_installed(monkeypatch, capsys):
    monkeypatch.setattr("lib.tracking.trackers.get_available_trackers", lambda: ["tensorboard"])
    assert tracker_names(True, ()) == ["tensorboard"]
    assert capsys.readouterr().err == "wandb is not installed: nothing is logged to it\n"
    with pytest.raises(ValueError, match="wandb: it is not installed: pip install wandb"):
        tracker_names(False, ("wandb",))


@pytest.mark.processes
def test_says_that_wandb_is_not_installed_and_trains(tracked, tmp_path):
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


def test_the_summary_holds_the_best_values(offline):
    metrics = [record["metric"] for record in offline[1] if record["type"] == "metric"]
    by_name = {metric.get("name") or metric.get("glob_name"): metric for metric in metrics}
    assert by_name["eval/accuracy"]["summary"] == {"max": True}
    assert by_name["eval/loss"]["summary"] == {"min": True}
    assert by_name["*"]["step_metric"] == STEP
