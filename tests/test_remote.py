"""A score behind HTTP: what is sent, what is tried again, what is not, and how many requests run at once."""

import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gymnasium as gym
import pytest

import textrl
from textrl import cli
from textrl.asking import Asking
from textrl.remote import RemoteError, is_address
from textrl.scores import ScoreError, ScoreUnavailable


class Endpoint(ThreadingHTTPServer):
    """Answers each request with what `script` says of its number (from 0) and its body: (status, content)."""

    daemon_threads = True

    def __init__(self, script=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script or (lambda number, body: (200, [float(len(text)) for text in body["texts"]]))
        self.bodies, self.headers, self.running, self.most = [], [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            status, content, *more = server.script(number, body)
        finally:
            with server.lock:
                server.running -= 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + (100 if more == ["cut"] else 0)))
        if status == 302:
            self.send_header("Location", self.server.url)
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)
        if more == ["cut"]:
            self.close_connection = True

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"[7.0]")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(script=None):
        servers.append(Endpoint(script))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lengths(body):
    return [float(len(text)) for text in body["texts"]]


PROMPTS, COMPLETIONS = ["p"] * 7, ["x" * i for i in range(7)]
QUICK = {"backoff": 0.001}


def test_texts_go_in_chunks_and_come_back_in_order(serve):
    server = serve(lambda number, body: (time.sleep(0.05 if number == 0 else 0), (200, {"scores": lengths(body)}))[1])
    score = textrl.RemoteScore(server.url, chunk_size=3, columns=("answer",), headers={"X-Key": "secret"})
    assert score(PROMPTS, COMPLETIONS, answer=list("abcdefg"), completion_ids=[[0]] * 7) == [i + 1.0 for i in range(7)]
    bodies = sorted(server.bodies, key=lambda body: body["completions"])
    assert [len(body["texts"]) for body in bodies] == [3, 3, 1]
    assert bodies[1] == {
        "texts": ["pxxx", "pxxxx", "pxxxxx"], "prompts": ["p"] * 3, "completions": ["xxx", "xxxx", "xxxxx"],
        "answer": ["d", "e", "f"],
    }  # fmt: skip
    assert all(headers["X-Key"] == "secret" for headers in server.headers)
    assert score([], [], answer=[]) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(serve, status):
    server = serve(lambda number, body: (status, b"") if number < 2 else (200, lengths(body)))
    assert textrl.RemoteScore(server.url, **QUICK)(["a"], ["b"]) == [2.0]
    assert len(server.bodies) == 3


def test_an_answer_that_is_cut_short_is_tried_again(serve):
    server = serve(lambda number, body: (200, lengths(body), *(["cut"] if number == 0 else [])))
    assert textrl.RemoteScore(server.url, **QUICK)(["a"], ["b"]) == [2.0]


