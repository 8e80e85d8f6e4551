#!/usr/bin/env python3
"""What ccproxy adds to the CLI that it drives: first delta and total, in one run, with ratios.

    bench.py ──HTTP───> ccproxy.py ──stdin──> claude ──HTTP──> fake API      rows c, d, e, f, g
    bench.py ──stdin─────────────────────────> claude ──HTTP──> fake API      rows a, b, h
    bench.py ──HTTP───> ccproxy.py ──HTTP──> an upstream                      rows of /api

The by-hand rows send the very lines that ccproxy sends (its pure functions are imported), so a
difference is the proxy's own.  Every round measures every row, whatever disturbs hits all alike;
shown are medians.  The fake API and the /health client are processes of their own.

    python .ci/bench.py --claude /path/to/claude --rounds 9
    python .ci/bench.py --quick
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import ccproxy  # noqa: E402

IDLE_S = 3.0                # what "idle" means in rows c, once the spares are up
SETTLE_S = 0.2              # between measurements, for what the one before has left to do
DEADLINE_S = 60             # of each step
WORDS = ("One ", "two ", "three ", "four.")
PROMPT = "You are a helpful assistant. Be brief."
DELTA, STOP, RESULT = (re.compile(rb'"type": ?"%s"' % mark) for mark in (
    b"content_block_delta", b"message_stop", b"result"))
TEXT = re.compile(r'"text_delta", ?"text": ?("(?:[^"\\]|\\.)*")')
MODEL = "sonnet"
KEY = "bench"               # agents need one


# == The fake API: answers at once =================================================================

def api_events():
    """The Anthropic stream events of the one answer that there is."""
    usage = {"input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
             "output_tokens": 1}
    yield {"type": "message_start", "message": {
        "id": "msg_" + uuid.uuid4().hex, "type": "message", "role": "assistant", "content": [],
        "model": "claude-sonnet-5", "stop_reason": None, "stop_sequence": None, "usage": usage}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for word in WORDS:
        yield {"type": "content_block_delta", "index": 0,
               "delta": {"type": "text_delta", "text": word}}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "usage": {"output_tokens": len(WORDS)},
           "delta": {"stop_reason": "end_turn", "stop_sequence": None}}
    yield {"type": "message_stop"}


def api_answer(method, path):
    """A whole HTTP response, written in one piece."""
    if method == "POST" and "/messages" in path and "count_tokens" not in path:
        frames = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in api_events()]
        body = b"".join(b"%x\r\n%s\r\n" % (len(f), f) for f in frames) + b"0\r\n\r\n"
        return (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nrequest-id: req_bench\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + body)
    body = b'{"type":"error","error":{"type":"not_found_error","message":"not served here"}}'
    head = (b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body))
    return head + (b"" if method == "HEAD" else body)


def api_connection(sock):
    with contextlib.suppress(OSError, ValueError), sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                more = sock.recv(1 << 18)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            found = re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.I)
            length = int(found.group(1)) if found else 0
            pieces, have = [data], len(data)
            while have < length:
                pieces.append(sock.recv(1 << 18))
                have += len(pieces[-1])
                if not pieces[-1]:
                    return
            data = b"".join(pieces)[length:]
            method, path = head.split(b" ", 2)[:2]
            sock.sendall(api_answer(method.decode(), path.decode()))


def run_api():
    """The role of the process `bench.py fake-api`: its port on stdout; ends with its stdin."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def accept():
        while True:
            threading.Thread(target=api_connection, args=listener.accept()[:1], daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


# == The upstream of the relay rows, and a client of raw sockets ===================================

DELTAS = 500                # of a streamed answer
ASKED = {"messages": "/v1/messages", "stream": "/v1/messages", "chat": "/v1/chat/completions"}


def http_message(head, body):
    return b"%s\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


def relay_request(kind, port, prefix=""):
    """The bytes of one request of a kind: health, messages (whole), stream, chat (streamed)."""
    if kind == "health":
        return b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port
    body = {"model": "claude-sonnet-5", "max_tokens": 1000, "messages": [user("Count.")],
            "stream": kind != "messages"}
    head = (f"POST {prefix}{ASKED[kind]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nx-api-key: "
            "sk-ant-dummy\r\nanthropic-version: 2023-06-01\r\nContent-Type: application/json")
    return http_message(head.encode(), json.dumps(body).encode())


def upstream_answers():
    """What the upstream says, whole and streamed, each ready to be sent in one piece; as the API
    does it, every event is a chunk of its own."""
    start, opening, *_, closing, end = api_events()
    delta = {"type": "content_block_delta", "index": 0,
             "delta": {"type": "text_delta", "text": "word "}}
    stop = {"type": "content_block_stop", "index": 0}
    frames = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in (
        start, opening, *[delta] * DELTAS, stop, closing, end)]
    head = b"HTTP/1.1 200 OK\r\nrequest-id: req_bench\r\nContent-Type: "
    message = {**start["message"], "content": [{"type": "text", "text": "One two three four."}],
               "stop_reason": "end_turn"}
    return (http_message(head + b"application/json", json.dumps(message).encode()),
            head + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
                b"%x\r\n%s\r\n" % (len(f), f) for f in frames) + b"0\r\n\r\n")


