"""`recollect doctor` tells the truth about servers, run folders and models."""

import json
import os
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recollect.cli import doctor
from recollect.cli.main import main


class FakeServer(BaseHTTPRequestHandler):
    """A model server whose `generates` and `health` are set per test."""

    def do_GET(self):
        if self.path == "/health":
            self.answer(self.server.health, {})
        elif self.path == "/v1/models":
            self.answer(200, self.server.models)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(self.server.generates, {"choices": []})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    running.health, running.generates, running.models = 200, 200, {"data": [{"id": "tiny"}]}
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_working_server_is_ok(server):
    assert doctor.check_server(server.url) == ("ok", "serves tiny; generates")


def test_a_server_that_is_healthy_but_cannot_generate_fails(server):
    server.generates = 500
    assert doctor.check_server(server.url)[0] == "failed"


def test_a_server_that_generates_but_reports_ill_health_is_a_warning(server):
    server.health = 503
    assert doctor.check_server(server.url)[0] == "warning"


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [3]}, []])
def test_a_server_with_rubbish_for_a_model_list_fails(server, models):
    server.models = models
    assert doctor.check_server(server.url)[0] == "failed"


def test_an_absent_server_fails():
    assert doctor.check_server("http://127.0.0.1:9/v1")[0] == "failed"


def test_a_server_off_loopback_is_a_warning(server, monkeypatch):
    monkeypatch.setattr(doctor, "LOOPBACK", ())
    state, detail = doctor.check_server(server.url)
    assert state == "warning"
    assert "not loopback" in detail


def test_a_failed_check_makes_the_command_exit_1(capsys):
    code = main(["doctor", "--skip-models", "--server", "http://127.0.0.1:9/v1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert report["failed"] is True
    assert {check["state"] for check in report["checks"]} <= {"ok", "warning", "failed"}


def test_an_intact_journal_is_ok_and_a_damaged_one_fails(tmp_path):
    path = tmp_path / "journal.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE calls (key TEXT PRIMARY KEY, answer TEXT)")
        database.executemany("INSERT INTO calls VALUES (?, ?)", [(str(i), "x" * 500) for i in range(200)])
    database.close()
    assert doctor.check_run(tmp_path) == ("ok", "journal.sqlite intact")
    with path.open("r+b") as handle:
        handle.seek(4096 * 3)
        handle.write(os.urandom(4096 * 6))
    assert doctor.perform("run files", lambda: doctor.check_run(tmp_path))["state"] == "failed"


def test_a_folder_without_a_journal_is_a_warning(tmp_path):
    assert doctor.check_run(tmp_path)[0] == "warning"


def test_a_torn_json_file_of_a_run_fails(tmp_path):
    (tmp_path / "run.json").write_text('{"command": "simu')
    assert doctor.perform("run files", lambda: doctor.check_run(tmp_path))["state"] == "failed"


def test_the_embedded_models_answer(smollm2_dir, minilm_dir):
    assert doctor.check_generation("smollm2", 0)[0] == "ok"
    assert doctor.check_embedding("minilm")[0] == "ok"


def test_dry_run_lists_the_checks_and_does_none(capsys):
    assert main(["doctor", "--dry-run", "--json", "--server", "http://127.0.0.1:9/v1"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["state"] for check in checks} == {"skipped"}
    assert len(checks) == 7