def test_tries_are_bounded_and_wait_longer_each_time(serve, monkeypatch):
    server, waits = serve(lambda number, body: (503, b"")), []
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds))
    score = textrl.RemoteScore(server.url, retries=5, backoff=1.0, max_backoff=6.0)
    with pytest.raises(ScoreUnavailable, match=r"http://127.* gave no answer in 6 tries: HTTP 503"):
        score(["a"], ["b"])
    assert len(server.bodies) == 6
    for wait, most in zip(waits, (1, 2, 4, 8, 16), strict=True):
        assert min(6.0, most / 2) <= wait <= min(6.0, most)
    assert len(set(waits[:3])) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b"no"), "answered HTTP 404 Not Found"),
        ((200, b"<html>"), r"must answer with JSON; got b'<html>'"),
        ((200, b"[" * 200_000), r"must answer with JSON; got b'\[\["),
        ((200, [1.0, 2.0]), r"a list of 1 numbers, or \{.*\}; got \[1.0, 2.0\]"),
        ((200, {"score": [1.0]}), r"got \{'score': \[1.0\]\}"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(serve, answer, message):
    server = serve(lambda number, body: answer)
    with pytest.raises(RemoteError, match=message):
        textrl.RemoteScore(server.url)(["a"], ["b"])
    assert len(server.bodies) == 1


def test_a_request_that_takes_too_long_and_nobody_at_the_address(serve):
    wait = threading.Event()
    server = serve(lambda number, body: (wait.wait(20), (200, lengths(body)))[1])
    with pytest.raises(ScoreUnavailable, match=r"gave no answer in 2 tries: .*timed out"):
        textrl.RemoteScore(server.url, timeout=0.1, retries=1, **QUICK)(["a"], ["b"])
    wait.set()
    with pytest.raises(ScoreUnavailable, match="refused"):
        textrl.RemoteScore("http://127.0.0.1:9", retries=0)(["a"], ["b"])


def test_requests_at_once_are_bounded_whoever_calls(serve):
    server = serve(lambda number, body: (time.sleep(0.02), (200, lengths(body)))[1])
    score = textrl.RemoteScore(server.url, chunk_size=1, concurrency=3)
    callers = [threading.Thread(target=score, args=(PROMPTS, COMPLETIONS)) for _ in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert len(server.bodies) == 21
    assert server.most == 3


def test_the_endpoint_as_a_score_of_an_environment(serve, tmp_path, capsys):
    server = serve()
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say"}\n')
    run = ["train", "reinforce", "--env", "textrl/Text-v0", "--prompts", str(file), "--batch-size", "8", "--quiet"]
    run += ["--env-arg", f"reward={server.url}", "--env-arg", "max_new_tokens=3", "--total-timesteps", "40"]
    assert cli.main([*run, "--log-dir", str(tmp_path / "run")]) == 0
    assert all(text.startswith("Say") for body in server.bodies for text in body["texts"])
    assert cli.main([*run, "--log-dir", str(tmp_path / "b"), "--env-arg", "reward=http//no"]) == 2
    assert (
        "reward must be a function of prompts and completions, or name one: module:function, the folder"
        in capsys.readouterr().err
    )


def test_an_endpoint_that_is_away_drops_a_batch_without_asking_for_each(serve):
    server = serve(lambda number, body: (503, b""))
    score = textrl.RemoteScore(server.url, retries=1, **QUICK)
    task = gym.make("textrl/Text-v0", reward=score, max_new_tokens=3).unwrapped.task
    rows, ids = [{"prompt": "a"}] * 5, [[0]] * 5
    with pytest.raises(ScoreError, match=r"gave no answer in 2 tries: HTTP 503 .*prompt 'a', completion ''"):
        task.evaluate(rows, ids)
    task.asking = Asking(drop=True)
    assert len(task.evaluate(rows, ids).faults) == 5
    assert len(server.bodies) == 4


def test_one_text_that_it_chokes_on_loses_no_other(serve):
    server = serve(lambda number, body: (400, b"") if "pxx" in body["texts"] else (200, lengths(body)))
    task = gym.make("textrl/Text-v0", reward=textrl.RemoteScore(server.url), max_new_tokens=9).unwrapped.task
    task.asking = Asking(drop=True)
    x = task.encode({"prompt": "x"})[-1]
    scores = task.evaluate([{"prompt": "p"}] * 4, [[x] * i + [0] for i in range(4)])
    assert list(scores.faults) == [2]
    assert [s for s in scores.totals if s == s] == [1, 2, 4]


BAD = {
    "url must be the address": {"url": "ftp://x"},
    "timeout must be a finite number above 0; got 0": {"timeout": 0},
    "retries must be a whole number of at least 0; got -1": {"retries": -1},
    "chunk_size must be a whole number of at least 1; got 0": {"chunk_size": 0},
    "concurrency must be": {"concurrency": 0},
    "backoff must be at least 0; got -1": {"backoff": -1},
    "columns must be a list of names; got 'x'": {"columns": "x"},
    "columns must be a list of names; got 5": {"columns": 5},
    "columns must be other columns than": {"columns": ["texts"]},
    "headers must be texts of one line of ASCII; got 5": {"headers": 5},
    "headers must be texts of one line of ASCII; got {'a': 'b": {"headers": {"a": "b\r\nc: d"}},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_are_checked(message):
    with pytest.raises(ValueError, match=message):
        textrl.RemoteScore(**{"url": "http://localhost", **BAD[message]})


def test_addresses_and_copies():
    right = ["http://localhost", "https://a.example:8080/x?y=1", "http://[::1]:8000/"]
    wrong = [
        "",
        "localhost",
        "http://",
        "file:///etc/passwd",
        "http://x:99999",
        "http://a b",
        "http://x\n",
        None,
        3,
        "http://me:key@x",
    ]
    assert all(map(is_address, right))
    assert not any(map(is_address, wrong))
    again = pickle.loads(pickle.dumps(textrl.RemoteScore(right[0], concurrency=2)))
    assert again.url == right[0]


def test_a_redirect_is_not_followed_without_the_texts(serve):
    server = serve(lambda number, body: (302, []))
    with pytest.raises(RemoteError, match="answered HTTP 302"):
        textrl.RemoteScore(server.url, retries=0)(["a"], ["b"])