def run_upstream():
    """The role of the process `bench.py upstream`: one thread, its port on stdout."""
    listener, selector = socket.create_server(("127.0.0.1", 0), backlog=256), \
        selectors.DefaultSelector()
    print(listener.getsockname()[1], flush=True)
    whole, streamed = upstream_answers()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(sock, selectors.EVENT_READ, bytearray())
                continue
            data = b""
            with contextlib.suppress(OSError):
                data = key.fileobj.recv(65536)
            if not data:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                continue
            key.data.extend(data)
            if key.data.endswith(b"}"):     # the last byte of its body
                with contextlib.suppress(OSError):
                    key.fileobj.sendall(streamed if re.search(
                        rb'"stream": ?true', key.data) else whole)
                key.data.clear()


def run_load(port, kind, connections, seconds, prefix=""):
    """The role of the process `bench.py load PORT KIND N SECONDS [PREFIX]`, with one request in
    flight on each connection: answers per second and the median of their ms on stdout."""
    request, selector, begun = relay_request(kind, port, prefix), selectors.DefaultSelector(), {}
    tails = {}
    last = b"}" if kind in ("health", "messages") else b"\r\n0\r\n\r\n"

    def ask(sock):
        begun[sock], tails[sock] = time.perf_counter(), b""
        sock.sendall(request)
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ)
        ask(sock)
    took, start = [], time.perf_counter()
    while time.perf_counter() < start + seconds:
        for key, _ in selector.select(1):
            piece = key.fileobj.recv(1 << 18)
            if not piece or piece.startswith(b"HTTP") and piece[9:12] != b"200":
                raise SystemExit(f"bench: {kind} was answered {piece[:300]!r}")
            tails[key.fileobj] = (tails[key.fileobj] + piece)[-len(last):]
            if tails[key.fileobj] == last:
                took.append(time.perf_counter() - begun[key.fileobj])
                ask(key.fileobj)
    print(len(took) / (time.perf_counter() - start), 1000 * statistics.median(took))


# == What is measured ==============================================================================

class Lab:
    """Folders, the fake API and the command of the CLI; what is started here ends with `exits`."""

    def __init__(self, claude, exits):
        self.exits, self.claude = exits, claude
        self.command = [claude] if claude != "echo" else [
            sys.executable, os.path.join(ROOT, "ccproxy.py"), "stand-in"]
        self.version = "the stand-in" if claude == "echo" else subprocess.run(
            [claude, "--version"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True
        ).stdout.decode().strip()
        self.folder = tempfile.mkdtemp(prefix="ccproxy-bench-")
        exits.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.empty = os.path.join(self.folder, "empty")
        os.mkdir(self.empty)
        api = self.start([sys.executable, os.path.abspath(__file__), "fake-api"], os.environ,
                         stdin=subprocess.PIPE)
        self.api_url = "http://127.0.0.1:" + api.stdout.readline().decode().strip()

    def environ(self, home):
        """Of a process that must not see the user's own login, settings or proxies."""
        path = os.path.join(self.folder, home)
        os.makedirs(path, exist_ok=True)
        outer = re.compile(r"CLAUDE|ANTHROPIC_|CCPROXY_|XDG_|\w+_proxy$", re.I)
        return {**{k: v for k, v in os.environ.items() if not outer.match(k)}, "HOME": path,
                "ANTHROPIC_BASE_URL": self.api_url, "ANTHROPIC_API_KEY": "sk-ant-dummy",
                "TMPDIR": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, argv, environ, **pipes):
        """A process in a group of its own, which is killed at the end whatever happens."""
        process = subprocess.Popen(argv, env=environ, cwd=self.empty, start_new_session=True, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL,
            **pipes})
        self.exits.callback(kill, process)
        return process


def kill(process):
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def request_body(messages, system):
    return {"model": MODEL, "max_tokens": 8192, "stream": True, "messages": messages,
            **({"system": system} if system else {})}


def user(text):
    return {"role": "user", "content": text}


class ByHand:
    """A CLI process, driven in the same steps as ccproxy drives its own."""

    def __init__(self, lab, system, agent=False):
        body = request_body([user("Count to four.")], system)
        launch = ccproxy.Launch(agent, permission_mode="default")
        self.turn, self.requests = dataclasses.replace(
            ccproxy.DIALECTS["messages"].parse(body), launch=launch), 0
        options = ccproxy.agent_options(launch, ccproxy.Settings()) if agent else ()
        variables = ccproxy.agent_env(
            ccproxy.parse_version(lab.version), False) if agent else ccproxy.CHAT_ENV
        self.process = lab.start(
            ccproxy.claude_argv(lab.command, "default", options), ccproxy.claude_env(
                lab.environ("hand"), 2, 2400, variables), stdin=subprocess.PIPE, bufsize=0)
        self.output = os.fdopen(os.dup(self.process.stdout.fileno()), "rb")

    def control(self, request):
        self.requests += 1
        return {"type": "control_request", "request_id": f"bench{self.requests}",
                "request": request}

    def initialize(self):
        return self.control(ccproxy.initialize_request(self.turn))

    def configure(self):
        return self.control(ccproxy.settings_request(self.turn, MODEL))

    def send(self, *lines):
        self.process.stdin.write(b"".join(ccproxy.encode_json(line) + b"\n" for line in lines))

    def until(self, mark):
        """Read lines until one holds the mark; when it came."""
        for line in self.output:
            if mark.search(line):
                return time.perf_counter()
        raise SystemExit(f"bench: the CLI ended before it said {mark.pattern.decode()}")

    def rehearse(self):
        """Initialise ahead, with one empty message that leaves nothing in the history."""
        self.send(self.initialize(), ccproxy.user_line(
            {"role": "user", "content": []}, str(uuid.uuid4()), False))
        self.until(RESULT)

    def ask(self, *before):
        """One turn: seconds to its first delta, and to its end."""
        start = time.perf_counter()
        self.send(*before, ccproxy.user_line(self.turn.messages[-1], str(uuid.uuid4())))
        first, total = self.until(DELTA), self.until(STOP)
        self.until(RESULT)                  # until then the CLI is busy with the turn
        return first - start, total - start


def ask_cold(lab, home="hand"):
    """`claude -p`: seconds from the start of the process to its first delta, and to its exit."""
    start, first = time.perf_counter(), 0.0
    process = lab.start([
        *lab.command, "-p", "Count to four.", "--output-format", "stream-json", "--verbose",
        "--include-partial-messages", "--model", MODEL, "--system-prompt", PROMPT, "--tools", "",
        "--strict-mcp-config", "--setting-sources", "", "--disable-slash-commands",
        "--no-session-persistence"], ccproxy.claude_env(lab.environ(home), 2, 2400))
    for line in process.stdout:
        if not first and DELTA.search(line):
            first = time.perf_counter() - start
    process.wait()
    if not first:
        raise SystemExit("bench: `claude -p` gave no answer")
    return first, time.perf_counter() - start


class Proxy:
    """`python ccproxy.py` as a user starts it, with a home and a state folder of its own."""

    def __init__(self, lab, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        started = time.perf_counter()
        self.process = lab.start([
            sys.executable, os.path.join(ROOT, "ccproxy.py"), "--port", str(self.port), "--quiet",
            "--claude", lab.claude, "--state-dir", os.path.join(lab.folder, "state"),
            "--cwd", lab.empty, *options],
            lab.environ("proxy"), stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(ConnectionError):
                self.get("/health")
                break
            if self.process.poll() is not None:
                raise SystemExit(f"bench: ccproxy ended with {self.process.returncode}")
            time.sleep(0.001)
        self.start_s = time.perf_counter() - started

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"x-api-key": KEY})
            return json.load(connection.getresponse())

    def await_spares(self, number=2):
        while self.get("/status")["processes"]["spare"] < number:
            time.sleep(0.05)

    def ask(self, text, system="", before=(), kind="new", prefix=""):
        """One streamed request: seconds to its first delta, and to its end."""
        body = json.dumps(request_body([*before, user(text)], system)).encode()
        start, first, data = time.perf_counter(), 0.0, b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S) as sock:
            sock.sendall(f"POST {prefix}/v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
                         f"x-api-key: {KEY}\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not data.endswith(b"\r\n0\r\n\r\n"):
                more = sock.recv(65536)
                data += more
                if not first and DELTA.search(data):
                    first = time.perf_counter() - start
                if not more or data[9:12] != b"200":
                    raise SystemExit(f"bench: the proxy answered {data[-500:]!r}")
        total = time.perf_counter() - start
        told = re.search(rb"X-CC-Conversation: (\w+)", data)
        if not told or told.group(1).decode() != kind:
            raise SystemExit(f"bench: expected a conversation that is {kind}, got {told}")
        self.said = "".join(map(json.loads, TEXT.findall(data.decode())))
        return first, total

    def rss_mb(self):
        """Resident memory without children, in MB."""
        told = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)],
                              stdout=subprocess.PIPE, check=True).stdout
        return int(told) / 1024

    def stop(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        kill(self.process)


def at_once(n, ask):
    """What `ask(number)` gives in n threads that start together."""
    barrier, answers = threading.Barrier(n), []

    def body(number):
        barrier.wait()
        answers.append(ask(number))
    threads = [threading.Thread(target=body, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) < n:
        raise SystemExit(f"bench: {n - len(answers)} of {n} requests at once failed")
    return answers


# == One round =====================================================================================

def play_round(lab, number, options, samples):
    """Measure every row once or a few times, on processes that are all of the same age."""
    step("starting processes")
    blank, ahead = ByHand(lab, PROMPT), ByHand(lab, PROMPT)
    bare, proxy = Proxy(lab), Proxy(lab, "--api-key", KEY)
    ahead.rehearse()
    bare.await_spares()

    def by_hand():
        step("by hand")
        samples["b0"].append(blank.ask(blank.initialize(), blank.configure()))
        time.sleep(SETTLE_S)
        samples["b1"].append(ahead.ask(ahead.configure()))
        for _ in range(options.follow_ups):
            time.sleep(SETTLE_S)
            samples["b"].append(ahead.ask())
        kill(blank.process)
        kill(ahead.process)

    def first_requests():
        step("first requests")
        samples["c1"].append(bare.ask("Count to four."))
        bare.stop()
        time.sleep(SETTLE_S)
        samples["c0"].append(proxy.ask("Count to four.", PROMPT))

    # In turns first and second, each after the same quiet: no row gains by its place.
    for part in (by_hand, first_requests)[::1 if number % 2 else -1]:
        proxy.await_spares()
        time.sleep(IDLE_S)
        part()

    step("new conversations")
    for row, systems in (("d1", [PROMPT] * options.new),
                         ("d0", [f"{PROMPT} ({n})" for n in range(options.new)])):
        for system in systems:
            time.sleep(options.pause)
            samples[row].append(proxy.ask("Count to four.", system))
    step("follow-ups")
    history = []
    for n in range(options.follow_ups + 1):
        time.sleep(options.pause if n < 2 else SETTLE_S)    # the new one has a spare refilled
        sample = proxy.ask(f"Again: {n}", PROMPT, history, "continued" if n else "new")
        samples["e"] += [sample] * (n > 0)
        history += [user(f"Again: {n}"), {"role": "assistant", "content": proxy.said}]
    samples["rss"].append(proxy.rss_mb())
    step("8 at once")
    time.sleep(options.pause)
    samples["f"] += at_once(8, lambda n: proxy.ask(f"Count to four. ({n})", PROMPT))
    step("agents")
    agent, history = ByHand(lab, "", agent=True), []
    agent.rehearse()
    proxy.ask("Count to four.", prefix="/sdk")          # from now on spares wait for agents, too
    proxy.await_spares(4)
    for n in range(options.follow_ups + 1):

        def by_hand_once():
            samples["h" if n else "h0"].append(agent.ask() if n else agent.ask(agent.configure()))

        def by_proxy_once():
            samples["g" if n else "g0"].append(proxy.ask(
                f"Again: {n}", "", history, "continued" if n else "new", "/sdk"))
        for part in (by_hand_once, by_proxy_once)[::1 if (number + n) % 2 else -1]:
            time.sleep(SETTLE_S if n else IDLE_S)
            part()
        history += [user(f"Again: {n}"), {"role": "assistant", "content": proxy.said}]
    kill(agent.process)
    proxy.stop()
    if lab.claude != "echo":                # the stand-in has no other mode
        step("claude -p")
        time.sleep(SETTLE_S)
        samples["a"].append(ask_cold(lab))
        samples["a8"] += at_once(8, lambda n: ask_cold(lab))


ROWS = (    # row, what it is, row to compare its first delta with, ms that it may be over
    ("a", "claude -p, cold", "", None),
    ("a8", "claude -p, cold, 8 at once", "", None),
    ("b0", "spare by hand, blank: initialised at the request", "", None),
    ("b1", "spare by hand, initialised ahead", "", None),
    ("b", "warm process by hand, a later turn", "", None),
    ("c0", "proxy, first request after 3 s idle, any prompt", "b0", 8),
    ("c1", "proxy, first request after 3 s idle, no prompt", "b1", 8),
    ("d0", "proxy, new conversation, another prompt", "b0", 8),
    ("d1", "proxy, new conversation, prompt as before", "b1", 8),
    ("e", "proxy, follow-up", "b", 5),
    ("f", "proxy, 8 new conversations at once", "a8", None),
    ("h0", "agent by hand, initialised ahead", "", None),
    ("h", "agent by hand, a later turn", "", None),
    ("g0", "agent, new conversation", "h0", 8),
    ("g", "agent, follow-up", "h", 5),
)


def table(samples):
    """The rows as text: median (lowest-highest) of the first delta, median total; difference and
    ratio of the medians, and the difference of the lowest, which a busy machine disturbs least."""
    yield f"{'':54}{'first delta ms':>22}{'total ms':>10}   compared with"
    first, lowest = ({row: pick(s[0] for s in samples[row]) * 1000 for row, *_ in ROWS
                      if samples[row]} for pick in (statistics.median, min))
    for row, text, base, over in ROWS:
        if row not in first:
            continue
        each = [1000 * s[0] for s in samples[row]]
        total = 1000 * statistics.median(s[1] for s in samples[row])
        spread = f"({min(each):.0f}-{max(each):.0f})"
        line = f"{row:4}{text:50}{first[row]:10.1f}{spread:>12}{total:10.1f}"
        if base in first:
            more = first[row] - first[base]
            line += (f"   {base:3}{more:+8.1f} ms  x{first[row] / first[base]:.2f}"
                     f"  ({lowest[row] - lowest[base]:+.1f} at the lowest)")
            line += judged(more, over, "to reach: +{:g} ms") if over is not None else ""
        yield line


def judged(value, goal, words, more=False):
    """The goal, and whether it was missed: a most, or with `more` a least."""
    return f"   {words.format(goal)}{'' if (value >= goal if more else value <= goal) else '  MISSED'}"


def measure_start(lab, times):
    """Milliseconds from the start of `python ccproxy.py` to its first answered /health, and those
    that Python takes to start and import asyncio; medians."""
    proxy_ms, python_ms = [], []
    for _ in range(times):
        step("start to /health")
        start = time.perf_counter()
        lab.start([sys.executable, "-c", "import asyncio"], lab.environ("proxy")).wait()
        python_ms.append(1000 * (time.perf_counter() - start))
        proxy = Proxy(lab)
        proxy_ms.append(1000 * proxy.start_s)
        proxy.stop()
    return statistics.median(proxy_ms), statistics.median(python_ms)


def load(lab, port, kind, connections, seconds, prefix=""):
    """(answers per second, median ms) that a client of that many connections sees."""
    step(f"{kind} on {connections} connections")
    argv = [sys.executable, os.path.abspath(__file__), "load", str(port), kind, str(connections),
            str(seconds), prefix]
    told = lab.start(argv, os.environ, stderr=None).communicate()[0].split()
    if len(told) != 2:
        raise SystemExit(f"bench: {kind} on {connections} connections failed")
    return float(told[0]), float(told[1])


def measure_health(lab, seconds, times):
    """Requests of /health per second, as {connections: median}; and resident MB before them."""
    proxy, rates = Proxy(lab, "--warm", "0"), {1: [], 16: []}
    rss = proxy.rss_mb()
    for _ in range(times):
        for connections, found in rates.items():
            found.append(load(lab, proxy.port, "health", connections, seconds)[0])
    proxy.stop()
    return {n: statistics.median(found) for n, found in rates.items()}, rss


RELAY_ROWS = (      # what is asked, connections, unit of the rate, events an answer, to reach
    ("messages", 1, "requests/s", 1, 1000), ("messages", 16, "requests/s", 1, 1000),
    ("messages", 64, "requests/s", 1, 1000),
    ("stream", 1, "deltas/s", DELTAS, 60000), ("stream", 32, "deltas/s", DELTAS, 60000),
    ("chat", 1, "deltas/s", DELTAS, 20000), ("chat", 32, "deltas/s", DELTAS, 20000))


def measure_relay(lab, seconds, times):
    """The rows of /api: what the proxy adds to an upstream that answers at once.  Each time every
    row is measured against the upstream itself and through the proxy; lines of text, medians."""
    api = lab.start([sys.executable, os.path.abspath(__file__), "upstream"], os.environ)
    port = int(api.stdout.readline())
    proxy = Proxy(lab, "--backend", "api", "--upstream-url", f"http://127.0.0.1:{port}")
    found = {row: ([], []) for row in RELAY_ROWS}
    for _ in range(times):
        for row, (direct, relayed) in found.items():
            direct.append(load(lab, port, *row[:2], seconds))
            relayed.append(load(lab, proxy.port, *row[:2], seconds, "/api"))
    proxy.stop()
    yield f"{'/api, upstream and client on the same machine':46}{'direct':>9}{'proxy':>9}"
    for (kind, connections, unit, events, goal), samples in found.items():
        (_, direct_ms), (rate, ms) = ([statistics.median(column) for column in zip(*side)]
                                      for side in samples)
        direct = statistics.median(sample[0] for sample in samples[0])
        line = (f"{kind}, {connections} connection{'s' * (connections > 1)}, {unit}".ljust(46)
                + f"{direct * events:9.0f}{rate * events:9.0f}"
                + judged(rate * events, goal, "to reach: {:g}", True))
        if kind == "messages" and connections == 1:
            line += f"   added {ms - direct_ms:.2f} ms" + judged(ms - direct_ms, 1, "to reach: {} ms")
        yield line


def step(what):
    """Each step has DEADLINE_S to end."""
    step.what = what
    signal.alarm(DEADLINE_S)


def too_late(*_):
    raise SystemExit(f"bench: {step.what}: nothing for {DEADLINE_S} s")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("CCPROXY_TEST_CLAUDE", "").split(os.pathsep)[0]
    parser.add_argument("--claude", default=given or shutil.which("claude") or "echo",
                        help="claude binary; echo is the stand-in (default: CCPROXY_TEST_CLAUDE's "
                        "first, else PATH's, else echo)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between new "
                        "conversations, in which a spare is refilled (default 1.5)")
    parser.add_argument("--quick", action="store_true", help="2 short rounds, about a minute")
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    options.new, options.follow_ups = (1, 3) if options.quick else (2, 5)
    return options


def main():
    options = parse_arguments()
    signal.signal(signal.SIGALRM, too_late)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as exits:
        lab = Lab(options.claude, exits)
        print(f"{lab.version}; Python {sys.version.split()[0]}; {os.cpu_count()} "
              f"cores, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds, {options.pause:g} s "
              "before each new conversation")
        if lab.claude == "echo":
            print("No claude binary: every row is of the built-in stand-in, not of Claude Code.")
        samples = {row: [] for row in ("rss", *(row for row, *_ in ROWS))}
        for home in ("hand", "proxy") if lab.claude != "echo" else ():
            ask_cold(lab, home)             # a first run in a new home does more
        for number in range(options.rounds):
            play_round(lab, number, options, samples)
        print("\n".join(table(samples)))
        start_ms, python_ms = measure_start(lab, 3 if options.quick else 5)
        rates, rss = measure_health(lab, 0.5 if options.quick else 2, 1 if options.quick else 3)
        print(f"start to first /health   {start_ms:6.0f} ms"
              + judged(start_ms, 150, "to reach: {} ms")
              + f"   (Python and asyncio alone: {python_ms:.0f} ms)")
        used = statistics.median(samples["rss"])
        print(f"memory without children  {used:6.1f} MB" + judged(used, 35, "to reach: {} MB")
              + f"   (before its first request: {rss:.1f} MB)")
        print("/health                  " + ", ".join(
            f"{rate:6.0f} requests/s on {n} connection{'s' * (n > 1)}"
            for n, rate in rates.items()))
        for line in measure_relay(lab, *((0.5, 1) if options.quick else (1.5, 3))):
            print(line)
        signal.alarm(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fake-api"]:
        run_api()
    elif sys.argv[1:2] == ["load"]:
        run_load(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]), *sys.argv[6:])
    elif sys.argv[1:2] == ["upstream"]:
        run_upstream()
    else:
        main()
