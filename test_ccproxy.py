"""Tests of ccproxy, in the order of its rooms.

The bench first: a fake Anthropic API and its clients.  Then what is pure; then the server, the
command line and misbehaving processes, with the stand-in as the CLI; last, marked real_cli, a real
claude binary (CCPROXY_TEST_CLAUDE or PATH) between the proxy and the fake API.
"""
import asyncio
import base64
import contextlib
import dataclasses
import errno
import gc
import glob
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ccproxy
from ccproxy import DIALECTS, ApiError, Message, Reply


# == The fake API and its clients =================================================================

# -- a fake Anthropic API: it records, obeys words in the last user text, and refuses what the real
#    one refuses (CLI-PROTOCOL 7)

STRICT = re.compile(r"opus-5-5|fable-5|sonnet-5-5")
NO_SAMPLING = re.compile(r"opus-4-[78]|opus-5|fable-5|sonnet-5-5|haiku-5-5")
NO_BUDGET = re.compile(r"opus-4-[78]|opus-5|fable-5|sonnet-5-5")
NO_FORMAT = NO_EFFORT = re.compile(r"sonnet-4-0")
TOOL_NAME = "^[a-zA-Z0-9_-]{1,128}$"
ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
               404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
               500: "api_error", 529: "overloaded_error"}
STOP_WORDS = {"MAXTOK": "max_tokens", "REFUSE": "refusal",
              "CONTEXT": "model_context_window_exceeded"}
USAGE = {"input_tokens": 10, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 5,
         "output_tokens": 1}


def objects(schema):
    """The schemas of objects in a schema, itself included."""
    found = [schema] if isinstance(schema, dict) and schema.get("type") == "object" else []
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(
        schema, list) else []
    return found + [each for value in inner for each in objects(value)]


def blocks_of(content):
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def refusal(body):
    """The message with which the real API would refuse `body`, or None."""
    return refused_parameters(body) or refused_history(body)


def refused_parameters(body):
    model, kind = body.get("model", ""), (body.get("thinking") or {}).get("type")
    thinks = kind in ("enabled", "adaptive") or (kind is None and STRICT.search(model))
    forced = (body.get("tool_choice") or {}).get("type") in ("any", "tool")
    warm = body.get("temperature", 1) != 1
    edits = (body.get("context_management") or {}).get("edits") or []
    for name in ("temperature", "top_p", "top_k"):
        if NO_SAMPLING.search(model) and name in body and (name != "temperature" or warm):
            return f"`{name}` is deprecated for this model."
    if thinks and (warm or "top_k" in body):
        return (f"`{'temperature' if warm else 'top_k'}` may only be set to 1 when thinking is "
                "enabled or in adaptive mode.")
    if "temperature" in body and "top_p" in body:
        return ("`temperature` and `top_p` cannot both be specified for this model. "
                "Please use only one.")
    if kind == "enabled" and NO_BUDGET.search(model):
        return ('"thinking.type.enabled" is not supported for this model. Use '
                '"thinking.type.adaptive" and "output_config.effort" to control thinking behavior.')
    if kind == "enabled" and body["thinking"].get("budget_tokens", 0) >= body.get("max_tokens", 0):
        return "`max_tokens` must be greater than `thinking.budget_tokens`."
    if kind == "disabled" and STRICT.search(model):
        return '"thinking.type.disabled" is not supported for this model.'
    if kind in (None, "disabled") and any(e["type"].startswith("clear_thinking") for e in edits):
        return ("`clear_thinking_20251015` strategy requires `thinking` to be enabled or adaptive")
    if forced and STRICT.search(model):
        return "tool_choice: forced tool use is not supported for this model."
    if forced and thinks:
        return "Thinking may not be enabled when tool_choice forces tool use."
    if not body.get("max_tokens"):
        return "max_tokens: Field required"
    if any(t.get("strict") and "minimum" in json.dumps(t) for t in body.get("tools") or []):
        return "tools.0.custom: For 'integer' type, properties maximum, minimum are not supported"
    form = (body.get("output_config") or {}).get("format")
    if form and NO_FORMAT.search(model):
        return "output_config.format: structured outputs are not supported for this model"
    if form and not all(inner.get("additionalProperties") is False for inner in objects(
            form["schema"])):
        return ("output_config.format.schema: For 'object' type, 'additionalProperties' must be "
                "explicitly set to false")
    if (body.get("output_config") or {}).get("effort") and NO_EFFORT.search(model):
        return "This model does not support the effort parameter."
    if kind == "adaptive" and NO_EFFORT.search(model):
        return "adaptive thinking is not supported on this model"
    if not all(re.match(TOOL_NAME, t.get("name", "")) for t in body.get("tools") or []):
        return f"tools.0.custom.name: String should match pattern '{TOOL_NAME}'"
    return None


def refused_history(body):
    messages = [m for m in body["messages"] if m["role"] != "system"]
    if messages[-1]["role"] == "assistant":
        return ("This model does not support assistant message prefill. The conversation must end "
                "with a user message.")
    calls = set()
    for at, message in enumerate(messages):
        blocks = blocks_of(message["content"])
        results = {b["tool_use_id"] for b in blocks if b["type"] == "tool_result"}
        if not blocks:
            return f"messages.{at}: all messages must have non-empty content"
        if message["role"] == "user" and calls - results:
            return (f"messages.{at}: `tool_use` ids were found without `tool_result` blocks "
                    f"immediately after: {', '.join(calls - results)}")
        if results - calls:
            return (f"messages.{at}: unexpected `tool_use_id` found in `tool_result` blocks: "
                    f"{', '.join(results - calls)}")
        if any(b["type"] == "text" and not b["text"].strip() for b in blocks):
            return "messages: text content blocks must contain non-whitespace text"
        if any(b["type"] == "thinking" and "REFUSED" in b.get("signature", "") for b in blocks):
            return (f"messages.{at}.content.0: `thinking` or `redacted_thinking` blocks in the "
                    "latest assistant message cannot be modified.")
        calls = {b["id"] for b in blocks if b["type"] == "tool_use"}
    marked = [*blocks_of(body.get("system") or []), *(body.get("tools") or []),
              *(b for m in messages for b in blocks_of(m["content"]))]
    marks = sum("cache_control" in block for block in marked)
    return f"A maximum of 4 blocks with cache_control may be provided. Found {marks}." * (marks > 4)


MODELS = {"claude-sonnet-4-6": "2026-02-01T00:00:00Z", "claude-opus-5": "2026-08-01T00:00:00Z",
          "claude-sonnet-5": "2026-06-01T00:00:00Z", "house-model": "2024-01-01T00:00:00Z"}


class FakeAPI:
    """The Anthropic API on loopback.  The last user text may hold these words:

    ERR:429 WAIT:60     fail, with Retry-After      STREAMERR, DROP     fail after two words
    LONG:9              say nine words              SLOW                wait 0.1 s after each
    THINK               think first                 EMPTY               say nothing
    CALL:name ARGS:{}   call a tool (or several)    SAY                 speak before that
    JSON:{} THEN:{}     answer a schema; the second once the first was refused (NOJSON: never)
    MAXTOK, REFUSE, CONTEXT     end for that reason; anything else is repeated: "You said: ..."
    """

    def __init__(self):
        self.bodies = []        # Messages requests that came, in order
        self.counted = []       # count_tokens requests
        self.heads = []         # (method, path, headers) of all
        self.refusals = []      # messages of the 400s that `refusal` gave
        self.broken = 0         # answers that nobody waited for
        self.delay = 0.0        # seconds before an answer
        self.used = USAGE["input_tokens"]       # what answers say of their input
        self.limit = 10**9      # bytes of messages above which a prompt is refused as too long
        self._lock, self._ids = threading.Lock(), itertools.count(1)
        handler = type("Handler", (FakeHandler,), {"fake": self})
        self._server = FakeServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def clear(self):
        with self._lock:
            self.bodies, self.counted, self.refusals, self.broken = [], [], [], 0
            self.heads = []

    def note(self, slot, value):
        with self._lock:
            getattr(self, slot).append(value)

    def count_broken(self):
        with self._lock:
            self.broken += 1

    def new_id(self, kind):
        return f"{kind}_{next(self._ids):016x}"


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass


class FakeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake = None

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.reply(200, {})

    def do_GET(self):
        self.fake.note("heads", (self.command, self.path, dict(self.headers)))
        if not self.path.startswith("/v1/models"):
            return self.fail(404, "nothing here")
        return self.reply(200, {"has_more": False, "data": [
            {"type": "model", "id": name, "display_name": name.title(), "created_at": made}
            for name, made in MODELS.items()]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.fake.note("heads", (self.command, self.path, dict(self.headers)))
        if "count_tokens" in self.path:
            self.fake.note("counted", body)
            return self.reply(200, {"input_tokens": len(json.dumps(body.get("messages"))) // 4})
        self.fake.note("bodies", body)
        no = refusal(body)
        if len(json.dumps(heard(body))) > self.fake.limit:
            no = "prompt is too long: 210000 tokens > 200000 maximum"
        if no:
            self.fake.note("refusals", no)
            return self.fail(400, no)
        try:
            self.answer(body)
        except OSError:
            self.close_connection = True
            self.fake.count_broken()

    def reply(self, status, value, **headers):
        data = json.dumps(value).encode() if self.command != "HEAD" else b""
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)),
                           "request-id": "req_fake", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status, message, retry_after=None):
        error = {"type": ERROR_TYPES[status], "message": message}
        self.reply(status, {"type": "error", "error": error},
                   **({"retry_after": retry_after} if retry_after else {}))

    def frame(self, kind, **fields):
        data = f"event: {kind}\ndata: {json.dumps(dict(type=kind, **fields))}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def block(self, start, deltas):
        self.frame("content_block_start", index=self.index, content_block=start)
        for delta in deltas:
            self.frame("content_block_delta", index=self.index, delta=delta)
        self.frame("content_block_stop", index=self.index)
        self.index += 1

    # -- an answer

    def answer(self, body):
        last = blocks_of([m for m in body["messages"] if m["role"] == "user"][-1]["content"])
        results = [b for b in last if b["type"] == "tool_result"]
        text = own_text(last)
        failed, wait = re.search(r"ERR:(\d+)", text), re.search(r"WAIT:(\d+)", text)
        if failed:
            status = int(failed.group(1))
            return self.fail(status, f"fake {ERROR_TYPES[status]}", wait and wait.group(1))
        if not body.get("stream"):
            return self.reply(200, {
                "model": body["model"], "id": self.fake.new_id("msg"), "type": "message",
                "role": "assistant", "content": [{"type": "text", "text": f"You said: {text}"}],
                "stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE})
        self.start(body["model"])
        if "THINK" in text:
            self.block({"type": "thinking", "thinking": "", "signature": ""}, [
                {"type": "thinking_delta", "thinking": "let me "},
                {"type": "thinking_delta", "thinking": "see"},
                {"type": "signature_delta", "signature": "SIGNED"}])
        stop, sequence = "end_turn", None
        calls = re.findall(r"CALL:(\S+) ARGS:(\{.*?\})(?= CALL|$|\n)", text)
        if any(t["name"] == "StructuredOutput" for t in body.get("tools") or []) and not calls:
            calls = self.structured(body, results)
        if calls:
            stop = "tool_use"
            self.call(calls, "SAY" in text)
            if "STREAMERR" in text:
                time.sleep(0.1)         # behind a finished call
                self.frame("error", error={"type": "overloaded_error", "message": "Overloaded"})
                self.wfile.write(b"0\r\n\r\n")
                return None
        elif (body.get("output_config") or {}).get("format"):
            self.speak(self.structured(body, results)[0][1], "")
        elif "EMPTY" not in text and not self.speak(text):
            return None
        stop = next((reason for word, reason in STOP_WORDS.items() if word in text), stop)
        for wanted in body.get("stop_sequences") or []:
            if wanted in text:
                stop, sequence = "stop_sequence", wanted
        self.frame("message_delta", delta={"stop_reason": stop, "stop_sequence": sequence},
                   usage={"output_tokens": 7})
        self.frame("message_stop")
        self.wfile.write(b"0\r\n\r\n")
        return None

    def start(self, model):
        self.index = 0
        self.send_response(200)
        for name, text in (("Content-Type", "text/event-stream"), ("request-id", "req_fake"),
                           ("Transfer-Encoding", "chunked")):
            self.send_header(name, text)
        self.end_headers()
        time.sleep(self.fake.delay)
        self.frame("message_start", message={
            "id": self.fake.new_id("msg"), "type": "message", "role": "assistant", "model": model,
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {**USAGE, "input_tokens": self.fake.used}})

    def structured(self, body, results):
        """What the model gives for a schema: JSON:{...}, and THEN:{...} once that was refused."""
        told = [own_text(blocks_of(m["content"])) for m in body["messages"] if m["role"] == "user"]
        asked = [text for text in told if "JSON" in text]
        if asked and "NOJSON" in asked[-1]:
            return []
        word = "THEN" if any(b.get("is_error") for b in results) else "JSON"
        found = re.search(word + r":(\{.*?\})(?= THEN:|$)", asked[-1] if asked else "")
        return [("StructuredOutput", found.group(1) if found else '{"answer": "x"}')]

    def call(self, calls, say):
        if say:
            self.block({"type": "text", "text": ""},
                       [{"type": "text_delta", "text": "Let me look."}])
        for name, arguments in calls:
            self.block({"type": "tool_use", "id": self.fake.new_id("toolu"), "name": name,
                        "input": {}}, [
                {"type": "input_json_delta", "partial_json": arguments[at:at + 8]}
                for at in range(0, len(arguments), 8)])

    def speak(self, text, opening="You said: "):
        """Say some words; False if the stream was broken on the way."""
        long = re.search(r"LONG:(\d+)", text)
        words = [f"w{n}" for n in range(int(long.group(1)))] if long else (
            f"{opening}{text}".split(" "))
        self.frame("content_block_start", index=self.index,
                   content_block={"type": "text", "text": ""})
        for at, word in enumerate(words):
            self.frame("content_block_delta", index=self.index, delta={
                "type": "text_delta", "text": word + " " * (at + 1 < len(words))})
            time.sleep(0.1 if "SLOW" in text else 0)
            if at == 1 and "DROP" in text:
                time.sleep(0.2)         # or the CLI sees the end before the words
                self.close_connection = True
                self.connection.shutdown(2)
                return False
            if at == 1 and "STREAMERR" in text:
                self.frame("error", error={"type": "overloaded_error", "message": "Overloaded"})
                self.wfile.write(b"0\r\n\r\n")
                return False
        self.frame("content_block_stop", index=self.index)
        return True


def own_text(blocks):
    """The last text of a user's message that is not the CLI's note; else that of its results."""
    texts = [b["text"] for b in blocks if b["type"] == "text" and not is_note(b)]
    results = [part.get("text", "") for b in blocks if b["type"] == "tool_result"
               for part in blocks_of(b.get("content") or "") if not is_note(part)]
    return texts[-1] if texts else "\n".join(filter(None, results)).strip()


def is_note(block):
    return block["type"] == "text" and block["text"].lstrip().startswith("<system-reminder>")


def heard(body):
    """The conversation that reached the API: [(role, blocks)] without the CLI's notes and marks.

    A result's text and a list of that text mean the same, and so do is_error: false and none.
    When tool results are all that is new, 2.1.330 puts its note into the last of them, after "\\n".
    """
    def plain(block):
        block = {k: v for k, v in block.items() if k != "cache_control"}
        if block["type"] == "tool_result":
            parts = [dict(part) for part in blocks_of(block.get("content") or [])]
            if parts and is_note(parts[-1]):
                del parts[-1]
                if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] = re.sub(r"\n\Z", "", parts[-1]["text"])
            block["content"] = parts
            block.update({"is_error": True} if block.pop("is_error", False) else {})
        return block
    return [(m["role"], [plain(b) for b in blocks_of(m["content"]) if not is_note(b)])
            for m in body["messages"] if m["role"] != "system"]


# -- a client

class Events(list):
    """(event, data) of a stream in order, data parsed but for [DONE]; with the answer's head."""
    status, headers = 0, None


def connect(url, path, body, headers=None, method="POST"):
    """Send a request: (connection, response whose body is not read yet)."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json",
                                                **(headers or {})})
        return connection, connection.getresponse()
    except OSError:
        connection.close()              # at once: the proxy ends the turn
        raise


def post(url, path, body, headers=None, method="POST"):
    """(status, headers, JSON) of a whole answer."""
    connection, response = connect(url, path, body, headers, method)
    with contextlib.closing(connection):
        return response.status, response.headers, json.loads(response.read())


def get(url, path):
    return post(url, path, None, method="GET")


def stream(url, path, body, headers=None):
    """The events of a streamed answer."""
    connection, response = connect(url, path, {**body, "stream": True}, headers)
    with contextlib.closing(connection):
        text, events = response.read().decode("utf-8"), Events()
    events.status, events.headers = response.status, response.headers
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        events.append(("", json.loads(text)))
        return events
    for frame in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        data = fields["data"]
        events.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}


class Said(NamedTuple):
    """What came back, the same for each dialect, whole and streamed."""
    status: int
    headers: Any
    raw: Any                # JSON, or the events
    message: Any            # the assistant's, as the client puts it into its history; or items
    text: str
    thinking: str
    calls: list             # [(id, name, arguments)]
    finish: Any             # finish_reason; Messages: (stop_reason, stop_sequence)
    usage: Any


def read_chat(events):
    """A Chat stream as the whole answer that says the same."""
    message, calls, finish, usage, model = {"role": "assistant"}, {}, [], None, None
    for _, data in events:
        if data == "[DONE]" or "error" in data:
            continue
        usage, model = data.get("usage") or usage, data["model"]
        for choice in data["choices"]:
            finish += filter(None, [choice["finish_reason"]])
            for name, value in choice["delta"].items():
                if name in ("content", "reasoning_content"):
                    message[name] = message.get(name, "") + value
                for piece in value if name == "tool_calls" else ():
                    function = piece.pop("function")
                    call = calls.setdefault(piece.pop("index"), {"function": {}})
                    call.update(piece)
                    for key, text in function.items():
                        call["function"][key] = call["function"].get(key, "") + text
                for key, text in value.items() if name == "function_call" else ():
                    old = message.setdefault("function_call", {})
                    old[key] = old.get(key, "") + text
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return {"choices": [{"message": message, "finish_reason": finish[0] if finish else None}],
            "usage": usage, "model": model, "finishes": finish}


def read_messages(events):
    """A Messages stream as the whole answer that says the same."""
    answer, pieces = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": {}}, ""
    for kind, data in events:
        if kind == "message_start":
            answer = {**answer, **data["message"]}
        elif kind == "content_block_start":
            answer["content"].append(dict(data["content_block"]))
            pieces = ""
        elif kind == "content_block_delta":
            delta = {**data["delta"]}
            delta.pop("type")
            pieces += delta.pop("partial_json", "")
            for name, text in delta.items():
                answer["content"][data["index"]][name] += text
        elif kind == "content_block_stop" and answer["content"][-1]["type"] == "tool_use":
            answer["content"][-1]["input"] = json.loads(pieces)
        elif kind == "message_delta":
            answer.update(data["delta"], usage={**answer["usage"], **data["usage"]})
    return answer


def read_responses(events):
    """The response of a Responses stream, checked to be what the events before it have told."""
    told = [data for _, data in events]
    assert [name for name, _ in events] == [data["type"] for data in told]
    assert [data["sequence_number"] for data in told] == list(range(len(told)))
    assert [data["type"] for data in told[:2]] == ["response.created", "response.in_progress"]
    assert len({data["response"]["id"] for data in told if "response" in data}) == 1
    added, done, pieces = {}, {}, {}
    for data in told:
        kind, at = data["type"].rpartition(".")[2], data.get("output_index")
        if data["type"] == "response.output_item.added":
            added[at] = data["item"]
        elif data["type"] == "response.output_item.done":
            done[at] = data["item"]
            assert [data["item"][key] for key in ("id", "type")] == [
                added[at][key] for key in ("id", "type")]
        elif kind == "delta":
            pieces[at] = pieces.get(at, "") + data["delta"]
        elif kind == "done" and "part" not in data:
            whole = data.get("text", data.get("arguments", data.get("input")))
            assert whole == pieces.get(at, "")
        assert "item_id" not in data or data["item_id"] == added[at]["id"]
    last = told[-1]["response"]
    if last["status"] in ("completed", "incomplete"):
        assert last["output"] == [done[at] for at in range(len(done))]
        assert told[-1]["type"] == "response." + last["status"]
    return last


READERS = {"chat": read_chat, "messages": read_messages, "responses": read_responses}


class Client:
    """One conversation of a client that keeps its history itself, and sends all of it each time."""

    prefix, headers = "", None

    def __init__(self, url, dialect, **fields):
        self.url, self.dialect, self.messages = url, dialect, []
        self.fields = {"model": MODEL, **({"max_tokens": 5000} if dialect == "messages" else {}),
                       **fields}

    def ask(self, *messages, streamed=False, **fields):
        """Send messages (text and parts are the user's) with what was said before."""
        self.messages = self.messages + [m if isinstance(m, dict) else {
            "role": "user", "content": m} for m in messages]
        slot = "input" if self.dialect == "responses" else "messages"
        self.body = {**self.fields, **fields, slot: self.messages}
        said = self.again(streamed)
        if said.status == 200:
            self.messages = self.messages + (
                said.message if isinstance(said.message, list) else [said.message])
        return said

    def again(self, streamed=False):
        """The same request once more."""
        path = self.prefix + PATHS[self.dialect]
        if not streamed:
            status, headers, raw = post(self.url, path, self.body, self.headers)
            answer = raw
        else:
            usage = {"stream_options": {"include_usage": True}} if self.dialect == "chat" else {}
            raw = stream(self.url, path, {**self.body, **usage}, self.headers)
            status, headers = raw.status, raw.headers
            answer = READERS[self.dialect](raw) if status == 200 else raw
        if status != 200:
            return Said(status, headers, raw, {}, "", "", [], None, None)
        read = {"chat": self._chat, "messages": self._messages, "responses": self._responses}
        return Said(status, headers, raw, *read[self.dialect](answer))

    def _responses(self, answer):
        items = answer["output"]
        calls = [(c["call_id"], c["name"], json.loads(c["arguments"]) if "arguments" in c else
                  c["input"]) for c in items if "call_id" in c]
        finish = "tool_calls" if calls else "stop"
        if answer["incomplete_details"]:
            finish = {"max_output_tokens": "length", "content_filter": "content_filter"}[
                answer["incomplete_details"]["reason"]]
        return (items, "".join(part["text"] for item in items if item["type"] == "message"
                               for part in item["content"]),
                "".join(part["text"] for item in items if item["type"] == "reasoning"
                        for part in item["summary"]), calls, finish, answer["usage"])

    def _chat(self, answer):
        message = answer["choices"][0]["message"]
        calls = [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
                 for c in message.get("tool_calls") or []]
        return (message, message.get("content") or "", message.get("reasoning_content") or "",
                calls, answer["choices"][0]["finish_reason"], answer["usage"])

    def _messages(self, answer):
        content = answer["content"]
        return ({"role": "assistant", "content": content},
                "".join(b["text"] for b in content if b["type"] == "text"),
                "".join(b["thinking"] for b in content if b["type"] == "thinking"),
                [(b["id"], b["name"], b["input"]) for b in content if b["type"] == "tool_use"],
                (answer["stop_reason"], answer["stop_sequence"]), answer["usage"])

    def results(self, *results):
        """Messages with tool results, given as (call id, content[, is_error])."""
        if self.dialect == "chat":
            return [{"role": "tool", "tool_call_id": call, "content": content}
                    for call, content, *_ in results]
        if self.dialect == "responses":
            return [{"type": "function_call_output", "call_id": call, "output": content}
                    for call, content, *_ in results]
        return [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call, "content": content,
             **({"is_error": True} if failed else {})} for call, content, *failed in results]}]


# -- agents

AGENT_KEY = {"Authorization": "Bearer k"}


class Agent(Client):
    """A client of Claude Code with its tools; headers as Agent(url, "chat", Workspace="web")."""
    prefix = "/sdk"

    def __init__(self, url, dialect="messages", fields=(), **headers):
        super().__init__(url, dialect, **dict(fields))
        self.headers = {**AGENT_KEY, **{f"X-CC-{name.replace('_', '-')}": value
                                  for name, value in headers.items()}}


class Listener:
    """Somebody who answers questions about permissions: `answer(question)` gives the body, or None
    to say nothing.  .events is what he was told, as (event, question)."""

    def __init__(self, url, answer=None, headers=AGENT_KEY):
        self.url, self.headers, self.answer, self.events = url, headers, answer, []
        self.status = 0                     # of his last answer

    def __enter__(self):
        self.connection, self.response = connect(self.url, "/permissions/stream", None,
                                                 self.headers, "GET")
        assert self.response.status == 200
        assert self.response.readline() == b": listening\n"
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def _read(self):
        event = ""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for line in self.response:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                event = value if name == "event" else event
                if name == "data":
                    question = json.loads(value)
                    self.events.append((event, question))
                    said = self.answer and event == "request" and self.answer(question)
                    if said:
                        self.status = post(self.url, f"/permissions/{question['id']}/respond", said,
                                           self.headers)[0]

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.thread.join(5)


@contextlib.contextmanager
def terminal(tmp_path, url, key="k"):
    """`ccproxy.py approve` in a pseudo-terminal: read(until) and write(text)."""
    import pty
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, ccproxy.__file__, "approve", "--url", url, "--key",
                                key], stdin=slave, stdout=slave, stderr=slave, cwd=str(tmp_path),
                               env=environment(tmp_path), start_new_session=True)
    os.close(slave)
    held = bytearray()

    def read(until_text, seconds=15):
        deadline = time.monotonic() + seconds
        while until_text.encode() not in held:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([master], [], [], left)[0], bytes(held)
            held.extend(os.read(master, 65536))
        shown, _, rest = bytes(held).partition(until_text.encode())
        held[:] = rest
        return (shown.decode() + until_text).replace("\r\n", "\n")
    def write(text, pause=0.8):             # nobody reads a question faster
        time.sleep(pause)
        os.write(master, text.encode())
    try:
        yield read, write
    finally:
        process.kill()
        process.wait()
        os.close(master)


# -- a proxy with a real CLI behind it
MODEL = "claude-sonnet-4-6"     # takes sampling parameters and thinking; the default in these tests

def claude_binaries():
    wanted = os.environ.get("CCPROXY_TEST_CLAUDE")
    paths = wanted.split(os.pathsep) if wanted else [shutil.which("claude")]
    return [path for path in paths if path]


def processes():
    """Living processes: pid -> its parent's pid."""
    ps = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE)
    rows = [line.split() for line in ps.communicate()[0].decode().splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows
            if int(pid) != ps.pid and not state.startswith("Z")}


def children(of=None):
    """Process ids of the CLIs that a process, this one unless told otherwise, has started."""
    return {pid for pid, parent in processes().items() if parent == (of or os.getpid())}


def kill_children(url):
    """kill -9 the CLIs of this process, and wait until the proxy at `url` has noticed."""
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def noticed():
        now = get(url, "/status")[2]["processes"]
        return now["idle"] + now["parked"] == 0
    assert until(noticed, 5)


def until(condition, within_s=5.0):
    """The condition's value as soon as it is true, else its last one."""
    deadline = time.monotonic() + within_s
    while True:                             # once each time: the next one may say something else
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.02)


class Bench:
    """A fake API, the environment that points a CLI at it, and a proxy on that CLI."""
    url = ""

    def __init__(self, claude, folder):
        self.claude, self.folder, self.api = claude, folder, FakeAPI()

    @contextlib.contextmanager
    def proxy(self, state="state", **settings):
        """A further proxy, with its own processes; the same `state` shares what was learned."""
        with ccproxy.running(claude=self.claude, state_dir=os.path.join(self.folder, state), **{
                "model": MODEL, "retries": 0, "warm": 1, **settings}) as url:
            yield url


@pytest.fixture(scope="module", params=claude_binaries() or [None],
                ids=lambda path: re.sub(r"^/|/node_modules.*", "", str(path)))
def bench(request, tmp_path_factory):
    """One proxy for a binary and a module; its environment is undone afterwards."""
    if request.param is None:
        pytest.skip("no claude binary: set CCPROXY_TEST_CLAUDE, or put one on PATH")
    bench = Bench(request.param, str(tmp_path_factory.mktemp("real")))
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("CLAUDE", "ANTHROPIC"))]:
            patch.delenv(name)
        for name, value in {"HOME": str(home), "USERPROFILE": str(home),
                            "ANTHROPIC_BASE_URL": bench.api.url,
                            "ANTHROPIC_API_KEY": "sk-ant-dummy"}.items():
            patch.setenv(name, value)
        with bench.proxy() as bench.url:
            yield bench
    bench.api.close()


@pytest.fixture
def real(bench):
    """The proxy's .url and the fake .api, which has heard nothing yet, nor will from before."""
    def settled():          # a CLI that is being ended may still have a request under way
        return len(children()) == get(bench.url, "/status")[2]["processes"]["all"]
    assert until(settled, 10)
    bench.api.clear()
    return bench


# == Pure: vocabulary, dialects, protocol, keys, wire ==============================================

BOTH = pytest.mark.parametrize("dialect", ["chat", "messages"])
ALL = pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
HERE = os.path.dirname(os.path.abspath(__file__))


# == The bench: events as the API sends them, bodies as callers do =================================

def start(**usage):
    return {"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-real",
        "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": usage or {"input_tokens": 10, "output_tokens": 1}}}


def block(index, content_block, *deltas):
    return [{"type": "content_block_start", "index": index, "content_block": content_block},
            *({"type": "content_block_delta", "index": index, "delta": d} for d in deltas),
            {"type": "content_block_stop", "index": index}]


def text(index, *pieces):
    return block(index, {"type": "text", "text": ""},
                 *({"type": "text_delta", "text": piece} for piece in pieces))


def thinking(index, *pieces, signature="sig=="):
    return block(index, {"type": "thinking", "thinking": "", "signature": ""},
                 *({"type": "thinking_delta", "thinking": piece} for piece in pieces),
                 {"type": "signature_delta", "signature": signature})


def call(index, ident, name, *pieces):
    return block(index, {"type": "tool_use", "id": ident, "name": name, "input": {}},
                 *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


def end(reason="end_turn", sequence=None, **usage):
    return [{"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
             "usage": usage or {"output_tokens": 7}}, {"type": "message_stop"}]


PING = {"type": "ping"}


def fresh(wants=()):
    wants = wants if isinstance(wants, dict) else dict.fromkeys(wants, True)
    return Message(ticket="abc", model="asked", created=5, wants=wants)


def fold(events):
    message = fresh()
    for event in events:
        message.add(event)
    return message


def pure_stream(dialect, events, wants=()):
    """The bytes that a client of the dialect receives; `wants` as names or as a dict."""
    message, frames = fresh(wants), []
    for event in events:
        message.add(event)
        told = DIALECTS[dialect].frames(message, event)
        frames, message.sent = frames + told, message.sent + len(told)
    return b"".join(frames)


def sse(data):
    """SSE bytes as [(event name or "", data)], every frame checked to be one."""
    frames = []
    assert data.endswith(b"\n\n") or not data
    for frame in data.decode("ascii").split("\n\n")[:-1]:
        found = re.fullmatch(r"(?:event: ([\w.]+)\n)?data: (.+)", frame)
        assert found, frame
        value = found.group(2)
        frames.append((found.group(1) or "", value if value == "[DONE]" else json.loads(value)))
    return frames


def chunks(events, wants=()):
    return [value for _, value in sse(pure_stream("chat", events, wants))]


def deltas(events, wants=()):
    """Per chunk with a choice: its delta, or its finish reason."""
    return [c["choices"][0]["finish_reason"] or c["choices"][0]["delta"]
            for c in chunks(events, wants) if c != "[DONE]" and c.get("choices")]


def chat_body(events, wants=()):
    message = fold(events)
    message.wants = fresh(wants).wants
    return DIALECTS["chat"].body(message)


HELLO = [start(), *text(0, "Hel", "lo"), *end()]
TOOLS = [start(), *text(0, "Let me look."),
         *call(1, "toolu_1", "get_weather", "", '{"ci', 'ty":"P"}'),
         *call(2, "toolu_2", "get_time", '{"zone":"CET"}'), *end("tool_use")]
THOUGHT = [start(), *thinking(0, "Let me ", "think."), *text(1, "Done."), *end()]


def parse(dialect, messages=None, **fields):
    messages = [{"role": "user", "content": "hi"}] if messages is None else messages
    return DIALECTS[dialect].parse({"model": "m", "messages": messages, **fields})


def refused(dialect, body):
    """The ApiError of a body that has to be refused with 400."""
    with pytest.raises(ApiError) as caught:
        DIALECTS[dialect].parse(body)
    assert caught.value.status == 400
    return caught.value


def said_settings(asked, model=None):
    settings = ccproxy.settings_request(asked, model)
    assert settings["subtype"] == "apply_flag_settings"
    return settings["settings"], json.loads(settings["settings"]["env"]["CLAUDE_CODE_EXTRA_BODY"])


def user(*content):
    return {"role": "user", "content": list(content)}


def said(value):
    return {"type": "text", "text": value}


def b64(data):
    return base64.b64encode(data).decode()


PNG, PDF = b64(b"\x89PNG"), b64(b"%PDF-1")
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
DOCUMENT = {"type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}
WEATHER = {"name": "get_weather", "description": "of a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
NESTED = {"type": "function", "function": {"name": "get_weather", "description": "of a city",
                                           "parameters": WEATHER["input_schema"]}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "P"}}
CHAT_CALL = {"id": "toolu_1", "type": "function",
             "function": {"name": "get_weather", "arguments": '{"city": "P"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]}


ON = {"type": "enabled", "budget_tokens": 2000}
ADAPTIVE, OFF = {"type": "adaptive"}, {"type": "disabled"}


def result(content="sunny", ident="toolu_1", **more):
    return {"type": "tool_result", "tool_use_id": ident, "content": content, **more}


# == 1. Vocabulary: the fold =======================================================================

@pytest.mark.parametrize("events, content", [
    (text(0, "Hel", "lo"), [said("Hello")]),
    (text(0), [said("")]),
    (thinking(0, "a", "b", signature="s"),
     [{"type": "thinking", "thinking": "ab", "signature": "s"}]),
    (thinking(0), [{"type": "thinking", "thinking": "", "signature": "sig=="}]),
    (call(0, "t", "f", "", '{"a"', ":[1,", '2]}'),
     [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1, 2]}}]),
    (call(0, "t", "f"), [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]),
    (call(0, "t", "f", ""), [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]),
    (call(0, "t", "f", "{}"), [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]),
    (call(0, "t", "f", '{"a": "cut'),
     [{"type": "tool_use", "id": "t", "name": "f", "input": '{"a": "cut'}]),
    (block(0, {"type": "redacted_thinking", "data": "xyz"}),
     [{"type": "redacted_thinking", "data": "xyz"}]),
    (block(0, {"type": "of_the_future", "x": 1}, {"type": "future_delta", "y": 2}),
     [{"type": "of_the_future", "x": 1}]),
    (block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"}, {"y": 2}),
     [said("a")]),
    (text(0, "a") + text(1, "b"), [said("a"), said("b")]),
    (block(0, said("al"), {"type": "text_delta", "text": "so"}), [said("also")]),
])
def test_the_fold_of_events_is_the_content_that_they_tell_of(events, content):
    assert fold([start(), *events, *end()]).content == content


@pytest.mark.parametrize("opening", [{}, {"citations": []}, {"citations": None}])
def test_citations_are_collected_on_their_block(opening):
    one, two = {"type": "char_location", "cited_text": "x"}, {"type": "page", "cited_text": "y"}
    message = fold([start(), *block(
        0, {"type": "text", "text": "", **opening}, {"type": "citations_delta", "citation": one},
        {"type": "text_delta", "text": "t"}, {"type": "citations_delta", "citation": two}), *end()])
    assert message.content == [{"type": "text", "text": "t", "citations": [one, two]}]


def test_folding_does_not_alter_the_events():
    events = [start(), *block(0, {"type": "text", "text": "", "citations": []},
                              {"type": "citations_delta", "citation": {"n": 1}}), *TOOLS[1:]]
    before = json.dumps(events)
    fold(events)
    assert json.dumps(events) == before


def test_later_usage_replaces_earlier_field_by_field_and_null_replaces_nothing():
    message = fold([start(input_tokens=10, cache_read_input_tokens=4, output_tokens=1),
                    *text(0, "a"),
                    *end(output_tokens=7, cache_read_input_tokens=None, extra={"n": 1})])
    assert message.usage == {"input_tokens": 10, "cache_read_input_tokens": 4, "output_tokens": 7,
                             "extra": {"n": 1}}


@pytest.mark.parametrize("event", [{"type": "of_the_future"}, PING, {"type": "error", "error": {}}])
def test_an_event_without_content_leaves_the_content_alone(event):
    message = fold([start(), event, *text(0, "a"), event, *end()])
    assert (message.content, message.stop_reason, message.done) == ([said("a")], "end_turn", True)


def test_a_message_knows_its_identity_its_end_and_its_stop_sequence():
    message = fold([start(), *text(0, "a"), *end("stop_sequence", "END")])
    assert (DIALECTS["messages"].body(message)["id"], message.model) == ("msg_1", "asked")
    assert (message.stop_reason, message.stop_sequence, message.done) == (
        "stop_sequence", "END", True)
    assert not fold([start(), *text(0, "a"), end()[0]]).done


# == 3. HTTP wire ==================================================================================

def head(*lines, first="POST /v1/messages HTTP/1.1", host="Host: localhost"):
    return "\r\n".join([first, *([host] if host else []), *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize("raw, expected", [
    (head(), ("POST", "/v1/messages", 0, True)),
    (head("Content-Length: 12"), ("POST", "/v1/messages", 12, True)),
    (head("content-LENGTH:12"), ("POST", "/v1/messages", 12, True)),
    (head("Content-Length: \t12 \t"), ("POST", "/v1/messages", 12, True)),
    (head("Transfer-Encoding: chunked"), ("POST", "/v1/messages", None, True)),
    (head("Transfer-Encoding: Chunked"), ("POST", "/v1/messages", None, True)),
    (head("Connection: close"), ("POST", "/v1/messages", 0, False)),
    (head("Connection: x, Close"), ("POST", "/v1/messages", 0, False)),
    (head("X-Odd: \xe9\xff"), ("POST", "/v1/messages", 0, True)),
    (head("X-Empty:"), ("POST", "/v1/messages", 0, True)),
    (head(first="GET / HTTP/1.0", host=""), ("GET", "/", 0, False)),
    (head("Connection: keep-alive", first="GET / HTTP/1.0", host=""), ("GET", "/", 0, True)),
    (head(first="GET /a%20b?beta=true#x HTTP/1.1"), ("GET", "/a b", 0, True)),
    (head(first="GET http://h:1/a?b HTTP/1.1"), ("GET", "/a", 0, True)),
    (head(first="GET HTTP://h HTTP/1.1"), ("GET", "/", 0, True)),
    (head(first="OPTIONS * HTTP/1.1"), ("OPTIONS", "/", 0, True)),
    (head(first="GET /%ff HTTP/1.1"), ("GET", "/\ufffd", 0, True)),
])
def test_a_valid_head_is_read_as_it_is(raw, expected):
    request = ccproxy.parse_head(raw)
    assert (request.method, request.path, request.length, request.keep_alive) == expected


@pytest.mark.parametrize("raw, status", [
    (head(host=""), 400),
    (head("Host: again"), 400),
    (head("Content-Length: 1", "Content-Length: 1"), 400),
    (head("Content-Length: 1, 1"), 400),
    (head("Content-Length: +5"), 400),
    (head("Content-Length: -5"), 400),
    (head("Content-Length: 5_0"), 400),
    (head("Content-Length: 0x5"), 400),
    (head("Content-Length: \xb2"), 400),
    (head("Content-Length: " + "9" * 5000), 400),
    (head("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    (head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    (head("Transfer-Encoding: gzip, chunked"), 501),
    (head("Transfer-Encoding: gzip"), 501),
    (head("Transfer-Encoding: \x0bchunked"), 400),
    (head("Transfer-Encoding : chunked"), 400),
    (head(" folded: line"), 400),
    (head("no colon"), 400),
    (head(": no name"), 400),
    (head("X: a\x00b"), 400),
    (head("X: a\rb"), 400),
    (head("X: a\nY: b"), 400),
    (head("X(): b"), 400),
    (head(first="GET / HTTP/2.0"), 505),
    (head(first="GET / HTTP/1"), 400),
    (head(first="GET  / HTTP/1.1"), 400),
    (head(first="GET / /x HTTP/1.1"), 400),
    (head(first="G@T / HTTP/1.1"), 400),
    (head(first="GET /\xe9 HTTP/1.1"), 400),
    (head(first="GET a HTTP/1.1"), 400),
    (head(first="GET * HTTP/1.1"), 400),
    (head(first="GET /" + "a" * 9000 + " HTTP/1.1"), 414),
    (head(*(f"X-{n}: 1" for n in range(101))), 431),
    (b"\r\n\r\n", 400),
])
def test_an_ambiguous_head_is_refused(raw, status):
    with pytest.raises(ApiError) as caught:
        ccproxy.parse_head(raw)
    assert caught.value.status == status


def test_parse_head_never_raises_anything_but_apierror():
    chance = random.Random(7)
    seeds = [head("Content-Length: 12", "Connection: close", "X-A: b"), head(
        "Transfer-Encoding: chunked", first="GET http://u@[::1]:8/a%2?b HTTP/1.1")]
    dirt = [b"\r\n", b"\r", b"\n", b"\0", b":", b" ", b"\xff", b"%", b"://", b"[", b"9" * 50, b""]
    lengths = set()
    for _ in range(4000):
        raw = bytearray(chance.choice(seeds)[:-4])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            raw[at:at + chance.randint(0, 3)] = chance.choice(
                dirt + [bytes([chance.randrange(256)])])
        try:
            lengths.add(ccproxy.parse_head(bytes(raw) + b"\r\n\r\n").length)
        except ApiError as error:
            assert 400 <= error.status < 600
    assert {None, 12} <= lengths


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: x", "a\nb", "a\rb", "\0", "caf\xe9", "\u2028",
                                   "\U0001f600", "\ud800", "a\x0b\x0c\x85b"])
def test_no_header_value_can_end_its_line(value):
    raw = ccproxy.response_head(200, [("X-Id", value), ("X-Last", "z")])
    lines = raw.decode("latin-1").split("\r\n")
    assert [line.partition(":")[0] for line in lines[1:]] == ["X-Id", "X-Last", "", ""]
    assert lines[0] == "HTTP/1.1 200 OK" and len(raw.splitlines()) == 4


@pytest.mark.parametrize("value, event, frame", [
    ({"a": "\n"}, "", b'data: {"a":"\\n"}\n\n'),
    ({"a": "\u2028\u00e9"}, "x", b'event: x\ndata: {"a":"\\u2028\\u00e9"}\n\n'),
    ({"a": "\ud800"}, "", b'data: {"a":"\\ud800"}\n\n'),
    (b"[DONE]", "", b"data: [DONE]\n\n"),
])
def test_an_sse_frame_is_one_line_of_ascii_data(value, event, frame):
    assert ccproxy.sse_frame(value, event) == frame


@pytest.mark.parametrize("body, value", [
    (b"{}", {}), (b' {"a": [1, 2.5, null, true]}\n', {"a": [1, 2.5, None, True]}),
    ('{"a": "\u00e9\u2028"}'.encode(), {"a": "\u00e9\u2028"}),
    (b'{"a":"\\ud800"}', {"a": "\ud800"}),
])
def test_a_json_object_is_read(body, value):
    assert ccproxy.parse_json(body) == value


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"a"', b"null", b"1", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}',
    b'{"a": -Infinity}', b'{"a": 1e400}', b'{"a": -1e400}', b'{"a": "\xff"}', b'{"a": "\x01"}',
    '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32"), b"[" * 100000, b'{"a":' * 100000,
    b'{"a": ' + b"9" * 5000 + b"}", b"{} x", b"\xef\xbb\xbf{"],
    ids=lambda body: repr(body[:20]))
def test_bad_json_is_a_400_whatever_is_wrong_with_it(body):
    with pytest.raises(ApiError) as caught:
        value = ccproxy.parse_json(body)
        if body.endswith(b"9}") and value["a"] > 10 ** 4000:    # before Python's digit limit
            raise ApiError("invalid_request", "")
    assert caught.value.status == 400


@pytest.mark.parametrize("path, route", [
    ("/v1/messages", "/messages"), ("/messages", "/messages"), ("/v1/messages/", "/messages"),
    ("/v1/v1/messages", "/messages"), ("//v1//messages", "/messages"),
    ("/chat/v1/messages", "/messages"), ("/chat/messages", "/messages"),
    ("/v1/chat/completions", "/chat/completions"), ("/chat/completions", "/chat/completions"),
    ("/v1/v1/chat/completions/", "/chat/completions"),
    ("/chat/v1/chat/completions", "/chat/completions"),
    ("/chat/chat/completions", "/chat/completions"),
    ("/v1/chat/completions/chat/completions", "/chat/completions"),
    ("/chat/completions/models", "/models"), ("/v1/chat/completions/v1/models", "/models"),
    ("/v1/messages/count_tokens", "/messages/count_tokens"),
    ("/chat/v1/messages/count_tokens", "/messages/count_tokens"),
    ("/v1/models", "/models"), ("/models/", "/models"), ("/v1/models/opus", "/models/opus"),
    ("/v1/models/a/b", "/models/a/b"), ("/chat/v1/models/opus", "/models/opus"),
    ("/v1/models/v1/x", "/models/v1/x"), ("/", "/"), ("", "/"), ("/v1", "/"), ("/v1/", "/"),
    ("/health", "/health"), ("/chat/health", "/health"), ("/v1/nothing", "/nothing"),
])
def test_a_base_url_given_in_any_way_leads_to_its_route(path, route):
    assert "".join(ccproxy.route_path(path)[1:]) == route
    backend = "chat" if path.startswith(("/chat/v1", "/chat/chat", "/chat/m", "/chat/h")) else ""
    assert ccproxy.route_path(path)[0] == backend


# == 4. Dialects: requests =========================================================================

BOTH_CONTENTS = [       # content as any role may hold it -> blocks
    ("hi", [said("hi")]),
    ([said("a"), said("b")], [said("a"), said("b")]),
    ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}],
     [said("a"), said("b")]),
    (["plain", said("b")], [said("plain"), said("b")]),
    ([said("a"), said(""), said(" \n")], [said("a")]),
    ([{**said("a"), "cache_control": {"type": "ephemeral"}}], [said("a")]),
]
MEDIA = [
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG, "detail": "low"}},
     IMAGE),
    ({"type": "image_url", "image_url": "data:image/png;base64," + PNG}, IMAGE),
    ({"type": "input_image", "image_url": "data:IMAGE/PNG;base64," + PNG}, IMAGE),
    ({"type": "image_url", "image_url": {"url": "data:image/jpg;base64," + PNG}},
     {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": PNG}}),
    ({"type": "image_url", "image_url": {"url": "https://h/a.png"}},
     {"type": "image", "source": {"type": "url", "url": "https://h/a.png"}}),
    ({"type": "file", "file": {"file_data": "data:application/pdf;base64," + PDF}}, DOCUMENT),
    ({"type": "file", "file": {"filename": "a.pdf",
                               "file_data": "data:application/pdf;base64," + PDF}},
     {**DOCUMENT, "title": "a.pdf"}),
    ({"type": "input_file", "file_data": "data:application/pdf;base64," + PDF}, DOCUMENT),
    ({"type": "input_file", "file_url": "https://h/a.pdf"},
     {"type": "document", "source": {"type": "url", "url": "https://h/a.pdf"}}),
    ({"type": "file", "file": {"file_data": "data:text/plain;base64," + b64("h\u00e9".encode())}},
     {"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                     "data": "h\u00e9"}}),
    ({"type": "file", "file": {"file_data": "data:image/png;base64," + PNG}}, IMAGE),
    (IMAGE, IMAGE), (DOCUMENT, DOCUMENT),
    *[(part, part) for part in (
        {"type": "image", "source": {"type": "url", "url": "http://h/a"}},
        {"type": "document", "title": "T", "context": "c", "citations": {"enabled": True},
         "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
        {"type": "document", "source": {"type": "url", "url": "https://h/a.pdf"}},
        {"type": "document", "source": {"type": "content", "content": [said("x")]}},
        {"type": "search_result", "source": "s", "title": "t", "content": [said("x")]})],
]


@BOTH
@pytest.mark.parametrize("content, blocks", BOTH_CONTENTS)
def test_rule_8_user_content_may_be_a_string_or_parts(dialect, content, blocks):
    assert parse(dialect, [{"role": "user", "content": content}]).messages == (user(*blocks),)


@BOTH
@pytest.mark.parametrize("part, expected", MEDIA)
def test_images_and_documents_become_their_blocks(dialect, part, expected):
    assert parse(dialect, [user(said("see"), part)]).messages == (user(said("see"), expected),)


@BOTH
@pytest.mark.parametrize("content, blocks", BOTH_CONTENTS + [(None, None), ("", None), ([], None)])
def test_rule_8_assistant_content_may_be_a_string_null_or_parts(dialect, content, blocks):
    messages = parse(dialect, [user(said("q")), {"role": "assistant", "content": content},
                               user(said("z"))]).messages
    assert list(messages) == (
        [user(said("q"), said("z"))] if blocks is None else
        [user(said("q")), {"role": "assistant", "content": blocks}, user(said("z"))])


def test_rule_8_a_refusal_of_the_assistant_is_its_text():
    messages = parse("chat", [user(said("q")), {"role": "assistant", "content": [
        {"type": "refusal", "refusal": "no"}]}, user(said("z"))]).messages
    assert messages[1] == {"role": "assistant", "content": [said("no")]}


@pytest.mark.parametrize("content, blocks", [
    *BOTH_CONTENTS[:3], (None, []), ("", []), ([], []),
    ([said("a"), MEDIA[0][0]], [said("a"), IMAGE])])
def test_rule_8_tool_content_may_be_a_string_null_or_parts(content, blocks):
    messages = parse("chat", [user(said("q")), CALLED, {
        "role": "tool", "tool_call_id": "toolu_1", "content": content}]).messages
    assert messages[1:] == ({"role": "assistant", "content": [CALL]}, user(result(blocks)))


@pytest.mark.parametrize("content, blocks", [
    ("a", [said("a")]), (None, []), ([said("a"), IMAGE], [said("a"), IMAGE]),
    ([DOCUMENT], [DOCUMENT])])
@pytest.mark.parametrize("error", [{}, {"is_error": True}, {"is_error": False}])
def test_tool_results_of_messages_keep_their_parts_and_their_failure(content, blocks, error):
    messages = parse("messages", [user(said("q")), {"role": "assistant", "content": [CALL]},
                                  user(result(content, **error))]).messages
    failed = {"is_error": True} if error.get("is_error") else {}
    assert messages[2] == user(result(blocks, **failed))


@pytest.mark.parametrize("messages, system", [
    ([{"role": "system", "content": "S"}, user(said("q"))], "S"),
    ([{"role": "developer", "content": [said("S"), said("T")]}, user(said("q"))], "S\n\nT"),
    ([user(said("q")), {"role": "system", "content": "S"}], "S"),
    ([{"role": "system", "content": "S"}, user(said("q")), {"role": "developer", "content": "T"}],
     "S\n\nT"),
    ([{"role": "system", "content": None}, user(said("q"))], ""),
    ([{"role": "system", "content": ""}, {"role": "system", "content": "S"}, user(said("q"))], "S"),
])
def test_rule_9_developer_is_system_and_may_stand_anywhere(messages, system):
    turn = parse("chat", messages)
    assert (turn.system, turn.messages) == (system, (user(said("q")),))


@pytest.mark.parametrize("value, system", [
    (None, ""), ("", ""), ("S", "S"), ([said("S")], "S"),
    ([said("S"), {**said("T"), "cache_control": {"type": "ephemeral"}}], "S\n\nT")])
def test_system_of_messages_is_a_string_or_blocks(value, system):
    assert parse("messages", system=value).system == system


HISTORIES = [   # (dialect, messages, what the model is given)
    ("chat", [user(said("a")), user(said("b"))], [user(said("a"), said("b"))]),
    ("messages", [user(said("a")), {"role": "assistant", "content": "b"},
                  {"role": "assistant", "content": "c"}, user(said("d"))],
     [user(said("a")), {"role": "assistant", "content": [said("b"), said("c")]}, user(said("d"))]),
    ("chat", [user(said("q")), {**CALLED, "content": "Look."},
              {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}, user(said("so?"))],
     [user(said("q")), {"role": "assistant", "content": [said("Look."), CALL]},
      user(result([said("sunny")]), said("so?"))]),
    ("messages", [user(said("q")), {"role": "assistant", "content": [CALL]},
                  user(said("here:"), result("sunny"), said("so?"))],
     [user(said("q")), {"role": "assistant", "content": [CALL]},
      user(result([said("sunny")]), said("here:"), said("so?"))]),
    ("chat", [user(said("q")), {"role": "assistant", "tool_calls": [CHAT_CALL, {
        "id": "toolu_2", "type": "function", "function": {"name": "f", "arguments": ""}}]},
              {"role": "tool", "tool_call_id": "toolu_2", "content": "2"},
              {"role": "tool", "tool_call_id": "toolu_1", "content": "1"}],
     [user(said("q")), {"role": "assistant", "content": [
         CALL, {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}}]},
      user(result([said("1")]), result([said("2")], "toolu_2"))]),     # in the order of the calls
    ("messages", [user(said("q"), {**IMAGE, "tool_use_id": {}})],       # of results alone
     [user(said("q"), {**IMAGE, "tool_use_id": {}})]),
    ("chat", [user(said("q")), {"role": "assistant", "content": [CALL]}, user(result("sunny"))],
     [user(said("q")), {"role": "assistant", "content": [CALL]}, user(result([said("sunny")]))]),
    ("messages", [user(said("q")), {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "", "signature": "s"},
        {"type": "redacted_thinking", "data": "d"}, said("a")]}, user(said("z"))],
     [user(said("q")), {"role": "assistant", "content": [
         {"type": "thinking", "thinking": "", "signature": "s"},
         {"type": "redacted_thinking", "data": "d"}, said("a")]}, user(said("z"))]),
]


@pytest.mark.parametrize("dialect, messages, expected", HISTORIES)
def test_history_becomes_real_turns_merged_and_with_results_first(dialect, messages, expected):
    assert list(parse(dialect, messages).messages) == expected


def test_old_style_functions_become_a_call_and_its_result():
    turn = parse("chat", [
        user(said("q")),
        {"role": "assistant", "content": None,
         "function_call": {"name": "get_weather", "arguments": '{"city": "P"}'}},
        {"role": "function", "name": "get_weather", "content": "sunny"}],
        functions=[NESTED["function"]], function_call={"name": "get_weather"})
    ident = turn.messages[1]["content"][0]["id"]
    assert turn.messages[1:] == ({"role": "assistant", "content": [{**CALL, "id": ident}]},
                                 user(result([said("sunny")], ident)))
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", ident)
    assert turn.tools == (WEATHER,)
    assert turn.fields["tool_choice"].items() >= {"type": "tool", "name": "get_weather"}.items()
    assert "functions" in turn.wants


def test_a_call_id_that_the_api_would_refuse_is_replaced_the_same_way_in_call_and_result():
    odd = {**CHAT_CALL, "id": "call:1/\u00e9"}
    messages = parse("chat", [user(said("q")), {"role": "assistant", "tool_calls": [odd]},
                              {"role": "tool", "tool_call_id": odd["id"], "content": "x"}]).messages
    ident = messages[1]["content"][0]["id"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", ident)
    assert messages[2]["content"][0]["tool_use_id"] == ident


EMPTY_SCHEMA = {"type": "object", "properties": {}}
TOOL_SHAPES = [     # (tool as it comes, Anthropic tool)
    (NESTED, WEATHER),
    ({"type": "function", **NESTED["function"]}, WEATHER),
    (NESTED["function"], WEATHER),
    (WEATHER, WEATHER),
    ({**WEATHER, "type": "custom"}, WEATHER),
    ({**WEATHER, "cache_control": {"type": "ephemeral"}}, WEATHER),
    ({**WEATHER, "strict": True}, {**WEATHER, "strict": True}),
    ({**NESTED, "function": {**NESTED["function"], "strict": True}}, {**WEATHER, "strict": True}),
    ({**NESTED, "function": {**NESTED["function"], "strict": False}}, WEATHER),
    ({"type": "function", "function": {"name": "f"}}, {"name": "f", "input_schema": EMPTY_SCHEMA}),
    ({"type": "function", "function": {"name": "f", "parameters": None, "description": None}},
     {"name": "f", "input_schema": EMPTY_SCHEMA}),
    ({"type": "function", "function": {"name": "f", "parameters": {}}},
     {"name": "f", "input_schema": EMPTY_SCHEMA}),
    ({"name": "f", "input_schema": {"properties": {"a": {}}}},
     {"name": "f", "input_schema": {"type": "object", "properties": {"a": {}}}}),
    ({"type": "bash_20250124", "name": "bash"}, {"type": "bash_20250124", "name": "bash"}),
]


@BOTH
@pytest.mark.parametrize("tool, expected", TOOL_SHAPES)
def test_a_tool_of_any_shape_becomes_an_anthropic_tool(dialect, tool, expected):
    turn = parse(dialect, tools=[tool])
    assert turn.tools == (expected,)
    assert turn.ignored == (("cache_control",) if "cache_control" in tool else ())


@BOTH
@pytest.mark.parametrize("kind", [
    "web_search_20250305", "web_fetch_20250910", "web_search_preview", "code_execution_20250825",
    "code_interpreter", "file_search", "mcp", "image_generation",
    "tool_search_tool_regex_20251119"])
def test_tools_that_only_the_vendor_can_run_are_left_out_and_named(dialect, kind):
    turn = parse(dialect, tools=[WEATHER, {"type": kind, "name": "x"}])
    assert turn.tools == (WEATHER,)
    assert len(turn.ignored) == 1 and kind in turn.ignored[0] and "tools[1]" in turn.ignored[0]


ANY, SINGLE = {"type": "any"}, {"disable_parallel_tool_use": True}
CHOICE = {"type": "tool", "name": "get_weather"}


@BOTH
@pytest.mark.parametrize("fields, expected", [
    ({}, None), ({"tool_choice": None}, None),
    ({"tool_choice": "auto"}, {"type": "auto"}), ({"tool_choice": "none"}, {"type": "none"}),
    ({"tool_choice": "required"}, ANY), ({"tool_choice": "any"}, ANY),
    ({"tool_choice": {"type": "auto"}}, {"type": "auto"}),
    ({"tool_choice": {"type": "none"}}, {"type": "none"}), ({"tool_choice": ANY}, ANY),
    ({"tool_choice": {**ANY, **SINGLE}}, {**ANY, **SINGLE}),
    ({"tool_choice": CHOICE}, CHOICE),
    ({"tool_choice": {**CHOICE, **SINGLE}}, {**CHOICE, **SINGLE}),
    ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, CHOICE),
    ({"tool_choice": {"type": "function", "name": "get_weather"}}, CHOICE),
    ({"function_call": "auto"}, {"type": "auto"}), ({"function_call": "none"}, {"type": "none"}),
    ({"function_call": {"name": "get_weather"}}, CHOICE),
    ({"parallel_tool_calls": True}, None),
    ({"parallel_tool_calls": False}, {"type": "auto", **SINGLE}),
    ({"parallel_tool_calls": False, "tool_choice": "required"}, {**ANY, **SINGLE}),
    ({"parallel_tool_calls": False, "tool_choice": "none"}, {"type": "none"}),
])
def test_tool_choice_in_any_form_becomes_anthropics(dialect, fields, expected):
    turn = parse(dialect, tools=[WEATHER], **fields)
    assert turn.fields.get("tool_choice") == expected
    assert turn.ignored == ()


@BOTH
@pytest.mark.parametrize("fields", [{"tool_choice": "auto"}, {"tool_choice": "none"},
                                    {"parallel_tool_calls": False}, {"tools": []}])
def test_a_choice_that_forces_nothing_is_no_matter_without_tools(dialect, fields):
    assert parse(dialect, **fields).fields == {}


FIELDS = [      # (fields of the body, Turn.fields and more)
    ({"temperature": 0}, {"temperature": 0}), ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"temperature": None}, {}), ({"top_p": 0.9}, {"top_p": 0.9}), ({"top_k": 40}, {"top_k": 40}),
    ({"max_tokens": 64}, {"max_tokens": 64}), ({"max_completion_tokens": 64}, {"max_tokens": 64}),
    ({"stop": None}, {}), ({"stop": "END"}, {"stop_sequences": ["END"]}),
    ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
    ({"stop_sequences": ["a"]}, {"stop_sequences": ["a"]}),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}},
     {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ({"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
    ({"thinking": {"type": "disabled"}}, {"thinking": {"type": "disabled"}}),
    ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
    ({"stream": None}, {}), ({"n": 1}, {}), ({"n": None}, {}), ({"stream_options": None}, {}),
]


@BOTH
@pytest.mark.parametrize("fields, expected", FIELDS)
def test_parameters_reach_the_model_under_the_apis_names(dialect, fields, expected):
    turn = parse(dialect, **fields)
    assert (turn.fields, turn.ignored, turn.schema) == (expected, (), None)


@BOTH
@pytest.mark.parametrize("fields, effort", [
    ({"reasoning_effort": "minimal"}, "low"), ({"reasoning_effort": "low"}, "low"),
    ({"reasoning_effort": "high"}, "high"), ({"reasoning_effort": "xhigh"}, "xhigh"),
    ({"reasoning_effort": None}, None), ({"reasoning": {"effort": "medium"}}, "medium"),
    ({"output_config": {"effort": "max"}}, "max"), ({"output_config": None}, None)])
def test_effort_in_any_form_is_taken(dialect, fields, effort):
    asked = parse(dialect, **fields)
    settings, body = said_settings(asked)
    assert (settings["effortLevel"], body, asked.ignored) == (effort, {}, ())


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@BOTH
@pytest.mark.parametrize("fields, schema", [
    ({"response_format": None}, None), ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"type": "object"}),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "strict": True, "schema": SCHEMA}}}, SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": SCHEMA}}}, SCHEMA),
    ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, SCHEMA),
    ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, SCHEMA),
])
def test_a_json_schema_in_any_form_is_taken(dialect, fields, schema):
    turn = parse(dialect, **fields)
    assert (turn.schema, turn.fields, turn.ignored) == (schema, {}, ())


@BOTH
@pytest.mark.parametrize("name, value", [
    ("store", True), ("metadata", {"user_id": "x"}), ("user", "u"), ("service_tier", "auto"),
    ("logit_bias", {"50256": -100}), ("seed", 7),
    ("prediction", {"type": "content", "content": "x"}), ("modalities", ["text"]),
    ("safety_identifier", "x"), ("prompt_cache_key", "x"),
    ("verbosity", "low"), ("enable_thinking", True), ("frequency_penalty", 0.5),
    ("presence_penalty", 0.5), ("logprobs", True), ("top_logprobs", 3),
    ("of_the_future", {"a": []}),
    ("context_management", {"edits": []}), ("mcp_servers", []), ("container", "x"),
])
def test_rule_10_unknown_fields_are_reported_and_not_refused(dialect, name, value):
    turn = parse(dialect, **{name: value})
    assert (turn.ignored, turn.fields) == ((name,), {})


@pytest.mark.parametrize("fields, ignored", [
    ({"output_config": {"x": 1, "effort": "low"}}, ("output_config.x",)),
    ({"temperature": 1.7}, ("temperature",)),
    ({"stop": "\n"}, ("stop",)), ({"stop": ["\n\n", "END"]}, ("stop",)),
    ({"system": [{**said("a"), "cache_control": {"type": "ephemeral"}}]}, ("cache_control",)),
    ({"seed": None, "user": None}, ()),
    ({"max_completion_tokens": 9, "parallel_tool_calls": True}, ()),
])
def test_what_cannot_be_honoured_in_full_is_named(fields, ignored):
    assert parse("chat", **fields).ignored == ignored


def test_openais_temperatures_above_anthropics_scale_end_at_one():
    assert parse("chat", temperature=1.7).fields == {"temperature": 1}


@BOTH
@pytest.mark.parametrize("fields, stream", [({}, False), ({"stream": False}, False),
                                            ({"stream": True}, True)])
def test_rule_11_absent_stream_means_json(dialect, fields, stream):
    assert parse(dialect, **fields).stream is stream


@pytest.mark.parametrize("options, wanted", [
    (None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": None}, False),
    ({"include_usage": True}, True), ({"include_obfuscation": False}, False)])
def test_usage_is_wanted_only_when_include_usage_is_true(options, wanted):
    turn = parse("chat", stream=True, stream_options=options)
    assert ("usage" in turn.wants) is wanted


def test_a_turn_repeats_the_model_as_asked():
    assert parse("chat").model == "m"


# -- Responses

HI = {"role": "user", "content": "hi"}


def items(given, **fields):
    return DIALECTS["responses"].parse({"model": "m", "input": given, **fields})


FUNCTION_CALL = {"type": "function_call", "id": "fc_1", "call_id": "toolu_1", "status": "completed",
                 "name": "get_weather", "arguments": '{"city": "P"}'}
FREE_CALL = {"type": "custom_tool_call", "id": "ctc_1", "call_id": "toolu_2", "name": "patch",
             "input": "*** Begin"}
FREE_USE = {"type": "tool_use", "id": "toolu_2", "name": "patch", "input": {"input": "*** Begin"}}
PROOF = {"type": "thinking", "thinking": "hm", "signature": "sig:=="}
ITEMS = [       # input of Responses -> the messages
    ("hi", [user(said("hi"))]),
    ([{"role": "user", "content": "hi"}], [user(said("hi"))]),
    ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
       {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64," + PNG},
       {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64," + PDF}
       ]}], [user(said("a"), IMAGE, {**DOCUMENT, "title": "a.pdf"})]),
    ([HI, {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []},
                        {"type": "refusal", "refusal": "no"}]}, HI],
     [user(said("hi")), {"role": "assistant", "content": [said("b"), said("no")]},
      user(said("hi"))]),
    ([HI, FUNCTION_CALL, FREE_CALL,
      {"type": "custom_tool_call_output", "call_id": "toolu_2", "output": "done"},
      {"type": "function_call_output", "call_id": "toolu_1", "output": [
          {"type": "input_text", "text": "sunny"},
          {"type": "input_image", "image_url": "data:image/png;base64," + PNG}]}],
     [user(said("hi")), {"role": "assistant", "content": [CALL, FREE_USE]},
      user(result([said("sunny"), IMAGE]), result([said("done")], "toolu_2"))]),
    ([HI, {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}],
            "encrypted_content": "thinking:sig:=="}, FUNCTION_CALL,
      {"type": "function_call_output", "call_id": "toolu_1", "output": ""}],
     [user(said("hi")), {"role": "assistant", "content": [PROOF, CALL]}, user(result([]))]),
    ([HI, {"type": "reasoning", "summary": [], "encrypted_content": "redacted_thinking:xyz"},
      {"role": "assistant", "content": "b"}, HI],
     [user(said("hi")), {"role": "assistant", "content": [
         {"type": "redacted_thinking", "data": "xyz"}, said("b")]}, user(said("hi"))]),
    ([HI, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "another's"}],
            "encrypted_content": "gAAAA"}, {"type": "reasoning", "summary": []},
      {"role": "assistant", "content": "b"}, HI],
     [user(said("hi")), {"role": "assistant", "content": [said("b")]}, user(said("hi"))]),
    ([HI, {**FUNCTION_CALL, "namespace": "sky"},
      {"type": "function_call_output", "call_id": "toolu_1", "output": "x"}],
     [user(said("hi")), {"role": "assistant", "content": [{**CALL, "name": "sky__get_weather"}]},
      user(result([said("x")]))]),
]


@pytest.mark.parametrize("given, messages", ITEMS)
def test_every_item_of_an_input_has_its_place_in_the_messages(given, messages):
    assert list(items(given).messages) == messages


def test_instructions_and_developer_messages_are_the_system_text():
    turn = items([{"role": "developer", "content": [{"type": "input_text", "text": "B"}]}, HI,
                  {"type": "message", "role": "system", "content": "C"}], instructions="A")
    assert (turn.system, turn.messages) == ("A\n\nB\n\nC", (user(said("hi")),))


FLAT = {"type": "function", "name": "get_weather", "description": "of a city", "strict": True,
        "parameters": WEATHER["input_schema"]}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: patch"}
PATCH = {"type": "custom", "name": "patch", "description": "Edit.", "format": GRAMMAR}
FREE_SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
               "additionalProperties": False}
FREE_TOOL = {"name": "patch", "input_schema": FREE_SCHEMA, "description":
             "Edit.\n\nThe input has to match this lark grammar:\nstart: patch"}


@ALL
@pytest.mark.parametrize("given, tool, known", [
    (FLAT, {**WEATHER, "strict": True}, {}),
    (PATCH, FREE_TOOL, {"patch": {"free": "function"}}),
    ({"type": "custom", "custom": {"name": "patch", "description": "Edit.", "format": {
        "type": "grammar", "grammar": {"syntax": "lark", "definition": "start: patch"}}}},
     FREE_TOOL, {"patch": {"free": "custom"}}),
    ({"type": "custom", "name": "patch", "format": {"type": "text"}},
     {"name": "patch", "input_schema": FREE_SCHEMA},
     {"patch": {"free": "function"}}),
    ({"type": "namespace", "name": "sky", "description": "d", "tools": [FLAT]},
     {**WEATHER, "name": "sky__get_weather", "strict": True},
     {"sky__get_weather": {"namespace": "sky", "name": "get_weather"}}),
    ({"type": "custom", **WEATHER}, WEATHER, {})])
def test_every_kind_of_tool_is_one_that_the_model_can_call(dialect, given, tool, known):
    slot = "input" if dialect == "responses" else "messages"
    turn = DIALECTS[dialect].parse({"model": "m", slot: [HI], "tools": [given]})
    assert (list(turn.tools), turn.wants.get("tools", {})) == ([tool], known)
    assert not turn.ignored


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "file_search", "computer",
                                  "computer_use_preview", "code_interpreter", "image_generation",
                                  "mcp", "local_shell", "shell", "apply_patch", "tool_search"])
def test_a_tool_that_only_the_vendor_could_run_is_named_or_refused_if_it_is_forced(kind):
    turn = items("hi", tools=[FLAT, {"type": kind}])
    assert ([t["name"] for t in turn.tools], turn.ignored) == (["get_weather"], (f"tools[1].{kind}",))
    for choice in ({"type": kind}, "required"):
        error = refused("responses", {"model": "m", "input": "hi", "tools": [{"type": kind}],
                                      "tool_choice": choice})
        assert error.param in ("tool_choice", "tool_choice.type")


@pytest.mark.parametrize("choice, expected, names", [
    ("auto", {"type": "auto"}, "ab"), ("none", {"type": "none"}, "ab"),
    ("required", {"type": "any"}, "ab"),
    ({"type": "function", "name": "a"}, {"type": "tool", "name": "a"}, "ab"),
    ({"type": "custom", "name": "b"}, {"type": "tool", "name": "b"}, "ab"),
    ({"type": "custom", "custom": {"name": "b"}}, {"type": "tool", "name": "b"}, "ab"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "b"},
                                                         {"type": "web_search"}]},
     {"type": "auto"}, "b"),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "a"}}]}}, {"type": "any"}, "a")])
def test_tool_choice_in_each_of_its_forms(choice, expected, names):
    tools = [{"type": "function", "name": "a"}, {"type": "custom", "name": "b"}]
    turn = items("hi", tools=tools, tool_choice=choice)
    assert (turn.fields["tool_choice"], "".join(t["name"] for t in turn.tools)) == (expected, names)


def test_parallel_calls_can_be_switched_off_in_responses():
    turn = items("hi", tools=[FLAT], parallel_tool_calls=False)
    assert turn.fields["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


def test_parameters_of_responses_are_the_models_parameters():
    schema = {"type": "object", "properties": {}}
    turn = items("hi", max_output_tokens=50, temperature=0.5, top_p=0.5, stop=["x"], stream=True,
                 reasoning={"effort": "minimal", "summary": "auto"}, text={"verbosity": "low",
                 "format": {"type": "json_schema", "name": "n", "strict": True, "schema": schema}})
    assert turn.fields == {"max_tokens": 50, "temperature": 0.5, "top_p": 0.5, "effort": "low",
                           "stop_sequences": ["x"]}
    assert (turn.schema, turn.stream, turn.ignored) == (schema, True, ("text.verbosity",))
    assert turn.said["max_tokens"] == "max_output_tokens"
    assert items("hi", text={"format": {"type": "json_object"}}).schema == {"type": "object"}
    assert items("hi", text={"format": {"type": "text"}}).schema is None


@pytest.mark.parametrize("fields, ignored", [
    ({"store": False, "metadata": {"a": "b"}, "previous_response_id": "resp_1",
      "truncation": "disabled", "include": ["reasoning.encrypted_content"], "background": False,
      "user": None, "conversation": None}, []),
    ({"truncation": "auto", "include": ["message.output_text.logprobs"], "top_logprobs": 2,
      "prompt_cache_key": "k", "service_tier": "flex", "max_tool_calls": 3},
     ["include", "max_tool_calls", "prompt_cache_key", "service_tier", "top_logprobs",
      "truncation"])])
def test_what_responses_cannot_honour_is_named_and_nothing_else(fields, ignored):
    assert list(items("hi", **fields).ignored) == ignored


@pytest.mark.parametrize("body, param, word", [
    ({}, "input", "expected"), ({"input": 5}, "input", "expected"), ({"input": []}, "input", ""),
    ({"input": ""}, "input[0]", "empty"),
    ({"input": "hi", "background": True}, "background", "leave it out"),
    ({"input": "hi", "conversation": "conv_1"}, "conversation", "previous_response_id"),
    ({"input": "hi", "prompt": {"id": "p"}}, "prompt", "instructions"),
    ({"input": [HI, {"type": "web_search_call", "id": "x"}]}, "input[1].type", "web_search_call"),
    ({"input": [{"type": {}}]}, "input[0].type", "string"),
    ({"input": [5]}, "input[0]", "object"),
    ({"input": [{"type": "message", "content": "x"}]}, "input[0].role", "string"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0].type",
     "input_audio"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
     "input[0].content[0].image_url", "string"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
     "input[0].content[0].file_id", "not kept"),
    ({"input": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
     "input[0].content[0].file_id", "not kept"),
    ({"input": [HI, {**FUNCTION_CALL, "call_id": None}]}, "input[1].call_id", "string"),
    ({"input": [HI, {**FUNCTION_CALL, "arguments": [1]}]}, "input[1].arguments", "object"),
    ({"input": [HI, {**FUNCTION_CALL, "name": ""}]}, "input[1].name", "empty"),
    ({"input": [HI, {**FREE_CALL, "input": {}}]}, "input[1].input", "string"),
    ({"input": [HI, FUNCTION_CALL, HI]}, "input[2]", "no result"),
    ({"input": [HI, FUNCTION_CALL]}, "input[1]", "no result"),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0]",
     "answers no call"),
    ({"input": [{"type": "reasoning", "encrypted_content": 5}]}, "input[0].encrypted_content",
     "string"),
    ({"input": "hi", "metadata": "x"}, "metadata", "object"),
    ({"input": "hi", "store": "yes"}, "store", "true or false"),
    ({"input": "hi", "include": "x"}, "include", "array"),
    ({"input": "hi", "instructions": 5}, "instructions", "string"),
    ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens", "1 or more"),
    ({"input": "hi", "text": "x"}, "text", "object"),
    ({"input": "hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "one of"),
    ({"input": "hi", "tools": [{"type": "namespace", "tools": [FLAT]}]}, "tools[0].name", "string"),
    ({"input": "hi", "tools": [{"type": "namespace", "name": "n", "tools": [FLAT, {"type":
      "function", "name": 5}]}]}, "tools[0].tools[1].name", "string"),
    ({"input": "hi", "tools": [PATCH, PATCH]}, "tools[1]", "twice"),
    ({"input": "hi", "tools": [FLAT], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
     "tool_choice.tools", "array"),
    ({"input": "hi", "tools": [FLAT], "tool_choice": {"type": "allowed_tools", "mode": "required",
      "tools": []}}, "tool_choice", "not there")])
def test_a_wrong_input_is_refused_with_the_name_of_its_field(body, param, word):
    error = refused("responses", {"model": "m", **body})
    assert (error.param, word in error.message) == (param, True), error.message


def test_stored_items_go_before_the_input_and_leave_its_positions_as_they_are():
    earlier = [HI, FUNCTION_CALL]
    done = {"type": "function_call_output", "call_id": "toolu_1", "output": "x"}
    turn = DIALECTS["responses"].parse({"model": "m", "input": [done]}, earlier)
    assert [m["role"] for m in turn.messages] == ["user", "assistant", "user"]
    with pytest.raises(ApiError) as caught:
        DIALECTS["responses"].parse({"model": "m", "input": [done, {"type": "odd"}]}, earlier)
    assert caught.value.param == "input[1].type"


@pytest.mark.parametrize("body", [
    {"input": [{"role": "developer", "content": "S"}, HI, FUNCTION_CALL,
               {"type": "function_call_output", "call_id": "toolu_1", "output": "sunny"}],
     "tools": [FLAT, PATCH]},
    {"messages": [{"role": "system", "content": "S"}, HI, {"role": "assistant", "content": [CALL]},
                  user(result())], "tools": [{**WEATHER, "strict": True}, PATCH]}])
def test_cursor_may_send_other_dialects_to_chat(body):
    turn = DIALECTS["chat"].parse({"model": "m", **body})
    assert (turn.system, turn.messages[1:]) == ("S", (
        {"role": "assistant", "content": [CALL]}, user(result([said("sunny")]))))
    assert [t["name"] for t in turn.tools] == ["get_weather", "patch"]


def test_tools_may_come_as_an_item_of_the_input_as_codex_sends_them():
    more = {"type": "additional_tools", "role": "developer", "tools": [
        {"type": "namespace", "name": "functions", "tools": [PATCH, FLAT]}]}
    for earlier, given in (([], [more, HI]), ([more, HI, {"role": "assistant", "content": "x"}],
                                              [HI])):
        turn = DIALECTS["responses"].parse({"model": "m", "input": given, "tools": [FLAT]}, earlier)
        assert [t["name"] for t in turn.tools] == [
            "get_weather", "functions__patch", "functions__get_weather"]
        assert turn.wants["tools"]["functions__patch"] == {
            "free": "function", "namespace": "functions", "name": "patch"}
        assert turn.messages[-1] == user(said("hi"))


def test_an_input_that_ends_with_an_answer_asks_the_model_to_go_on():
    """Codex sends it after a stream that broke off."""
    turn = items([HI, {"type": "message", "role": "assistant", "content": "half"}])
    assert list(turn.messages[1:]) == [{"role": "assistant", "content": [said("half")]},
                                       user(said("(continue)"))]


def test_what_is_dropped_inside_a_field_is_named_too():
    turn = items("hi", reasoning={"effort": "low", "summary": "auto", "context": "all_turns"},
                 tools=[{**FLAT, "defer_loading": True}, {**PATCH, "allowed_callers": []}])
    assert turn.ignored == ("reasoning.context", "tools[0].defer_loading",
                            "tools[1].allowed_callers")


def test_what_claude_code_sends_as_a_client_is_understood():
    header = "x-anthropic-billing-header: cc_version=9.9.9; cch=00000;"
    turn = parse("messages", [user(said("q")), {"role": "assistant", "content": [CALL]}, user(
        result([{"type": "tool_reference", "tool_name": "Edit"}]))],
        system=[said(header), said("You are Claude Code.")],
        tools=[WEATHER, {"name": "DeferredToolPlaceholder", "input_schema": {"type": "object"}}])
    assert turn.system == "You are Claude Code."
    assert [t["name"] for t in turn.tools] == ["get_weather"]
    assert turn.messages[2] == user(result([said("Edit can be called now.")]))
    assert set(turn.ignored) == {"x-anthropic-billing-header", "tools[1].function"}


@pytest.mark.parametrize("call", [
    {"id": "toolu_2", "type": "function", "function": {"name": "patch", "arguments": "*** Begin"}},
    {"id": "toolu_2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}])
def test_a_free_tools_call_comes_back_in_chat_as_the_text_that_it_was(call):
    history = [HI, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "toolu_2", "content": "done"}]
    turn = parse("chat", history, tools=[PATCH])
    assert turn.messages[1]["content"] == [FREE_USE]


# -- what is refused, and under which name

ASK, REPLY = user(said("q")), {"role": "assistant", "content": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "toolu_1", "content": "x"}
ASKED, LAST = {"messages": [ASK]}, "messages[0].content[0]"


def part_body(part):
    return {"messages": [user(part)]}


REFUSED = [     # (body but for model, how the name of the field at fault begins)
    ({"messages": []}, "messages"), ({}, "messages"), ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"), ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": "only"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0]"),
    ({"messages": [{"role": "system", "content": [IMAGE]}, ASK]}, "messages[0].content"),
    ({"messages": [ASK, {"role": "assistant", "content": "prefill"}]}, "messages[1]"),
    ({"messages": [ASK, REPLY]}, "messages[1]"),
    ({"messages": [ASK, REPLY, ASK]}, "messages[2]"),
    ({"messages": [ASK, CALLED, ASK]}, "messages[2]"),
    ({"messages": [ASK, CALLED, {**TOOL, "tool_call_id": "other"}]}, "messages[2]"),
    ({"messages": [ASK, CALLED, {"role": "tool", "content": "x"}]}, "messages[2].tool_call_id"),
    ({"messages": [ASK, CALLED, {**TOOL, "tool_call_id": 5}]}, "messages[2].tool"),
    ({"messages": [ASK, CALLED, TOOL, TOOL]}, "messages[2]"),
    ({"messages": [ASK, TOOL]}, "messages[0]"), ({"messages": [TOOL]}, "messages[0]"),
    ({"messages": [ASK, {"role": "function", "name": "f", "content": "x"}]}, "messages[1]"),
    ({"messages": [user(CALL)]}, "messages[0]"),
    ({"messages": [ASK, {"role": "assistant", "content": [result()]}, ASK]}, "messages[1]"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [CHAT_CALL, CHAT_CALL]}, TOOL]},
     "messages[1]"),
    ({"messages": [ASK, CALLED, TOOL, CALLED, TOOL]}, "messages[3]"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": {"a": 1}}, TOOL]},
     "messages[1].tool_calls"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": ["x"]}, TOOL]},
     "messages[1].tool_calls[0]"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "a"}]}, TOOL]},
     "messages[1].tool_calls[0].function"),
    *[({"messages": [ASK, {"role": "assistant", "tool_calls": [{
        "id": "toolu_1", "function": {"name": "f", "arguments": arguments}}]}, TOOL]},
       "messages[1].tool_calls[0].function.arguments")
      for arguments in (5, [1])],
    (part_body({"type": "input_audio", "input_audio": {}}), LAST + ".type"),
    (part_body({"type": 5}), LAST + ".type"), (part_body({"text": "x"}), LAST + ".type"),
    (part_body(5), LAST), (part_body({"type": "text"}), LAST + ".text"),
    (part_body({"type": "text", "text": 5}), LAST + ".text"),
    *[(part_body({"type": "image_url", "image_url": url}), LAST + ".image_url") for url in (
        None, 5, {}, {"url": None}, "", "file:///etc/passwd", "ftp://h/a.png", "/etc/passwd",
        "https://", "https://h/a b", "data:image/png,abc", "data:image/bmp;base64," + PNG,
        "data:image/png;base64,$$$", "data:image/png;base64,abc", "data:;base64," + PNG,
        "data:application/pdf;base64," + PDF)],
    (part_body({"type": "file", "file": {"file_id": "file-1"}}), LAST + ".file"),
    (part_body({"type": "file", "file": "x"}), LAST + ".file"),
    (part_body({"type": "file", "file": {"file_data": ""}}), LAST + ".file"),
    (part_body({"type": "file", "file": {"file_data": "data:application/zip;base64," + PDF}}),
     LAST + ".file"),
    (part_body({"type": "image", "source": "x"}), LAST + ".source"),
    (part_body({"type": "image", "source": {"type": "file"}}), LAST + ".source.type"),
    (part_body({"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                            "data": "$"}}), LAST + ".source.data"),
    (part_body({"type": "image", "source": {"type": "base64", "media_type": "image/bmp",
                                            "data": PNG}}), LAST + ".source.media_type"),
    (part_body({"type": "image", "source": {"type": "text", "data": "x"}}), LAST + ".source.type"),
    (part_body({"type": "image", "source": {"type": "url", "url": "file:///x"}}),
     LAST + ".source.url"),
    (part_body({"type": "document", "source": {"type": "base64", "media_type": "image/png",
                                               "data": PNG}}), LAST + ".source.media_type"),
    (part_body({"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                               "data": 5}}), LAST + ".source.data"),
    ({**ASKED, "model": None}, "model"), ({**ASKED, "model": 5}, "model"),
    *[({"messages": [ASK], name: value}, name) for name, value in (
        ("temperature", "0.5"), ("temperature", True), ("temperature", -0.1), ("temperature", 2.1),
        ("top_p", 1.5), ("top_p", []), ("top_k", 1.5), ("top_k", -1), ("max_tokens", 0),
        ("max_tokens", "64"), ("max_tokens", 1.5), ("max_tokens", True),
        ("max_completion_tokens", -1), ("stop", 5), ("stop", {}), ("stream", "true"), ("stream", 1),
        ("n", 2), ("n", "1"), ("n", 1.5), ("n", True), ("thinking", "on"), ("thinking", True),
        ("reasoning_effort", "huge"), ("reasoning_effort", 5), ("response_format", "json"),
        ("stream_options", True), ("tools", "x"), ("functions", "x"), ("system", 5),
        ("system", [IMAGE]), ("output_config", "x"), ("parallel_tool_calls", "false"),
        ("tool_choice", "sometimes"), ("tool_choice", 5), ("tool_choice", "required"),
        ("tool_choice", CHOICE))],
    ({**ASKED, "stop": [5]}, "stop[0]"),
    ({**ASKED, "stop_sequences": ["a", None]}, "stop_sequences[1]"),
    ({**ASKED, "thinking": {"type": "maybe"}}, "thinking.type"),
    ({**ASKED, "thinking": {}}, "thinking.type"),
    ({**ASKED, "thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({**ASKED, "thinking": {"type": "enabled", "budget_tokens": 1023}},
     "thinking.budget_tokens"),
    ({**ASKED, "thinking": {"type": "enabled", "budget_tokens": 2000},
      "max_tokens": 2000}, "thinking.budget_tokens"),
    ({**ASKED, "output_config": {"effort": "huge"}}, "output_config.effort"),
    ({**ASKED, "stream_options": {"include_usage": "no"}}, "stream_options.include_usage"),
    ({**ASKED, "response_format": {}}, "response_format.type"),
    ({**ASKED, "response_format": {"type": "xml"}}, "response_format.type"),
    ({**ASKED, "response_format": {"type": "json_schema"}}, "response_format.schema"),
    ({**ASKED, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema"),
    ({**ASKED, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "array"}}}}, "response_format.json_schema.schema"),
    ({**ASKED, "output_config": {"format": {"type": "json_schema"}}},
     "output_config.format.schema"),
    ({**ASKED, "tools": [5]}, "tools[0]"),
    ({**ASKED, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({**ASKED, "tools": [{"name": 5, "input_schema": {}}]}, "tools[0].name"),
    ({**ASKED, "tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
    ({**ASKED, "tools": [WEATHER, {"name": "g", "description": 5, "input_schema": {}}]},
     "tools[1].description"),
    ({**ASKED, "tools": [{"name": "f", "input_schema": "x"}]}, "tools[0].input_schema"),
    ({**ASKED, "tools": [{"name": "f", "type": "bash_1", "input_schema": 5}]},
     "tools[0].input_schema"),
    ({**ASKED, "tools": [WEATHER, NESTED]}, "tools"),
    ({**ASKED, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}},
     "tool_choice"),
    ({**ASKED, "tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({**ASKED, "tools": [WEATHER], "tool_choice": {"type": "odd"}}, "tool_choice.type"),
    ({**ASKED, "tools": [WEATHER], "tool_choice": {"type": {}}}, "tool_choice.type"),
    ({**ASKED, "tools": [{"type": "web_search_20250305", "name": "web_search"}],
      "tool_choice": {"type": "tool", "name": "web_search"}}, "tool_choice"),
    ({**ASKED, "functions": [NESTED["function"]], "function_call": {"name": 5}},
     "function_call.name"),
    ({**ASKED, "thread": {"type": "create"}}, "thread"),
]


@pytest.mark.parametrize("body, field", REFUSED)
def test_a_wrong_request_is_refused_with_the_name_of_its_field(body, field):
    for name, dialect in DIALECTS.items():
        with pytest.raises(ApiError) as caught:
            dialect.parse({"model": "m", **body})
        error, other = caught.value, name == "responses" and "messages" not in body
        assert (error.status, error.kind) == (400, "invalid_request")
        assert (error.param or "").startswith("input" if other else field)
        assert error.param in str(error)


def test_several_choices_are_refused_with_advice():
    assert "send n requests" in str(refused("chat", {"model": "m", "messages": [ASK], "n": 2}))


def test_a_last_message_of_the_assistant_is_refused_with_the_reason():
    error = refused("messages", {"model": "m", "messages": [
        ASK, {"role": "assistant", "content": "{"}]})
    assert "prefill" in str(error)


def test_a_thread_is_refused_with_the_code_that_the_sdk_falls_back_on():
    error = refused("messages", {"model": "m", "messages": [ASK], "thread": {"type": "create"}})
    envelope = DIALECTS["messages"].error(error)
    assert envelope["error"]["type"] == "invalid_request_error"
    assert envelope["error"]["details"]["error_code"] == "thread_unsupported_request"


def test_parse_never_raises_anything_but_apierror():
    chance = random.Random(11)
    seeds = [{"model": "m", "messages": m, "tools": [NESTED, {**WEATHER, "name": "g"}],
              "stop": ["a"],
              "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
              "thinking": {"type": "enabled", "budget_tokens": 2000}, "temperature": 0.5,
              "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
              "stream_options": {"include_usage": True}, "output_config": {"effort": "low"},
              "system": [said("s")], "reasoning": {"effort": "low"}} for _, m, _ in HISTORIES]
    seeds += [{"model": "m", "messages": [user(part)]} for part, _ in MEDIA]
    odd = [json.dumps(value) for value in (
        None, 5, -1, 1.5, True, "", "x", "\ud800", [], [5], [[]], {}, {"type": "text"},
        {"type": []}, {"a": {}}, {"name": {}}, 10 ** 400)]
    fine = 0
    for _ in range(4000):
        body = json.loads(json.dumps(chance.choice(seeds)))
        for _ in range(chance.randint(1, 2)):
            spot, path = body, None
            while isinstance(spot, (dict, list)) and spot and (not path or chance.random() < .8):
                path = (spot, chance.choice(list(spot) if isinstance(spot, dict) else
                                            range(len(spot))))
                spot = path[0][path[1]]
            path[0][path[1]] = json.loads(chance.choice(odd))
        for dialect in DIALECTS.values():
            try:
                json.dumps(dataclasses.asdict(dialect.parse(body)), default=sorted)
                fine += 1
            except ApiError as error:
                assert error.status == 400 and json.dumps(dialect.error(error))
    assert fine > 100


# == 4. Dialects: answers ==========================================================================

ROLE = {"role": "assistant", "content": ""}


def opened(index, ident, name):
    return {"tool_calls": [{"index": index, "id": ident, "type": "function",
                            "function": {"name": name, "arguments": ""}}]}


def more(index, arguments):
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


CHAT_STREAMS = [
    (HELLO, [ROLE, {"content": "Hel"}, {"content": "lo"}, "stop"]),
    ([start(), *end()], [ROLE, "stop"]),
    (THOUGHT, [ROLE, {"reasoning_content": "Let me "}, {"reasoning_content": "think."},
               {"content": "Done."}, "stop"]),
    ([start(), *thinking(0), *text(1, "a"), *end()], [ROLE, {"content": "a"}, "stop"]),
    ([start(), *block(0, {"type": "redacted_thinking", "data": "d"}), *text(1, "a"), *end()],
     [ROLE, {"content": "a"}, "stop"]),
    ([start(), *call(0, "toolu_1", "f", "", '{"a"', ":1}"), *end("tool_use")],
     [ROLE, opened(0, "toolu_1", "f"), more(0, '{"a"'), more(0, ":1}"), "tool_calls"]),
    (TOOLS, [ROLE, {"content": "Let me look."}, opened(0, "toolu_1", "get_weather"),
             more(0, '{"ci'), more(0, 'ty":"P"}'), opened(1, "toolu_2", "get_time"),
             more(1, '{"zone":"CET"}'), "tool_calls"]),
    ([start(), *call(0, "t", "f"), *call(1, "u", "g", ""), *call(2, "v", "h", "{}"),
      *end("tool_use")],
     [ROLE, opened(0, "t", "f"), more(0, "{}"), opened(1, "u", "g"), more(1, "{}"),
      opened(2, "v", "h"), more(2, "{}"), "tool_calls"]),
    ([start(), *text(0, "I "), *end("refusal")], [ROLE, {"content": "I "}, "content_filter"]),
    ([start(), *text(0, "a"), *end("max_tokens")], [ROLE, {"content": "a"}, "length"]),
    ([start(), *text(0, "a"), *end("stop_sequence", "END")], [ROLE, {"content": "a"}, "stop"]),
    ([start(), *text(0, "a"), *end("of_the_future")], [ROLE, {"content": "a"}, "stop"]),
    ([start(), *text(0, "a"), *end("model_context_window_exceeded")],
     [ROLE, {"content": "a"}, "length"]),
    ([PING, start(), PING, *text(0, "a"), *end()], [ROLE, {}, {}, {"content": "a"}, "stop"]),
    ([start(), *block(0, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                      {"type": "input_json_delta", "partial_json": "{}"}),
      *block(1, {"type": "of_the_future", "input": {}}, {"type": "future_delta", "text": "x"}),
      *text(2, "a"), *end()], [ROLE, {"content": "a"}, "stop"]),
]


@pytest.mark.parametrize("events, expected", CHAT_STREAMS)
def test_a_chat_stream_tells_exactly_what_the_events_say(events, expected):
    assert deltas(events) == expected


def test_rule_1_all_chunks_share_id_created_and_model_and_the_first_names_the_role():
    told = chunks([PING, *TOOLS], wants=["usage"])[:-1]
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in told} == {
        ("chatcmpl-abc", 5, "asked", "chat.completion.chunk")}
    assert ["role" in c["choices"][0]["delta"] for c in told if c["choices"]] == [
        True] + [False] * (len(told) - 2)
    assert all(c["choices"][0]["index"] == 0 for c in told if c["choices"])


@pytest.mark.parametrize("events, arguments", [
    (TOOLS, {0: '{"city":"P"}', 1: '{"zone":"CET"}'}),
    ([start(), *call(0, "t", "f"), *call(1, "u", "g", "", "{}"), *end("tool_use")],
     {0: "{}", 1: "{}"})])
def test_rule_2_every_call_fragment_has_a_stable_index_and_names_come_once(events, arguments):
    calls = [d["tool_calls"] for d in deltas(events) if "tool_calls" in d and d != "tool_calls"]
    assert all(len(c) == 1 and type(c[0]["index"]) is int for c in calls)
    first, whole = {}, {}
    for [fragment] in calls:
        index, function = fragment["index"], fragment["function"]
        if index in first:
            assert set(fragment) == {"index", "function"} and set(function) == {"arguments"}
        else:
            first[index] = (fragment["id"], fragment["type"], function["name"])
        whole[index] = whole.get(index, "") + function["arguments"]
    assert whole == arguments and list(first) == sorted(first) and len(set(first.values())) == 2


@pytest.mark.parametrize("events, _", CHAT_STREAMS)
def test_rule_3_one_finish_reason_before_usage_and_done(events, _):
    told = chunks(events, wants=["usage"])
    finished = [bool(c["choices"] and c["choices"][0]["finish_reason"]) for c in told[:-1]]
    assert finished == [False] * (len(finished) - 2) + [True, False]
    assert told[-2]["choices"] == [] and told[-2]["usage"] and told[-1] == "[DONE]"


def test_rule_4_a_usage_chunk_comes_only_when_it_was_asked_for():
    unasked, asked = chunks(HELLO), chunks(HELLO, wants=["usage"])
    assert all("usage" not in c and c["choices"] for c in unasked[:-1])
    assert (asked[-2]["choices"], asked[-2]["usage"]["total_tokens"]) == ([], 17)
    assert len(asked) == len(unasked) + 1


def test_rule_5_no_other_chunk_carries_running_usage():
    assert [c["usage"] for c in chunks(TOOLS, wants=["usage"])[:-2]] == [None] * (
        len(chunks(TOOLS)) - 1)


def test_rule_6_a_heartbeat_is_an_empty_chunk_for_chat_and_a_ping_for_messages():
    [beat] = sse(DIALECTS["chat"].frames(fold([start(), PING]), PING)[0])
    assert beat[1]["object"] == "chat.completion.chunk"
    assert [(c["delta"], c["finish_reason"]) for c in beat[1]["choices"]] == [({}, None)]
    assert pure_stream("messages", [PING]) == b'event: ping\ndata: {"type":"ping"}\n\n'
    for dialect in DIALECTS:
        assert not re.search(rb"(?m)^(id:|:|data: *$)", pure_stream(dialect, [PING, *TOOLS]))


ERROR = {"type": "error", "error": {"type": "server_error", "message": "it broke", "code": None}}


@pytest.mark.parametrize("events", [[], [start()], [start(), *text(0, "a", "b")[:2]], TOOLS[:7]])
def test_rule_7_an_error_inside_a_chat_stream_is_one_frame_then_done(events):
    told = chunks([*events, ERROR], wants=["usage"])
    assert told[-2:] == [{"error": ERROR["error"]}, "[DONE]"]
    assert all(c["choices"][0]["finish_reason"] is None for c in told[:-2])


def event_names(events):
    return [(name, value.get("index")) for name, value in sse(pure_stream("messages", events))]


@pytest.mark.parametrize("events", [HELLO, TOOLS, THOUGHT, [PING, *HELLO], [start(), *end()], [
    start(), *block(0, {"type": "of_the_future", "x": 1}, {"type": "future_delta"}), *end()]])
def test_messages_events_pass_in_full_and_in_order_but_for_the_models_name(events):
    expected = [(e["type"], e) for e in events]
    told = sse(pure_stream("messages", events))
    at = [e["type"] for e in events].index("message_start")
    expected[at] = ("message_start", {**events[at], "message": {**events[at]["message"],
                                                                "model": "asked"}})
    assert told == expected


@pytest.mark.parametrize("events, closed", [
    ([start(), *text(0, "a")[:2]], [("content_block_stop", 0)]),
    ([start(), *thinking(0, "a"), *text(1, "a")[:1]], [("content_block_stop", 1)]),
    ([start(), *text(0, "a")], []), ([start()], [])])
def test_a_failure_in_a_messages_stream_closes_the_block_before_event_error(events, closed):
    told = event_names([*events, ERROR])
    assert [t for t in told[len(events):] if not t[0].startswith("message")] == [
        *closed, ("error", None)]
    assert sse(pure_stream("messages", [*events, ERROR]))[-1][1] == ERROR


def test_thinking_keeps_its_signature_and_an_empty_thinking_block_is_kept():
    events = [start(), *thinking(0), *text(1, "a"), *end()]
    told = [value for name, value in sse(pure_stream("messages", events))]
    assert {"type": "signature_delta", "signature": "sig=="} in [v.get("delta") for v in told]
    assert DIALECTS["messages"].body(fold(events))["content"][0] == {
        "type": "thinking", "thinking": "", "signature": "sig=="}


USAGE_PURE = {"input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 300,
         "output_tokens": 1}


def test_a_whole_messages_answer_is_what_its_stream_folds_to():
    message = fold([start(**USAGE_PURE), *THOUGHT[1:-2], *call(2, "t", "f", '{"a": 1}'),
                    *end("tool_use", output_tokens=9)])
    assert DIALECTS["messages"].body(message) == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "asked", "content": [
            {"type": "thinking", "thinking": "Let me think.", "signature": "sig=="}, said("Done."),
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}],
        "stop_reason": "tool_use", "stop_sequence": None, "usage": {**USAGE_PURE, "output_tokens": 9}}


def test_a_whole_messages_answer_names_the_stop_sequence_and_keeps_an_input_an_object():
    body = DIALECTS["messages"].body(fold([start(), *text(0, "a"), *end("stop_sequence", "END")]))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    cut = DIALECTS["messages"].body(fold([start(), *call(0, "t", "f", '{"a'), *end("max_tokens")]))
    assert isinstance(cut["content"][0]["input"], dict)


@pytest.mark.parametrize("events, _", CHAT_STREAMS)
@pytest.mark.parametrize("wants", [[], ["functions"]])
def test_a_whole_chat_answer_is_what_its_stream_folds_to(events, _, wants):
    choice = chat_body(events, wants)["choices"][0]
    told, calls, finish = {}, {}, None
    for delta in deltas(events, wants):
        if isinstance(delta, str):
            finish = delta
            continue
        for name in ("content", "reasoning_content"):
            told[name] = told.get(name, "") + delta.get(name, "")
        for piece in delta.get("tool_calls", [{"index": 0, "function": delta["function_call"]}]
                               if "function_call" in delta else []):
            kept = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
            kept["name"] += piece["function"].get("name", "")
            kept["arguments"] += piece["function"].get("arguments", "")
    message = choice["message"]
    whole = [c["function"] for c in message.get("tool_calls", [])] or (
        [message["function_call"]] if "function_call" in message else [])
    assert choice["finish_reason"] == finish
    assert (message["content"] or "", message.get("reasoning_content", "")) == (
        told["content"], told["reasoning_content"])
    assert [(f["name"], json.loads(f["arguments"])) for f in whole] == [
        (f["name"], json.loads(f["arguments"])) for f in calls.values()]


def test_a_whole_chat_answer_has_every_field_that_clients_read():
    assert chat_body([start(**USAGE_PURE), *TOOLS[1:-2], *end("tool_use", output_tokens=9)]) == {
        "id": "chatcmpl-abc", "object": "chat.completion", "created": 5, "model": "asked",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "Let me look.", "refusal": None, "tool_calls": [
                {"id": "toolu_1", "type": "function",
                 "function": {"name": "get_weather", "arguments": '{"city":"P"}'}},
                {"id": "toolu_2", "type": "function",
                 "function": {"name": "get_time", "arguments": '{"zone":"CET"}'}}]}}],
        "usage": {"prompt_tokens": 330, "completion_tokens": 9, "total_tokens": 339,
                  "prompt_tokens_details": {"cached_tokens": 300},
                  "completion_tokens_details": {"reasoning_tokens": 0}}}


@pytest.mark.parametrize("events, content", [
    ([start(), *call(0, "t", "f"), *end("tool_use")], None), ([start(), *end()], ""),
    ([start(), *text(0, "a"), *text(1, "b"), *end()], "ab")])
def test_chat_content_is_null_only_beside_tool_calls(events, content):
    assert chat_body(events)["choices"][0]["message"]["content"] == content


def test_arguments_that_the_output_limit_cut_off_stay_as_they_are_in_chat():
    choice = chat_body([start(), *call(0, "t", "f", '{"a": "cu'), *end("max_tokens")])["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "cu'
    assert choice["finish_reason"] == "length"


def test_old_style_callers_get_a_function_call():
    events = [start(), *call(0, "t", "f", '{"a":', "1}"), *end("tool_use")]
    assert deltas(events, ["functions"]) == [
        ROLE, {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": '{"a":'}}, {"function_call": {"arguments": "1}"}},
        "function_call"]
    choice = chat_body(events, ["functions"])["choices"][0]
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "function_call"


def test_an_old_style_caller_gets_a_function_call_of_a_custom_tool_too():
    wants = {"functions": True, "tools": {"f": {"free": "custom"}}}
    events = [start(), *call(0, "t", "f", '{"input": "say', ' it"}'), *end("tool_use")]
    assert deltas(events, wants)[1:] == [
        {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": "say it"}}, "function_call"]
    assert chat_body(events, wants)["choices"][0]["message"]["function_call"] == {
        "name": "f", "arguments": "say it"}


def test_reasoning_tokens_are_told_when_the_api_counts_them():
    usage = chat_body([start(), *text(0, "a"), *end(
        output_tokens=9, output_tokens_details={"thinking_tokens": 4})])["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}


VENDOR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
                403: "permission_error", 404: "not_found_error", 413: "request_too_large",
                429: "rate_limit_error", 500: "api_error", 504: "timeout_error",
                529: "overloaded_error"}


@pytest.mark.parametrize("kind", ccproxy.ERRORS)
def test_every_error_has_its_status_and_both_envelopes(kind):
    error = ApiError(kind, "what happened", param="field")
    status = error.status
    chat, messages = DIALECTS["chat"].error(error), DIALECTS["messages"].error(error)
    ours = status >= 500 and status not in (501, 505)       # those two are the caller's doing
    generic = "api_error" if ours else "invalid_request_error"
    assert 400 <= status < 600
    assert messages == {"type": "error", "error": {"type": VENDOR_TYPES.get(status, generic),
                                                   "message": "what happened"}}
    assert set(chat) == {"error"} and set(chat["error"]) == {"message", "type", "param", "code"}
    assert (chat["error"]["message"], chat["error"]["param"]) == ("what happened", "field")
    assert (chat["error"]["type"] == "server_error") is ours
    assert chat["error"]["code"] == (None if kind == "invalid_request" else kind)


@pytest.mark.parametrize("status, kind", [(s, ApiError(k, "").kind) for k, (s, *_) in
                                          ccproxy.ERRORS.items()])
def test_a_vendors_status_is_kept(status, kind):
    error = ccproxy.status_error(status, "m", 3)
    assert (error.status, error.kind, str(error), error.retry_after) == (status, kind, "m", 3)


@pytest.mark.parametrize("status, vendor", [(418, "invalid_request_error"), (520, "api_error")])
def test_an_unknown_status_is_kept_too(status, vendor):
    error = ccproxy.status_error(status, "m")
    assert error.status == status
    assert DIALECTS["messages"].error(error)["error"]["type"] == vendor


# -- Responses

def life(events, wants=()):
    """The events of a Responses stream, and their response by the checks of the test's reader."""
    frames = sse(pure_stream("responses", events, wants))
    read_responses(frames)
    return [data for _, data in frames]


def steps(events, wants=()):
    """Event names without "response.", with output_index and what is told:  "output_text.delta 0 a"."""
    found = []
    for data in life(events, wants):
        text = [str(data[key]) for key in ("output_index", "delta", "text", "arguments", "input")
                if data.get(key) not in (None, "")]
        found.append(" ".join([data["type"].replace("response.", "", 1), *text]))
    return found


FREE = {"tools": {"patch": {"free": "function"}}}
OPENED, WHOLE = ["created", "in_progress"], ["completed"]
TOLD_TEXT = ["output_item.added 0", "content_part.added 0", "output_text.delta 0 Hel",
             "output_text.delta 0 lo", "output_text.done 0 Hello", "content_part.done 0",
             "output_item.done 0"]
SEQUENCES = [       # events -> (wishes, what a Responses client is told)
    (HELLO, (), OPENED + TOLD_TEXT + WHOLE),
    (THOUGHT, (), OPENED + [
        "output_item.added 0", "reasoning_summary_part.added 0",
        "reasoning_summary_text.delta 0 Let me ", "reasoning_summary_text.delta 0 think.",
        "reasoning_summary_text.done 0 Let me think.", "reasoning_summary_part.done 0",
        "output_item.done 0", "output_item.added 1", "content_part.added 1",
        "output_text.delta 1 Done.", "output_text.done 1 Done.", "content_part.done 1",
        "output_item.done 1"] + WHOLE),
    ([start(), *call(0, "toolu_1", "f", "", '{"a"', ":1}"), *end("tool_use")], (), OPENED + [
        "output_item.added 0", 'function_call_arguments.delta 0 {"a"',
        "function_call_arguments.delta 0 :1}", 'function_call_arguments.done 0 {"a":1}',
        "output_item.done 0"] + WHOLE),
    ([start(), *call(0, "toolu_1", "f"), *end("tool_use")], (), OPENED + [
        "output_item.added 0", "function_call_arguments.delta 0 {}",
        "function_call_arguments.done 0 {}", "output_item.done 0"] + WHOLE),
    ([start(), *call(0, "t1", "f", "{}"), *call(1, "t2", "g", "{}"), *end("tool_use")], (),
     OPENED + [f"{name.format(at)}" for at in (0, 1) for name in (
         "output_item.added {}", "function_call_arguments.delta {} {{}}",
         "function_call_arguments.done {} {{}}", "output_item.done {}")] + WHOLE),
    ([start(), *call(0, "t1", "patch", '{"input": "*** ', 'Begin"}'), *end("tool_use")], FREE,
     OPENED + ["output_item.added 0", "custom_tool_call_input.delta 0 *** Begin",
               "custom_tool_call_input.done 0 *** Begin", "output_item.done 0"] + WHOLE),
    ([start(), *text(0, "No"), *end("refusal")], (), OPENED + [
        "output_item.added 0", "content_part.added 0", "output_text.delta 0 No",
        "output_text.done 0 No", "content_part.done 0", "output_item.done 0", "incomplete"]),
    ([start(), *end("max_tokens")], (), OPENED + ["incomplete"]),
    ([PING, start(), *text(0, "Hel", "lo"), *end()], (), OPENED + TOLD_TEXT + WHOLE),
    ([start(), PING, *text(0, "Hel", "lo"), *end()], (), [*OPENED, "in_progress"] + TOLD_TEXT
     + WHOLE),
    ([start(), *block(0, {"type": "of_the_future", "x": 1}, {"type": "future_delta", "y": 2}),
      *text(1, "Hel", "lo"), *end()], (), OPENED + TOLD_TEXT + WHOLE),
    ([start(), *block(0, {"type": "redacted_thinking", "data": "xyz"}), *end()], (), OPENED + [
        "output_item.added 0", "output_item.done 0"] + WHOLE),
    ([start(), *text(0, "Hel", "lo")[:2], ERROR], (), OPENED + TOLD_TEXT[:3] + ["error", "failed"]),
]


@pytest.mark.parametrize("events, wants, expected", SEQUENCES)
def test_a_responses_stream_tells_its_whole_life_in_order(events, wants, expected):
    assert steps(events, wants) == expected


@pytest.mark.parametrize("events, wants, _", [row for row in SEQUENCES if row[0][-1] != ERROR])
def test_a_whole_response_is_the_one_that_its_stream_ends_with(events, wants, _):
    message = fold(events)
    message.wants = fresh(wants).wants
    assert life(events, wants)[-1]["response"] == DIALECTS["responses"].body(message)


@pytest.mark.parametrize("reason, status, cut", [
    ("end_turn", "completed", None), ("tool_use", "completed", None), ("new", "completed", None),
    ("max_tokens", "incomplete", "max_output_tokens"), ("refusal", "incomplete", "content_filter"),
    ("model_context_window_exceeded", "incomplete", "max_output_tokens")])
def test_a_response_says_whether_and_why_it_was_cut_short(reason, status, cut):
    response = life([start(), *text(0, "a"), *end(reason)])[-1]["response"]
    assert (response["status"], response["error"]) == (status, None)
    assert response["incomplete_details"] == (cut and {"reason": cut})


def test_a_response_that_fails_inside_its_stream_says_so_twice_and_never_that_it_is_whole():
    error, failed = life([start(), *text(0, "a"), ERROR])[-2:]
    assert (error["type"], error["error"]["message"]) == ("error", error["message"])
    response = failed["response"]
    assert (failed["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"]["message"] == error["message"] and response["error"]["code"]


def test_a_response_has_every_field_that_clients_read_and_repeats_its_request():
    asked = {"model": "m", "input": "hi", "metadata": {"a": "b"}, "temperature": 0.5,
             "instructions": "I", "tools": [PATCH], "store": False, "max_output_tokens": 9}
    message = fold([start(input_tokens=10, cache_read_input_tokens=5, cache_creation_input_tokens=3,
                          output_tokens=1), *thinking(0, "hm"), *text(1, "a"), *end()])
    message.wants = DIALECTS["responses"].parse(asked).wants
    body = DIALECTS["responses"].body(message)
    assert {name: body[name] for name in asked if name not in ("input", "model")} == {
        name: value for name, value in asked.items() if name not in ("input", "model")}
    for name in ("background", "parallel_tool_calls", "previous_response_id", "reasoning", "text",
                 "tool_choice", "top_p", "truncation", "user", "error", "incomplete_details"):
        assert name in body
    assert (body["id"], body["object"], body["created_at"], body["model"], body["status"]) == (
        "resp_abc", "response", 5, "asked", "completed")
    assert body["usage"] == {
        "input_tokens": 18, "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 3},
        "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 25}
    reasoning, answer = body["output"]
    assert reasoning["encrypted_content"] == "thinking:sig=="
    assert (answer["status"], answer["content"]) == ("completed", [
        {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}])
    assert len({item["id"] for item in body["output"]}) == 2


@pytest.mark.parametrize("events", [TOOLS, THOUGHT, [
    start(), *block(0, {"type": "redacted_thinking", "data": "xyz"}), *text(1, "a"), *end()]])
def test_the_output_sent_back_as_input_is_the_message_that_it_was(events):
    message = fold(events)
    output = DIALECTS["responses"].body(message)["output"]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "x"}
               for item in output if "call_id" in item]
    assert items([HI, *output, *(results or [HI])]).messages[1]["content"] == message.content


@pytest.mark.parametrize("events, wants, slot, value", [
    (text(0, "a"), (), "content", [{"type": "output_text", "text": "a", "annotations": [],
                                    "logprobs": []}]),
    (call(0, "t", "f", '{"city": "Bon'), (), "arguments", '{"city": "Bon'),
    (call(0, "t", "patch", '{"input": "abc de'), FREE, "input", "abc de"),
    (call(0, "t", "patch", '{"inp'), FREE, "input", '{"inp')])
def test_only_the_last_item_is_incomplete_when_the_output_limit_cut_it_off(events, wants, slot,
                                                                           value):
    shifted = [{**event, "index": 1} for event in events]
    data = life([start(), *text(0, "whole"), *shifted, *end("max_tokens")], wants)
    first, last = data[-1]["response"]["output"]
    assert (first["status"], last["status"], last[slot]) == ("completed", "incomplete", value)


def test_a_block_that_the_api_broke_off_is_never_told_to_be_done():
    """2.1.330 ends the block before it tells of the error."""
    names = [data["type"] for data in life([start(), *text(0, "half"), ERROR])]
    assert "response.output_item.added" in names and "response.output_item.done" not in names


def test_a_call_in_a_namespace_is_told_by_its_own_name():
    for free, kind in (({}, "function_call"), ({"free": "function"}, "custom_tool_call")):
        wants = {"tools": {"sky__look": {"namespace": "sky", "name": "look", **free}}}
        [item] = life([start(), *call(0, "t", "sky__look", "{}"), *end("tool_use")], wants)[-1][
            "response"]["output"]
        assert (item["type"], item["namespace"], item["name"]) == (kind, "sky", "look")


@pytest.mark.parametrize("slot, field", [("function", "arguments"), ("custom", "input")])
def test_a_free_tools_call_is_raw_text_in_chat_in_the_envelope_that_its_caller_reads(slot, field):
    wants = {"tools": {"patch": {"free": slot}}}
    events = [start(), *call(0, "t", "patch", '{"input": "***', ' Begin"}'), *end("tool_use")]
    pieces = [d["tool_calls"][0] for d in deltas(events, wants)
              if isinstance(d, dict) and "tool_calls" in d]
    assert pieces == [{"index": 0, "id": "t", "type": slot, slot: {"name": "patch", field: ""}},
                      {"index": 0, slot: {field: "*** Begin"}}]
    [whole] = chat_body(events, wants)["choices"][0]["message"]["tool_calls"]
    assert whole == {"id": "t", "type": slot, slot: {"name": "patch", field: "*** Begin"}}


# == 5. CLI protocol ===============================================================================

def load_recordings():
    """Recordings of a real CLI (2.1.330), trimmed: name -> [[direction, line]]."""
    for place in (os.path.join(HERE, ".ci"), HERE):
        path = os.path.join(place, "transcripts.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return json.load(file)
    raise FileNotFoundError("transcripts.json")


RECORDINGS = load_recordings()


def from_cli(name):
    """What the CLI said in its turns: lines of history and control are not the turn's."""
    return [line for way, line in RECORDINGS[name] if way == "from_cli"
            and not line["type"].startswith("control_")
            and not (line["type"] == "result" and line["num_turns"] == 0)]


def turn(**fields):
    fields = {"messages": (user(said("q")),), "tools": (WEATHER,), **fields}
    return ccproxy.Turn(model="m", **fields)


def replay(lines, asked=None, clock=lambda: 0.0):
    """A Reply fed until it has ended, its events, and the lines that are left."""
    reply, events, lines = Reply(asked or turn(), clock), [], list(lines)
    while lines and not reply.done and not reply.failed:
        events += reply.feed(lines.pop(0))
    return reply, events, lines


def well_formed(events, whole=True):
    """Exactly one message: one start, contiguous blocks one after the other, one end."""
    kinds = [e["type"] for e in events]
    shape = "".join(kind + " " for kind in kinds if kind != "content_block_delta")
    blocks = "(content_block_start content_block_stop )*"
    if whole:
        assert re.fullmatch(f"message_start {blocks}message_delta message_stop ", shape), kinds
    else:
        assert re.fullmatch(f"(message_start )?{blocks}(content_block_start )?", shape), kinds
    starts = [e["index"] for e in events if e["type"] == "content_block_start"]
    assert starts == list(range(len(starts)))
    return fold(events)


def stream_lines(*events):
    return [{"type": "stream_event", "event": event, "parent_tool_use_id": None}
            for event in events]


def init(*tools):
    return {"type": "system", "subtype": "init", "model": "claude-real", "tools": list(tools)}


def failed_result(text="API Error: 500 broken", **more):
    return {"type": "result", "subtype": "success", "is_error": True, "result": text, **more}


WORDS = "Hello from fake. "
SUNNY = 'result=[{"type": "text", "text": "sunny"}]'


def tool_use(ident, name, **given):
    return {"type": "tool_use", "id": ident, "name": name, "input": given}


ANSWERS = {     # recording -> (content, stop reason) of each message in it
    "chat-two-turns": [([said(WORDS + "You said: ECHO hello ")], "end_turn"),
                       ([said(WORDS + "You said: and again ")], "end_turn")],
    "history": [([said(WORDS + "You said: So, is it wet? ")], "end_turn")],
    "sampling-and-tool-choice": [([said(WORDS + "You said: hello ")], "end_turn")],
    "thinking": [([{"type": "thinking", "thinking": "Let me think.", "signature": "sig=="},
                   said("Done.")], "end_turn")],
    "client-tool": [
        ([tool_use("toolu_8a04f9552350459189d8", "get_weather", city="Paris")], "tool_use"),
        ([said(WORDS + SUNNY + " ")], "end_turn")],
    "client-tools-parallel": [
        ([tool_use("toolu_cea1c8ae7bd04e5c883b", "get_weather", city="Paris"),
          tool_use("toolu_255db43154ed41fcba08", "get_weather", city="Rome")], "tool_use"),
        ([said(WORDS + SUNNY + SUNNY[7:] + " ")], "end_turn")],
    "agent-permission-allow": [
        ([tool_use("toolu_fdb97f1a4be74680b770", "Write", file_path="out.txt", content="hi")],
         "tool_use"),
        ([said(WORDS + 'result="File created successfully at: out.txt (file state is current in '
               'your context \\u2014 no need to Read it back)" ')], "end_turn")],
    "agent-permission-deny": [
        ([tool_use("toolu_8045213bbd214c25bd6b", "Write", file_path="out.txt", content="hi")],
         "tool_use"),
        ([said(WORDS + 'result="User said no" ')], "end_turn")],
}
FAILURES = {
    "error-400": (400, "fake invalid_request_error"), "error-529": (529, "fake overloaded_error"),
    "error-401": (401, "fake authentication_error"), "error-429": (429, "fake rate_limit_error"),
    "interrupt": (502, None),
}


def test_every_recording_is_replayed():
    assert set(RECORDINGS) == set(ANSWERS) | set(FAILURES)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_recorded_turn_becomes_exactly_one_message_after_the_other(name):
    lines = from_cli(name)
    for content, reason in ANSWERS[name]:
        reply, events, lines = replay(lines)
        assert reply.done and reply.reusable and not reply.failed
        message = well_formed(events)
        assert (message.content, message.stop_reason) == (content, reason)
        while lines and lines[0]["type"] == "result":
            lines.pop(0)
    assert lines == []


@pytest.mark.parametrize("name", FAILURES)
def test_a_recorded_failure_keeps_its_status_and_the_vendors_own_words(name):
    status, words = FAILURES[name]
    reply, events, rest = replay(from_cli(name))
    assert not reply.done and not reply.reusable and rest == []
    assert reply.failed.status == status and not reply.failed.retry_after
    assert words is None or str(reply.failed) == words
    well_formed(events, whole=False)


def test_nothing_is_told_after_the_message_is_done():
    reply, _, rest = replay(from_cli("client-tool"))
    assert rest and [e for line in rest for e in reply.feed(line)] == []
    assert reply.done and not reply.failed


@pytest.mark.parametrize("line, seconds", [
    ({"type": "system", "subtype": "api_retry", "retry_delay_ms": 12500, "error_status": 429}, 13),
    ({"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1090}}, 90),
    ({"type": "rate_limit_event", "rate_limit_info": {"resetsAt": 900}}, 1),
    ({"type": "rate_limit_event", "rate_limit_info": {}}, None),
    ({"type": "rate_limit_event"}, None)])
@pytest.mark.parametrize("name", ["error-429", "error-529", "error-400"])
def test_retry_after_is_told_when_the_cli_said_it_and_waiting_may_help(name, line, seconds):
    reply, _, _ = replay([line, *from_cli(name)], clock=lambda: 1000.0)
    expected = None if name == "error-400" else seconds
    assert (reply.failed.status, reply.failed.retry_after or None) == (int(name[-3:]), expected)


def test_an_api_that_asks_to_wait_long_fails_the_turn_at_once():
    retry = {"type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 2,
             "retry_delay_ms": 61000, "error_status": 429}
    reply, _, rest = replay([init(), retry, init()])
    assert (reply.failed.status, reply.failed.retry_after, len(rest)) == (429, 61, 1)
    assert replay([init(), {**retry, "error_status": None}])[0].failed.status == 502
    assert not replay([init(), {**retry, "retry_delay_ms": 2000}])[0].failed


@pytest.mark.parametrize("noise", [
    {"type": "of_the_future"}, {"type": "system", "subtype": "of_the_future"}, {},
    {"type": "system", "subtype": "status", "status": None}, {"no": "type"},
    {"type": "stream_event", "parent_tool_use_id": "toolu_9", "event": text(0, "sub")[1]},
    {"type": "stream_event", "parent_tool_use_id": "toolu_9", "event": start()},
    {"type": "assistant", "parent_tool_use_id": "toolu_9", "error": "unknown",
     "message": {"model": "<synthetic>", "content": []}},
    {"type": "assistant", "message": {"model": "claude-real", "content": [said("again")]}},
    {"type": "user", "message": {"role": "user", "content": "x"}},
    {"type": "command_lifecycle", "state": "queued"}],
    ids=lambda line: json.dumps(line)[:50])
def test_lines_of_subagents_and_of_unknown_types_change_nothing(noise):
    lines = from_cli("thinking")
    reply, events, _ = replay([x for line in lines for x in (noise, line)])
    assert (reply.done, events) == (True, replay(lines)[1])


def test_unknown_fields_key_order_and_unknown_blocks_pass():
    events = [start(), *block(0, {"of": "future", "type": "new_block"}, {"type": "new_delta"}),
              *text(1, "a"), *end("new_reason")]
    lines = [{k: line[k] for k in reversed(list(line))} for line in stream_lines(*events)]
    reply, told, _ = replay(lines)
    assert (told, reply.done) == (events, True)


@pytest.mark.parametrize("reason, reusable", [
    ("end_turn", True), ("stop_sequence", True), ("max_tokens", False), ("refusal", False)])
def test_a_process_is_reused_only_after_an_end_that_the_cli_leaves_alone(reason, reusable):
    reply, _, _ = replay(stream_lines(start(), *text(0, "a"), *end(reason)))
    assert (reply.done, reply.reusable) == (True, reusable)


def test_a_broken_stream_is_an_error_and_never_an_answer():
    broken = [{"type": "message_delta", "delta": {"stop_reason": None}, "usage": {}},
              {"type": "message_stop"}]
    reply, events, rest = replay([init(), *stream_lines(start(), *text(0, "a"), *broken), {
        "type": "assistant", "error": "server_error", "message": {
            "model": "<synthetic>", "content": [said("API Error: 500 broken off")]}},
        failed_result("API Error: 500 broken off", api_error_status=500)])
    assert (reply.done, reply.reusable, rest) == (False, False, [])
    assert (reply.failed.status, str(reply.failed)) == (500, "broken off")
    well_formed(events, whole=False)


def test_an_error_of_the_api_behind_a_finished_call_fails_at_once():
    """The CLI waits for the call's result, and would wait for as long as it may be parked."""
    problem = {"type": "assistant", "error": "overloaded", "api_error_status": 529, "message": {
        "model": "<synthetic>", "content": [said("API Error: 529 Overloaded")]}}
    reply, events, rest = replay([init("get_weather"), *stream_lines(
        start(), *call(0, "t", "get_weather", "{}")), problem, *stream_lines(*text(1, "late"))])
    assert (reply.failed.status, str(reply.failed), reply.done) == (529, "Overloaded", False)
    assert len(well_formed(events, whole=False).content) == 1


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_a_message_that_broke_off_fails_as_soon_as_the_cli_asks_the_model_to_go_on(schema):
    """2.1.330 would answer from both halves."""
    reply, events, _ = replay([init(ANSWER), *stream_lines(
        start(), *thinking(0, "hm"), *text(1, "half"), {"type": "message_stop"}),
        {"type": "system", "subtype": "status", "status": "requesting"}, *stream_lines(
        start(), *text(0, "again"), *end())], turn(schema=schema))
    assert (reply.failed.status, reply.done) == (502, False) and "broke off" in str(reply.failed)
    assert "again" not in json.dumps(events)


def test_after_a_failure_nothing_more_is_told():
    reply, events, _ = replay(stream_lines(start(), *text(0, "a"), start(), *text(0, "again"),
                                           *end()))
    assert reply.failed and not reply.done and "again" not in json.dumps(events)


def test_a_second_message_start_is_hidden_before_content_and_an_error_after_it():
    reply, events, _ = replay(stream_lines(start(), start(), *text(0, "a"), *end()))
    assert reply.done and well_formed(events).content == [said("a")]
    reply, events, _ = replay(stream_lines(start(), *text(0, "a"), start(), *text(0, "b"), *end()))
    assert reply.failed.status == 502 and not reply.done
    well_formed(events, whole=False)


@pytest.mark.parametrize("line, status, words", [
    (failed_result("API Error: 400 {\"type\":\"error\",\"error\":{\"message\":\"no\"}} \u00b7 see",
                   api_error_status=400), 400, "no"),
    (failed_result("API Error: 413 too big", api_error_status=413), 413, "too big"),
    (failed_result("API Error: 404 model: x. Run --model to pick a different model.",
                   api_error_status=404), 404, "model: x"),
    (failed_result("You've hit your limit", api_error_status=429), 429, "You've hit your limit"),
    (failed_result(None, errors=["it broke"]), 502, None),
    ({"type": "result", "subtype": "success", "is_error": False, "result": ""}, 502, None),
    ({"type": "result", "subtype": "error_max_turns", "is_error": True}, 502, None)])
def test_a_result_without_a_message_is_a_failure(line, status, words):
    reply, _, _ = replay([init(), line])
    assert reply.failed.status == status and str(reply.failed)
    assert words is None or str(reply.failed) == words


def test_the_clis_word_for_an_error_stands_in_for_a_missing_status():
    for word, status in {"rate_limit": 429, "authentication_failed": 401, "new": 502}.items():
        problem = {"type": "assistant", "error": word, "message": {
            "model": "<synthetic>", "content": [said("no")]}}
        assert replay([problem, failed_result()])[0].failed.status == status


# -- structured output

ANSWER = "StructuredOutput"
GOOD, BAD = '{"n": 7}', '{"n": "x"}'


def answer_lines(ident, pieces, verdict, before=()):
    """One message with a call of the answer tool, and what the CLI says to it."""
    given = [] if verdict is None else [{"type": "user", "message": {"role": "user", "content": [
        result("valid" if verdict else "n must be integer", ident,
               **({} if verdict else {"is_error": True}))]}}]
    return [*stream_lines(start(), *before, *call(len(before) and 1, ident, ANSWER, *pieces),
                          *end("tool_use")), *given]


def structured(*lines, **fields):
    return replay([init(ANSWER), *lines], turn(schema=SCHEMA, tools=(), **fields))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("before", [(), text(0, "Sure:"), thinking(0, "hm")])
def test_an_answer_to_a_schema_arrives_as_text(streamed, before):
    reply, events, _ = structured(*answer_lines("t", ["", '{"n"', ": 7}"], True, before),
                                  stream=streamed)
    message = well_formed(events)
    assert reply.done and (message.said("text"), message.stop_reason) == (GOOD, "end_turn")
    assert {b["type"] for b in message.content} <= {"text", "thinking"}


def test_an_answer_to_a_schema_is_streamed_as_it_comes_but_ends_only_when_valid():
    reply = Reply(turn(schema=SCHEMA, tools=(), stream=True))
    *lines, verdict = answer_lines("t", ['{"n"', ": 7}"], True)
    events = [reply.feed(line) for line in [init(ANSWER), *lines]]
    assert [e["delta"]["text"] for told in events for e in told
            if e["type"] == "content_block_delta"] == ['{"n"', ": 7}"]
    assert not reply.done
    assert [e["type"] for e in reply.feed(verdict)] == ["message_delta", "message_stop"]


def test_a_cli_that_begins_often_without_a_block_is_not_told_of_a_schema_that_there_is_none_of():
    again = [*stream_lines(start())] * 8
    reply, events, _ = replay([*again, *stream_lines(*text(0, "hi"), *end())])
    assert reply.done and well_formed(events).said("text") == "hi"
    assert "schema" in str(structured(*again)[0].failed)


def test_a_whole_answer_that_was_rejected_first_is_only_the_accepted_one():
    reply, events, _ = structured(*answer_lines("t", [BAD], False, thinking(0, "hm")),
                                  *answer_lines("u", [GOOD], True, thinking(0, "oh")))
    assert reply.done and well_formed(events).said("text") == GOOD


def test_a_streamed_answer_that_is_rejected_ends_in_an_error():
    reply, events, _ = structured(*answer_lines("t", [BAD], False), stream=True)
    assert reply.failed.status == 502 and not reply.done
    assert "n must be integer" in str(reply.failed)
    well_formed(events, whole=False)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_tool_that_was_never_called_ends_in_an_error(streamed):
    reply, events, _ = structured(
        *stream_lines(start(), *text(0, "no JSON"), *end()),
        {"type": "result", "subtype": "success", "is_error": False, "result": "no JSON"},
        stream=streamed)
    assert reply.failed.status == 502 and not reply.done
    assert "no JSON" not in json.dumps(events)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("pieces", [[], [""], ["{}"]])
def test_an_empty_answer_to_a_schema_is_still_json(streamed, pieces):
    reply, events, _ = structured(*answer_lines("t", pieces, True), stream=streamed)
    assert reply.done and json.loads(well_formed(events).said("text")) == {}


def test_a_client_tool_may_be_called_before_the_answer():
    reply, events, _ = replay([init(ANSWER, "get_weather"), *stream_lines(
        start(), *text(0, "Look."), *call(1, "t", "get_weather", "{}"), *text(2, "So."),
        *end("tool_use"))], turn(schema=SCHEMA))
    assert reply.done and reply.reusable    # its text is told only now: it might have been no JSON
    assert [b["type"] for b in well_formed(events).content] == ["text", "tool_use", "text"]


def test_text_before_an_answer_to_a_schema_stays_out_also_behind_a_clients_call():
    reply, events, _ = replay([init(ANSWER, "get_weather"), *stream_lines(
        start(), *text(0, "Hm."), *call(1, "t1", "get_weather", "{}"), *text(2, "Out."),
        *call(3, "t2", ANSWER, "{}"), *end("tool_use"))], turn(schema=SCHEMA))
    assert [b.get("name", b.get("text")) for b in fold([start(), *events[1:]]).content] == [
        "Hm.", "get_weather"] and not reply.done


def verdict(ident):
    return {"type": "user", "message": {"role": "user", "content": [result("valid", ident)]}}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_second_answer_beside_the_first_is_one_too_many(streamed):
    lines = stream_lines(start(), *call(0, "t1", ANSWER, '{"answer": "a"}'),
                         *call(1, "t2", ANSWER, '{"answer": "b"}'), *end("tool_use"))
    reply, events, _ = structured(*lines, verdict("t1"), verdict("t2"), stream=streamed)
    assert reply.done and json.loads(well_formed(events).said("text")) == {"answer": "a"}


def test_an_answer_beside_a_clients_call_ends_for_the_call():
    lines = [init(ANSWER, "get_weather"), *stream_lines(
        start(), *call(0, "t1", "get_weather", "{}"), *call(1, "t2", ANSWER, '{"answer": "a"}'),
        *end("tool_use")), verdict("t2")]
    reply, events, _ = replay(lines, turn(schema=SCHEMA))
    assert reply.done and well_formed(events).stop_reason == "tool_use"


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_that_begins_again_after_an_error_is_no_answer(streamed):
    reply, _, _ = structured(*stream_lines(
        start(), *call(0, "t1", ANSWER, '{"ans')[:2], start(), *call(0, "t2", ANSWER, "{}"),
        *end("tool_use")), verdict("t2"), stream=streamed)
    assert reply.failed and not reply.done


def test_a_schema_that_the_cli_cannot_use_is_refused():
    assert replay([init()], turn(schema=SCHEMA))[0].failed.status == 400


# -- what is said to it

@pytest.mark.parametrize("name, kept", [
    ("get_weather", True), ("a-B_9", True), ("a" * 128, True), ("a" * 129, False), ("", False),
    ("a b", False), ("a.b", False), ("\u00e9", False), ("a/b", False), (ANSWER, False),
    ("__proto__", False), ("constructor", False), ("\ud800", False)])
def test_a_tool_name_that_the_cli_could_not_take_is_mapped_there_and_back(name, kept):
    wire = ccproxy.wire_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", wire) and (wire == name) is kept
    _, events, _ = replay(stream_lines(start(), *call(0, "t", wire), *end("tool_use")),
                          turn(tools=({**WEATHER, "name": name},)))
    assert fold(events).content[0]["name"] == name
    line = ccproxy.assistant_line({"content": [{**CALL, "name": name}]}, "u-1", "claude-real")
    assert line["message"]["content"][0]["name"] == wire


def test_mapped_tool_names_differ_where_the_names_do():
    names = ["a b", "a.b", "a_b", "a/b", "a" * 129, "a" * 130]
    assert len(set(map(ccproxy.wire_name, names))) == len(names)


NUMBER = {"type": "number", "minimum": 0}


@pytest.mark.parametrize("schema, wire", [
    (SCHEMA, SCHEMA), ({}, {}), (True, True), (NUMBER, NUMBER),
    ({"type": "string", "format": "date-time", "x-order": 1, "$comment": "c"}, {"type": "string"}),
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"},
     {"type": "object"}),
    ({"properties": {"format": {"format": "uri", "type": "string"}, "x-a": {"x-b": 1}}},
     {"properties": {"format": {"type": "string"}, "x-a": {}}}),
    ({"$defs": {"x-y": {"format": "date", **NUMBER}}, "$ref": "#/$defs/x-y"},
     {"$defs": {"x-y": NUMBER}, "$ref": "#/$defs/x-y"}),
    ({"enum": [{"format": 1}], "const": {"x-a": 1}, "default": {"format": 2}},
     {"enum": [{"format": 1}], "const": {"x-a": 1}, "default": {"format": 2}}),
    ({"anyOf": [{"format": "date"}, NUMBER], "items": {"format": "date"}, "not": {"x": 1}},
     {"anyOf": [{}, NUMBER], "items": {}, "not": {}}),
    ({"required": ["format"], "additionalProperties": False, "patternProperties": {"^x": NUMBER}},
     {"required": ["format"], "additionalProperties": False, "patternProperties": {"^x": NUMBER}}),
])
def test_a_schema_keeps_what_narrows_and_loses_what_the_validator_trips_over(schema, wire):
    before = json.dumps(schema)
    assert ccproxy.wire_schema(schema) == wire and json.dumps(schema) == before


@pytest.mark.parametrize("words", [
    "/compact", "/x\ny", "//compact", "///compact", "// compact", "/ compact", "//", "/",
    " /compact", "hi", "hi /compact", "a\n/compact", "/\n", "/\u00e9"])
@pytest.mark.parametrize("after", [[], [IMAGE]])
@pytest.mark.parametrize("starts", [True, False])
def test_no_text_of_the_user_is_taken_for_a_command(words, after, starts):
    line = ccproxy.user_line(user(said("/first"), said(words), *after), "u-1", starts)
    content = line["message"]["content"]
    texts = [b["text"] for b in content if b["type"] == "text"]
    assert "".join(texts).replace("/first", "", 1).strip() == words.strip()
    if not after:       # measured: "/" and "/x" are taken for commands, "//x" and " /" are not
        assert not re.match(r"/(?!/)", texts[-1])
    assert [b for b in content if b["type"] != "text"] == after
    assert all(map(str.strip, texts))                   # the API refuses white space alone
    assert line.get("shouldQuery", True) is starts


def test_parameters_travel_in_the_extra_body_and_nothing_else_does():
    fields = {"temperature": 0.2, "top_k": 5, "max_tokens": 64, "stop_sequences": ["END"],
              "thinking": {"type": "adaptive"}}
    settings, body = said_settings(turn(fields={**fields, "effort": "high"}, tools=()), "sonnet")
    assert body == fields
    assert (settings["model"], settings["effortLevel"]) == ("sonnet", "high")
    settings, body = said_settings(turn(tools=()))
    assert body == {} and "model" not in settings and settings["effortLevel"] is None


@pytest.mark.parametrize("fields, refused, thought", [
    ({"temperature": 0.5}, False, OFF), ({"top_p": 1}, False, OFF), ({"top_k": 5}, False, OFF),
    ({"tool_choice": ANY}, False, OFF), ({"temperature": 0.5}, True, None), ({}, False, None),
    ({"stop_sequences": ["a"]}, False, None),
    ({"tool_choice": {"type": "auto"}}, False, None),
    ({"temperature": 1, "effort": "low"}, False, None),
    ({"temperature": 1, "thinking": ADAPTIVE}, False, ADAPTIVE)])
def test_sampling_switches_thinking_off_unless_the_caller_or_the_model_objects(
        fields, refused, thought):
    asked = ccproxy.with_thinking(turn(fields=fields), ["thinking.disabled"] * refused)
    assert said_settings(asked)[1].get("thinking") == thought


def test_client_tools_travel_exactly_as_defined_and_are_allowed():
    long = {"name": "b tool", "description": "x" * 9000 + "\u200b", "strict": True,
            "input_schema": {"type": "object", "properties": {"d": {"format": "date"}}}}
    settings, body = said_settings(turn(tools=(long, WEATHER)))
    assert body["tools"] == [{**long, "name": ccproxy.wire_name("b tool")}, WEATHER]
    assert settings["permissions"]["allow"] == ["mcp__client__*"]


def test_the_answer_tool_stays_in_the_list_beside_client_tools():
    _, body = said_settings(turn(schema=SCHEMA))
    assert [t["name"] for t in body["tools"]] == ["get_weather", ANSWER]
    assert body["tools"][1]["input_schema"] == SCHEMA
    assert "tools" not in said_settings(turn(schema=SCHEMA, tools=()))[1]


@pytest.mark.parametrize("choice, wire", [
    ({"type": "auto", **SINGLE}, {"type": "auto", **SINGLE}), (ANY, ANY),
    ({"type": "tool", "name": "b tool"}, {"type": "tool", "name": ccproxy.wire_name("b tool")})])
def test_a_forced_tool_is_named_as_the_cli_knows_it(choice, wire):
    asked = turn(tools=({**WEATHER, "name": "b tool"},), fields={"tool_choice": choice})
    assert said_settings(asked)[1]["tool_choice"] == wire


def test_every_settings_request_resets_what_the_last_one_set():
    first = said_settings(turn(tools=(), fields={
        "effort": "low", "max_tokens": 5, "temperature": 0, "thinking": {"type": "disabled"}}))[0]
    second = said_settings(turn(tools=()))[0]
    assert set(first["env"]) <= set(second["env"]) and set(first) <= set(second)
    assert second["env"]["CLAUDE_CODE_DISABLE_THINKING"] == ""


def test_history_has_unique_ids_and_the_models_own_id():
    message = {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "t", "signature": "s"}, said("a"), CALL]}
    lines = [ccproxy.assistant_line(message, uid, "claude-real") for uid in ("u-1", "u-2")]
    assert lines[0]["message"]["id"] != lines[1]["message"]["id"]
    assert lines[0]["message"]["content"] == message["content"]
    assert lines[0]["message"]["model"] == "claude-real"


def test_the_environment_loses_the_outer_session_and_keeps_credentials():
    kept = {"HOME": "h", "PATH": "p", "ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "u",
            "ANTHROPIC_AUTH_TOKEN": "t", "CLAUDE_CODE_OAUTH_TOKEN": "o", "CLAUDE_CONFIG_DIR": "d",
            "CLAUDE_CODE_USE_BEDROCK": "1", "CLAUDE_CODE_USE_VERTEX": "1", "HTTPS_PROXY": "x",
            "no_proxy": "y", "AWS_REGION": "r"}
    lost = {"CLAUDECODE": "1", "CLAUDE_CODE_ENTRYPOINT": "cli", "CLAUDE_CODE_SSE_PORT": "1",
            "CLAUDE_CODE_SESSION_ID": "s", "CLAUDE_CODE_EXTRA_BODY": "{}",
            "CCPROXY_API_KEY": "secret", "CCPROXY_CLAUDE": "x", "CLAUDE_AGENT_SDK_VERSION": "1"}
    env = ccproxy.claude_env({**kept, **lost}, 3, 900.0)
    assert {name: env.get(name) for name in kept} == kept
    assert not set(lost) & set(env)
    assert env.items() >= {
        "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1", "ENABLE_TOOL_SEARCH": "false",
        "CLAUDE_CODE_MAX_RETRIES": "3", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1", "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1"}.items()
    assert int(env["MCP_TOOL_TIMEOUT"]) >= 900000
    assert int(env["CLAUDE_CODE_MCP_TOOL_IDLE_TIMEOUT"]) >= 900000


@pytest.mark.parametrize("told, version, fits", [
    ("2.1.330 (Claude Code)\n", (2, 1, 330), True), ("2.1.110 (Claude Code)", (2, 1, 110), True),
    ("2.1.109 (Claude Code)", (2, 1, 109), False), ("2.1.9", (2, 1, 9), False),
    ("warning: x\n3.0.0", (3, 0, 0), True), ("1.0.999", (1, 0, 999), False), ("", (), False),
    ("command not found", (), False)])
def test_a_version_is_read_and_measured_against_the_floor(told, version, fits):
    assert ccproxy.parse_version(told) == version
    assert (version >= ccproxy.CLI_FLOOR) is fits


# -- what models refuse

THOUGHT_BEFORE = (user(said("q")), {"role": "assistant", "content": [
    {"type": "thinking", "thinking": "t", "signature": "s"}, said("a")]}, user(said("z")))
BLAMED = [      # (fields of the turn, message of the API, what is dropped)
    ({"temperature": 0.5, "thinking": OFF}, "`temperature` is deprecated for this model.",
     "temperature"),
    ({"top_p": 0.5, "temperature": 1}, "`top_p` is deprecated for this model.", "top_p"),
    ({"top_k": 5}, "`top_k` is deprecated for this model.", "top_k"),
    ({"temperature": 0.5, "thinking": ADAPTIVE}, "`temperature` may only be set to 1 when thinking "
     "is enabled or in adaptive mode.", "temperature"),
    ({"top_k": 5, "thinking": ON}, "`top_k` may only be set to 1 when thinking is enabled or in "
     "adaptive mode.", "top_k"),
    ({"thinking": ON}, '"thinking.type.enabled" is not supported for this model. Use '
     '"thinking.type.adaptive" and "output_config.effort" to control thinking.', "thinking"),
    ({"thinking": OFF}, '"thinking.type.disabled" is not supported for this model.', "thinking"),
    ({"tool_choice": ANY, "thinking": OFF}, "tool_choice: forced tool use is not supported for "
     "this model.", "tool_choice"),
    ({"tool_choice": CHOICE}, "tool_choice: `any` and `tool` are not supported.", "tool_choice"),
    ({"tool_choice": ANY, "thinking": ON}, "Thinking may not be enabled when tool_choice forces "
     "tool use.", "tool_choice"),
    ({"temperature": 0.5, "top_p": 0.5}, "`temperature` and `top_p` cannot both be specified for "
     "this model. Please use only one.", "temperature"),
    ({"stop_sequences": ["a"]}, "stop_sequences: not supported for this model", "stop_sequences"),
    ({"effort": "max"}, "This model does not support the effort parameter.", "effort"),
    ({"messages": THOUGHT_BEFORE}, "messages.1.content.0: `thinking` or `redacted_thinking` "
     "blocks in the latest assistant message cannot be modified.", "thinking_blocks"),
    ({"messages": THOUGHT_BEFORE, "thinking": ON}, "messages.1.content.0: Invalid `signature` in "
     "`thinking` block", "thinking_blocks"),
    ({}, "`temperature` is deprecated for this model.", None),
    ({"temperature": 0.5}, "max_tokens: 900000 > 128000, which is the maximum allowed", None),
    ({"temperature": 0.5}, "This model does not support assistant message prefill. The "
     "conversation must end with a user message.", None),
    ({"temperature": 0.5}, "Your credit balance is too low to access the API", None),
    ({"tool_choice": {"type": "auto"}}, "tool_choice: not supported", None),
]


def blamed(fields, **more):
    fields = dict(fields)
    return turn(messages=fields.pop("messages", (ASK,)), fields=fields, **more)


@pytest.mark.parametrize("fields, message, dropped", BLAMED)
def test_the_field_that_a_refusal_names_is_found_and_dropped(fields, message, dropped):
    asked = blamed(fields, said={name: name for name in fields})
    found, rule = ccproxy.features(asked), ccproxy.refusal_rule(asked, message)
    if dropped is None:
        assert rule is None
        return
    assert rule["drop"] == found[dropped] and rule["drop"] not in rule["with"]
    left = ccproxy.without(asked, dropped)
    assert set(ccproxy.features(left).values()) - {"thinking.default"} == (
        set(found.values()) - {found[dropped], "thinking.default"})
    assert (left.tools, left.messages[-1]) == (asked.tools, asked.messages[-1])


def test_two_fields_refused_together_are_refused_only_together():
    asked = blamed({"temperature": 0.5, "top_p": 0.5})
    assert ccproxy.refusal_rule(asked, "`temperature` and `top_p` cannot both be set") == {
        "drop": "temperature", "with": ["top_p"]}


FORCED = "Thinking may not be enabled when tool_choice forces tool use."


@pytest.mark.parametrize("fields, said_too, message, rule", [
    ({"tool_choice": ANY}, {}, FORCED, {"drop": "tool_choice", "with": ["thinking.default"]}),
    ({"tool_choice": ANY, "thinking": ON}, {"thinking": "thinking"}, FORCED,
     {"drop": "tool_choice", "with": ["thinking.enabled"]}),
    ({"tool_choice": ANY, "thinking": ADAPTIVE}, {}, FORCED,     # that was our own idea
     {"drop": "thinking.adaptive", "with": ["tool_choice"]}),
    ({"temperature": 0.5}, {}, "`temperature` may only be set to 1 when thinking is enabled.",
     {"drop": "temperature", "with": ["thinking.default"]}),
    ({}, {}, "Thinking is odd here", None)])
def test_what_thinking_forbids_is_forbidden_only_beside_it(fields, said_too, message, rule):
    assert ccproxy.refusal_rule(blamed(fields, said=said_too), message) == rule


def test_what_is_known_to_be_refused_switches_no_thinking_off(tmp_path):
    known = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    known.learn("m", [{"drop": "temperature", "with": []}])
    assert known.apply(blamed({"temperature": 0.5}), "m", []).fields == {}
    assert known.apply(blamed({"top_k": 5}), "m", []).fields == {"top_k": 5, "thinking": OFF}


def test_what_was_not_forced_of_a_dropped_choice_remains():
    left = ccproxy.without(turn(fields={"tool_choice": {**ANY, **SINGLE}}), "tool_choice")
    assert left.fields == {"tool_choice": {"type": "auto", **SINGLE}}
    assert ccproxy.without(turn(fields={"tool_choice": CHOICE}), "tool_choice").fields == {}


def test_dropping_thinking_blocks_leaves_the_rest_of_the_history():
    left = ccproxy.without(turn(messages=THOUGHT_BEFORE), "thinking_blocks")
    assert left.messages == (THOUGHT_BEFORE[0], {"role": "assistant", "content": [said("a")]},
                             THOUGHT_BEFORE[2])


# == 7. Conversations: their keys ==================================================================

TALK = {    # the same conversation in both dialects
    "chat": {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {
        "role": "assistant", "content": "Look.", "tool_calls": [CHAT_CALL]}, {
        "role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}], "tools": [NESTED]},
    "messages": {"system": "S", "tools": [WEATHER], "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": [said("Look."), CALL]},
        user(result("sunny"))]},
}


def keys(dialect="messages", caller="me", model="m", **changes):
    body = {**json.loads(json.dumps(TALK[dialect])), **changes}
    return ccproxy.digest_chain(parse(dialect, **body), caller, model)


def test_the_same_conversation_has_the_same_keys_in_both_dialects():
    assert keys("chat") == keys("messages")
    assert len(set(keys("chat"))) == 4


def test_a_prefix_of_a_conversation_has_a_prefix_of_its_keys():
    assert keys(messages=TALK["messages"]["messages"][:1]) == keys()[:2]


@pytest.mark.parametrize("changes", [
    {"caller": "you"}, {"model": "other"}, {"system": "T"}, {"tools": [WEATHER, {
        "name": "f", "input_schema": {}}]}, {"tools": [{**WEATHER, "description": "other"}]},
    {"output_format": {"type": "json_schema", "schema": SCHEMA}}])
def test_another_caller_model_prompt_tool_or_schema_shares_no_key(changes):
    assert not set(keys(**changes)) & set(keys())


def canonical(role, *content):
    return ccproxy.canonical_message({"role": role, "content": list(content)}, {})


@pytest.mark.parametrize("one, other", [
    (("user", said("a")), ("user", said("b"))), (("user", said("a")), ("assistant", said("a"))),
    (("assistant", CALL), ("assistant", {**CALL, "input": {}})),
    (("assistant", CALL), ("assistant", {**CALL, "id": "toolu_2"})),
    (("assistant", CALL), ("assistant", {**CALL, "name": "f"})),
    (("assistant", said("a")), ("assistant", said("a"), CALL)),
    (("user", result([said("a")])), ("user", result([said("b")]))),
    (("user", result([said("a")])), ("user", result([said("a")], is_error=True))),
    (("user", said("a")), ("user", said("a"), IMAGE)), (("user", IMAGE), ("user", DOCUMENT)),
])
def test_an_edited_message_has_another_key(one, other):
    assert canonical(*one) != canonical(*other)


@pytest.mark.parametrize("one, other", [
    (("assistant", said(" a\n")), ("assistant", said("a"))),
    (("assistant", THOUGHT_BEFORE[1]["content"][0], said("a")), ("assistant", said("a"))),
    (("assistant", {"type": "redacted_thinking", "data": "d"}, said("a")),
     ("assistant", said("a"))),
    (("assistant", {**CALL, "input": {"a": 1, "b": 2}}),
     ("assistant", {**CALL, "input": {"b": 2, "a": 1}})),
    (("assistant", said("a"), said("b")), ("assistant", said("ab"))),
    (("user", said("\ud800")), ("user", said("\ud800"))),
])
def test_what_clients_do_not_send_back_exactly_does_not_change_the_key(one, other):
    assert canonical(*one) == canonical(*other)


@pytest.mark.parametrize("reason, told", [("tool_use", "end_turn"), ("max_tokens", "max_tokens")])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_validated_before_its_message_ends_keeps_usage_and_reason(
        streamed, reason, told):
    reply = Reply(ccproxy.Turn("m", schema={"type": "object"}, stream=streamed))
    events = [{"type": "message_start", "message": {"id": "msg_1", "usage": {}}},
              {"type": "content_block_start", "index": 0, "content_block": {
                  "type": "tool_use", "id": "toolu_1", "name": "StructuredOutput", "input": {}}},
              {"type": "content_block_delta", "index": 0, "delta": {
                  "type": "input_json_delta", "partial_json": "{}"}},
              {"type": "content_block_stop", "index": 0}]
    verdict = {"type": "user", "message": {"content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}]}}
    last = [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {
        "output_tokens": 7}}, {"type": "message_stop"}]
    lines = [{"type": "stream_event", "event": event} for event in events] + [verdict] + [
        {"type": "stream_event", "event": event} for event in last]
    message = Message("t", "m", 0)
    for event in [event for line in lines for event in reply.feed(line)]:
        message.add(event)
    assert (message.done, message.stop_reason, message.usage) == (True, told, {"output_tokens": 7})
    assert message.said("text") == "{}"


# == Server, access, command line, processes =======================================================

# == the bench =====================================================================================

PATHS_HTTP = {"chat": "/v1/chat/completions", "messages": "/v1/messages",
              "responses": "/v1/responses"}
both_dialects = pytest.mark.parametrize("dialect", PATHS_HTTP)
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]

    @property
    def how(self):
        return self.headers.get("x-cc-conversation")

    @property
    def text(self):
        if "choices" in self.json:
            return self.json["choices"][0]["message"]["content"]
        if "output" in self.json:
            return output_text(self.json)
        return "".join(b.get("text", "") for b in self.json["content"])


def dechunk(data):
    """A chunked body as (its bytes, what follows it)."""
    pieces, at = [], 0
    while True:
        line_end = data.index(b"\r\n", at)
        length, at = int(data[at:line_end], 16), line_end + 2
        if not length:
            return b"".join(pieces), data[at:].partition(b"\r\n")[2]
        pieces.append(data[at:at + length])
        at += length + 2
        assert data[at - 2:at] == b"\r\n"


def answers(data):
    """The final responses in what a server sent, in order."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", first).group(1))
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        if "transfer-encoding" in headers:
            body, data = dechunk(data)
        else:
            length = 0 if status < 200 or status in (204, 304) else int(
                headers.get("content-length", len(data)))
            body, data = data[:length], data[length:]
        if status >= 200:
            found.append(Answer(status, headers, body))
    return found


def request(start, *fields, body=None, close=True):
    """The bytes of a request:  request("POST /v1/messages", "X-A: b", body={...})."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    said = [field.split(":")[0].lower() for field in fields]
    more = ["Host: localhost"] * ("host" not in said) + ["Connection: close"] * close
    if data is not None:
        more += [f"Content-Length: {len(data)}"]
        more += ["Content-Type: application/json"] * ("content-type" not in said)
    start = start if " HTTP/" in start else start + " HTTP/1.1"
    return "\r\n".join([start, *fields, *more, "", ""]).encode("utf-8") + (data or b"")


def question(said, **more):
    """A body of either dialect:  question("hi"),  question([messages])."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    return {"model": "echo", "messages": messages, **more}


def http_connect(url, data=b"", timeout=40.0, rcvbuf=0):
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()
    sock = socket.socket()
    if rcvbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.settimeout(timeout)
    sock.connect((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(data)
    return sock


def read_all(sock):
    pieces = []
    with sock, contextlib.suppress(ConnectionResetError):
        while True:
            try:
                pieces.append(sock.recv(1 << 18))
            except socket.timeout:
                pytest.fail(f"no end after {b''.join(pieces)[-300:]!r}\n{standstill()}", False)
            if not pieces[-1]:
                break
    return b"".join(pieces)


def standstill():
    """What waits where in this process, and bytes that nobody takes: to read when a test hung."""
    def place(frame):
        return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}"
    stacks, told = sys._current_frames(), Counter()
    for thread in threading.enumerate():
        frames = [place(frame) for frame, _ in traceback.walk_stack(stacks.get(thread.ident))]
        told["thread  " + " < ".join(frames[:6])] += 1
    for thing in gc.get_objects():
        kind = {types.CoroutineType: "cr", types.AsyncGeneratorType: "ag"}.get(type(thing), "")
        frame, running = kind and getattr(thing, f"{kind}_frame"), kind and getattr(
            thing, f"{kind}_running")
        if frame and (running or frame.f_lasti > 2):
            told[f"waits   {place(frame)}"] += 1
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if words[4] != "00000000:00000000":     # of a listener: connections not accepted
                told["socket  " + " ".join(words[1:5])] += 1
    return "\n".join(f"{count} x {what}" for what, count in told.items())


def talk(url, data, end=False):
    """Everything the server says to these bytes, until it ends."""
    sock = http_connect(url, data)
    if end:
        sock.shutdown(socket.SHUT_WR)
    return read_all(sock)


def ask(url, start, *fields, **more):
    return answers(talk(url, request(start, *fields, **more)))[-1]


def http_post(url, said, dialect="chat", fields=(), **more):
    return ask(url, "POST " + PATHS_HTTP[dialect], *fields, body=question(said, **more))


def frames(body):
    """An SSE body as [(event, data)]; anything but event and data lines is refused."""
    found = []
    for frame in body.decode().split("\n\n")[:-1]:
        event, data = re.fullmatch(r"(?:event: ([\w.]+)\n)?data: ([^\n]+)", frame).groups()
        found.append((event, data if data == "[DONE]" else json.loads(data)))
    return found


def together(*jobs):
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def alive(pid):
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return Path("/proc/self").exists() is False and pid_exists(pid)


def pid_exists(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def gone(pids, within_s=2.0):
    assert pids, "nothing was started"
    return until(lambda: not any(map(alive, pids)), within_s)


class Cli(NamedTuple):
    """A fake claude: where it is, and the processes that it started (--version left out)."""
    path: str
    log: Path

    @property
    def pids(self):
        return [int(n) for n in self.log.read_text().split()] if self.log.exists() else []


CLI = """\
    #!{python}
    import json, os, signal, subprocess, sys, time
    def note(pid):
        with open({log!r}, "a") as file:
            file.write("%d\\n" % pid)
    def put(kind, **line):
        print(json.dumps(dict(line, type=kind)), flush=True)
    def event(kind, **fields):
        put("stream_event", event=dict(fields, type=kind))
    def start(*words):
        event("message_start", message=dict(id="msg_1", type="message", role="assistant",
              model="m", content=[], usage=dict(input_tokens=1, output_tokens=1)))
        event("content_block_start", index=0, content_block=dict(type="text", text=""))
        for word in words:
            event("content_block_delta", index=0, delta=dict(type="text_delta", text=word))
    def end():
        event("content_block_stop", index=0)
        event("message_delta", delta=dict(stop_reason="end_turn"), usage=dict(output_tokens=2))
        event("message_stop")
        put("result", subtype="success", is_error=False, num_turns=1)
    def turn():
        start("fine")
        end()
    def told(request_id, subtype):
        put("control_response", response=dict(subtype="success", request_id=request_id,
                                              response=dict(
            account=ACCOUNT, models=[dict(value="default", resolvedModel="m")])))
    VERSION, ACCOUNT = "2.1.330 (Claude Code)", dict(tokenSource="fake")
    def on_start(): pass
    def on_end(): pass
    {code}
    if "--version" in sys.argv:
        print(VERSION)
        sys.exit()
    note(os.getpid())
    on_start()
    for text in iter(sys.stdin.readline, ""):
        line = json.loads(text)
        if line["type"] == "control_request":
            told(line["request_id"], line["request"]["subtype"])
        elif line["type"] == "user" and line.get("shouldQuery", True):
            turn()
        elif line["type"] == "user":
            put("result", subtype="success", is_error=False, num_turns=0)
    on_end()
"""


def cli(folder, code="", name="claude"):
    """A fake claude that answers "fine", but for what `code` redefines."""
    folder.mkdir(parents=True, exist_ok=True)
    fake = Cli(str(folder / name), folder / "pids")
    body = textwrap.dedent(CLI).format(python=sys.executable, log=str(fake.log),
                                       code=textwrap.dedent(code))
    Path(fake.path).write_text(body)
    os.chmod(fake.path, 0o755)
    return fake


def noted_stand_in(folder):
    """The built-in stand-in, its processes noted."""
    return cli(folder, f"""
        def on_start():
            os.execv(sys.executable, [sys.executable, "-IS", {ccproxy.__file__!r}, "stand-in"])
    """)


def serving(tmp_path, **settings):
    return ccproxy.running(**{"claude": "echo", "warm": 0, "state_dir": str(tmp_path / "state"),
                              **settings})


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with ccproxy.running(claude="echo", warm=1, max_body=200_000,
                         state_dir=str(tmp_path_factory.mktemp("state"))) as base:
        yield base


def environment(tmp_path, **more):
    """The environment of a proxy on a machine with nothing set up."""
    kept = {k: v for k, v in os.environ.items() if not re.match("CCPROXY_|CLAUDE|ANTHROPIC_", k)}
    return {**kept, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1", **more}


class Proxy(NamedTuple):
    process: subprocess.Popen
    url: str
    banner: str
    stderr: Path

    @property
    def log(self):
        """What it has said on stderr, but for the line with the key that it has made."""
        return [line for line in self.stderr.read_text().splitlines() if "ccp-" not in line]

    @property
    def key(self):
        return re.search("ccp-[A-Za-z0-9_-]{43}", self.stderr.read_text()).group()


@contextlib.contextmanager
def command(tmp_path, *flags, claude="echo", **env):
    """`python ccproxy.py FLAGS` as a process, ended for sure."""
    stderr = tmp_path / "stderr"
    with open(stderr, "w") as file:
        process = subprocess.Popen(
            [sys.executable, ccproxy.__file__, "--port", "0", "--claude", claude, "--state-dir",
             str(tmp_path / "state"), *flags], cwd=str(tmp_path), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=file, env=environment(tmp_path, **env), text=True)
    try:
        banner = process.stdout.readline()
        found = re.search(r"ANTHROPIC_BASE_URL=(\S+)", banner)
        yield Proxy(process, found.group(1) if found else "", banner, stderr)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        process.stdout.close()


def run(tmp_path, *argv, **env):
    return subprocess.run([sys.executable, ccproxy.__file__, *argv], cwd=str(tmp_path), text=True,
                          env=environment(tmp_path, **env), capture_output=True, timeout=12,
                          stdin=subprocess.DEVNULL)


# == (a) HTTP wire and server ======================================================================

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nConnection: close\r\n")
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NO_MESSAGES = b'{"model": "echo"}'          # answered with 400 and param "messages" once it is read

MALFORMED = {
    "no target": (b"GET\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "two spaces": (b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "space at the end": (b"GET /health HTTP/1.1 \r\nHost: localhost\r\n\r\n", 400),
    "space in target": (b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "space first": (b" GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "odd method": (b"G@T /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "relative target": (b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "raw byte in target": (b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "lower case version": (b"GET /health http/1.1\r\nHost: localhost\r\n\r\n", 400),
    "two-digit version": (b"GET /health HTTP/1.10\r\nHost: localhost\r\n\r\n", 400),
    "HTTP/2.0": (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "folded field": (GET + b"X-A: b\r\n c\r\n\r\n", 400),
    "space before first field": (b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    "space before colon": (GET + b"X-A : b\r\n\r\n", 400),
    "space in name": (GET + b"X A: b\r\n\r\n", 400),
    "no colon": (GET + b"X-A\r\n\r\n", 400),
    "no name": (GET + b": b\r\n\r\n", 400),
    "bare LF between fields": (GET + b"X-A: b\nX-B: c\r\n\r\n", 400),
    "bare LF after request line": (b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n", 400),
    "bare CR in value": (GET + b"X-A: b\rX-B: c\r\n\r\n", 400),
    "NUL in value": (GET + b"X-A: b\x00\r\n\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "Host twice": (GET + b"Host: localhost\r\n\r\n", 400),
    "Content-Length twice": (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "length and chunked": (
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (
        CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "gzip": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", 501),
    "almost chunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "vertical tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    **{f"length {value!r}": (POST + b"Content-Length: " + value + b"\r\n\r\n{}", 400)
       for value in (b"", b"-2", b"+2", b"2_0", b"0x2", b"2.0", b"2e0", b"2 2", b"\xd9\xa2",
                     b"\xb2", b"two", b"2;", b"9" * 5000)},
    "long request line": (
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "endless request line": (b"GET /" + b"a" * 70_000, 414),
    "big field": (GET + b"X-A: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    "endless field": (GET + b"X-A: " + b"b" * 70_000, 431),
    "many fields": (GET + b"".join(b"X-%d: a\r\n" % n for n in range(101)) + b"\r\n", 431),
    **{f"chunk size {line!r}": (CHUNKED + line + b"{}\r\n0\r\n\r\n", 400) for line in (
        b"\r\n", b" 2\r\n", b"+2\r\n", b"-2\r\n", b"0x2\r\n", b"2_0\r\n", b"g\r\n", b"2\n", b"2\r",
        b"\xd9\xa2\r\n", b"2;a\nb\r\n", b"2 2\r\n", b"2,\r\n")},
    "no CRLF after a chunk": (CHUNKED + b"2\r\n{}0\r\n\r\n", 400),
    "LF after a chunk": (CHUNKED + b"2\r\n{}\n0\r\n\r\n", 400),
    "chunk longer than its size": (CHUNKED + b"2\r\n{}}\r\n0\r\n\r\n", 400),
    "many trailer fields": (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
}


@pytest.mark.parametrize("data, status", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_gets_one_json_error_and_the_end_of_the_connection(url, data, status):
    (answer,) = answers(talk(url, data + b"\r\n" + GET + b"\r\n"))
    assert answer.status == status and answer.error["message"]
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("field", ["Transfer-Encoding: chunked", "Transfer-Encoding: gzip"])
def test_a_transfer_coding_in_http_1_0_is_refused_and_nothing_after_it_is_read(url, field):
    data = request("POST /v1/messages HTTP/1.0", field, "Connection: keep-alive", close=False)
    (answer,) = answers(talk(url, data + b"0\r\n\r\n" + GET + b"\r\n"))
    assert answer.status in (400, 501)


def test_a_head_of_bare_line_feeds_is_never_answered_as_a_request(url):
    data = talk(url, b"GET /health HTTP/1.1\nHost: localhost\n\n", end=True)
    assert all(answer.status == 400 for answer in answers(data))


VALID = {
    "plain": GET + b"Connection: close\r\n\r\n",
    "blank lines before it": b"\r\n\r\n" + GET + b"Connection: close\r\n\r\n",
    "no space after colon": b"GET /health HTTP/1.1\r\nHost:localhost\r\nConnection:close\r\n\r\n",
    "spaces around values": GET + b"Connection: \t close \t\r\n\r\n",
    "any case": b"GET /health HTTP/1.1\r\nhOST: LocalHost\r\nCONNECTION: Close\r\n\r\n",
    "empty value": GET + b"X-A:\r\nConnection: close\r\n\r\n",
    "raw bytes in a value": GET + b"X-A: \xc3\xa9\xff\r\nConnection: close\r\n\r\n",
    "absolute target": b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n"
                       b"Connection: close\r\n\r\n",
    "close among others": GET + b"Connection: x, close\r\n\r\n",
    "escaped target": b"GET /%68ealth HTTP/1.1\r\nHost: a.localhost\r\nConnection: close\r\n\r\n",
    "ninety fields": GET + b"".join(b"X-%d: a\r\n" % n for n in range(90))
                     + b"Connection: close\r\n\r\n",
    "30 kB head": GET + b"X-A: " + b"b" * 30_000 + b"\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("data", VALID.values(), ids=VALID)
def test_a_valid_request_is_answered_and_the_connection_ended_as_asked(url, data):
    (answer,) = answers(talk(url, data))
    assert (answer.status, answer.json["status"]) == (200, "ok")


BODIES = {
    "length": POST + b"Content-Length: 17\r\n\r\n" + NO_MESSAGES,
    "one chunk": CHUNKED + b"11\r\n" + NO_MESSAGES + b"\r\n0\r\n\r\n",
    "upper case and zeros": CHUNKED.replace(b"chunked", b"Chunked")
        + b"00011\r\n" + NO_MESSAGES + b"\r\n000\r\n\r\n",
    "hex and extensions": CHUNKED + b'F;a;b="c d"\r\n' + NO_MESSAGES[:15] + b"\r\n2;x\r\n"
        + NO_MESSAGES[15:] + b"\r\n0;last\r\n\r\n",
    "a byte a chunk": CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in NO_MESSAGES)
        + b"0\r\n\r\n",
    "trailer fields": CHUNKED + b"11\r\n" + NO_MESSAGES + b"\r\n0\r\nX-A: b\r\nX-B: c\r\n\r\n",
}


def reached(data):
    (answer,) = answers(data)
    return answer.status == 400 and answer.error["param"] == "messages"


@pytest.mark.parametrize("data", BODIES.values(), ids=BODIES)
def test_a_body_is_read_whole_in_one_piece_and_byte_by_byte(url, data):
    assert reached(talk(url, data))
    sock = http_connect(url)
    for at in range(len(data)):
        sock.sendall(data[at:at + 1])
    assert reached(read_all(sock))


@pytest.mark.parametrize("name", ["length", "hex and extensions", "trailer fields"])
def test_a_request_cut_in_two_anywhere_is_the_same_request(url, name):
    def cut(at):
        sock = http_connect(url, BODIES[name][:at])
        time.sleep(0.02)
        sock.sendall(BODIES[name][at:])
        return reached(read_all(sock))
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(cut, range(1, len(BODIES[name]))))


def test_the_parser_reads_fields_case_and_length_from_a_head():
    found = ccproxy.parse_head(b"POST /a%20b?c=d HTTP/1.1\r\nHOST: x\r\nX-A: 1\r\nx-a: 2\r\n"
                               b"Content-Length: 012\r\n\r\n")
    assert (found.method, found.path, found.length) == ("POST", "/a b", 12)
    assert found.headers["x-a"] == "1, 2" and found.keep_alive


def test_expect_100_continue_is_answered_before_the_body_is_sent(url):
    sock = http_connect(url, POST + b"Expect: 100-continue\r\nContent-Length: 17\r\n\r\n")
    assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(NO_MESSAGES)
    assert reached(read_all(sock))


@pytest.mark.parametrize("data, status", [
    (POST + b"Content-Length: 999999\r\n", 413),
    (POST.replace(b"application/json", b"text/plain") + b"Content-Length: 17\r\n", 415),
    (POST.replace(b"/v1/", b"/no/such/") + b"Content-Length: 17\r\n", 404)])
def test_a_refused_request_is_not_told_to_continue(url, data, status):
    said = talk(url, data + b"Expect: 100-continue\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 %d " % status) and answers(said)[0].status == status


@pytest.mark.parametrize("data", [
    POST + b"Content-Length: 200001\r\n\r\n", POST + b"Content-Length: 999999999999\r\n\r\n",
    CHUNKED + b"fffffff\r\n", CHUNKED + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 4,
    POST + b"Content-Length: 3000000\r\n\r\n" + b" " * 3000000],
    ids=["length", "huge length", "chunk size", "sum of chunks", "all sent"])
@both_dialects
def test_a_body_over_the_limit_gets_413_without_being_waited_for(url, data, dialect):
    sock = http_connect(url)
    with contextlib.suppress(ConnectionError):
        sock.sendall(data.replace(PATHS_HTTP["chat"].encode(), PATHS_HTTP[dialect].encode()))
    (answer,) = answers(read_all(sock))
    assert answer.status == 413 and "200000" in answer.error["message"]
    if dialect == "messages":
        assert answer.error["type"] == "request_too_large"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", *PATHS_HTTP.values(),
                                  "/v1/messages/count_tokens"])
def test_head_and_options_work_on_every_route(url, path):
    head, options = (talk(url, request(f"{verb} {path}")) for verb in ("HEAD", "OPTIONS"))
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    assert options.startswith(b"HTTP/1.1 204 ") and options.endswith(b"\r\n\r\n")
    allowed = answers(options)[0].headers["allow"].split(", ")
    assert {"HEAD", "OPTIONS"} < set(allowed) and b"\r\nContent-Length" not in options


def test_head_has_the_fields_of_get_and_options_takes_a_star(url):
    head, get = (answers(talk(url, request(f"{verb} /health")))[0] for verb in ("HEAD", "GET"))
    assert head.headers["content-length"] == get.headers["content-length"] != "0"
    assert ask(url, "OPTIONS *").status == 204


def test_pipelined_requests_are_answered_in_order_on_one_connection(url):
    data = (request("GET /health", close=False) + request("POST /v1/messages", body={}, close=False)
            + request("POST /v1/messages", "Transfer-Encoding: chunked",
                      "Content-Type: application/json", close=False) + b"2\r\n{}\r\n0\r\n\r\n"
            + request("HEAD /health", "X-Request-Id: last"))
    found = answers(talk(url, data))
    assert [answer.status for answer in found] == [200, 400, 400, 200]
    assert [answer.headers["connection"] for answer in found] == ["keep-alive"] * 3 + ["close"]
    assert found[-1].headers["x-request-id"] == "last"


@whole_and_streamed
def test_a_connection_serves_another_request_after_an_answer(url, stream):
    data = request("POST /v1/chat/completions", body=question("hi", stream=stream), close=False)
    first, second, third = answers(talk(url, data + data + request("GET /health")))
    assert b"hi" in first.body and b"hi" in second.body and third.json == {"status": "ok"}


@pytest.mark.parametrize("version, field, kept", [
    ("1.1", "X-A: b", True), ("1.1", "Connection: close", False),
    ("1.1", "Connection: Keep-Alive", True), ("1.0", "X-A: b", False),
    ("1.0", "Connection: keep-alive", True), ("1.0", "Connection: close", False)])
def test_the_connection_stays_open_as_version_and_client_say(url, version, field, kept):
    first = request(f"GET /health HTTP/{version}", field, close=False)
    found = answers(talk(url, first + request("GET /health")))
    assert len(found) == 1 + kept
    assert found[0].headers["connection"] == ("keep-alive" if kept else "close")


def test_a_stream_to_http_1_0_is_not_chunked_and_ends_with_the_connection(url):
    data = request("POST /v1/chat/completions HTTP/1.0", "Connection: keep-alive",
                   body=question("hi there", stream=True), close=False)
    (answer,) = answers(talk(url, data))
    assert "transfer-encoding" not in answer.headers and answer.headers["connection"] == "close"
    assert frames(answer.body)[-1] == (None, "[DONE]")


def test_stream_heads_forbid_buffering_and_caching(url):
    headers = http_post(url, "hi", stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-accel-buffering"] == "no" and headers["cache-control"] == "no-cache"
    assert headers["transfer-encoding"] == "chunked" and headers["x-request-id"]


@pytest.mark.parametrize("sent, echoed", [("abc-1.2", True), ("a b", False), ("x" * 300, False),
                                          ("é", False)])
def test_a_request_id_is_echoed_if_it_is_harmless_else_made(url, sent, echoed):
    headers = ask(url, "GET /health", f"X-Request-Id: {sent}").headers
    assert (headers["x-request-id"] == sent) == echoed
    assert headers["request-id"] == headers["x-request-id"] != ""


def test_a_client_that_ended_its_side_still_gets_whole_and_streamed_answers(tmp_path):
    words = "/slow " + "a " * 20                    # over 2 s
    with serving(tmp_path) as base:
        jobs = [lambda start=start, stream=stream: answers(talk(base, request(
            start, body=question(words, stream=stream)), end=True))[-1]
            for start in ("POST /v1/messages", "POST /v1/messages HTTP/1.0")
            for stream in (False, True)]
        whole, streamed, old, old_streamed = together(*jobs)
    assert whole.text.split() == old.text.split() == words.split()
    for answer in (streamed, old_streamed):
        assert frames(answer.body)[-1][0] == "message_stop"
        assert answer.body.count(b"text_delta") >= 20


def rss_mb(pid):
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout) / 1024


def test_a_reader_that_stops_reading_costs_little_memory_and_then_gets_everything(tmp_path):
    with command(tmp_path, "--warm", "1", "--quiet") as proxy:
        http_post(proxy.url, "hi")
        before = rss_mb(proxy.process.pid)
        sock = http_connect(proxy.url, request("POST /v1/chat/completions", body=question(
            "/long 30000", stream=True)), rcvbuf=2**16)
        most = 0.0
        for _ in range(12):
            time.sleep(0.1)
            most = max(most, rss_mb(proxy.process.pid))
        assert ask(proxy.url, "GET /health").status == 200
        assert most - before < 25
        (answer,) = answers(read_all(sock))
    texts = re.findall(rb'"content":" ?(word\d+)"', answer.body)
    assert texts == [b"word%d" % n for n in range(30_000)]
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_500_idle_connections_do_not_keep_others_out(url):
    try:
        idle = [http_connect(url, b"GET /hea" * (n % 2)) for n in range(500)]
    except OSError as exc:
        pytest.skip(f"this machine allows too few files: {exc}")
    try:
        assert ask(url, "GET /health").status == 200
        idle[0].sendall(request("GET /health"))
        idle[1].sendall(request("GET /health")[len("GET /hea"):])
        assert [answers(read_all(sock))[0].status for sock in idle[:2]] == [200, 200]
    finally:
        for sock in idle:
            sock.close()


def test_connections_over_the_limit_are_refused_politely(tmp_path):
    with serving(tmp_path, max_connections=8) as base:
        idle = [http_connect(base) for _ in range(8)]
        assert until(lambda: b" 503 " in talk(base, request("GET /health")))
        (answer,) = answers(talk(base, request("GET /health")))
        assert answer.status == 503 and answer.headers["retry-after"]
        for sock in idle:
            sock.close()
        assert until(lambda: b" 200 " in talk(base, request("GET /health")))


def hang_up(sock, how):
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@pytest.mark.parametrize("how, stream", [("end", False), ("reset", True)])
def test_the_process_of_a_client_that_is_gone_is_gone_within_2_s(tmp_path, stream, how):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path) as base:
        sock = http_connect(base, request("POST /v1/messages", body=question(
            "/slow " + "a " * 300, stream=stream)))
        assert until(lambda: fake.pids)
        time.sleep(0.3)
        hang_up(sock, how)
        assert gone(fake.pids)


# -- bodies

NOT_JSON = {
    "nothing": b"", "cut off": b'{"model": "echo"', "array": b"[]", "null": b"null", "text": b'"x"',
    "number": b"5", "two objects": b"{}{}", "single quotes": b"{'model': 'echo'}",
    "bad UTF-8": b'{"model": "\xff\xfe"}', "UTF-16": '{"model": "echo"}'.encode("utf-16"),
    "surrogate bytes": b'{"model": "\xed\xa0\x80"}', "control byte": b'{"model": "a\x01"}',
    "NaN": b'{"temperature": NaN}', "Infinity": b'{"a": [-Infinity]}', "1e400": b'{"a": 1e400}',
    "-1e400": b'{"a": -1e400}', "5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "depth bomb": b"[" * 100_000, "object bomb": b'{"a":' * 30_000,
    "closed bomb": b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
}


@both_dialects
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_is_no_json_object_gets_400_in_the_dialects_envelope(url, dialect, body):
    answer = ask(url, f"POST {PATHS_HTTP[dialect]}", body=body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert "body" in answer.error["message"] or "JSON" in answer.error["message"]
    assert (answer.json.get("type") == "error") == (dialect == "messages")


def image(value):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": value}]}]


def http_said(content):
    return [{"role": "user", "content": content}]


def called(calls):
    return [*http_said("hi"), {"role": "assistant", "tool_calls": calls}, *http_said("go on")]


SHARED_FIELDS = [
    ("model", 5), ("model", None), ("model", ["echo"]), ("messages", None), ("messages", "hi"),
    ("messages", {}), ("messages", []), ("messages", 5), ("messages", [5]), ("messages", [None]),
    ("messages", [{}]), ("messages", [{"role": 5, "content": "hi"}]),
    ("messages", [{"role": "pope", "content": "hi"}]), ("messages", http_said(5)),
    ("messages", http_said({})), ("messages", http_said("")), ("messages", http_said([])), ("messages", http_said([5])),
    ("messages", http_said([{}])), ("messages", http_said([{"type": 5}])),
    ("messages", http_said([{"type": "hologram"}])), ("messages", http_said([{"type": "text"}])),
    ("messages", http_said([{"type": "text", "text": 5}])),
    ("messages", [*http_said("hi"), {"role": "assistant", "content": "prefill"}]),
    ("stream", "yes"), ("stream", 1), ("stream", []), ("temperature", "hot"), ("temperature", True),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", []),
    ("top_p", "x"), ("top_p", 1.1), ("top_p", {}),
    ("max_tokens", "many"), ("max_tokens", 0), ("max_tokens", -1),
    ("max_tokens", 1.5), ("max_tokens", True), ("tools", {}), ("tools", "x"), ("tools", [5]),
    ("tools", [None]), ("tool_choice", 5), ("tool_choice", []), ("tool_choice", "sometimes"),
    ("tool_choice", {"type": 5}), ("tool_choice", {"type": "zap"}),
    ("tool_choice", {"type": "tool", "name": "absent"}),
]
MESSAGES_FIELDS = SHARED_FIELDS + [
    ("system", 5), ("system", {}), ("system", [5]), ("system", [{"type": "text", "text": 5}]),
    ("top_k", "x"), ("top_k", 1.5), ("top_k", -1), ("stop_sequences", "END5"[:0] or 5),
    ("stop_sequences", {}), ("stop_sequences", [5]), ("thinking", "on"), ("thinking", []),
    ("thinking", {"type": "maybe"}), ("thinking", {"type": "enabled"}),
    ("thinking", {"type": "enabled", "budget_tokens": "x"}),
    ("thinking", {"type": "enabled", "budget_tokens": 5}), ("output_config", 5),
    ("output_config", {"effort": 5}), ("output_config", {"effort": "huge"}),
    ("output_config", {"format": 5}), ("output_config", {"format": {"type": "json_schema"}}),
    ("output_format", 5), ("output_format", {"type": "json_schema", "schema": 5}),
    ("tools", [{"name": 5, "input_schema": {}}]), ("tools", [{"name": "", "input_schema": {}}]),
    ("tools", [{"name": "a", "input_schema": 5}]),
    ("tools", [{"name": "a", "input_schema": {}, "description": 5}]),
    ("tools", [{"name": "a", "input_schema": {}}] * 2), ("thread", {"type": "create"}),
    *[("messages", http_said([{"type": "image", "source": source}])) for source in (
        None, 5, {}, {"type": "tape"}, {"type": "base64"}, {"type": "url", "url": 5},
        {"type": "url", "url": "file:///etc/passwd"},
        {"type": "base64", "media_type": "image/png", "data": "@@"},
        {"type": "base64", "media_type": 5, "data": "QUJD"})],
    *[("messages", http_said([{"type": "document", "source": source}])) for source in (
        {"type": "text"}, {"type": "text", "data": 5}, {"type": "content", "content": 5})],
    *[("messages", http_said([{"type": "tool_result", **more}])) for more in (
        {}, {"tool_use_id": 5}, {"tool_use_id": "absent"}, {"tool_use_id": "a", "content": 5})],
    *[("messages", [*http_said("hi"), {"role": "assistant", "content": [{"type": "tool_use", **more}]},
                    *http_said("go on")]) for more in (
        {}, {"id": 5, "name": "a", "input": {}}, {"id": "a", "name": 5, "input": {}},
        {"id": "a", "name": "a", "input": "x"})],
    ("messages", [*http_said("hi"), {"role": "assistant", "content": [
        {"type": "thinking", "thinking": 5, "signature": "x"}]}, *http_said("go on")]),
]
CHAT_FIELDS = SHARED_FIELDS + [
    ("n", "two"), ("n", 2), ("n", -1), ("n", 1.5), ("n", True), ("stop", 5), ("stop", [5]),
    ("stop", {}), ("max_completion_tokens", "x"), ("max_completion_tokens", 0),
    ("stream_options", 5), ("stream_options", []), ("stream_options", {"include_usage": "yes"}),
    ("parallel_tool_calls", "no"), ("parallel_tool_calls", 0), ("reasoning_effort", 5),
    ("reasoning_effort", "huge"), ("response_format", 5), ("response_format", "json"),
    ("response_format", {}), ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": 5}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}),
    ("response_format", {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "array"}}}),
    *[("tools", [{"type": "function", "function": value}]) for value in (
        5, {}, {"name": 5}, {"name": "a", "parameters": 5}, {"name": "a", "parameters": []},
        {"name": "a", "description": 5})],
    ("tool_choice", {"type": "function"}), ("tool_choice", {"type": "function", "function": {}}),
    ("functions", 5), ("functions", [5]), ("functions", [{"name": 5}]), ("function_call", 5),
    *[("messages", image(value)) for value in (
        None, 5, {}, {"url": 5}, "", "ftp://example/a.png", "data:image/png;base64,@@",
        "data:image/tiff;base64,QUJD", "data:image/png,plain")],
    *[("messages", http_said([{"type": "file", "file": value}])) for value in (
        5, {}, {"file_data": 5}, {"file_id": "file_1"}, {"file_data": "data:a/b;base64,QUJD"})],
    *[("messages", called(value)) for value in (
        5, {}, [5], [{}], [{"id": "a", "function": 5}], [{"id": 5, "function": {"name": "a"}}],
        [{"id": "a", "function": {"name": 5}}],
        [{"id": "a", "function": {"name": "a", "arguments": 5}}],
        [{"id": "a", "function": {"name": "a", "arguments": "{}"}}])],
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [*http_said("hi"), {"role": "tool", "tool_call_id": 5, "content": "x"}]),
    ("messages", [*http_said("hi"), {"role": "tool", "tool_call_id": "absent", "content": "x"}]),
    ("messages", [{"role": "system", "content": 5}, *http_said("hi")]),
]
WRONG = [("messages", *row) for row in MESSAGES_FIELDS] + [("chat", *row) for row in CHAT_FIELDS]


@pytest.mark.parametrize("dialect, field, value", WRONG,
                         ids=[f"{d}-{f}-{json.dumps(v)[:90]}" for d, f, v in WRONG])
def test_a_field_of_a_wrong_type_gets_400_that_names_the_field(url, dialect, field, value):
    answer = http_post(url, "hi", dialect, **{field: value})
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert field in answer.error["message"]
    if dialect == "chat":
        assert re.split(r"[.\[]", answer.error["param"])[0] == field


@pytest.mark.parametrize("body", [
    question("\ud800 lone"), question(http_said([{"type": "text", "text": "\udfff"}])),
    question("hi", seed=10**400, metadata={"a": None}, store=True, user=5, unknown=[{}])],
    ids=["lone surrogate", "in a part", "unknown fields"])
@both_dialects
def test_odd_but_valid_bodies_are_answered(url, dialect, body):
    answer = ask(url, f"POST {PATHS_HTTP[dialect]}", body=body)
    assert answer.status == 200 and answer.text == (
        body["messages"][0]["content"] if isinstance(body["messages"][0]["content"], str)
        else "\udfff")


@pytest.mark.parametrize("depth", [300, 900, 5000])
def test_a_deeply_nested_tool_schema_is_served_or_refused_but_breaks_nothing(url, depth):
    schema = b'{"not":' * depth + b"{}" + b"}" * depth
    body = (b'{"model": "echo", "messages": [{"role": "user", "content": "hi"}], "tools": '
            b'[{"name": "a", "input_schema": ' + schema + b"}]}")
    assert ask(url, "POST /v1/messages", body=body).status in (200, 400)


@pytest.mark.parametrize("kind, status", [
    ("application/json", 400), ("Application/JSON ; charset=utf-8", 400), ("text/plain", 415),
    ("application/x-www-form-urlencoded", 415), ("multipart/form-data", 415), ("", 415),
    ("application/json-patch+json", 415), ("text/plain, application/json", 415)])
@both_dialects
def test_only_application_json_is_read(url, dialect, kind, status):
    answer = ask(url, f"POST {PATHS_HTTP[dialect]}", f"Content-Type: {kind}", body=NO_MESSAGES)
    assert answer.status == status and answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


# == (b) access and routes =========================================================================

PORT = "PORT"


def with_port(text, url):
    return text.replace(PORT, url.rpartition(":")[2])


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:PORT", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200),
    ("127.0.0.1:PORT", 200), ("[::1]", 200), ("[::1]:PORT", 200), ("localhost.", 200),
    ("proxy.example", 200), ("Proxy.Example:9", 200), ("", 403), ("evil.example", 403),
    ("evil.example:PORT", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
    ("evil.proxy.example", 403), ("localhost@evil.example", 403), ("localhost:1:2", 403),
    ("localhost, evil.example", 403), ("192.0.2.1", 403), ("0.0.0.0", 403), ("*", 403),
    ("2130706433", 403), ("[::1", 403), ("evil.example/localhost", 403)])
@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_only_loopback_and_configured_hosts_are_answered(guarded, host, status, path):
    answer = ask(guarded, f"GET {path}", "Host: " + with_port(host, guarded), KEY)
    assert answer.status == status or (status == 403 and answer.status == 400)
    assert status == 200 or answer.error["message"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with ccproxy.running(claude="echo", warm=0, api_key="sk-tést", allow_hosts=["proxy.example"],
                         allow_origins=["https://app.example", "http://localhost:3000/"],
                         state_dir=str(tmp_path_factory.mktemp("state"))) as base:
        ask(base, "GET /v1/models", KEY)            # once: later ones need no process
        yield base


KEY = "Authorization: Bearer sk-tést"               # sent as UTF-8


@pytest.mark.parametrize("target, host, status", [
    ("http://localhost/health", "evil.example", 200),
    ("http://evil.example/health", "localhost", 403),
    ("http://localhost@evil.example/health", "localhost", 403)])
def test_the_authority_of_an_absolute_target_counts_as_the_host(url, target, host, status):
    assert ask(url, f"GET {target}", f"Host: {host}").status == status


@pytest.mark.parametrize("origin, status", [
    ("http://evil.example", 403), ("null", 403), ("", 403), ("http://localhost:1", 403),
    ("https://app.example.evil.example", 403), ("https://app.example:444", 403),
    ("http://app.example", 403), ("https://app.example", 200), ("https://APP.example", 200),
    ("http://localhost:3000", 200), ("http://127.0.0.1:PORT", 200)])
def test_only_configured_origins_and_our_own_page_may_call(guarded, origin, status):
    origin = with_port(origin, guarded)
    answer = ask(guarded, "GET /v1/models", "Host: " + guarded[7:], f"Origin: {origin}", KEY)
    assert answer.status == status
    told = answer.headers.get("access-control-allow-origin")
    assert told == (origin if status == 200 and guarded not in origin else None)
    assert told is None or answer.headers["vary"].lower() == "origin"


def test_a_preflight_of_a_configured_origin_needs_no_key_and_allows_what_clients_send(guarded):
    wish = "authorization, content-type, x-api-key, x-stainless-os"
    answer = ask(guarded, "OPTIONS /v1/chat/completions", "Origin: https://app.example",
                 "Access-Control-Request-Method: POST", f"Access-Control-Request-Headers: {wish}")
    told = {k[len("access-control-"):]: v for k, v in answer.headers.items()
            if k.startswith("access-control-")}
    assert answer.status == 204 and told["allow-origin"] == "https://app.example"
    assert "POST" in told["allow-methods"]
    assert {w.strip() for w in told["allow-headers"].split(",")} == set(wish.split(", "))


def test_a_preflight_of_another_origin_is_refused(guarded):
    answer = ask(guarded, "OPTIONS /v1/messages", "Origin: http://evil.example",
                 "Access-Control-Request-Method: POST")
    assert answer.status == 403
    assert not any(name.startswith("access-control-") for name in answer.headers)


def test_a_page_of_a_configured_origin_can_read_errors(guarded):
    for path in ("/v1/models", "/no/such"):
        answer = ask(guarded, f"GET {path}", "Origin: https://app.example")
        assert answer.status in (401, 404)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("field, good", [
    (KEY, True), ("Authorization: bearer sk-tést", True), ("x-api-key: sk-tést", True),
    ("Authorization: Bearer  sk-tést", True), ("X-A: b", False), ("Authorization: Bearer", False),
    ("Authorization: Bearer sk-test", False), ("Authorization: Basic sk-tést", False),
    ("Authorization: sk-tést", False), ("x-api-key:", False), ("x-api-key: sk-tést2", False),
    ("x-api-key: sk-tés", False), ("x-api-key: ключ", False),
    ("Authorization: Bearer ключ", False)])
@both_dialects
def test_only_the_key_opens_the_api(guarded, dialect, field, good):
    answer = ask(guarded, f"POST {PATHS_HTTP[dialect]}", field, body=NO_MESSAGES)
    assert answer.status == (400 if good else 401)
    if not good:
        assert "sk-t" not in answer.body.decode() and answer.headers["www-authenticate"]
        assert answer.error["type"] == "authentication_error" and answer.error["message"]
        assert dialect == "messages" or answer.error["code"] == "invalid_api_key"
        assert dialect != "messages" or answer.json["type"] == "error"


def test_a_good_key_beside_a_bad_one_opens_the_api(guarded):
    assert ask(guarded, "GET /v1/models", "x-api-key: sk-tést", "Authorization: Bearer x"
               ).status == 200


@pytest.mark.parametrize("start, status", [
    ("GET /health", 200), ("GET /healthz", 200), ("GET /readyz", 200), ("HEAD /health", 200),
    ("GET /status", 401), ("GET /v1/models", 401), ("GET /v1/models/echo", 401),
    ("HEAD /v1/messages", 401), ("POST /v1/messages/count_tokens", 401)])
def test_only_health_routes_are_open_without_the_key(guarded, start, status):
    assert answers(talk(guarded, request(start).replace(b"localhost", b"127.0.0.1")))[0].status \
        == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_listening_beyond_loopback_without_a_key_is_refused_in_one_line(host, capsys, tmp_path,
                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ccproxy.main(["--host", host, "--port", "0", "--claude", "echo"]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "key" in err and not out


def test_listening_beyond_loopback_with_a_key_answers_to_its_own_address(tmp_path):
    with serving(tmp_path, host="0.0.0.0", api_key="k") as base:
        assert base.startswith("http://127.0.0.1:")
        assert ask(base, "GET /health", "Host: evil.example").status == 403
        assert ask(base, "GET /v1/models", "Host: 127.0.0.1").status == 401


CHAT_URLS = ["/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions",
             "/v1/chat/completions/", "/chat/v1/chat/completions", "/chat/chat/completions",
             "/v1/chat/completions?beta=true", "/v1/chat/completions/?a=b",
             "/v1/chat/completions/chat/completions", "/chat/completions/chat/completions",
             "/v1/chat/completions/v1/chat/completions", "//v1/chat/completions"]
MESSAGES_URLS = ["/v1/messages", "/messages", "/v1/v1/messages", "/v1/messages/",
                 "/chat/v1/messages", "/chat/messages", "/v1/messages?beta=true",
                 "/v1/messages/v1/messages", "/v1/chat/completions/v1/messages"]
COUNT_URLS = ["/v1/messages/count_tokens", "/v1/messages/count_tokens?beta=true",
              "/messages/count_tokens/", "/chat/v1/messages/count_tokens",
              "/v1/v1/messages/count_tokens"]


@pytest.mark.parametrize("path, dialect", [(p, "chat") for p in CHAT_URLS] + [
    (p, "messages") for p in MESSAGES_URLS + COUNT_URLS])
def test_base_urls_given_in_any_way_reach_their_route(url, path, dialect):
    answer = ask(url, f"POST {path}", body=NO_MESSAGES)
    assert answer.status == 400 and "messages" in answer.error["message"]
    assert ("param" in answer.error) == (dialect == "chat")


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/models/", "/v1/v1/models?limit=1000",
                                  "/chat/v1/models", "/v1/chat/completions/models",
                                  "/v1/models/echo", "/models/echo", "/status", "/chat/status",
                                  "/v1/status", "/health", "/v1/health", "/chat/healthz"])
def test_what_is_read_is_found_under_every_base(guarded, path):
    assert ask(guarded, f"GET {path}", KEY).status == 200


@pytest.mark.parametrize("path", ["/no/such", "/v1/chat", "/v1/messages/other",
                                  "/v1/models/absent", "/../etc/passwd", "/%2e%2e/etc/passwd",
                                  "/favicon.ico", "/v2/messages", "/<script>", "/%00",
                                  "/%ff", "/v1/messagesx", "/healthx"])
@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_unknown_routes_get_404_in_json(guarded, path, verb):
    if verb == "POST" and "absent" in path:
        path = "/v1/nothing"
    answer = ask(guarded, f"{verb} {path}", KEY, **({"body": {}} if verb == "POST" else {}))
    assert answer.status == 404 and answer.headers["content-type"] == "application/json"
    assert answer.json["type"] == "error" and answer.error["message"]


@pytest.mark.parametrize("start, allowed", [
    ("GET /v1/messages", "POST"), ("GET /v1/chat/completions", "POST"),
    ("DELETE /v1/chat/completions", "POST"), ("PUT /v1/messages/count_tokens", "POST"),
    ("POST /health", "GET"), ("PATCH /v1/models", "GET"), ("POST /v1/models/echo", "GET"),
    ("BREW /health", "GET")])
def test_a_wrong_method_gets_405_with_the_allowed_ones(url, start, allowed):
    answer = ask(url, start)
    assert answer.status == 405 and allowed in answer.headers["allow"].split(", ")
    assert answer.error["message"] and start.split()[0] not in answer.headers["allow"].split(", ")


# == (c) settings and command line =================================================================

def test_the_proxy_says_one_line_with_base_urls_and_logs_one_line_a_request(tmp_path):
    with command(tmp_path, "--warm", "0") as proxy:
        assert f"OPENAI_BASE_URL={proxy.url}/v1" in proxy.banner
        one = http_post(proxy.url, "hi there", "messages", fields=["X-Request-Id: first-one"])
        http_post(proxy.url, "hi\nthere", stream=True)
        http_post(proxy.url, "/error 429", model="a\x1b[2Jb\x9b2Jc")
        ask(proxy.url, "GET /health")
        ask(proxy.url, "POST /no/such", "X-Api-Key: hidden-key", body={})
        talk(proxy.url, b"nonsense\r\n\r\n")
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(5) == 0 and proxy.process.stdout.read() == ""
    words = proxy.log[0].split()
    usage = one.json["usage"]
    assert "POST /v1/messages echo 200 first" in proxy.log[0] and "total" in words
    assert re.search(rf"in {usage['input_tokens']} out {usage['output_tokens']} ", proxy.log[0])
    assert words[-1] == "first-one" and "$0" in proxy.log[0]
    assert [re.search(r" (\d{3}) ", line).group(1) for line in proxy.log] == [
        "200", "200", "429", "200", "404", "400"]
    log = "".join(proxy.log)
    assert "\x1b" not in log and "\x9b" not in log and "hidden-key" not in log


def test_help_names_every_option_with_its_default_and_environment_name(tmp_path):
    told = run(tmp_path, "--help", COLUMNS="200")
    assert told.returncode == 0
    for name, default in vars(ccproxy.Settings()).items():
        assert f"--{name.replace('_', '-')}" in told.stdout
        assert f"CCPROXY_{name.upper()}" in told.stdout
        assert default in ("", [], {}) or f"default {default}" in told.stdout
    for word in ("doctor", "version", "curl", "ANTHROPIC_BASE_URL", "--claude echo", "/slow"):
        assert word in told.stdout


def test_a_port_in_use_is_told_in_one_line_with_exit_code_1(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = run(tmp_path, "--port", port, "--claude", "echo", "--state-dir", str(tmp_path))
    assert told.returncode == 1 and told.stdout == ""
    assert len(told.stderr.splitlines()) == 1 and port in told.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_all_processes_and_exits_with_0(tmp_path, number):
    fake = noted_stand_in(tmp_path)
    with command(tmp_path, "--warm", "2", claude=fake.path) as proxy:
        http_post(proxy.url, "hi")
        assert until(lambda: len(fake.pids) >= 2)
        proxy.process.send_signal(number)
        assert proxy.process.wait(5) == 0
        assert not any(map(alive, fake.pids))
    assert not any("Traceback" in line for line in proxy.log)


def test_the_processes_of_a_killed_proxy_are_gone_within_2_s(tmp_path):
    fake = noted_stand_in(tmp_path)
    with command(tmp_path, "--warm", "1", claude=fake.path) as proxy:
        http_post(proxy.url, "hi")                                               # one idle
        busy = http_connect(proxy.url, request("POST /v1/messages", body=question(
            "/slow " + "a " * 200, stream=True)))
        assert busy.recv(10) and until(lambda: len(fake.pids) >= 2)
        proxy.process.kill()
        assert gone(fake.pids)
        busy.close()


NODE = {"type": "object", "required": ["next"], "properties": {
    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}


@pytest.mark.parametrize("schema, innermost", [
    ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, None),
    ({"type": "array", "items": {"$ref": "#"}}, []),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}}, {}),
    ({"type": "object", "properties": {"next": True}}, {}),
    ({"type": "object", "properties": {"next": {"type": "object", "properties": {
        "next": {"$ref": "#/properties/next/$defs/last"}}, "$defs": {"last": {"const": 7}}}}}, 7),
    ({"anyOf": [True]}, {}), ({"allOf": [{"const": 8}], "properties": {
        "next": {"$ref": "#/allOf/0"}}}, 8),
    ({"required": ["next"], "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}}, None),
    ({"properties": {name: {"$ref": "#"} for name in ("next", *"abcdefghijklmno")}}, {}),
])
def test_the_stand_in_has_an_answer_to_a_recursive_or_an_odd_schema(schema, innermost):
    value = ccproxy.sample(schema, schema)
    while value and isinstance(value, (dict, list)):
        value = value["next"] if isinstance(value, dict) else value[0]
    assert value == innermost


@pytest.mark.parametrize("schema", [{"properties": "x"}, {"$ref": 5}, {"$ref": "#/x"}, {"anyOf": 5},
                                    {"enum": 5, "type": {}}])
def test_the_stand_in_outlives_what_is_no_schema(url, schema):
    answer = http_post(url, "hi", "messages", output_config={"format": {
        "type": "json_schema", "schema": {"type": "object", **schema}}})
    assert answer.status in (200, 400), answer.body


def test_doctor_is_content_with_the_stand_in(tmp_path):
    told = run(tmp_path, "doctor", "--deep", "--claude", "echo", "--state-dir", str(tmp_path))
    assert told.returncode == 0 and "FAIL" not in told.stdout
    for word in ("Python 3", "claude", "login", "models", "Answer: yes"):
        assert word in told.stdout


@pytest.mark.parametrize("code, words", [
    ("VERSION = '2.1.0 (Claude Code)'", ["2.1.0", ccproxy.INSTALL + "@latest"]),
    ("VERSION = 'hello'", [ccproxy.INSTALL + "@latest"]),
    ("ACCOUNT = {}", ["logged in", "next: claude auth login"]),
    ("def on_start():\n    sys.exit('no licence')", ["no licence", "next: claude"])],
    ids=["old", "no version", "no login", "dies"])
def test_doctor_fails_with_the_next_command_if_a_request_would(tmp_path, code, words):
    told = run(tmp_path, "doctor", "--warm", "0", "--claude", cli(tmp_path, code).path,
               "--state-dir", str(tmp_path))
    assert told.returncode == 1 and "FAIL" in told.stdout and "Traceback" not in told.stderr
    assert all(word in told.stdout for word in words)


def test_version_is_printed(tmp_path):
    assert run(tmp_path, "version").stdout.strip() == ccproxy.__version__


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    """No PATH, an empty home."""
    for place in ("/opt/homebrew/bin/claude", "/usr/local/bin/claude"):
        if os.path.exists(place):
            pytest.skip(f"{place} is there")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CCPROXY_CLAUDE", raising=False)


def check_unavailable(base, *words):
    assert ask(base, "GET /health").status == 200
    found = [ask(base, "GET /readyz"), ask(base, "GET /v1/models"),
             *(http_post(base, "hi", dialect, stream=True) for dialect in PATHS_HTTP)]
    assert [answer.status for answer in found] == [503] * (2 + len(PATHS_HTTP))
    for answer in found:
        assert all(word in answer.error["message"] for word in words)


@pytest.mark.parametrize("warm", [0, 2])
def test_without_a_cli_everything_but_health_says_how_to_install_it(tmp_path, bare_machine, warm):
    with serving(tmp_path, claude="", warm=warm) as base:
        check_unavailable(base, ccproxy.INSTALL)


@pytest.mark.parametrize("version, words", [
    ("2.1.0 (Claude Code)", ["2.1.0", "2.1.110"]), ("2.1.109 (Claude Code)", ["2.1.109"]),
    ("1.9.999 (Claude Code)", ["1.9.999"]), ("", [])])
def test_a_cli_older_than_the_floor_is_not_used_and_the_upgrade_named(tmp_path, version, words):
    fake = cli(tmp_path, f"VERSION = {version!r}")
    with serving(tmp_path, claude=fake.path) as base:
        check_unavailable(base, ccproxy.INSTALL + "@latest", *words)
    assert fake.pids == []


@pytest.mark.parametrize("version", ["2.1.110 (Claude Code)", "2.2.0 (Claude Code)", "10.0.0"])
def test_a_cli_from_the_floor_on_is_used(tmp_path, version):
    with serving(tmp_path, claude=cli(tmp_path, f"VERSION = {version!r}").path) as base:
        assert ask(base, "GET /readyz").json["claude"] == version.split()[0]


@pytest.mark.parametrize("place", [".claude/local", ".local/bin", ".npm-global/bin", ".bun/bin",
                                   ".volta/bin"])
def test_the_cli_is_found_where_installers_put_it(tmp_path, bare_machine, place):
    cli(tmp_path / place)
    with serving(tmp_path, claude="") as base:
        assert ask(base, "GET /readyz").json["claude"] == "2.1.330"


def test_the_path_comes_before_the_usual_places_and_the_flag_before_both(
        tmp_path, bare_machine, monkeypatch):
    first, second, third = (cli(tmp_path / place, f"VERSION = '2.1.{n}'") for n, place in (
        (333, "flag"), (332, "path"), (331, ".local/bin")))
    for settings, path, version in (({"claude": first.path}, tmp_path / "path", "2.1.333"),
                                    ({"claude": ""}, tmp_path / "path", "2.1.332"),
                                    ({"claude": ""}, tmp_path / "none", "2.1.331")):
        monkeypatch.setenv("PATH", str(path))
        with serving(tmp_path, **settings) as base:
            assert ask(base, "GET /readyz").json["claude"] == version
    assert second.pids == third.pids == []


def test_a_cli_that_is_installed_later_is_found_without_a_restart(tmp_path):
    with serving(tmp_path, claude=str(tmp_path / "claude")) as base:
        assert ask(base, "GET /readyz").status == 503
        cli(tmp_path)
        assert until(lambda: ask(base, "GET /readyz").status == 200)


@pytest.mark.parametrize("name", ["claude.cmd", "claude.bat", "claude.ps1"])
def test_a_shell_shim_is_refused_with_the_reason(tmp_path, name):
    with serving(tmp_path, claude=cli(tmp_path, name=name).path) as base:
        answer = http_post(base, "hi")
        assert answer.status == 503 and "shim" in answer.error["message"]


def test_flags_win_over_environment_over_dotenv_over_file_over_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ccproxy.json").write_text('{"port": 1, "warm": 1, "idle_ttl": 1, "retries": 1}')
    (tmp_path / ".env").write_text("# ours\nexport CCPROXY_WARM='2'\nCCPROXY_RETRIES=2\n"
                                   "CCPROXY_IDLE_TTL=2\nOTHER=5\n")
    found = ccproxy.load_settings({"retries": "4"}, {"CCPROXY_IDLE_TTL": "3",
                                                     "CCPROXY_RETRIES": "3", "CCPROXY_HOST": ""})
    assert (found.retries, found.idle_ttl, found.warm, found.port) == (4, 3, 2, 1)
    assert (found.host, found.max_processes) == ("127.0.0.1", 8)


def test_a_configuration_file_can_be_named_and_hold_lists_and_maps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ccproxy.json").write_text('{"port": 1}')
    (tmp_path / "mine.json").write_text(json.dumps(
        {"models": {"gpt-*": "opus"}, "allow_hosts": ["a", "b"], "max_body": "2k", "quiet": True}))
    found = ccproxy.load_settings({"config": "mine.json"}, {})
    assert (found.models, found.allow_hosts) == ({"gpt-*": {"model": "opus"}}, ["a", "b"])
    assert (found.max_body, found.quiet, found.port) == (2048, True, 8082)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read from Python 3.11 on")
def test_a_toml_file_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ccproxy.toml").write_text('port = 9\nallow_origins = ["https://a.example"]\n')
    found = ccproxy.load_settings({}, {})
    assert (found.port, found.allow_origins) == (9, ["https://a.example"])


BAD_SETTINGS = {
    "port x": (["--port", "x"], "port"), "port 70000": (["--port", "70000"], "port"),
    "port -1": (["--port=-1"], "port"), "port ²": (["--port", "²"], "port"),
    "max_body 0": (["--max-body", "0"], "max_body"),
    "max_body x": (["--max-body", "1x"], "max_body"),
    "heartbeat 0": (["--heartbeat", "0"], "heartbeat"), "heartbeat nan": (
        ["--heartbeat", "nan"], "heartbeat"), "idle_ttl inf": (["--idle-ttl", "inf"], "idle_ttl"),
    "warm -1": (["--warm=-1"], "warm"), "no process": (["--max-processes", "0"], "max_processes"),
    "retries": (["--retries", "99"], "retries"), "models": (["--models", "gpt-4"], "models"),
    "quiet": (["--quiet=maybe"], "quiet"), "half of TLS": (["--tls-cert", "a.pem"], "tls_"),
    "TLS files": (["--tls-cert", "absent.pem", "--tls-key", "absent.pem"], "absent.pem"),
    "no file": (["--config", "absent.json"], "absent.json"),
    "bad JSON": (["--config", "bad.json"], "bad.json"),
    "no object": (["--config", "list.json"], "list.json"),
    "unknown name": (["--config", "unknown.json"], "colour"),
    "wrong type": (["--config", "type.json"], "port"),
}


@pytest.mark.parametrize("argv, word", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_one_line_that_names_it_and_exit_code_2(argv, word, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", "{"), ("list", "[5]"), ("unknown", '{"colour": 1}'),
                       ("type", '{"port": true}')):
        (tmp_path / f"{name}.json").write_text(text)
    assert ccproxy.main(["--claude", "echo", "--state-dir", str(tmp_path), *argv]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and word in err and not out


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_bad_setting_of_the_environment_is_told_the_same_way(where, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    if where == ".env":
        (tmp_path / ".env").write_text("CCPROXY_WARM=many\n")
    else:
        monkeypatch.setenv("CCPROXY_WARM", "many")
    assert ccproxy.main(["--port", "0", "--claude", "echo"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "warm" in err


def test_an_unknown_setting_is_refused_to_importers_too():
    with pytest.raises(ccproxy.ConfigError, match="colour"):
        ccproxy.Settings(colour=1)


# == (d) CLIs that misbehave =======================================================================

def failure(answer, dialect):
    """(status, message) of a failed answer, whole or streamed."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.status, answer.error["message"]
    found = frames(answer.body)
    if dialect == "chat":
        assert found[-1] == (None, "[DONE]") and set(found[-2][1]) == {"error"}
        assert not any(c.get("finish_reason") for _, d in found[:-1] for c in d.get("choices", []))
        return answer.status, found[-2][1]["error"]["message"]
    if dialect == "responses":
        error, failed = [data for _, data in found[-2:]]
        assert read_responses(found) == failed["response"] and failed["type"] == "response.failed"
        assert error["type"] == "error" and failed["response"]["status"] == "failed"
        assert error["error"]["message"] == failed["response"]["error"]["message"]
        return answer.status, error["message"]
    assert found[-1][0] == "error" and found[-1][1]["type"] == "error"
    kinds = [kind for kind, _ in found]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    assert "message_stop" not in kinds
    return answer.status, found[-1][1]["error"]["message"]


def ask_badly(tmp_path, code, dialect="chat", stream=False, within_s=6.0, **settings):
    """(status, message) that a client of such a CLI gets; no process may be left."""
    fake, began = cli(tmp_path, code), time.monotonic()
    with serving(tmp_path, **{"claude": fake.path, "stall_timeout": 20.0, **settings}) as base:
        answer = http_post(base, "hi", dialect, stream=stream)
        assert time.monotonic() - began < within_s
        if answer.status != 200 or stream:
            assert gone(fake.pids)
    assert gone(fake.pids, 0.5)
    return failure(answer, dialect) if answer.status != 200 or stream else (200, answer.text), fake


BEFORE_ANY_EVENT = {
    "dies at start": ("def on_start():\n    sys.exit('no licence')", 502, "no licence"),
    "dies in the turn": ("def turn():\n    sys.exit('boom')", 502, "boom"),
    "killed": ("def turn():\n    os.kill(os.getpid(), 9)", 502, "exit code -9"),
    "garbage at start": ("def on_start():\n    print('Welcome!', flush=True)", 502, "Welcome!"),
    "garbage in the turn": ("def turn():\n    print('{\"type\": oops', flush=True)", 502, "oops"),
    "not UTF-8": ("def turn():\n    sys.stdout.buffer.write(b'\\xff\\xfe\\n')\n"
                  "    sys.stdout.flush()", 502, "unreadable"),
    "a bare number": ("def turn():\n    print(5, flush=True)", 502, "5"),
    "depth bomb": ("def turn():\n    print('[' * 100000, flush=True)", 502, "unreadable"),
    "odd event": ("def turn():\n    put('stream_event')", 502, "protocol"),
    "odd result": ("def turn():\n    put('assistant', error='x', message=5)\n"
                   "    put('result', is_error=True, result=7)", 502, ""),
    "refuses initialize": ("def told(request_id, subtype):\n    put('control_response', response="
                           "dict(subtype='error', request_id=request_id, error='not today'))",
                           502, "not today"),
    "line without end": ("def turn():\n    for _ in range(70):\n"
                         "        sys.stdout.write('x' * 2**20)\n    sys.stdout.flush()\n"
                         "    time.sleep(60)", 502, "line"),
    "result without answer": ("def turn():\n    put('result', subtype='success', is_error=False)",
                              502, "without an answer"),
}


@pytest.mark.parametrize("code, status, word, stream", [    # by turns whole and streamed
    (*row, n % 2 == 1) for n, row in enumerate(BEFORE_ANY_EVENT.values())], ids=BEFORE_ANY_EVENT)
def test_a_cli_that_fails_before_its_first_event_gives_a_status(tmp_path, code, status, word,
                                                                stream):
    (told, message), _ = ask_badly(tmp_path, code, "messages" if stream else "chat", stream)
    assert told == status and word in message


IN_THE_STREAM = {
    "dies": ("sys.exit('boom')", "boom"),
    "garbage": ("print('oops', flush=True)\n    time.sleep(60)", "oops"),
    "odd shape": ("put('stream_event', event=5)\n    time.sleep(60)", "protocol"),
    "silent": ("time.sleep(60)", "silent"),
}


def test_a_cli_that_fails_in_mid_stream_gives_the_dialects_own_error_and_end(tmp_path):
    rows = [(name, dialect) for name in IN_THE_STREAM for dialect in PATHS_HTTP
            if dialect == "messages" or name == "dies"]
    opening = "def turn():\n    start('one', 'two')\n    time.sleep(0.2)\n    "
    found = together(*[lambda name=name, dialect=dialect: ask_badly(
        tmp_path / name / dialect, opening + IN_THE_STREAM[name][0], dialect, True,
        stall_timeout=2.0) for name, dialect in rows])      # six CLIs start at once
    for (name, _), ((status, message), fake) in zip(rows, found):
        assert status == 200 and IN_THE_STREAM[name][1] in message and len(fake.pids) == 1


def test_a_cli_that_dies_in_mid_answer_gives_502_to_who_wants_it_whole(tmp_path):
    (status, message), fake = ask_badly(
        tmp_path, "def turn():\n    start('one')\n    sys.exit('boom')")
    assert (status, len(fake.pids)) == (502, 1) and "boom" in message


def test_a_silent_cli_gives_504_after_stall_timeout(tmp_path):
    for (status, message), _ in together(*[lambda dialect=dialect: ask_badly(
            tmp_path / dialect, "def turn():\n    time.sleep(60)", dialect, stall_timeout=0.6)
            for dialect in PATHS_HTTP]):
        assert status == 504 and "silent" in message


def test_a_turn_longer_than_request_timeout_gives_504(tmp_path):
    code = ("def turn():\n    start('one')\n    while True:\n        time.sleep(0.1)\n"
            "        event('content_block_delta', index=0,\n"
            "              delta=dict(type='text_delta', text='x'))")
    (status, message), _ = ask_badly(tmp_path, code, request_timeout=1.0)
    assert status == 504 and "1 s" in message


def test_a_cli_that_dies_at_start_is_tried_again_once(tmp_path):
    noted = str(tmp_path / "pids")
    code = f"def on_start():\n    len(open({noted!r}).readlines()) > 1 or os._exit(3)"
    (status, text), fake = ask_badly(tmp_path, code)
    assert (status, text, len(fake.pids)) == (200, "fine", 2)


def test_a_cli_that_always_dies_at_start_is_started_only_twice_for_a_request(tmp_path):
    _, fake = ask_badly(tmp_path, "def on_start():\n    sys.exit('no licence')")
    assert len(fake.pids) == 2


def test_a_cli_that_always_dies_is_not_restarted_in_a_tight_loop(tmp_path):
    fake = cli(tmp_path, "def on_start():\n    sys.exit('no licence')")
    with serving(tmp_path, claude=fake.path, warm=2) as base:
        time.sleep(1.5)
        assert ask(base, "GET /health").status == 200
        answer = ask(base, "GET /readyz")
    assert answer.status == 503 and "no licence" in answer.error["message"]
    assert len(fake.pids) <= 12


HARMLESS = {
    "unknown lines": "def turn():\n    put('novelty', a=1)\n    put('system', subtype='new')\n"
                     "    print('\\n\\r\\n  ', flush=True)\n    event('new_event')\n"
                     "    start('fine')\n    event('ping')\n    end()",
    "50 MB line": "def turn():\n    put('novelty', data='x' * 50 * 2**20)\n    start('fine')\n"
                  "    end()",
    "much stderr": "def turn():\n    for _ in range(50):\n"
                   "        sys.stderr.write('x' * 100000 + '\\n' * 1000)\n    start('fine')\n"
                   "    end()",
    "unknown request": "def turn():\n    put('control_request', request_id='a', request="
                       "dict(subtype='new'))\n    sys.stdin.readline()\n"
                       "    start('fine')\n    end()",
    "raw U+2028": "def put(kind, **line):\n"
                  "    line = dict(line, type=kind, note='a\u2028b')\n"
                  "    text = json.dumps(line, ensure_ascii=False)\n"
                  "    sys.stdout.buffer.write(text.encode() + b'\\r\\n')\n"
                  "    sys.stdout.flush()",
    "subagent frames": "def turn():\n    put('stream_event', parent_tool_use_id='a', event=dict("
                       "type='content_block_delta', index=0, delta=dict(type='text_delta', "
                       "text='not this')))\n    start('fine')\n    end()",
}


@pytest.mark.parametrize("code", HARMLESS.values(), ids=HARMLESS)
def test_what_a_newer_or_noisy_cli_says_beside_its_answer_does_no_harm(tmp_path, code):
    (status, text), fake = ask_badly(tmp_path, code)
    assert (status, text, len(fake.pids)) == (200, "fine", 1)


STUBBORN = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    def turn():
        start("one")
        time.sleep(60)
    def on_end():
        time.sleep(60)
"""


def test_a_cli_that_ignores_sigterm_and_the_end_of_input_is_killed_within_2_s(tmp_path):
    fake = cli(tmp_path, STUBBORN)
    with serving(tmp_path, claude=fake.path) as base:
        socks = [http_connect(base, request("POST /v1/messages", body=question("hi", stream=stream)))
                 for stream in (False, True)]
        assert until(lambda: len(fake.pids) == 2)
        time.sleep(0.3)
        for sock in socks:
            sock.close()
        assert gone(fake.pids)


def test_stubborn_spares_are_gone_when_the_proxy_stops(tmp_path):
    fake = cli(tmp_path, STUBBORN)
    with serving(tmp_path, claude=fake.path, warm=2) as base:
        assert until(lambda: len(fake.pids) == 2) and ask(base, "GET /health").status == 200
    assert not any(map(alive, fake.pids))


LEAVES_GRANDCHILD = """
    def turn():
        note(subprocess.Popen(["sleep", "60"]).pid)
        {then}
"""


@pytest.mark.parametrize("then, status, word", [
    ("os._exit(7)", 502, "exit code 7"), ("start('one'); os._exit(7)", 502, "exit code 7"),
    ("start('fine'); end()", 200, "fine")], ids=["before", "within", "after"])
def test_a_grandchild_that_holds_the_pipes_neither_hangs_a_request_nor_stays(tmp_path, then,
                                                                             status, word):
    (told, message), fake = ask_badly(tmp_path, LEAVES_GRANDCHILD.format(then=then))
    assert told == status and word in message and len(fake.pids) in (2, 4)


# == (e) conversations =============================================================================

def http_more(messages, answer, text):
    """The history with an answer and the next question."""
    return [*messages, {"role": "assistant", "content": answer.text},
            {"role": "user", "content": text}]


@both_dialects
def test_a_conversation_is_new_then_continued_by_the_same_process(tmp_path, dialect):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path) as base:
        messages, told = http_said("one"), []
        for text in ("two", "three", "four"):
            answer = http_post(base, messages, dialect, temperature=0.1 * len(messages))
            told.append((answer.how, answer.text))
            messages = http_more(messages, answer, text)
    assert told == [("new", "one"), ("continued", "two"), ("continued", "three")]
    assert len(fake.pids) == 1


def test_another_prompt_model_history_or_reply_never_continues_a_conversation(tmp_path):
    with serving(tmp_path, models={"other": "echo"}) as base:
        tools = [{"name": "a", "input_schema": {}}]
        first = http_post(base, http_said("one"), system="S")
        history = http_more(http_said("one"), first, "two")
        edited = [{"role": "user", "content": "won"}, *history[1:]]
        guessed = [history[0], {"role": "assistant", "content": "ONE"}, history[2]]
        for messages, fields in (
                (history, {"system": "T"}), (history, {}), (edited, {"system": "S"}),
                (guessed, {"system": "S"}), (history, {"system": "S", "tools": tools}),
                (history, {"system": "S", "model": "claude-other"})):
            answer = http_post(base, messages, **fields)
            assert (answer.how, answer.text) == ("rebuilt", "two")
        assert http_post(base, history, system="S").how == "continued"       # still where it was
        assert http_post(base, history, system="S").how == "rebuilt"         # regenerated


def test_a_default_that_the_client_writes_into_a_call_does_not_end_the_conversation(tmp_path):
    schema = {"type": "object", "properties": {"all": {"type": "boolean", "default": False},
                                               "a": {"type": "integer"}}}
    client = None
    with serving(tmp_path) as base:
        for more, how in (({"all": False}, "continued"), ({"all": True}, "rebuilt"),
                          ({"b": False}, "rebuilt")):
            client = Client(base, "messages", tools=[{"name": "edit", "input_schema": schema}])
            said = client.ask('/call edit {"a": 1}')
            [call] = client.messages[-1]["content"]
            call["input"].update(more)
            told = client.ask(*client.results((said.calls[0][0], "done")))
            assert (told.text, told.headers["X-CC-Conversation"]) == ("done", how)


def test_a_conversation_whose_process_was_killed_is_rebuilt(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path) as base:
        history = http_more(http_said("one"), http_post(base, http_said("one")), "two")
        os.kill(fake.pids[0], signal.SIGKILL)
        assert gone(fake.pids)
        answer = http_post(base, history)
        assert (answer.status, answer.how, answer.text) == (200, "rebuilt", "two")


def test_a_conversation_goes_on_after_a_restart_of_the_proxy(tmp_path):
    with serving(tmp_path) as base:
        history = http_more(http_said("one"), http_post(base, http_said("one")), "two")
    with serving(tmp_path) as base:
        assert http_post(base, history).how == "rebuilt"


def test_two_requests_at_once_for_one_conversation_are_both_answered(tmp_path):
    with serving(tmp_path) as base:
        history = http_more(http_said("one"), http_post(base, http_said("one")), "/slow a b c d e")
        found = together(*[lambda: http_post(base, history)] * 2)
    assert sorted(answer.how for answer in found) == ["continued", "rebuilt"]
    assert [answer.text for answer in found] == ["/slow a b c d e"] * 2


def test_a_failed_turn_does_not_stay_in_a_conversation(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path) as base:
        history = http_more(http_said("one"), http_post(base, http_said("one")), "/error 529")
        assert http_post(base, history, "messages").status == 529
        assert gone(fake.pids)


SLOW = "/slow " + "a " * 9                          # over 0.9 s


def busy(base, number):
    def count():
        told = ask(base, "GET /status").json["processes"]
        return told["all"] - told["spare"] - told["idle"] - told["parked"]
    return until(lambda: count() == number)


def test_when_all_processes_are_busy_429_comes_after_queue_timeout(tmp_path):
    with serving(tmp_path, max_processes=2, queue_timeout=0.3) as base:
        socks = [http_connect(base, request("POST /v1/messages", body=question("/slow " + "a " * 18)))
                 for _ in range(2)]
        assert busy(base, 2)
        for answer in together(*[lambda dialect=dialect: http_post(base, "hi", dialect, stream=True)
                                 for dialect in PATHS_HTTP]):
            assert answer.status == 429 and int(answer.headers["retry-after"]) > 0
            assert answer.error["type"] == "rate_limit_error"
        assert [answers(read_all(sock))[0].status for sock in socks] == [200, 200]
        assert http_post(base, "hi").status == 200


def test_a_request_waits_in_line_for_a_process(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, max_processes=2, queue_timeout=10.0) as base:
        found = together(*[lambda n=n: http_post(base, f"/slow a b c {n}") for n in range(5)])
        assert [answer.status for answer in found] == [200] * 5
        assert ask(base, "GET /status").json["processes"]["all"] <= 2
    assert len(fake.pids) == 5


def test_a_client_that_leaves_the_line_takes_nobodys_place(tmp_path):
    with serving(tmp_path, max_processes=1, queue_timeout=10.0) as base:
        first = http_connect(base, request("POST /v1/messages", body=question("/slow a b c d e f g")))
        assert busy(base, 1)
        leaver = http_connect(base, request("POST /v1/messages", body=question("hi")))
        time.sleep(0.1)
        leaver.close()
        assert http_post(base, "hi").status == 200
        assert answers(read_all(first))[0].status == 200


def test_the_least_recently_used_conversation_goes_first(tmp_path):
    with serving(tmp_path, max_processes=2) as base:
        a, b = (http_more(http_said(name), http_post(base, http_said(name)), "next") for name in ("a", "b"))
        answer = http_post(base, a)
        a = http_more(a, answer, "next")
        assert answer.how == "continued"
        assert http_post(base, http_said("c")).how == "new"                       # b has to go
        assert http_post(base, a).how == "continued"
        assert http_post(base, b).how == "rebuilt"


TOOLS_HTTP = [{"name": "look", "input_schema": {"type": "object"}}]
CALL_HTTP = http_said('/call look {"at": "it"}')


def parked(base):
    """A conversation that waits for a tool's result, as the history with that result."""
    answer = http_post(base, CALL_HTTP, "messages", tools=TOOLS_HTTP)
    (call,) = answer.json["content"]
    assert (answer.json["stop_reason"], call["name"]) == ("tool_use", "look")
    return [*CALL_HTTP, {"role": "assistant", "content": [call]}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": call["id"], "content": "seen"}]}]


def finished(base, history, how):
    answer = http_post(base, history, "messages", tools=TOOLS_HTTP)
    assert (answer.status, answer.how, answer.text) == (200, how, "seen")


def test_a_parked_conversation_is_continued_by_its_tool_result(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path) as base:
        finished(base, parked(base), "continued")
    assert len(fake.pids) == 1


def test_an_idle_process_ends_after_idle_ttl_and_a_parked_one_does_not(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, idle_ttl=0.4, park_ttl=30.0) as base:
        history = parked(base)
        follow_up = http_more(http_said("one"), http_post(base, http_said("one")), "two")
        assert gone(fake.pids[1:])
        time.sleep(0.2)
        finished(base, history, "continued")
        assert http_post(base, follow_up).how == "rebuilt"


def test_a_parked_process_ends_after_park_ttl_and_its_result_rebuilds(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, park_ttl=0.3) as base:
        history = parked(base)
        assert gone(fake.pids)
        finished(base, history, "rebuilt")


def test_a_parked_conversation_that_had_to_go_is_rebuilt(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, max_processes=1) as base:
        history = parked(base)
        assert http_post(base, "other").how == "new" and gone(fake.pids[:1])
        finished(base, history, "rebuilt")


def test_spares_wait_and_serve_the_first_request(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, warm=1) as base:
        assert until(lambda: ask(base, "GET /status").json["processes"]["spare"] == 1)
        assert ask(base, "GET /readyz").status == 200
        first = list(fake.pids)
        assert http_post(base, "hi").how == "new"
        assert until(lambda: len(fake.pids) == 2) and all(map(alive, first))


QUIET = "def turn():\n    time.sleep(0.7)\n    start('fine')\n    time.sleep(0.5)\n    end()"


def test_a_silent_stream_gets_heartbeats_that_the_dialects_clients_read_over(tmp_path):
    with serving(tmp_path, claude=cli(tmp_path, QUIET).path, heartbeat=0.2) as base:
        told = together(*[lambda dialect=dialect: http_post(base, "hi", dialect, stream=True)
                          for dialect in PATHS_HTTP])
    for dialect, answer in zip(PATHS_HTTP, told):   # frames refuses comments and id: lines
        check_heartbeats(dialect, frames(answer.body))


def check_heartbeats(dialect, found):
    if dialect == "messages":
        kinds = [kind for kind, _ in found]
        assert kinds.index("message_start") >= 2 and set(kinds[:kinds.index("message_start")]) == {
            "ping"} and kinds[-1] == "message_stop"
        assert all(data == {"type": "ping"} for kind, data in found if kind == "ping")
        assert kinds.count("ping") >= 4
        return
    if dialect == "responses":
        assert output_text(read_responses(found)) == "fine"
        assert [kind for kind, _ in found].count("response.in_progress") >= 4
        return
    chunks = [data for _, data in found[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert "role" in deltas[0] and sum("role" in delta for delta in deltas) == 1
    assert "".join(delta.get("content") or "" for delta in deltas) == "fine"
    assert deltas.count({}) >= 4 and found[-1][1] == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] \
        == ["stop"]


def test_a_whole_answer_gets_no_heartbeat_and_a_lively_stream_none(tmp_path):
    with serving(tmp_path, claude=cli(tmp_path, QUIET).path, heartbeat=0.2) as base:
        assert talk(base, request("POST /v1/messages", body=question("hi"))).count(b"HTTP/1.1") == 1
    with serving(tmp_path, heartbeat=1.0, warm=1) as base:
        assert until(lambda: ask(base, "GET /status").json["processes"]["spare"] == 1)
        answer = http_post(base, "/slow " + "a " * 12, "messages", stream=True)      # 1.4 s
        assert b"event: ping" not in answer.body and b"message_stop" in answer.body


def test_a_failure_after_heartbeats_ends_the_stream_in_the_dialects_own_way(tmp_path):
    code = ("def turn():\n    time.sleep(0.5)\n    put('assistant', error='rate_limit', message="
            "dict(model='<synthetic>', content=[dict(type='text', text='API Error: 429 slow')]))\n"
            "    put('result', is_error=True, subtype='success', api_error_status=429)")
    for (status, message), _ in together(*[lambda dialect=dialect: ask_badly(
            tmp_path / dialect, code, dialect, True, heartbeat=0.2) for dialect in PATHS_HTTP]):
        assert status == 200 and message == "slow"


# == (f) stored responses ==========================================================================

def respond(base, given, headers=None, **fields):
    """The headers and the response of a request that has to succeed."""
    status, told, response = post(base, "/v1/responses", {"model": "m", "input": given, **fields},
                                  headers)
    assert status == 200, response
    return told, response


def output_text(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message"
                   for part in item["content"])


def history_of(base, name, **query):
    """[(role, text)] of a stored response's input, oldest first."""
    found = get(base, f"/v1/responses/{name}/input_items?order=asc&limit=100")[2]["data"]
    return [(item["role"], item["content"][0]["text"]) for item in found]


def test_a_stored_response_can_be_continued_more_than_once_and_after_a_restart(tmp_path):
    with serving(tmp_path) as base:
        first = respond(base, "one")[1]
        told, second = respond(base, "two", previous_response_id=first["id"])
        assert (told["X-CC-Conversation"], output_text(second)) == ("continued", "two")
        told, other = respond(base, "zwei", previous_response_id=first["id"])
        assert (told["X-CC-Conversation"], output_text(other)) == ("rebuilt", "zwei")
        assert second["previous_response_id"] == other["previous_response_id"] == first["id"]
    with serving(tmp_path) as base:
        for before, said in ((second, "two"), (other, "zwei")):
            third = respond(base, [{"role": "user", "content": "three"}],
                            previous_response_id=before["id"])[1]
            assert history_of(base, third["id"]) == [
                ("user", "one"), ("assistant", "one"), ("user", said), ("assistant", said),
                ("user", "three")]
        status, _, again = get(base, "/v1/responses/" + first["id"])
        assert (status, again) == (200, first)


def test_a_streamed_response_is_stored_before_its_end_is_told(tmp_path):
    with serving(tmp_path) as base:
        events = stream(base, "/v1/responses", {"model": "m", "input": "one"})
        response = read_responses(events)
        assert get(base, "/v1/responses/" + response["id"])[2] == response
        told = respond(base, "two", previous_response_id=response["id"])[0]
        assert told["X-CC-Conversation"] == "continued"


@pytest.mark.parametrize("path", [
    "/v1/responses/", "/responses/", "/v1/v1/responses/", "/chat/v1/responses/",
    "/v1/responses/responses/"])
def test_a_stored_response_is_found_by_every_base_url(url, path):
    response = respond(url, "one")[1]
    if path.count("responses") == 1:
        assert get(url, path + response["id"])[2] == response
    assert get(url, path + "nobody")[0] == 404


def test_what_is_not_stored_cannot_be_read_or_continued(url):
    for given in ({"store": False}, {}):
        name = respond(url, "one", **given)[1]["id"] if given else "resp_" + "0" * 28
        for path in (name, name + "/input_items"):
            status, _, told = get(url, "/v1/responses/" + path)
            assert (status, told["error"]["param"]) == (404, "response_id")
        assert post(url, "/v1/responses/" + name, None, method="DELETE")[0] == 404
        status, _, told = post(url, "/v1/responses", {
            "model": "m", "input": "two", "previous_response_id": name})
        assert (status, told["error"]["param"]) == (400, "previous_response_id")
        assert told["error"]["code"] == "previous_response_not_found"
        assert name in told["error"]["message"]
    status, _, told = post(url, "/v1/responses", {"model": "m", "input": "two",
                                                  "previous_response_id": 5})
    assert (status, told["error"]["param"]) == (400, "previous_response_id")


def test_a_response_that_failed_or_was_left_is_not_stored(tmp_path):
    with serving(tmp_path) as base:
        events = stream(base, "/v1/responses", {"model": "m", "input": "/error 529"})
        assert events.status == 529
        connection, response = connect(base, "/v1/responses", {
            "model": "m", "input": SLOW, "stream": True})
        first = response.read1(4096).decode()
        connection.close()
        name = re.search(r"resp_\w+", first).group()
        assert until(lambda: get(base, "/status")[2]["connections"] == 1)
        assert get(base, "/v1/responses/" + name)[0] == 404


def test_a_deleted_response_is_gone_and_what_continued_it_goes_on(tmp_path):
    with serving(tmp_path) as base:
        first = respond(base, "one")[1]
        second = respond(base, "two", previous_response_id=first["id"])[1]
        third = respond(base, "three", previous_response_id=second["id"])[1]
        for gone_one in (second, first):
            path = "/v1/responses/" + gone_one["id"]
            status, _, told = post(base, path, None, method="DELETE")
            assert (status, told["id"], told["deleted"]) == (200, gone_one["id"], True)
            assert get(base, path)[0] == post(base, path, None, method="DELETE")[0] == 404
            assert history_of(base, third["id"])[::2] == [
                ("user", "one"), ("user", "two"), ("user", "three")]
        last = respond(base, "four", previous_response_id=third["id"])[1]
        assert len(history_of(base, last["id"])) == 7


def test_only_its_caller_sees_a_stored_response(tmp_path):
    mine, yours = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer yours"}
    with serving(tmp_path, api_key="mine") as base:
        response = respond(base, "secret", mine)[1]
    item = {"type": "item_reference", "id": response["output"][0]["id"]}
    asked = [({"input": "x", "previous_response_id": response["id"]}, "previous_response_id"),
             ({"input": [item, {"role": "user", "content": "x"}]}, "input[0].id")]
    with serving(tmp_path, api_key="yours") as base:
        for method in ("GET", "DELETE"):
            path = "/v1/responses/" + response["id"]
            assert post(base, path, None, yours, method)[0] == 404
            assert post(base, path, None, None, method)[0] == 401
        for body, param in asked:
            status, _, told = post(base, "/v1/responses", {"model": "m", **body}, yours)
            assert (status, told["error"]["param"]) == (400, param)
    with serving(tmp_path, api_key="mine") as base:
        assert post(base, path, None, mine, "GET")[2] == response


def test_a_reference_stands_for_the_stored_item_that_it_names(tmp_path):
    tools = [{"type": "function", "name": "look"}]
    with serving(tmp_path) as base:
        asked = {"role": "user", "content": '/think /call look {"a": 1}'}
        first = respond(base, [asked], tools=tools)[1]
        thought, call = first["output"]
        names = [{"type": "item_reference", "id": item["id"]} for item in (thought, call)]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "found"}
        told, second = respond(base, [asked, *names, result], tools=tools)
        assert (told["X-CC-Conversation"], output_text(second)) == ("continued", "found")
        kept = get(base, f"/v1/responses/{second['id']}/input_items?order=asc")[2]["data"]
        assert [item["type"] for item in kept] == [
            "message", "reasoning", "function_call", "function_call_output"]
        own = {"type": "item_reference", "id": kept[0]["id"]}
        assert respond(base, [own], tools=tools)[1]["output"][1]["name"] == "look"
        for name in (call["id"] + "9", "x", "", None):
            status, _, told = post(base, "/v1/responses", {
                "model": "m", "input": [asked, {"type": "item_reference", "id": name}]})
            assert (status, told["error"]["param"]) == (400, "input[1].id")


def test_the_items_of_an_input_come_in_pages_newest_first(url):
    given = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(5)]
    path = f"/v1/responses/{respond(url, given)[1]['id']}/input_items"

    def page(query):
        status, _, told = get(url, path + query)
        assert (status, told["object"]) == (200, "list")
        texts = "".join(item["content"][0]["text"] for item in told["data"])
        assert not texts or [told["first_id"], told["last_id"]] == [
            told["data"][0]["id"], told["data"][-1]["id"]]
        return texts, told["has_more"], told["last_id"]
    assert page("")[:2] == ("43210", False)
    texts, more, last = page("?limit=2&order=asc")
    assert (texts, more) == ("01", True)
    texts, more, last = page(f"?limit=2&order=asc&after={last}")
    assert (texts, more) == ("23", True)
    assert page(f"?limit=2&order=asc&after={last}") == ("4", False, page("?limit=1")[2])
    for name, value in (("limit", "0"), ("limit", "101"), ("limit", "x"), ("limit", "²"),
                        ("order", "odd"), ("stream", "true"), ("after", "nobody")):
        status, _, told = get(url, f"{path}?{name}={urllib.parse.quote(value)}")
        assert (status, told["error"]["param"]) == (400, name)


def test_stored_responses_are_dropped_when_they_are_too_many_the_oldest_first(tmp_path):
    with serving(tmp_path, store_size="300k") as base:
        first = respond(base, "first")[1]
        kept = [respond(base, "x" * 50_000, previous_response_id=first["id"])[1]["id"]]
        for n in range(4):
            kept.append(respond(base, f"{n}" + "x" * 50_000)[1]["id"])
        found = [get(base, "/v1/responses/" + name)[0] for name in [first["id"], *kept]]
        assert found[-1] == 200 and 404 in found
        assert found[found.index(200):] == [200] * found.count(200)


def test_stored_responses_are_dropped_when_they_are_too_old(tmp_path):
    def found(days):
        async def live():
            store = ccproxy.Store(str(tmp_path), days, 2**20, 2**20)
            before = await store.run(store.read, "resp_1", "me")
            await store.run(store.keep, {"id": f"resp_{days}", "output": []}, "hi", "me")
            after = await store.run(store.read, "resp_1", "me")
            await store.close()
            return before is not None, after is not None
        return asyncio.run(live())
    assert found(1) == (False, True)
    time.sleep(0.2)
    assert found(2) == (True, True)
    assert found(0.1 / 86400) == (True, False)


def test_what_is_continued_keeps_what_it_needs_from_growing_old(tmp_path):
    async def live():
        store = ccproxy.Store(str(tmp_path), 30, 2**20, 2**20)
        for name, before in (("a", None), ("b", "a"), ("other", None), ("c", "b")):
            await store.run(store.keep, {"id": "resp_" + name, "output": [], "previous_response_id":
                                         before and "resp_" + before}, name, "me")
            await asyncio.sleep(0.01)
        order = await store.run(lambda: [row[0] for row in store._db.execute(
            "SELECT id FROM responses ORDER BY used, id")])
        await store.close()
        return order
    assert asyncio.run(live()) == ["resp_other", "resp_a", "resp_b", "resp_c"]


def stored(folder, *jobs, size=2**20, limit=2**20):
    """What jobs give, each called with a store on the folder, within its thread."""
    async def live():
        store = ccproxy.Store(str(folder), 30, size, limit)
        try:
            return [await store.run(job, store) for job in jobs]
        finally:
            await store.close()
    return asyncio.run(live())


def kept(name, before=None, text="hi"):
    return lambda store: store.keep({"id": name, "output": [], "previous_response_id": before},
                                    text, "me")


def test_a_conversation_that_lost_its_beginning_is_not_continued_without_it(tmp_path):
    *_, whole, _, cut, last = stored(
        tmp_path, kept("resp_1"), kept("resp_2", "resp_1"), kept("resp_3", "resp_2"),
        lambda store: len(store.context("resp_3", "me")),
        lambda store: store._db.execute("DELETE FROM responses WHERE id = 'resp_1'") and None,
        lambda store: store.context("resp_3", "me"), lambda store: store.read("resp_3", "me")["id"])
    assert (whole, cut, last) == (3, [], "resp_3")


def test_a_big_response_pushes_many_small_ones_out_in_one_walk(tmp_path):
    def work(store):
        told = []
        store._db.set_trace_callback(told.append)
        kept("resp_big", text="x" * 40_000)(store)
        ids = [row[0] for row in store._db.execute("SELECT id FROM responses ORDER BY used")]
        return sum("SUM(size" in statement for statement in told), ids
    *_, (sums, left) = stored(tmp_path, *[kept(f"resp_{n}") for n in range(300)], work,
                                    size=60_000)
    assert sums < 5
    assert 1 < len(left) < 200 and left == [
        f"resp_{n}" for n in range(301 - len(left), 300)] + ["resp_big"]


def test_deleting_leaves_nothing_behind_once_nothing_continues_it(tmp_path):
    def rows(store):
        return store._db.execute("SELECT COUNT(*) FROM responses").fetchone()[0]
    *_, one, two, three, gone_one = stored(
        tmp_path, kept("resp_1"), kept("resp_2", "resp_1"), kept("resp_3", "resp_2"),
        lambda store: store.delete("resp_1", "me") and rows(store),
        lambda store: store.delete("resp_2", "me") and rows(store),
        lambda store: store.delete("resp_3", "me") and rows(store),
        lambda store: store.delete("resp_3", "me"))
    assert (one, two, three, gone_one) == (3, 3, 0, False)


def test_a_response_that_is_too_big_to_store_takes_nobodys_place(tmp_path):
    with serving(tmp_path, store_size="300k") as base:
        first = respond(base, "first")[1]
        big = respond(base, "x" * 200_000)[1]
        assert output_text(big) == "x" * 200_000
        assert get(base, "/v1/responses/" + first["id"])[0] == 200
        assert get(base, "/v1/responses/" + big["id"])[0] == 404


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
def test_what_a_small_request_recalls_is_no_larger_than_a_body_may_be(tmp_path, path):
    with serving(tmp_path, max_body="200k") as base:
        long = respond(base, "x" * 50_000)[1]
        item = {"type": "item_reference", "id": long["output"][0]["id"]}
        status, _, told = post(base, path, {"model": "m", "input": [item] * 9})
        assert (status, told["error"]["param"]) == (413, "input[4].id")     # 200 KiB
        two = respond(base, "y" * 60_000, previous_response_id=long["id"])[1]
        status, _, told = post(base, path, {"model": "m", "input": "z", "previous_response_id":
                                            two["id"]})
        assert status == 413 and "stored conversation" in told["error"]["message"]


@pytest.mark.parametrize("more", [
    {"previous_response_id": "\ud800"}, {"input": [{"type": "item_reference", "id": "msg_\ud800"}]},
    {"tools": [{"type": "custom", "name": "g", "format": "text"}]},
    {"tools": [{"type": "custom", "name": "g", "format": [1]}]},
    {"tools": [{"": 5}]},
    {"tools": [{"type": "function", "name": "g"}], "tool_choice": {
        "type": "allowed_tools", "mode": "required", "tools": [{"function": "x"}, {"custom": 3}]}}])
def test_odd_values_found_by_an_attack_are_refused(url, more):
    status, _, told = post(url, "/v1/responses", {"model": "m", "input": "hi", **more})
    assert status == 400 and told["error"]["param"]


def test_items_with_odd_ids_are_stored_under_ids_of_their_own(url):
    given = [{"role": "user", "content": "x", "id": odd} for odd in ([1], {}, "msg_a", "msg_a", 5)]
    name = respond(url, given)[1]["id"]
    found = get(url, f"/v1/responses/{name}/input_items")[2]["data"]
    assert len({item["id"] for item in found}) == 5
    last = {"type": "item_reference", "id": found[0]["id"]}
    assert output_text(respond(url, [last])[1]) == "x"


def test_a_body_of_chat_may_continue_a_stored_response(url):
    first = respond(url, "/call look {}", tools=[{"type": "function", "name": "look"}])[1]
    call = first["output"][0]["call_id"]
    status, _, told = post(url, "/v1/responses", {
        "model": "m", "messages": [{"role": "tool", "tool_call_id": call, "content": "seen"}],
        "tools": [{"type": "function", "name": "look"}], "previous_response_id": first["id"]})
    assert (status, output_text(told)) == (200, "seen")


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 99", "CREATE TABLE responses (x)"])
def test_a_store_of_another_make_is_left_as_it_is_and_not_locked(tmp_path, statement):
    sqlite3 = pytest.importorskip("sqlite3")
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "store.db"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.execute(statement)
        db.commit()
    with serving(tmp_path) as base:
        for _ in range(2):
            status, _, told = get(base, "/v1/responses/resp_1")
            assert status == 500 and "locked" not in told["error"]["message"]
        with contextlib.closing(sqlite3.connect(str(path), timeout=0.1)) as db:
            db.execute("BEGIN IMMEDIATE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
    assert version == (99 if "99" in statement else 0)


def test_a_stream_that_cannot_be_ended_is_at_least_closed(tmp_path, monkeypatch):
    def frames(message, event):
        if event["type"] == "message_stop":
            raise RecursionError
        return real(message, event)
    real = DIALECTS["chat"].frames
    monkeypatch.setitem(ccproxy.DIALECTS, "chat", DIALECTS["chat"]._replace(frames=frames))
    with serving(tmp_path) as base:
        answer = http_post(base, "hi", stream=True)
    assert answer.body.endswith(b"data: [DONE]\n\n") and b'"error"' in answer.body


def test_the_stores_file_is_its_owners_alone_and_two_proxies_share_it(tmp_path):
    with serving(tmp_path) as one, serving(tmp_path) as other:
        names = together(*[lambda base=base: respond(base, "hi")[1]["id"]
                           for base in (one, other) * 4])
        assert {get(base, "/v1/responses/" + name)[0] for base in (one, other)
                for name in names} == {200}
        folder = tmp_path / "state"
        if os.name == "posix":
            assert folder.stat().st_mode & 0o777 == 0o700
            assert {path.stat().st_mode & 0o777 for path in folder.glob("store.db*")} == {0o600}


def test_a_store_that_cannot_be_used_is_an_error_where_it_is_needed_and_nowhere_else(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "store.db").write_bytes(b"no database" * 100)
    with serving(tmp_path) as base:
        response = respond(base, "hi")[1]
        assert output_text(response) == "hi"
        status, _, told = get(base, "/v1/responses/" + response["id"])
        assert (status, told["error"]["type"]) == (500, "server_error")
        assert "store" in told["error"]["message"]
        assert http_post(base, "hi").status == 200


def test_input_tokens_are_counted_in_the_words_of_responses(url):
    status, _, told = post(url, "/v1/responses/input_tokens", {"model": "m", "input": "hi there"})
    assert (status, told["object"]) == (200, "response.input_tokens") and told["input_tokens"] > 0


def test_routes_of_responses_take_their_methods_alone(url):
    name = respond(url, "one")[1]["id"]
    for method, path, allowed in (("GET", "/v1/responses", "POST"), ("PUT", "/v1/responses", "POST"),
                                  ("POST", "/v1/responses/" + name, "GET, DELETE"),
                                  ("GET", "/v1/responses/input_tokens", "POST")):
        status, headers, told = post(url, path, None, method=method)
        assert (status, headers["Allow"]) == (405, allowed + ", HEAD, OPTIONS")
        assert told["error"]["code"] == "method_not_allowed"
    assert post(url, f"/v1/responses/{name}/input_items", None, method="DELETE")[0] == 404
    assert get(url, f"/v1/responses/{name}/odd")[0] == 404
    assert ask(url, "HEAD /v1/responses/" + name).status == 200


@pytest.mark.parametrize("first, second", [("chat", "responses"), ("responses", "messages"),
                                           ("messages", "responses")])
def test_a_conversation_of_one_dialect_is_continued_from_another(tmp_path, first, second):
    with serving(tmp_path) as base:
        client = Client(base, first)
        said = client.ask("one")
        other = Client(base, second)
        other.messages = [{"role": "user", "content": "one"}, {"role": "assistant",
                                                               "content": said.text}]
        told = other.ask("two")
        assert (told.headers["X-CC-Conversation"], told.text) == ("continued", "two")


def test_a_websocket_is_refused_so_that_codex_falls_back_at_once(url):
    answer = ask(url, "GET /v1/responses", "Upgrade: websocket", "Connection: Upgrade")
    assert answer.status == 426 and answer.error["code"] == "upgrade_required"


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_a_prompt_that_is_too_long_has_the_code_on_which_clients_compact(dialect):
    for words in ("prompt is too long: 210000 tokens > 200000 maximum",         # the API's words
                  "Prompt is too long · the request is ~210000 tokens"):        # the CLI's
        error = DIALECTS[dialect].error(ApiError("invalid_request", words))["error"]
        assert error["code"] == "context_length_exceeded"


@whole_and_streamed
def test_an_error_before_a_response_is_a_status(url, stream):
    answer = ask(url, "POST /v1/responses", body={"model": "m", "input": "/error 429",
                                                  "stream": stream})
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")


# -- cancelling

def test_a_running_request_is_cancelled_by_its_id(tmp_path):
    def cancel(dialect, stream):
        fake = noted_stand_in(tmp_path / f"{dialect}{stream}")
        with serving(tmp_path / f"{dialect}{stream}", claude=fake.path) as base:
            body = {"model": "m", "input": SLOW, "stream": stream} if dialect == "responses" else (
                question(SLOW, stream=stream))
            sock = http_connect(base, request("POST " + PATHS_HTTP[dialect], "X-Request-Id: mine",
                                              body=body, close=False))
            assert busy(base, 1) and until(lambda: fake.pids)
            begun = sock.recv(65536) if stream else b""
            assert ask(base, "DELETE /v1/requests/other").status == 404
            told = ask(base, "DELETE /v1/requests/mine")
            assert told.json == {"id": "mine", "object": "request", "cancelled": True}
            assert gone(fake.pids)
            sock.sendall(request("GET /health"))
            first, second = answers(begun + read_all(sock))     # the connection serves on
            assert second.status == 200
            assert ask(base, "DELETE /v1/requests/mine").status == 404
            assert http_post(base, "hi").text == "hi"
            return first
    jobs = [("chat", False), ("chat", True), ("messages", True), ("responses", True)]
    whole, chat, messages, responses = together(*[lambda job=job: cancel(*job) for job in jobs])
    assert whole.status == 499 and whole.error["message"] == "the request was cancelled"
    assert all(b"cancelled" in answer.body for answer in (chat, messages, responses))
    assert frames(chat.body)[-1][1] == "[DONE]" and frames(messages.body)[-1][0] == "error"
    assert frames(responses.body)[-1][0] == "response.failed"


def test_a_relayed_request_is_cancelled_upstream(tmp_path, own_key):
    with Odd(after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), then=hang)) as up, \
            relaying(tmp_path, up) as base:
        sock = http_connect(base, request("POST /api/v1/messages", "X-Request-Id: r:1", body=ASK_UP))
        begun = sock.recv(65536)
        assert ask(base, "DELETE /v1/requests/r:1").status == 200
        assert until(lambda: up.ended == 1, 2.0)
        last = answers(begun + read_all(sock))[0].body.decode().strip().split("\n\n")[-1]
        assert "event: error" in last and "cancelled" in last


def test_nobody_cancels_without_a_key(tmp_path):
    with serving(tmp_path, api_key="k") as base:
        assert ask(base, "DELETE /v1/requests/x").status == 401
        assert ask(base, "DELETE /v1/requests/x", "x-api-key: k").status == 404
        for verb in ("GET", "HEAD", "POST"):
            odd = ask(base, f"{verb} /v1/requests/x", "x-api-key: k")
            assert odd.status == 405 and odd.headers["allow"] == "DELETE, OPTIONS"


# -- headers that go before the body

ASK_MESSAGES = [{"role": "user", "content": "hi"}]
ONE_TURN = ({"role": "user", "content": [{"type": "text", "text": "x"}]},)


@pytest.mark.parametrize("fields, effort, left", [
    ({}, "high", {"effort": "high"}), ({"effort": "low"}, "max", {"effort": "max"}),
    ({"effort": "low"}, "none", {"thinking": {"type": "disabled"}}),
    ({}, "minimal", {"effort": "low"}),
    ({"thinking": {"type": "disabled"}, "temperature": 1}, "high", {"effort": "high", "temperature": 1})])
def test_an_effort_said_elsewhere_goes_before_the_bodys(fields, effort, left):
    found = ccproxy.with_effort(ccproxy.Turn("m", ONE_TURN, fields=fields), effort, "X-CC-Effort")
    assert found.fields == left and set(found.said.values()) == {"X-CC-Effort"}


@pytest.mark.parametrize("settings, fields, body, model, effort", [
    ({}, ["X-CC-Model: opus", "X-CC-Effort: high"], {"reasoning_effort": "low"}, "claude-opus-5", "high"),
    ({}, ["X-CC-Model: claude-x"], {"model": None}, "claude-x", None),
    ({"effort": "low"}, [], {}, "claude-sonnet-5", "low"),
    ({"effort": "low"}, [], {"reasoning_effort": "max"}, "claude-sonnet-5", "max"),
    ({"effort": "low"}, ["X-CC-Effort: medium"], {}, "claude-sonnet-5", "medium"),
    ({"effort": "low"}, [], {"thinking": {"type": "disabled"}}, "claude-sonnet-5", None)])
def test_headers_go_before_the_body_and_that_before_settings(api, tmp_path, own_key, settings, fields,
                                                             body, model, effort):
    api.clear()
    with relaying(tmp_path, api, **settings) as base:
        answer = ask(base, "POST /api/v1/chat/completions", *fields,
                     body={"model": "claude-sonnet-5", "messages": ASK_MESSAGES, **body})
        assert answer.status == 200 and answer.json["model"] == body.get(
            "model", "claude-sonnet-5") or answer.json["model"] == "claude-x"
        sent = api.bodies[-1]
        assert sent["model"] == model and sent.get("output_config", {}).get("effort") == effort
        odd = ask(base, "POST /api/v1/chat/completions", "X-CC-Effort: much",
                  body={"model": "m", "messages": ASK_MESSAGES})
        assert odd.status == 400 and odd.error["param"] == "X-CC-Effort"
        passed = relay(base, "POST /api/v1/messages", "X-CC-Effort: high", "X-CC-Model: x")
        assert passed.headers["x-cc-ignored-params"] == "X-CC-Model, X-CC-Effort"
        assert api.bodies[-1] == json.loads(ASK_UP)


# -- stopping

def test_running_turns_are_finished_at_a_stop_and_new_connections_refused(tmp_path):
    fake = noted_stand_in(tmp_path)
    with command(tmp_path, "--warm", "0", claude=fake.path) as proxy:
        socks = [http_connect(proxy.url, request("POST /v1/messages", close=False, body=question(
            SLOW, stream=stream))) for stream in (False, True)]
        idle = http_connect(proxy.url)
        assert busy(proxy.url, 2)
        proxy.process.send_signal(signal.SIGTERM)
        assert read_all(idle) == b""
        with pytest.raises(OSError):
            http_connect(proxy.url)
        whole, streamed = (answers(read_all(sock))[0] for sock in socks)
        assert whole.text == SLOW and frames(streamed.body)[-1][0] == "message_stop"
        assert proxy.process.wait(5) == 0 and not any(map(alive, fake.pids))


@pytest.mark.parametrize("twice", [False, True], ids=["drain_timeout", "asked twice"])
def test_a_turn_that_is_too_long_for_the_drain_does_not_hold_the_stop(tmp_path, twice):
    fake = noted_stand_in(tmp_path)
    with command(tmp_path, "--warm", "0", "--drain-timeout", "20" if twice else "0.3",
                 claude=fake.path) as proxy:
        sock = http_connect(proxy.url, request("POST /v1/messages", body=question("/slow " + "a " * 99)))
        assert busy(proxy.url, 1)
        proxy.process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(0.1)
            proxy.process.send_signal(signal.SIGINT)
        assert proxy.process.wait(4) == 0 and not any(map(alive, fake.pids))
        sock.close()
    assert not any("Traceback" in line for line in proxy.log)


def test_running_gives_up_its_port_processes_and_folder(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, warm=2) as base:
        http_post(base, "hi")
    assert not any(map(alive, fake.pids))
    with pytest.raises(OSError):
        http_connect(base)


# -- what an attack has found

@pytest.mark.parametrize("fields, message, rule", [
    ({"top_k": 600}, "top_k: Input should be less than or equal to 500",
     {"drop": "top_k", "with": [], "value": 600}),
    ({"temperature": 0.5}, "tools.0.custom.input_schema: property temperature must be object", None),
    ({"temperature": 0.5}, "`temperature` is deprecated for this model.",
     {"drop": "temperature", "with": []})])
def test_a_bad_value_teaches_nothing_about_other_values(fields, message, rule):
    assert ccproxy.refusal_rule(turn(fields=fields), message) == rule


def test_a_model_is_asked_again_after_a_month_also_by_a_proxy_that_runs(tmp_path, monkeypatch):
    refusals = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    refusals.learn("m", [{"drop": "top_p", "with": []}])
    asked, later = turn(fields={"top_p": 0.5}), time.time() + 31 * 86400
    assert "top_p" not in refusals.apply(asked, "m", []).fields
    monkeypatch.setattr(ccproxy.time, "time", lambda: later)
    assert refusals.apply(asked, "m", []).fields["top_p"] == 0.5
    assert ccproxy.Refusals(refusals.path).apply(asked, "m", []).fields["top_p"] == 0.5


def test_a_rule_for_one_value_leaves_other_values_alone(tmp_path):
    refusals = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    refusals.learn("m", [{"drop": "top_k", "with": [], "value": 600}])
    again = ccproxy.Refusals(refusals.path)
    assert "top_k" not in again.apply(turn(fields={"top_k": 600}), "m", []).fields
    assert again.apply(turn(fields={"top_k": 5}), "m", []).fields["top_k"] == 5


def test_a_bad_signature_of_one_history_is_not_learned_for_the_model(tmp_path):
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    asked = turn(messages=(ASK, {"role": "assistant", "content": [thought]}, ASK))
    rule = ccproxy.refusal_rule(asked, "messages.1.content.0: Invalid `signature` in `thinking` block")
    refusals = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    assert "thinking_blocks" not in ccproxy.features(refusals.apply(asked, "m", [rule]))
    refusals.learn("m", [rule])
    assert "thinking_blocks" in ccproxy.features(refusals.apply(asked, "m", []))


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"m": 5}', '{"m": [{"drop": "top_k"}]}',
                                     '{"m": [{"drop": "top_k", "with": [[1]], "at": 9e9}]}',
                                     '{"m": [{"drop": 5, "with": [], "at": 9e9}]}'])
def test_damaged_state_is_read_as_none(tmp_path, content):
    path = tmp_path / "refusals.json"
    path.write_text(content)
    fields = {"top_k": 5, "thinking": {"type": "disabled"}}
    assert ccproxy.Refusals(str(path)).apply(turn(fields=fields), "m", []).fields == fields


def test_what_a_model_refused_and_cannot_be_kept_leaves_no_half_file(tmp_path, capsys):
    (tmp_path / "refusals.json").mkdir()
    kept = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    kept.learn("m", [{"drop": "top_k", "with": []}])
    assert os.listdir(tmp_path) == ["refusals.json"] and "cannot keep" in capsys.readouterr().err
    fields = {"top_k": 5, "thinking": {"type": "disabled"}}
    assert "top_k" not in kept.apply(turn(fields=fields), "m", []).fields


def test_a_flood_of_blank_lines_ends_the_connection(url):
    with contextlib.suppress(ConnectionError):
        assert b" 200 " not in talk(url, b"\r\n" * 500_000)
    assert b" 200 " in talk(url, request("GET /health"))


@both_dialects
@pytest.mark.parametrize("more, name", [
    ({"model": "m" * 300}, "model"),
    ({"thinking": {"type": "adaptive", "budget_tokens": "x"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "disabled", "budget_tokens": None}}, "thinking.budget_tokens")])
def test_a_mistyped_budget_or_an_endless_model_name_is_refused(url, dialect, more, name):
    answer = http_post(url, "hi", dialect, **more)
    assert answer.status == 400 and name in answer.error["message"]


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": 1e999}', '{"a": -Infinity}', '{"a": }',
                                       "[1]", '"x"', "null", '{"a'])
def test_arguments_that_are_no_json_object_come_back_to_the_model_as_text(url, arguments):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"}]
    assert DIALECTS["chat"].parse(question(said)).messages[1]["content"][0]["input"] == {
        "INVALID_JSON": arguments}
    assert arguments != "[1]" or http_post(url, said).status == 200


def test_cancelled_turns_never_make_more_processes_than_are_allowed(tmp_path):
    fake = noted_stand_in(tmp_path)
    with serving(tmp_path, claude=fake.path, max_processes=2, queue_timeout=10.0) as base:
        for _ in range(6):
            sock = http_connect(base, request("POST /v1/messages", body=question(
                "/slow a b c", stream=True)))
            sock.recv(10)
            hang_up(sock, "reset")
            assert sum(map(alive, fake.pids)) <= 2
        assert http_post(base, "hi").status == 200
    assert gone(fake.pids)


def test_a_cli_that_reports_no_models_lists_none(tmp_path):
    fake = cli(tmp_path, """
        def told(request_id, subtype):
            put("control_response", response=dict(subtype="success", request_id=request_id,
                                                  response=dict(account=ACCOUNT)))
    """)
    with serving(tmp_path, claude=fake.path) as base:
        status, _, found = get(base, "/v1/models")
        assert (status, found["data"], found["first_id"], found["last_id"]) == (200, [], None, None)
        assert http_post(base, "hi").text == "fine"


def test_models_are_told_at_once_by_one_process(tmp_path):
    with serving(tmp_path, max_processes=1, warm=2) as base:
        started = time.monotonic()
        assert ask(base, "GET /v1/models").status == 200
        assert time.monotonic() - started < 5


def test_a_request_that_comes_while_the_only_place_is_being_filled_is_served(tmp_path):
    for _ in range(8):
        with serving(tmp_path, max_processes=1, warm=2) as base:
            started = time.monotonic()
            assert http_post(base, "hi").status == 200
            assert time.monotonic() - started < 10


def test_the_spares_come_back_after_very_long_trouble(tmp_path):
    talk = ccproxy.Conversations(ccproxy.Settings(claude="echo", state_dir=str(tmp_path)))
    talk._failures = 5000

    async def live():
        await talk.start()
        await asyncio.sleep(0.3)
        kept = not talk._keeper.done()
        await talk.stop()
        return kept
    assert asyncio.run(live())


@pytest.mark.skipif(not ccproxy.POSIX, reason="a shell script")
def test_a_cli_that_does_not_tell_its_version_ends_with_the_proxy(tmp_path):
    script, told = tmp_path / "claude", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {told}.new; mv {told}.new {told}\nexec sleep 300\n")
    script.chmod(0o755)
    gc.disable()                # it would end the process, too, some time
    try:
        with ccproxy.running(claude=str(script), state_dir=str(tmp_path / "state")):
            assert until(told.exists, 10)
        pid = int(told.read_text())
        assert until(lambda: pid not in processes(), 5)
    finally:
        gc.enable()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_what_a_cli_asks_while_it_is_ended_is_put_to_nobody():
    late = """if True:
        import json, sys, time
        for line in sys.stdin:
            pass
        print(json.dumps({"type": "control_request", "request_id": "r", "request": {
            "subtype": "can_use_tool", "tool_name": "Bash", "input": {}}}), flush=True)
        time.sleep(9)"""
    asked = []

    async def permit(claude, request):
        asked.append(request)
        await asyncio.sleep(60)

    async def live():
        claude = await ccproxy.Claude.spawn([sys.executable, "-c", late], dict(os.environ), HERE,
                                            lambda claude: None, ccproxy.Launch(True), permit,
                                            "x=y")
        await asyncio.sleep(0.5)
        await claude.close()
        return claude.process.returncode
    assert asyncio.run(live()) is not None and asked == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux")
def test_an_agent_is_ended_and_its_place_free_also_without_a_free_file_descriptor(
        tmp_path, monkeypatch):
    talk = ccproxy.Conversations(ccproxy.Settings(
        claude="echo", state_dir=str(tmp_path), warm=0, max_processes=1))
    listdir = os.listdir

    def refuse(path="."):
        if path == "/proc":
            raise OSError(errno.EMFILE, "Too many open files")
        return listdir(path)

    async def live():
        await talk.start()
        try:
            claude = await talk._fresh(b"", "default", talk.launch())
            monkeypatch.setattr(os, "listdir", refuse)
            talk._close(claude)
            await asyncio.wait(set(talk._closers), timeout=5)
            return claude.process.returncode, talk._places.locked()
        finally:
            monkeypatch.undo()
            await talk.stop()
    ended, full = asyncio.run(live())
    assert ended is not None and not full


def test_a_cli_that_leaves_out_what_others_tell_is_no_bug_of_ours(tmp_path):
    fake = cli(tmp_path, """
        def told(request_id, subtype):
            put("control_response", response=dict(subtype="success", request_id=request_id,
                response=dict(models=[dict(resolvedModel="claude-new-1")])))
    """)
    with serving(tmp_path, claude=fake.path, warm=2) as base:
        assert until(lambda: get(base, "/status")[2]["processes"]["spare"] == 2)
        assert [m["id"] for m in get(base, "/v1/models")[2]["data"]] == ["claude-new-1"]
        answer = ask(base, "POST /v1/messages/count_tokens", body=question("hi"))
        assert answer.status == 502 and "no number of tokens" in answer.error["message"]


def test_many_who_ask_for_the_models_at_once_get_by_with_one_process(tmp_path):
    talk = ccproxy.Conversations(ccproxy.Settings(claude="echo", state_dir=str(tmp_path)))

    async def live():
        await talk.start()
        talk._keeper.cancel()               # or its spares would be counted, too
        try:
            told = await asyncio.gather(*(talk.known_models() for _ in range(20)))
            return told, len(talk.fleet)
        finally:
            await talk.stop()
    told, processes_ = asyncio.run(live())
    assert processes_ == 1 and told[0] and told == told[:1] * 20


def test_a_failure_to_ask_for_the_models_is_told_to_all_who_waited(tmp_path):
    talk, tries = ccproxy.Conversations(ccproxy.Settings(
        claude="echo", state_dir=str(tmp_path), warm=0)), []

    async def fresh(*_):
        tries.append(1)
        await asyncio.sleep(0.05)
        raise ApiError("rate_limit_exceeded", "no place")

    async def live():
        await talk.start()
        talk._fresh = fresh
        try:
            told = await asyncio.gather(*(talk.known_models() for _ in range(9)),
                                        return_exceptions=True)
            del talk._fresh
            return told, await talk.known_models()
        finally:
            await talk.stop()
    told, models = asyncio.run(live())
    assert [str(error) for error in told] == ["no place"] * 9 and len(tries) == 1 and models


def test_a_failure_to_ask_for_the_models_that_nobody_waits_for_any_more_is_no_noise(tmp_path):
    talk, noise = ccproxy.Conversations(ccproxy.Settings(
        claude="echo", state_dir=str(tmp_path), warm=0)), []

    async def fresh(*_):
        await asyncio.sleep(0.1)
        raise ApiError("rate_limit_exceeded", "no place")

    async def live():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
        await talk.start()
        talk._fresh = fresh
        try:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(talk.known_models(), 0.02)
            await asyncio.sleep(0.2)
            gc.collect()
        finally:
            await talk.stop()
    asyncio.run(live())
    assert noise == []


def test_any_process_tells_the_models_to_who_asks(tmp_path):
    with serving(tmp_path, max_processes=1, queue_timeout=0.3) as base:
        busy = http_connect(base, request("POST /v1/messages", body=question(
            "/slow " + "word " * 30, stream=True)))
        assert b" 200 " in busy.recv(9999)
        assert ask(base, "GET /v1/models").status == 200
        busy.close()


@pytest.mark.skipif(not ccproxy.POSIX, reason="a process group")
def test_a_command_that_hangs_ends_with_its_children_and_leaves_no_descriptor(tmp_path):
    async def live():
        with pytest.raises(asyncio.TimeoutError):
            await ccproxy.hear(["sh", "-c", f"sleep 987{os.getpid()} & wait"], 0.3)
        assert await ccproxy.hear(["sh", "-c", "echo 1; echo 2 >&2"], 5) == "1\n"
    asyncio.run(live())                     # whatever the first one needs once
    before = os.listdir("/dev/fd")
    asyncio.run(live())
    assert len(os.listdir("/dev/fd")) == len(before)
    assert until(lambda: f"987{os.getpid()}" not in subprocess.run(
        ["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("value", [None, False, 5])
def test_a_key_that_is_no_text_guards_nothing(value):
    with pytest.raises(ccproxy.ConfigError):
        ccproxy.App(ccproxy.Settings(host="0.0.0.0", api_key=value))


@pytest.mark.parametrize("path", ["/evil/v1/messages", "/sdk/x/messages", "/v1/x/v1/messages"])
def test_what_stands_before_a_route_is_not_read_over(url, path):
    assert http_post(url, "hi").status == 200
    assert ask(url, "POST " + path, body=question("hi")).status == 404


@pytest.mark.parametrize("schema", [{"type": "string"}, {"properties": 5}, {"required": None}])
def test_the_cli_lists_tools_without_their_schemas(schema):
    tools = [{"name": "f", "description": "d", "input_schema": schema}]
    answer = ccproxy.mcp_answer({"method": "tools/list", "id": 1}, tools)
    [listed] = answer["mcp_response"]["result"]["tools"]
    assert listed.pop("_meta") and listed == {"name": "f", "inputSchema": {"type": "object"}}


def test_answers_cut_off_by_a_stop_say_so(tmp_path):
    with serving(tmp_path, drain_timeout=0.3) as base:
        sock = http_connect(base, request("POST /v1/messages", body=question(
            "/slow " + "a " * 99, stream=True)))
        assert sock.recv(10)
    assert b"event: error" in read_all(sock)


# -- README

README = Path(ccproxy.__file__).with_name("README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", README, re.S)


def test_every_block_of_code_in_readme_is_run_by_a_test():
    assert len(EXAMPLES) == README.count("```") // 2 >= 3


def curled(url, code):
    """The answer to a line with curl; its text."""
    words = shlex.split(code.replace("\\\n", " "))
    assert words[0] == "curl" and set(words[2::2]) == {"-H", "-d"}
    fields = [value for flag, value in zip(words[2::2], words[3::2]) if flag == "-H"]
    path, body = words[1].partition("8082")[2], words[words.index("-d") + 1]
    (answer,) = answers(talk(url, request("POST " + path, *fields, body=body.encode())))
    said = json.loads(body)
    return answer, said.get("input") or said["messages"][0]["content"]


@pytest.mark.parametrize("code", [code for kind, code in EXAMPLES
                                  if kind == "sh" and "/sdk" not in code])
def test_the_curl_lines_of_readme_are_answered(url, code):
    answer, said = curled(url, code)
    assert answer.status == 200 and said == "Hello" and b"Hello" in answer.body


def test_the_example_of_agents_in_readme_works(tmp_path):
    for name in ("shop", "docs"):
        (tmp_path / "src" / name).mkdir(parents=True)
    [config] = [code for kind, code in EXAMPLES if kind == "json"]
    [code] = [code for kind, code in EXAMPLES if kind == "sh" and "/sdk" in code]
    (tmp_path / "ccproxy.json").write_text(config)
    key = re.search(r"CCPROXY_API_KEY=(\w+) python ccproxy.py\n", README).group(1)
    assert f"CCPROXY_API_KEY={key} python ccproxy.py approve\n" in README
    with command(tmp_path, CCPROXY_API_KEY=key) as proxy:
        answer, said = curled(proxy.url, code)
        assert (answer.status, answer.text) == (200, said)
        assert answer.headers["x-cc-workspace"] == "shop"
        answer = ask(proxy.url, "POST /v1/chat/completions", f"x-api-key: {key}",
                     body=question("/run ls", model="shop"))
        assert answer.headers["x-cc-workspace"] == "shop" and "[Bash: ls]" in answer.text
        if os.name == "posix":
            with terminal(tmp_path, proxy.url, key) as (read, write), ThreadPoolExecutor(1) as pool:
                read("listening at")
                asked = pool.submit(ask, proxy.url, "POST /v1/chat/completions",
                                    f"x-api-key: {key}", body=question("/run ls", model="shop"))
                assert "Bash in shop" in read("? ")
                write("y\n")
                assert "ran: ls" in asked.result(9).text


@pytest.mark.parametrize("code", [code for kind, code in EXAMPLES if kind == "python"])
def test_the_python_of_readme_prints_an_answer(tmp_path, code):
    told = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), timeout=60, env={
        **os.environ, "PYTHONPATH": os.path.dirname(ccproxy.__file__),
        "CCPROXY_STATE_DIR": str(tmp_path)}, stdout=subprocess.PIPE, check=True)
    assert told.stdout.strip() == b"Hello"


@pytest.mark.parametrize("code", [code for kind, code in EXAMPLES if kind == "toml"])
def test_the_codex_settings_of_readme_lead_to_the_responses_route(url, code):
    fields = dict(re.findall(r'^(\w+) = "(.*)"$', code, re.M))
    assert f"[model_providers.{fields['model_provider']}]" in code
    base, _, path = fields["base_url"].partition("8082")
    assert (base, fields["wire_api"]) == ("http://127.0.0.1:", "responses")
    assert post(url, f"{path}/responses", {"model": fields["model"], "input": "hi"})[0] == 200


def test_readme_names_no_option_route_or_default_that_is_not_there():
    flags = set(re.findall(r"--([a-z][a-z-]+)", README)) - {
        "openai-api-base", "openai-api-key", "help", "permission-prompt-tool", "any"}
    assert flags and flags <= {name.replace("_", "-") for name in ccproxy.OPTIONS}
    for path in re.findall(r"`(/[a-z]+)`", README):
        assert path in ccproxy.ROUTES or path[1:] in (*ccproxy.PREFIXES, "compact", "command")
    for name, default in re.findall(r"--([a-z-]+)`? \((\d+)(?: s| days)?\)", README):
        assert ccproxy.OPTIONS[name.replace("-", "_")][0] == float(default)


def test_readmes_command_for_the_reverse_proxy_serves(tmp_path):
    key, words = re.search(r"    ANTHROPIC_API_KEY=(\S+) python ccproxy.py (.+)\n", README).groups()
    with command(tmp_path, *words.split(), ANTHROPIC_API_KEY=key) as proxy:
        assert ask(proxy.url, "GET /readyz").json == {"status": "ready", "upstream": ccproxy.ANTHROPIC}
        assert ask(proxy.url, "GET /status").json["processes"]["all"] == 0


# == (g) the upstream API ==========================================================================

def every_split(data):
    """Byte by byte, and cut once at every place: all a socket can do to us."""
    yield [data[at:at + 1] for at in range(len(data))]
    yield from ([data[:cut], data[cut:]] for cut in range(len(data)))


CERTIFICATE, TLS_KEY = """-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjQwMTAxMDAwMDAwWhgPMjEyNDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABGszNDT92OGr1+23
dmcK/nzWnlhh4z1fkcymce7vTJWn0fEaTY6RlPv/Ar9aTULl1YVxIPF/YYK1tgxA
9RbF8WmjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBT9PlEAR56gssgEpbXIgJAoabdO8zAOBgNVHQ8BAf8E
BAMCAoQwCgYIKoZIzj0EAwIDRwAwRAIgE/BJ0cMQEZs3KDb4kM/hdwby67kUtA0U
JwdM2D/WPIUCIEGM7SmRFByPXF5G/AQQFrATrj40Xgj3oqgUaC/ObMMe
-----END CERTIFICATE-----
""", """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpWiLMkbGRSCO+6RQ
Vjoy+dRHusJa9o6aNty/KGe+pk2hRANCAARrMzQ0/djhq9ftt3ZnCv581p5YYeM9
X5HMpnHu70yVp9HxGk2OkZT7/wK/Wk1C5dWFcSDxf2GCtbYMQPUWxfFp
-----END PRIVATE KEY-----
"""     # of localhost and 127.0.0.1, made for these tests alone


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """(certificate, key): files."""
    folder = tmp_path_factory.mktemp("pem")
    for name, text in (("cert.pem", CERTIFICATE), ("key.pem", TLS_KEY)):
        (folder / name).write_text(text)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def whole_answer(body=b'{"ok": true}', *fields, status="200 OK", kind="application/json"):
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {kind}"] if kind else []),
             f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nrequest-id: req_up\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")
EVENTS_UP = [json.dumps(event) for event in (
    {"type": "message_start", "message": {
        "id": "msg_up", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
        "content": [], "stop_reason": None, "usage": {"input_tokens": 11, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
     "usage": {"output_tokens": 7}},
    {"type": "message_stop"})]
FRAMES_UP = [f"event: {json.loads(e)['type']}\ndata: {e}\n\n".encode() for e in EVENTS_UP]


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def read_head(file):
    """The lines of a request's head, without the blank one; b"" at the end."""
    lines = []
    while not lines or lines[-1] not in (b"\r\n", b""):
        lines.append(file.readline())
    return b"".join(lines[:-1])


class Odd:
    """An upstream that answers its requests one after the other by `answers`, the last again and
    again: bytes to send, or a function that is given the socket and returns False to end it."""

    def __init__(self, *answers, context=None):
        self.answers, self.heard, self.connections, self.ended = answers, [], 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._context, self._socks, self._over = context, [], False
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Its threads end first: one that waited for a socket by a number that has been closed, and
        given to somebody else's meanwhile, would answer in its place."""
        self._over = True
        with contextlib.suppress(OSError):      # that wakes the first one
            socket.create_connection(self._listener.getsockname()).close()
        self._threads[0].join(5)
        for sock in self._socks:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._socks):
            sock.close()

    def _accept(self):
        while True:
            sock = self._listener.accept()[0]
            self._socks.append(sock)
            if self._over:
                break
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
            self._threads[-1].start()

    def _serve(self, sock):
        with contextlib.suppress(OSError):
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True,
                                                 do_handshake_on_connect=False)
                self._socks.append(sock)
                sock.do_handshake()
            file, going = sock.makefile("rb"), True
            while going is not False:
                head = read_head(file)
                if not head:
                    break
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", b"\r\n" + head)
                self.heard.append((head, file.read(int(length.group(1))) if length else b""))
                answer = self.answers[min(len(self.heard), len(self.answers)) - 1]
                going = answer(sock) if callable(answer) else sock.sendall(answer)
            file.close()
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.ended += 1

    @property
    def lines(self):
        """Of the last request's head, lower-cased names:  {"": "POST /v1/messages ...", ...}."""
        first, *lines = self.heard[-1][0].decode("latin-1").strip().split("\r\n")
        return {"": first, **{n.lower(): v.strip() for n, _, v in (
            line.partition(":") for line in lines)}}


@contextlib.contextmanager
def relaying(tmp_path, upstream, **settings):
    """A proxy in front of an upstream (an Odd, a FakeAPI, a URL); the CLI is not there."""
    with ccproxy.running(**{
            "upstream_url": getattr(upstream, "url", upstream), "claude": str(tmp_path / "none"),
            "state_dir": str(tmp_path / "state"), "warm": 0, **settings}) as base:
        yield base


@pytest.fixture(autouse=True, scope="module")
def no_login():
    """No test may see the user's own credentials, or send anything to a real API."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if re.match("(?i)ANTHROPIC_|CLAUDE|.*_proxy$", n)]:
            if name not in ("CCPROXY_TEST_CLAUDE",):
                patch.delenv(name)
        yield


@pytest.fixture
def own_key(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-own")


TRANSLATED = pytest.mark.parametrize("dialect", ["chat", "responses"])
ASK_UP = b'{"model": "claude-sonnet-5",  "max_tokens": 9, "messages":[{"role":"user","content":"h\xc3\xa9"}]}'


def relay(base, start="POST /api/v1/messages", *fields, body=ASK_UP, **more):
    return ask(base, start, *fields, body=body, **more)


# -- byte for byte

def test_a_request_goes_upstream_as_it_came_but_for_hops_and_credentials(tmp_path, own_key):
    with Odd(whole_answer()) as up, relaying(tmp_path, up) as base:
        answer = relay(base, "POST /api/v1/messages?beta=true&x=%20y", "anthropic-version: 2023-06-01",
                       "anthropic-beta: a-1,b-2", "Connection: x-hop, TE", "X-Hop: 1", "TE: trailers",
                       "Keep-Alive: 5", "Proxy-Authorization: Basic x", "Cookie: session=1",
                       "X-Other: v\xe9rt", "User-Agent: me/1")
        assert answer.body == b'{"ok": true}' and up.heard[0][1] == ASK_UP
        assert up.lines[""] == "POST /v1/messages?beta=true&x=%20y HTTP/1.1"
        sent = {n: v for n, v in up.lines.items() if n}
        assert sent.pop("x-other").encode("latin-1").decode() == "v\xe9rt"
        assert sent == {
            "anthropic-version": "2023-06-01", "anthropic-beta": "a-1,b-2", "user-agent": "me/1",
            "content-type": "application/json", "content-length": str(len(ASK_UP)),
            "host": up.url[7:], "x-api-key": "sk-ant-own"}


@pytest.mark.parametrize("path, target", [
    ("/api/v1/files", "/v1/files"), ("/api/v1/files/a%20b%2Ec?x=1&x=2", "/v1/files/a%20b%2Ec?x=1&x=2"),
    ("/api/odd", "/odd"), ("/api/v1/models/", "/v1/models"), ("/api/models/claude-x", "/v1/models/claude-x"),
    ("/api/v1/v1/messages", "/v1/messages"), ("/api/messages/count_tokens/?beta=true",
                                              "/v1/messages/count_tokens?beta=true"),
    ("/api/health", "/health"), ("/api/v1/messages/batches/x/results", "/v1/messages/batches/x/results")])
def test_every_method_and_path_under_api_is_passed_on(tmp_path, own_key, path, target):
    with Odd(whole_answer(b"\x00\xff", kind="x/y", status="299 Odd")) as up, \
            relaying(tmp_path, up) as base:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            answer = ask(base, f"{method} {path}", body=None if method == "GET" else b"{}")
            assert (answer.status, answer.body) == (299, b"\x00\xff")
            assert answer.headers["content-type"] == "x/y"
            assert up.lines[""] == f"{method} {target} HTTP/1.1"


def test_an_answer_comes_back_as_it_is_with_its_end_to_end_headers(tmp_path, own_key):
    import gzip
    packed = gzip.compress(b'{"model": "m", "usage": {"output_tokens": 3}}')
    fields = ("Content-Encoding: gzip", "request-id: req_up", "X-Request-Id: theirs", "Retry-After: 3", "Set-Cookie: a=1",
              "Set-Cookie: b=2", "anthropic-ratelimit-requests-remaining: 7", "Connection: X-Hop",
              "X-Hop: 1", "Keep-Alive: timeout=5", "Date: Mon, 01 Jan 2024 00:00:00 GMT")
    with Odd(whole_answer(packed, *fields)) as up, relaying(tmp_path, up) as base:
        raw = talk(base, request("POST /api/v1/messages", body=ASK_UP))
        head, _, body = raw.partition(b"\r\n\r\n")
        assert body == packed
        lines = head.decode().split("\r\n")[1:]
        assert [line for line in lines if line.startswith("Set-Cookie")] == [
            "Set-Cookie: a=1", "Set-Cookie: b=2"]
        told = answers(raw)[0].headers
        assert told["request-id"] == "req_up" and told["retry-after"] == "3"
        assert told["x-request-id"].startswith("req_") and told["content-encoding"] == "gzip"
        assert told["x-cc-upstream-request-id"] == "theirs"
        assert told["anthropic-ratelimit-requests-remaining"] == "7"
        assert told["date"] == "Mon, 01 Jan 2024 00:00:00 GMT" and told["connection"] == "close"
        assert not {"x-hop", "keep-alive", "transfer-encoding"} & set(told)


@pytest.mark.parametrize("answer, status, length", [
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, None),
    (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", 304, None),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, "0"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, "0"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://other.invalid/\r\nContent-Length: 0\r\n\r\n", 302, "0")])
def test_answers_without_a_body_are_passed_on_and_redirects_not_followed(
        tmp_path, own_key, answer, status, length):
    with Odd(answer) as up, relaying(tmp_path, up) as base:
        sock = http_connect(base, request("GET /api/v1/files", close=False) + request("GET /health"))
        first, second = answers(read_all(sock))
        assert (first.status, first.body, first.headers.get("content-length")) == (status, b"", length)
        assert second.status == 200 and len(up.heard) == 1
        assert status != 302 or first.headers["location"] == "http://other.invalid/"


def test_head_is_passed_on_and_answered_without_a_body(tmp_path, own_key):
    with Odd(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n") as up, relaying(tmp_path, up) as base:
        raw = talk(base, request("HEAD /api/v1/files", close=False) + request("GET /health"))
        head, _, rest = raw.partition(b"\r\n\r\n")
        assert b"Content-Length: 999" in head and rest.startswith(b"HTTP/1.1 200 OK")
        assert up.lines[""].startswith("HEAD ")


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_a_body_that_ends_with_its_connection_comes_whole(tmp_path, own_key, close):
    with Odd(lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\n" + close + b"\r\n" + b"x" * 200_000)
             or False) as up, relaying(tmp_path, up) as base:
        assert ask(base, "GET /api/v1/files").body == b"x" * 200_000


def test_a_stream_is_passed_on_event_by_event_unbuffered(tmp_path, own_key):
    """The upstream says the next event only once the client has the one before."""
    seen = threading.Semaphore(0)

    def drip(sock):
        sock.sendall(STREAM_HEAD)
        for frame in FRAMES_UP:
            sock.sendall(chunk(frame))
            assert seen.acquire(timeout=5)
        sock.sendall(b"0\r\n\r\n")
    with Odd(drip) as up, relaying(tmp_path, up) as base:
        sock, data = http_connect(base, request("POST /api/v1/messages", body=ASK_UP)), b""
        while b"\r\n0\r\n\r\n" not in data:
            piece = sock.recv(65536)
            assert piece, data
            data += piece
            for _ in range(piece.count(b"\ndata: ")):
                seen.release()
        sock.close()
        answer = answers(data)[0]
        assert answer.body == b"".join(FRAMES_UP)
        assert answer.headers["request-id"] == "req_up" and up.connections == 1


def test_the_upstream_waits_for_a_client_that_takes_nothing(tmp_path, own_key):
    total, sent = 48 * 2**20, []

    def flood(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // 65536):
            sock.sendall(b"x" * 65536)
            sent.append(65536)
    with Odd(flood) as up, relaying(tmp_path, up) as base:
        sock = http_connect(base, request("GET /api/v1/files"), rcvbuf=65536)
        until(lambda: False, 1.0)
        assert 0 < sum(sent) < total * 0.75
        assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == total


def test_what_comes_while_the_loop_looks_is_not_lost():
    class Busy:
        """A lock; as soon as it is free, the thread puts its last piece and ends."""
        def __enter__(self):
            pass

        def __exit__(self, *_):
            if not exchange._over:
                exchange._pieces.append(b"last")
                exchange._over = exchange._told = True

    async def play():
        exchange._loop, exchange._told = asyncio.get_running_loop(), True
        return [await exchange.read() for _ in "ab"]
    exchange = ccproxy.Exchange.__new__(ccproxy.Exchange)
    exchange._lock, exchange._room, exchange._error = Busy(), threading.Event(), None
    exchange._pieces, exchange._held, exchange._over = [], 0, False
    assert asyncio.run(play()) == [b"last", b""]


def test_connections_are_kept_for_the_next_request(tmp_path, own_key):
    stream = STREAM_HEAD + b"".join(map(chunk, FRAMES_UP)) + b"0\r\n\r\n"
    with Odd(whole_answer(), stream) as up, relaying(tmp_path, up) as base:
        for _ in range(3):
            assert relay(base).status == 200
            assert relay(base, "POST /api/v1/chat/completions").status == 200
        assert (up.connections, len(up.heard)) == (1, 6)


def test_a_kept_connection_that_the_upstream_has_ended_is_not_used(tmp_path, own_key):
    with Odd(lambda sock: sock.sendall(whole_answer()) or False) as up, \
            relaying(tmp_path, up) as base:
        for n in range(3):
            assert relay(base).status == 200 and until(lambda: up.ended == n + 1)
        assert (up.connections, len(up.heard)) == (3, 3)


def test_a_request_that_a_kept_connection_has_taken_is_not_sent_again(tmp_path, own_key):
    with Odd(whole_answer(), lambda sock: False, whole_answer()) as up, \
            relaying(tmp_path, up) as base:
        assert relay(base).status == 200
        failed = relay(base)
        assert failed.status == 502 and failed.error["type"] == "api_error"
        assert (up.connections, len(up.heard)) == (1, 2)
        assert relay(base).status == 200


def test_a_kept_connection_that_takes_nothing_is_replaced_once(tmp_path, own_key, monkeypatch):
    with Odd(whole_answer()) as up, relaying(tmp_path, up) as base:
        assert relay(base).status == 200

        def take(links, before=ccproxy.Links._take):
            link = before(links)
            if link:
                link.sock.shutdown(socket.SHUT_WR)      # the next send fails
            return link
        monkeypatch.setattr(ccproxy.Links, "_take", take)
        assert relay(base).status == 200
        assert (up.connections, len(up.heard)) == (2, 2)


@pytest.mark.parametrize("interim", [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
                                     b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 199 Odd\r\n\r\n"])
def test_interim_answers_are_stepped_over(tmp_path, own_key, interim):
    def play(sock):
        sock.sendall(interim)
        time.sleep(0.1)
        sock.sendall(whole_answer(b'{"for": %d}' % len(up.heard)))
    with Odd(play) as up, relaying(tmp_path, up) as base:
        assert [relay(base).json["for"] for _ in range(3)] == [1, 2, 3]


SURPLUS = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n\"EVIL\""


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("start, answer", [
    ("HEAD /api/v1/files", whole_answer(b'"body of HEAD"')),
    ("GET /api/v1/files", b"HTTP/1.1 204 No\r\nContent-Length: 4\r\n\r\nbody"),
    ("GET /api/v1/files", b"HTTP/1.1 304 No\r\n\r\n" + SURPLUS),
    ("GET /api/v1/files", whole_answer(b"1234") + SURPLUS),
    ("GET /api/v1/files", whole_answer(b"1234") + b"x" * 9000 + SURPLUS),
    ("GET /api/v1/files", STREAM_HEAD + b"0\r\n\r\n" + SURPLUS)])
def test_nothing_behind_an_answer_reaches_the_next_caller(tmp_path, own_key, pem, start, answer, secure):
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pem)
    with Odd(answer, whole_answer(), context=context if secure else None) as up, relaying(
            tmp_path, up, upstream_ca=pem[0]) as base:
        ask_head = http_connect(base, request(start))
        read_all(ask_head)
        assert relay(base).body == b'{"ok": true}' and up.connections == 2


@pytest.mark.parametrize("head", [
    b"Content-Length: 5\r\nContent-Length: 6", b"Transfer-Encoding: gzip, chunked",
    b"X-Odd Name: 1\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: chunked"])
def test_an_answer_that_ends_who_knows_where_is_a_502(tmp_path, own_key, head):
    with Odd(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n") as up, \
            relaying(tmp_path, up) as base:
        for _ in "ab":
            assert relay(base).status == 502
        assert up.connections == 2


def test_an_early_refusal_of_a_large_body_reaches_the_caller(tmp_path, own_key):
    def serve():
        sock = listener.accept()[0]
        sock.recv(1000)                     # not all of it
        sock.sendall(whole_answer(b'{"type":"error","error":{"type":"request_too_large","message":"big"}}',
                                  "Connection: close", status="413 Large"))
        sock.shutdown(socket.SHUT_RDWR)
        time.sleep(0.5)
        sock.close()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    with listener, relaying(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}") as base:
        answer = relay(base, body=b"x" * 20_000_000)
        assert (answer.status, answer.error["message"]) == (413, "big")


@pytest.mark.parametrize("body", [b'{"type":"error","error":{"type":"api_error","message":"no"}}',
                                  b"<html>Bad gateway</html>"])
def test_a_compressed_error_is_passed_on_if_it_is_one(tmp_path, own_key, body):
    import gzip
    packed = gzip.compress(body)
    with Odd(whole_answer(packed, "Content-Encoding: gzip", status="500 Odd")) as up, \
            relaying(tmp_path, up) as base:
        answer = relay(base)
        assert answer.status == 500
        if body.startswith(b"{"):
            assert answer.body == packed and answer.headers["content-encoding"] == "gzip"
        else:
            assert "Bad gateway" in answer.error["message"]


@pytest.mark.parametrize("rest", [b"Content-Length: 500000\r\n\r\n", b"Transfer-Encoding: chunked\r\n"
                                  b"\r\n", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_an_answer_without_its_first_byte_is_a_502_or_breaks_off(tmp_path, own_key, rest):
    with Odd(lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\n" + rest) or False) as up, \
            relaying(tmp_path, up) as base:
        for _ in range(10):
            raw = talk(base, request("POST /api/v1/messages", body=ASK_UP))
            assert raw.startswith((b"HTTP/1.1 502", b"HTTP/1.1 200")), raw


@pytest.mark.parametrize("minor", [0, 1])
def test_a_broken_answer_ends_in_a_reset_that_no_client_takes_for_its_end(tmp_path, own_key, minor):
    with Odd(after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(b"x" * 4000))) as up, \
            relaying(tmp_path, up) as base:
        sock = http_connect(base, request(f"GET /api/v1/files HTTP/1.{minor}"))
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass
        sock.close()


def test_a_client_that_is_gone_before_its_request_is_read_is_noticed(tmp_path, own_key):
    with Odd(hang) as up, relaying(tmp_path, up) as base:
        for _ in range(5):
            http_connect(base, request("POST /api/v1/messages", body=ASK_UP)).close()
        time.sleep(0.2)
        assert until(lambda: get(base, "/status")[2]["upstream"]["streams"] == 0, 2.5)
        assert until(lambda: up.ended == up.connections, 1) and up.connections <= 5


ODD_EVENTS = [
    {"type": "message_start"}, {"type": "message_start", "message": "x"},
    {"type": "message_start", "message": {"usage": 5}}, {"type": "content_block_delta", "delta": 0},
    {"type": "content_block_start", "index": 0, "content_block": None},
    {"type": "content_block_start", "index": 0, "content_block": {"text": "x"}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "name": "f"}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}},
    {"type": "content_block_delta", "index": 0, "delta": {}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": ["text"]}},
    {"type": "message_delta", "delta": {"stop_reason": 7}, "usage": {}}, {"type": "error"},
    {"type": "content_block_delta", "index": 9, "delta": {"type": "text_delta", "text": "x"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": [1]}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta",
                                                          "partial_json": "{}"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": "x"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
     "usage": {"output_tokens_details": 5}}]


@pytest.mark.parametrize("event", ODD_EVENTS, ids=json.dumps)
@TRANSLATED
def test_odd_events_of_the_upstream_are_its_fault(tmp_path, own_key, dialect, event):
    frame = f"data: {json.dumps(event)}\n\n".encode()
    body = {"model": "claude-x", "input": "hi"} if dialect == "responses" else question("hi", model="claude-x")
    streams = [STREAM_HEAD + b"".join(map(chunk, [*FRAMES_UP[:before], frame, *FRAMES_UP[-rest:]]))
               + b"0\r\n\r\n" for before, rest in ((0, 1), (2, 1), (3, 1), (3, 3)) for _ in "ab"]
    with Odd(*streams) as up, relaying(tmp_path, up) as base:
        for at in range(len(streams)):
            answer = relay(base, f"POST {UP_PATHS[dialect]}", body={**body, "stream": bool(at % 2)})
            told = answer.body.decode()
            assert answer.status in (200, 502, 500) and "a bug in ccproxy" not in told
            assert answer.status != 500 or event["type"] == "error"
        assert len(up.heard) == len(streams)


def test_odd_usage_in_a_relayed_answer_troubles_nobody(tmp_path, own_key):
    with Odd(whole_answer(b'{"model": "m", "usage": {"input_tokens": "x", "output_tokens": [1]}}')) as up, \
            relaying(tmp_path, up, quiet=False) as base:
        raw = talk(base, request("POST /api/v1/messages", body=ASK_UP, close=False) + request("GET /health"))
        assert [answer.status for answer in answers(raw)] == [200, 200]


def test_a_page_of_another_site_gets_nothing_even_without_an_origin(tmp_path, own_key):
    with Odd(whole_answer()) as up, relaying(tmp_path, up) as base:
        for start in ("GET /api/v1/models", "GET /v1/models", "GET /status"):
            assert ask(base, start, "Sec-Fetch-Site: cross-site").status == 403
        assert ask(base, "GET /health", "Sec-Fetch-Site: cross-site").status == 200
        assert ask(base, "GET /api/v1/models", "Sec-Fetch-Site: none").status == 200
        assert len(up.heard) == 1


@contextlib.contextmanager
def silent_address():
    """A listener whose queue is full lets nobody in, and says nothing."""
    with contextlib.ExitStack() as socks:
        full = socks.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = socks.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()


def test_connecting_ends_with_its_client_and_after_connect_timeout(tmp_path, own_key):
    with silent_address() as (host, port):
        url = f"http://{host}:{port}"
        with relaying(tmp_path, url, connect_timeout=1) as base:
            answer = relay(base)
            assert answer.status == 504 and "connect" in answer.error["message"]
        with relaying(tmp_path, url, connect_timeout=30) as base:
            http_connect(base, request("POST /api/v1/messages", body=ASK_UP)).close()
            until(lambda: False, 0.2)
            assert until(lambda: get(base, "/status")[2]["upstream"]["streams"] == 0, 2.0)


def test_a_silent_address_leaves_time_for_the_next(tmp_path, own_key, monkeypatch):
    """As where the way to all IPv6 addresses is broken."""
    with silent_address() as silent, Odd(whole_answer()) as up:
        port, look_up = int(up.url.rpartition(":")[2]), socket.getaddrinfo

        def both(host, wanted, *more):
            found = look_up(host, wanted, *more)
            return [(*found[0][:4], silent), *found] if wanted == port else found
        with monkeypatch.context() as patch, relaying(tmp_path, up, connect_timeout=1) as base:
            patch.setattr(socket, "getaddrinfo", both)
            assert relay(base).status == 200


def test_a_failed_listing_of_models_is_no_empty_list(tmp_path, own_key):
    odd = whole_answer(b'{"type":"error","error":{"type":"not_found_error","message":"nothing"}}',
                       status="404 Not Found")
    with Odd(odd) as up, relaying(tmp_path, up, backend="api") as base:
        for _ in "ab":
            assert ask(base, "GET /v1/models").status == 404
        assert len(up.heard) == 1           # believed for a while
    bad = whole_answer(b'{"type":"error","error":{"type":"authentication_error","message":"no"}}',
                       status="401 No")
    with Odd(bad, whole_answer(b'{"data": [{"id": "claude-x"}]}')) as up, relaying(
            tmp_path, up, backend="api") as base:
        assert ask(base, "GET /v1/models", "x-api-key: sk-ant-bad").status == 401
        assert ask(base, "GET /v1/models").json["data"][0]["id"] == "claude-x"


def test_requests_that_come_while_the_models_are_listed_wait_for_the_list(api, tmp_path, own_key):
    api.clear()
    with relaying(tmp_path, api) as base:
        together(*[lambda: up_ask(UpstreamBench(base, api), "chat", "hi", model="sonnet")] * 6)
        assert {body["model"] for body in api.bodies} == {"claude-sonnet-5"}
        assert sum(path.startswith("/v1/models") for _, path, _ in api.heads) == 1


def test_beyond_max_streams_callers_are_told_to_come_back(tmp_path, own_key):
    going = threading.Event()

    def wait(sock):
        going.wait(10)
        sock.sendall(whole_answer())
    with Odd(wait) as up, relaying(tmp_path, up, max_streams=2) as base:
        socks = [http_connect(base, request("POST /api/v1/messages", body=ASK_UP)) for _ in "ab"]
        assert until(lambda: len(up.heard) == 2)
        for path in ("/api/v1/messages", "/api/v1/chat/completions"):
            full = relay(base, f"POST {path}")
            assert full.status == 429 and full.headers["retry-after"]
            assert full.error["type"] == "rate_limit_error"
        going.set()
        assert [answers(read_all(sock))[0].status for sock in socks] == [200, 200]
        assert relay(base).status == 200


# -- credentials

FILE_LOGIN = {"claudeAiOauth": {"accessToken": "sk-ant-oat01-file", "refreshToken": "sk-ant-ort01-r",
                                "expiresAt": 4e12, "scopes": ["user:inference"]}}
BEARER = "authorization"


@pytest.mark.parametrize("sent, settings, environ, login, expected", [
    ({"x-api-key": "sk-ant-his"}, {}, {"ANTHROPIC_API_KEY": "sk-ant-own"}, False,
     {"x-api-key": "sk-ant-his"}),
    ({BEARER: "Bearer sk-ant-his"}, {}, {"ANTHROPIC_API_KEY": "sk-ant-own"}, False,
     {"x-api-key": "sk-ant-his"}),
    ({BEARER: "Bearer sk-ant-oat01-his"}, {}, {"ANTHROPIC_API_KEY": "sk-ant-own"}, False,
     {BEARER: "Bearer sk-ant-oat01-his", "anthropic-beta": ccproxy.OAUTH_BETA}),
    ({"x-api-key": "any"}, {}, {"ANTHROPIC_API_KEY": "sk-ant-own"}, True,
     {"x-api-key": "sk-ant-own"}),
    ({BEARER: "Bearer any"}, {}, {"ANTHROPIC_API_KEY": " sk-ant-own "}, False,
     {"x-api-key": "sk-ant-own"}),
    ({"x-api-key": "proxy", BEARER: "Bearer sk-ant-his"}, {"api_key": "proxy"},
     {"ANTHROPIC_API_KEY": "sk-ant-own"}, False, {"x-api-key": "sk-ant-own"}),
    ({"x-api-key": "proxy"}, {"api_key": "proxy"}, {}, True, {}),
    ({}, {}, {"ANTHROPIC_AUTH_TOKEN": "tok"}, False, {BEARER: "Bearer tok"}),
    ({}, {}, {"ANTHROPIC_API_KEY": "sk-ant-own", "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-env"}, True,
     {"x-api-key": "sk-ant-own"}),
    ({}, {}, {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-env"}, True, {}),
    ({}, {"oauth": True}, {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-env"}, True,
     {BEARER: "Bearer sk-ant-oat01-env", "anthropic-beta": ccproxy.OAUTH_BETA}),
    ({"anthropic-beta": "a-1"}, {"oauth": True}, {}, True,
     {BEARER: "Bearer sk-ant-oat01-file", "anthropic-beta": "a-1," + ccproxy.OAUTH_BETA}),
    ({"anthropic-beta": ccproxy.OAUTH_BETA}, {"oauth": True}, {}, True,
     {BEARER: "Bearer sk-ant-oat01-file", "anthropic-beta": ccproxy.OAUTH_BETA}),
    ({"x-api-key": "any"}, {}, {}, False, {"x-api-key": "any"}),
    ({"x-api-key": "any"}, {"upstream_url": ccproxy.ANTHROPIC}, {}, False, {}),
    ({BEARER: "Bearer sk-proj-other"}, {"upstream_url": ccproxy.ANTHROPIC}, {}, False, {}),
    ({}, {}, {"ANTHROPIC_API_KEY": "a\nb"}, False, {}),
])
def test_the_first_credential_that_is_there_is_sent(tmp_path, monkeypatch, sent, settings, environ,
                                                    login, expected):
    for name, value in {**environ, "CLAUDE_CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    if login:
        (tmp_path / ".credentials.json").write_text(json.dumps(FILE_LOGIN))
    wish = ccproxy.Settings(**{"upstream_url": "http://gateway", **settings})
    found = ccproxy.Credentials(wish, wish.upstream_url).find(sent)
    assert ccproxy.upstream_headers(sent, found) == expected


def test_the_clis_login_is_read_again_when_it_changed_and_never_written(tmp_path, monkeypatch):
    path = tmp_path / ".credentials.json"
    path.write_text(json.dumps(FILE_LOGIN))
    os.chmod(path, 0o400)
    before = path.stat()
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    credentials = ccproxy.Credentials(ccproxy.Settings(oauth=True), ccproxy.ANTHROPIC)
    assert [credentials.find({}).headers[BEARER] for _ in "ab"] == ["Bearer sk-ant-oat01-file"] * 2
    after = path.stat()
    assert (before.st_mtime_ns, before.st_mode, before.st_ino) == (
        after.st_mtime_ns, after.st_mode, after.st_ino)
    renewed = tmp_path / "renewed"
    renewed.write_text(json.dumps(FILE_LOGIN).replace("01-file", "01-next"))
    renewed.replace(path)
    assert credentials.find({}).headers[BEARER] == "Bearer sk-ant-oat01-next"
    for odd in ("", "{", "[]", '{"claudeAiOauth": 1}', '{"claudeAiOauth": {"accessToken": "a\\nb"}}'):
        path.unlink()
        path.write_text(odd)
        assert credentials.find({}) is None
    path.unlink()
    assert credentials.find({}) is None


@pytest.mark.parametrize("path, dialect", [
    ("/api/v1/messages", "messages"), ("/api/v1/chat/completions", "chat")])
def test_an_expired_login_is_a_401_that_names_the_command_to_run(tmp_path, monkeypatch, path, dialect):
    expired = {"claudeAiOauth": {"accessToken": "sk-ant-oat01-x", "expiresAt": 1e12}}
    (tmp_path / ".credentials.json").write_text(json.dumps(expired))
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    with Odd(whole_answer()) as up, relaying(tmp_path, up, oauth=True) as base:
        answer = relay(base, f"POST {path}")
        assert answer.status == 401 and answer.error["type"] == "authentication_error"
        assert "2001-09-09" in answer.error["message"]
        assert "claude auth login" in answer.error["message"]
        assert "claude setup-token" in answer.error["message"]
        assert not up.heard and "sk-ant-oat" not in answer.body.decode()


@pytest.mark.parametrize("field", ["x-api-key: proxy-secret", "Authorization: Bearer proxy-secret"])
@pytest.mark.parametrize("path", ["/api/v1/messages", "/api/v1/chat/completions", "/api/v1/odd"])
@pytest.mark.parametrize("key", ["", "sk-ant-own"])
def test_the_callers_proxy_key_never_goes_upstream(tmp_path, monkeypatch, field, path, key):
    monkeypatch.setenv("ANTHROPIC_API_KEY", key)
    stream = STREAM_HEAD + b"".join(map(chunk, FRAMES_UP)) + b"0\r\n\r\n"
    with Odd(stream) as up, relaying(tmp_path, up, api_key="proxy-secret") as base:
        assert relay(base, f"POST {path}").status == 401 and not up.heard
        assert relay(base, f"POST {path}", field).status == 200
        assert b"proxy-secret" not in b"".join(up.heard[0])
        assert (b"sk-ant-own" in up.heard[0][0]) == bool(key)


def test_without_any_credential_the_vendors_api_is_not_bothered(tmp_path):
    with relaying(tmp_path, ccproxy.ANTHROPIC) as base:
        for path in ("/api/v1/messages", "/api/v1/chat/completions", "/api/v1/models"):
            answer = relay(base, f"POST {path}", "Authorization: Bearer sk-proj-of-somebody-else")
            assert answer.status == 401 and "ANTHROPIC_API_KEY" in answer.error["message"]


def test_oauth_says_at_start_what_it_does_and_what_the_terms_may_say(tmp_path):
    with command(tmp_path, "--oauth") as proxy:
        told = [line for line in proxy.log if "--oauth" in line]
        assert len(told) == 1 and "terms" in told[0]
    with command(tmp_path / "..", "--quiet") as proxy:
        assert not any("oauth" in line for line in proxy.log)


@pytest.mark.parametrize("environ, flags, code, words", [
    ({}, [], 0, ["ok    chat  claude stand-in", "none  api   https://api.anthropic.com: none of its own"]),
    ({}, ["--backend", "api"], 1, ["none  api"]),
    ({"ANTHROPIC_API_KEY": "sk-ant-secret"}, ["--backend", "api"], 0,
     ["ok    api   https://api.anthropic.com: API key from ANTHROPIC_API_KEY"]),
    ({"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-secret"}, ["--oauth"], 0,
     ["ok    api   https://api.anthropic.com: login from CLAUDE_CODE_OAUTH_TOKEN"]),
    ({"ANTHROPIC_BASE_URL": "http://gateway/v1"}, [], 0, ["http://gateway: none"]),
    ({"LOGIN": "4000000000000"}, ["--oauth"], 0, [".credentials.json, until 2096-10-02 07:06 UTC"]),
    ({"LOGIN": "4000000000000"}, [], 0, ["none of its own", "see --oauth"]),
    ({"LOGIN": str(10**30)}, ["--oauth"], 0, [".credentials.json\n"]),     # no time to speak of
    ({"LOGIN": "1000000000000"}, ["--oauth", "--backend", "api"], 1, ["expired at 2001-09-09"]),
])
def test_auth_status_shows_kind_source_and_expiry_and_never_a_value(tmp_path, environ, flags, code,
                                                                    words):
    if "LOGIN" in environ:
        (tmp_path / ".claude").mkdir()
        (tmp_path / ".claude" / ".credentials.json").write_text(json.dumps({"claudeAiOauth": {
            "accessToken": "sk-ant-secret", "expiresAt": int(environ.pop("LOGIN"))}}))
    told = run(tmp_path, "auth", "status", "--claude", "echo", *flags, **environ)
    assert told.returncode == code and all(word in told.stdout for word in words), told.stdout
    assert "secret" not in told.stdout + told.stderr


def test_auth_status_shows_the_login_that_the_cli_tells_of(tmp_path):
    fake = cli(tmp_path, """
        if sys.argv[1:] == ["auth", "status"]:
            print(json.dumps(dict(loggedIn=True, authMethod="claude.ai", email="a@b.c", token="t0ken")))
            sys.exit()
    """)
    told = run(tmp_path, "auth", "--claude", fake.path)
    assert "ok    chat  claude 2.1.330: authMethod claude.ai, email a@b.c" in told.stdout
    assert "t0ken" not in told.stdout and told.returncode == 0


@pytest.mark.parametrize("what, words", [("login", "auth login"), ("setup-token", "setup-token")])
def test_auth_login_and_setup_token_hand_over_to_the_cli(tmp_path, what, words):
    fake = cli(tmp_path, """
        if "--version" not in sys.argv:
            print("argv:", *sys.argv[1:], "CLAUDECODE" in os.environ)
            sys.exit(7)
    """)
    told = run(tmp_path, "auth", what, "--claude", fake.path, CLAUDECODE="1")
    assert told.returncode == 7 and f"argv: {words} False" in told.stdout


@pytest.mark.parametrize("value", ["localhost:9", "http://127.0.0.1:99999", "ftp://x", "http://a b"])
def test_an_odd_base_url_in_the_environment_is_named_at_start(tmp_path, value):
    for argv in ([], ["auth"], ["doctor"])[:3 if value == "ftp://x" else 1]:
        told = run(tmp_path, *argv, "--claude", "echo", "--port", "0", ANTHROPIC_BASE_URL=value)
        assert told.returncode == 2 and "ANTHROPIC_BASE_URL" in told.stderr
        assert "Traceback" not in told.stderr


@pytest.mark.parametrize("argv", [["doctor", "login"], ["auth", "logout"], ["--backend", "agents"],
                                  ["--upstream-url", "ftp://x"], ["--upstream-url", "http://a@b"],
                                  ["--upstream-ca", "/nowhere", "--upstream-url", "https://x"],
                                  ["--max-streams", "0"]])
def test_odd_words_about_the_upstream_are_refused_at_start(tmp_path, argv):
    told = run(tmp_path, *argv, "--claude", "echo", "--port", "0")
    assert told.returncode == 2 and argv[-1].lstrip("-") and "Traceback" not in told.stderr
    assert re.search("choose|upstream|backend|belongs|number", told.stderr)


def test_a_proxy_whose_upstream_is_itself_does_not_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = run(tmp_path, "--claude", "echo", "--port", str(port),
               ANTHROPIC_BASE_URL=f"http://localhost:{port}/")
    assert told.returncode == 2 and "ANTHROPIC_BASE_URL" in told.stderr


# -- faults

def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    return False


def hang(sock):
    sock.recv(1)
    return False


def after(*pieces, then=lambda sock: False):
    """An answer: these bytes, then the fault."""
    def play(sock):
        sock.sendall(b"".join(pieces))
        time.sleep(0.1)
        return then(sock)
    return play


FAULTS_UP = {   # what the upstream does -> (status, words); before anything was said
    "reset": (reset, 502, ""), "ended": (lambda sock: False, 502, "without an answer"),
    "garbage": (lambda sock: sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n") or False, 502, "no HTTP"),
    "half a head": (lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-") or False, 502, ""),
    "hang": (hang, 504, ""),
    "odd status": (lambda sock: sock.sendall(b"HTTP/1.1 99999 Odd\r\n\r\n") or False, 502, "HTTP"),
    "a gateway's page": (whole_answer(b"<html><h1>Bad gateway</h1>", status="502 Bad Gateway",
                                      kind="text/html"), 502, "Bad gateway"),
    "a page with 429": (whole_answer(b"slow down", "Retry-After: 9", status="429 Many", kind=""), 429,
                        "slow down"),
    "503 without a body": (whole_answer(b"", status="503 Busy", kind=""), 503, "503")}
UP_PATHS = {"messages": "/api/v1/messages", "chat": "/api/v1/chat/completions",
            "responses": "/api/v1/responses"}


@pytest.mark.parametrize("fault", FAULTS_UP)
@ALL
def test_a_fault_before_the_answer_is_an_error_in_the_dialect(tmp_path, own_key, dialect, fault):
    play, status, words = FAULTS_UP[fault]
    body = json.loads(ASK_UP)
    body = {"model": "claude-sonnet-5", "input": "hi"} if dialect == "responses" else body
    with Odd(play) as up, relaying(tmp_path, up, stall_timeout=0.5, request_timeout=1.0) as base:
        answer = relay(base, f"POST {UP_PATHS[dialect]}", body=body)
        assert answer.status == status and words in answer.error["message"], answer.body
        assert len(up.heard) == 1 and answer.headers["content-type"] == "application/json"
        assert (answer.json.get("type") == "error") == (dialect == "messages")
        assert answer.headers.get("retry-after") == ("9" if status == 429 else None)
        assert up.connections == 1


@pytest.mark.parametrize("url, words", [
    ("http://127.0.0.1:1", "refuses connections"), ("http://no-such-host.invalid", "resolved"),
    ("https://no-such-host.invalid", "resolved")])
@ALL
def test_an_upstream_that_cannot_be_reached_is_a_502(tmp_path, own_key, dialect, url, words):
    body = {"model": "claude-sonnet-5", "input": "hi"} if dialect == "responses" else ASK_UP
    with relaying(tmp_path, url) as base:
        answer = relay(base, f"POST {UP_PATHS[dialect]}", body=body)
        assert answer.status == 502 and words in answer.error["message"]


@pytest.mark.parametrize("settings, words", [
    ({}, "certificate is not trusted"), ({"upstream_ca": True}, "")], ids=["unknown", "upstream_ca"])
def test_tls_upstream_needs_a_certificate_that_is_trusted(tmp_path, own_key, pem, settings, words):
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pem)
    with Odd(whole_answer(), context=context) as up, relaying(
            tmp_path, up, **({"upstream_ca": pem[0]} if settings else {})) as base:
        for _ in range(3):
            answer = relay(base)
            assert answer.status == (502 if words else 200), answer.body
            assert not words or words in answer.error["message"]
        assert up.connections == (3 if words else 1)


def test_tls_to_an_upstream_that_speaks_none_is_a_502(tmp_path, own_key):
    with Odd(whole_answer()) as up, relaying(
            tmp_path, up.url.replace("http:", "https:"), connect_timeout=0.5) as base:
        sock = http_connect(up.url)         # it answers a hello with nothing that is TLS
        sock.close()
        answer = relay(base)
        assert answer.status in (502, 504) and answer.error["message"].startswith("upstream 127")


BROKEN_UP = {      # how a stream that has begun goes wrong -> (what the upstream does, status, words)
    "reset": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), then=reset), "api_error"),
    "ended": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3])), "api_error"),
    "inside a chunk": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), b"500\r\nevent: "), "api_error"),
    "inside a frame": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), chunk(FRAMES_UP[3][:40])),
                       "api_error"),
    "odd chunk": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), b"zz\r\n"), "api_error"),
    "hang": (after(STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), then=hang), "timeout_error"),
}


@pytest.mark.parametrize("fault", BROKEN_UP)
@ALL
def test_a_fault_inside_a_stream_is_the_dialects_error_in_it(tmp_path, own_key, dialect, fault):
    play, kind = BROKEN_UP[fault]
    body = {**json.loads(ASK_UP), "stream": True}
    if dialect == "responses":
        body = {"model": "claude-sonnet-5", "input": "hi", "stream": True}
    with Odd(play) as up, relaying(tmp_path, up, stall_timeout=0.4) as base:
        answer = relay(base, f"POST {UP_PATHS[dialect]}", body=body)
        assert answer.status == 200
        told = [data for data in re.findall(r"data: (.*)", answer.body.decode())]
        if fault == "inside a frame" and dialect == "messages":     # its bytes had been passed on
            del told[3]
        assert "Hel" in answer.body.decode() and "message_stop" not in answer.body.decode()
        last = json.loads(told[-2 if dialect == "chat" else -1])
        assert told[-1] == "[DONE]" or dialect != "chat"
        if dialect == "responses":
            assert last["type"] == "response.failed" and last["response"]["error"]["message"]
        else:
            expected = kind if dialect == "messages" else "server_error"
            assert last["error"]["type"] == expected and "upstream" in last["error"]["message"]
        assert len(up.heard) == 1


@pytest.mark.parametrize("head", [b"Content-Length: 500000\r\n", b"Content-Length: 5000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_whole_answer_that_breaks_off_is_never_taken_for_whole(tmp_path, own_key, head):
    with Odd(after(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n1000\r\n" + b"x" * 4000)) as up, \
            relaying(tmp_path, up) as base:
        raw = read_all(http_connect(base, request("GET /api/v1/files")))
        assert not raw.endswith(b"0\r\n\r\n") and len(raw) < 5000
        assert raw.startswith(b"HTTP/1.1 502") or head != b"Content-Length: 5000\r\n"
        assert ask(base, "GET /health").status == 200


def test_a_client_that_goes_ends_the_upstream_connection_within_2_s(tmp_path, own_key):
    def gone_in(path, play):
        with Odd(play) as up, relaying(tmp_path, up) as base:
            sock = http_connect(base, request(f"POST {path}", body=ASK_UP))
            assert until(lambda: up.heard)
            time.sleep(0.3)
            sock.close()
            return until(lambda: up.ended == 1, 2.0)
    plays = [hang, after(STREAM_HEAD, then=hang), after(
        STREAM_HEAD, *map(chunk, FRAMES_UP[:3]), then=hang)]
    body = after(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\nx", then=hang)
    jobs = [(path, play) for play in plays for path in (
        "/api/v1/messages", "/api/v1/chat/completions")] + [("/api/v1/files", body)]
    assert together(*[lambda job=job: gone_in(*job) for job in jobs]) == [True] * len(jobs)


# -- safety

@pytest.mark.parametrize("path", [
    "/api/v1/../../secret", "/api/../v1/messages", "/api/v1/%2e%2e/x", "/api/v1/%252e%252e/x",
    "/api//evil.example/x", "/api/v1//x", "/api/v1/%2F%2Fevil", "/api/v1/a%5Cb", "/api/v1/a\\b",
    "/api/v1/..", "/api/v1/.", "/api/v1/a%00b", "/api/v1/a%0d%0aX-Y:%20z", "/api/v1/models/..",
    "/%61pi/v1/odd"])
def test_a_path_that_could_mean_another_one_is_refused(tmp_path, own_key, path):
    with Odd(whole_answer()) as up, relaying(tmp_path, up.url + "/base") as base:
        assert ask(base, f"GET {path}").status in (400, 404) and not up.heard
        assert ask(base, "GET /api/v1/odd").status == 200
        assert up.lines[""] == "GET /base/v1/odd HTTP/1.1"


@pytest.mark.parametrize("start, field, status", [
    ("GET http://evil.example/api/v1/odd", "X-A: b", 403),
    ("GET /api/v1/odd", "Host: evil.example", 403),
    ("GET /api/v1/odd", "Origin: http://evil.example", 403),
    ("CONNECT evil.example:443", "X-A: b", 400), ("TRACE /api/v1/odd", "X-A: b", 405)])
def test_no_other_host_is_reached_and_no_web_page_gets_in(tmp_path, own_key, start, field, status):
    with Odd(whole_answer()) as up, relaying(tmp_path, up) as base:
        assert ask(base, start, field).status == status and not up.heard


def test_the_body_goes_upstream_with_one_length_of_our_own(tmp_path, own_key):
    chunked = b"5\r\n{\"a\":\r\n2;x=y\r\n1}\r\n0\r\nX-Trailer: 1\r\n\r\n"
    with Odd(whole_answer()) as up, relaying(tmp_path, up) as base:
        raw = request("POST /api/v1/odd", "Transfer-Encoding: chunked", "Content-Type: application/json",
                      close=True) + chunked
        assert answers(talk(base, raw))[0].status == 200
        assert up.heard[0][1] == b'{"a":1}' and up.lines["content-length"] == "7"
        assert "transfer-encoding" not in up.lines and "x-trailer" not in up.lines
        both = request("POST /api/v1/odd", "Transfer-Encoding: chunked", body=b"{}")
        assert answers(talk(base, both))[0].status == 400 and len(up.heard) == 1


def test_a_messages_request_has_to_be_json_and_within_max_body(tmp_path, own_key):
    with Odd(whole_answer()) as up, relaying(tmp_path, up, max_body=1000) as base:
        assert relay(base, "POST /api/v1/messages", "Content-Type: text/plain").status == 415
        assert relay(base, body=b"x" * 1001).status == 413
        assert relay(base, "POST /api/v1/odd", body=b"x" * 1001).status == 413
        assert not up.heard
        assert relay(base, "POST /api/v1/files", "Content-Type: multipart/form-data; boundary=x",
                     body=b"--x--").status == 200


def test_proxies_of_the_environment_are_used_but_for_no_proxy(tmp_path, own_key, monkeypatch):
    with Odd(whole_answer()) as way, Odd(whole_answer(b'"direct"')) as up:
        monkeypatch.setenv("http_proxy", way.url.replace("//", "//user:pass@"))
        with relaying(tmp_path, "http://api.example:81/base") as base:
            assert relay(base).status == 200
            assert way.lines[""] == "POST http://api.example:81/base/v1/messages HTTP/1.1"
            assert way.lines["host"] == "api.example:81" and way.heard[0][1] == ASK_UP
            assert base64.b64decode(way.lines["proxy-authorization"].split()[1]) == b"user:pass"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with relaying(tmp_path, up) as base:
            assert relay(base).body == b'"direct"' and len(way.heard) == 1


def test_https_goes_through_a_proxy_by_connect(tmp_path, own_key, monkeypatch, pem):
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pem)

    def tunnel(sock):
        sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with context.wrap_socket(sock, server_side=True) as inner:
            file = inner.makefile("rb")
            for _ in "ab":
                head = read_head(file)
                seen.append((head.splitlines()[0], file.read(len(ASK_UP))))
                assert b"proxy-auth" not in head.lower()
                inner.sendall(whole_answer())
        return False
    seen = []
    with Odd(tunnel) as way:
        monkeypatch.setenv("https_proxy", way.url.replace("//", "//user:pass@"))
        with relaying(tmp_path, "https://localhost:4433", upstream_ca=pem[0]) as base:
            assert [relay(base).status for _ in "ab"] == [200, 200]
            assert way.lines[""].startswith("CONNECT localhost:4433 ") and len(way.heard) == 1
            assert b"sk-ant" not in way.heard[0][0]
            assert base64.b64decode(way.lines["proxy-authorization"].split()[1]) == b"user:pass"
            assert seen == [(b"POST /v1/messages HTTP/1.1", ASK_UP)] * 2


# -- Chat and Responses over Messages

@pytest.fixture(scope="module")
def api():
    fake = FakeAPI()
    yield fake
    fake.close()


@pytest.fixture
def up(api, tmp_path, own_key):
    """A proxy in front of the fake API; .api is that, with nothing heard yet."""
    api.clear()
    with relaying(tmp_path, api) as base:
        yield UpstreamBench(base, api)


class UpstreamBench(NamedTuple):
    url: str
    api: FakeAPI


def up_ask(up, dialect, said, stream=False, **more):
    """(status, headers, final object) of a request to /api in Chat or Responses."""
    body = {"model": "claude-sonnet-5", "stream": stream, **more}
    body["messages" if dialect == "chat" else "input"] = said if isinstance(said, list) else [
        {"role": "user", "content": said}]
    return ask(up.url, "POST " + UP_PATHS[dialect], body=body)


@TRANSLATED
@whole_and_streamed
def test_another_dialect_is_served_over_messages(up, dialect, stream):
    limit = {"max_tokens" if dialect == "chat" else "max_output_tokens": 77}
    answer = up_ask(up, dialect, "hi there", stream, temperature=0.3, top_p=None, **limit)
    assert answer.status == 200
    text = answer.body.decode()
    assert "You said: hi there" in (answer.text if not stream else "".join(
        re.findall(r'"(?:content|delta)":"([^"]*)"', text)))
    body = up.api.bodies[0]
    assert body["temperature"] == 0.3 and body["max_tokens"] == 77 and body["stream"] is True
    assert heard(body) == [("user", [{"type": "text", "text": "hi there"}])] and "system" not in body
    method, path, headers = up.api.heads[0]
    assert (method, path) == ("POST", "/v1/messages")
    assert headers["x-api-key"] == "sk-ant-own" and headers["anthropic-version"] == "2023-06-01"
    assert headers["user-agent"] == f"ccproxy/{ccproxy.__version__}"
    assert answer.headers["x-cc-model"] == "claude-sonnet-5"
    assert answer.headers["x-cc-upstream-request-id"] == "req_fake"


def test_nothing_of_claude_code_is_imitated_upstream(up):
    up_ask(up, "chat", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}])
    said = json.dumps([up.api.bodies, up.api.heads]).lower()
    assert up.api.bodies[0]["system"] == [{"type": "text", "text": "Be brief."}]
    assert "claude code" not in said and "claude-cli" not in said and "billing" not in said


def test_a_tool_round_trip_reaches_the_api_as_real_blocks(up):
    tools = [tool("look up", description="x")]
    first = up_ask(up, "chat", 'CALL:look_up_0 ARGS:{"q": 1}', tools=tools, tool_choice="required")
    sent = up.api.bodies[0]
    assert sent["tool_choice"] == {"type": "any"} and len(sent["tools"]) == 1
    assert re.fullmatch(r"look_up_[0-9a-f]{8}", sent["tools"][0]["name"])
    call = first.json["choices"][0]["message"]["tool_calls"][0]
    second = up_ask(up, "chat", [
        {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
            {**call, "function": {"name": "look up", "arguments": '{"q": 1}'}}]},
        {"role": "tool", "tool_call_id": call["id"], "content": "found"}], tools=tools)
    assert second.text == "You said: found"
    roles = heard(up.api.bodies[1])
    assert [role for role, _ in roles] == ["user", "assistant", "user"]
    assert roles[1][1][0]["name"] == sent["tools"][0]["name"] and roles[1][1][0]["input"] == {"q": 1}
    assert roles[2][1][0]["tool_use_id"] == call["id"]
    marks = [b for m in up.api.bodies[1]["messages"] for b in m["content"] if "cache_control" in b]
    assert len(marks) == 1 and marks[0]["type"] == "tool_result"


def test_calls_in_a_history_have_their_tools_even_if_the_caller_sends_none(up):
    up_ask(up, "chat", [
        {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"}])
    body = up.api.bodies[0]
    assert [t["name"] for t in body["tools"]] == ["f"] and body["tool_choice"] == {"type": "none"}


def test_what_a_model_refuses_is_dropped_told_and_remembered(up):
    for tries in (2, 1):
        up.api.clear()
        answer = up_ask(up, "chat", "hi", model="claude-opus-5", temperature=0.2)
        assert answer.status == 200 and answer.headers["x-cc-ignored-params"] == "temperature"
        assert len(up.api.bodies) == tries and "temperature" not in up.api.bodies[-1]


@pytest.mark.parametrize("model, effort, thinking", [
    ("claude-opus-5", {"effort": "high"}, {"type": "adaptive"}), ("claude-sonnet-4-0", None, None)])
def test_effort_asks_for_thinking_where_the_model_knows_it(up, model, effort, thinking):
    answer = up_ask(up, "chat", "THINK", model=model, reasoning_effort="high")
    assert answer.status == 200 and answer.json["choices"][0]["message"]["reasoning_content"] == "let me see"
    sent = up.api.bodies[-1]
    assert sent.get("output_config") == effort and sent.get("thinking") == thinking
    assert ("x-cc-ignored-params" in answer.headers) == (effort is None)


CLOSED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}


@pytest.mark.parametrize("model, schema, native", [
    ("claude-sonnet-5", CLOSED, True), ("claude-sonnet-4-0", CLOSED, False),
    ("claude-sonnet-5", {"type": "object", "properties": {}}, False),
    ("claude-sonnet-5-5", CLOSED, True), ("claude-sonnet-5-5", {"type": "object"}, False)])
@whole_and_streamed
@TRANSLATED
def test_a_schema_is_answered_natively_or_else_by_a_tool(up, dialect, stream, model, schema, native):
    form = {"type": "json_schema", "name": "n", "schema": schema}
    wish = {"text": {"format": form}} if dialect == "responses" else {
        "response_format": {"type": "json_schema", "json_schema": form}}
    answer = up_ask(up, dialect, 'JSON:{"a": 1}', stream, model=model, **wish)
    assert answer.status == 200, answer.body
    said = answer.text if not stream else "".join(
        json.loads(f'"{piece}"') for piece in re.findall(
            r'"(?:content|delta)":"((?:[^"\\]|\\.)*)"', answer.body.decode()))
    assert json.loads(said) == {"a": 1}
    sent = up.api.bodies[-1]
    assert (sent.get("output_config", {}).get("format") == {
        "type": "json_schema", "schema": schema}) == native
    assert [t["name"] for t in sent.get("tools", [])] == [ccproxy.ANSWER] * (not native)
    forced = {"type": "tool", "name": ccproxy.ANSWER}
    assert native or sent.get("tool_choice") == (None if "5-5" in model else forced)
    assert not native or len(up.api.bodies) == 1 and "thinking" not in sent
    tries = len(up.api.bodies)
    assert up_ask(up, dialect, 'JSON:{"a": 1}', stream, model=model, **wish).status == 200
    assert len(up.api.bodies) == tries + 1      # what was refused is remembered


def test_a_forced_tool_is_lost_to_no_request_that_did_not_ask_for_thinking(up):
    tools, forced = [tool("f")], {"tool_choice": "required"}
    for effort in ({}, {"reasoning_effort": "low"}, {}):
        answer = up_ask(up, "chat", "CALL:f ARGS:{}", tools=tools, **forced, **effort)
        assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
        assert up.api.bodies[-1]["tool_choice"] == {"type": "any"}
        assert "x-cc-ignored-params" not in answer.headers


def test_a_schema_beside_tools_leaves_the_model_its_choice(up):
    wish = {"response_format": {"type": "json_object"}, "tools": [tool("f")]}
    called = up_ask(up, "chat", "CALL:f ARGS:{}", **wish)
    assert called.json["choices"][0]["finish_reason"] == "tool_calls"
    assert up.api.bodies[-1]["tool_choice"] == {"type": "any"}
    assert json.loads(up_ask(up, "chat", 'JSON:{"b": 2}', **wish).text) == {"b": 2}


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("more, choice", [
    ({"tool_choice": "auto"}, {"type": "tool", "name": ccproxy.ANSWER}),
    ({"tools": [FUNCTION], "tool_choice": "auto"}, {"type": "any"}),
    ({"tools": [FUNCTION], "tool_choice": "none"}, {"type": "tool", "name": ccproxy.ANSWER}),
    ({"tools": [FUNCTION], "parallel_tool_calls": False}, {"type": "any", ccproxy.SINGLE: True}),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}},
     {"type": "tool", "name": "f"})])
def test_a_tool_for_a_schema_is_forced_whatever_the_caller_said_of_his_own(up, more, choice):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {}}}}
    for _ in "ab":
        answer = up_ask(up, "chat", 'JSON:{"a": 1}', model="claude-sonnet-4-0", response_format=form, **more)
        assert answer.status == 200 and json.loads(answer.text) == {"a": 1}
        sent = up.api.bodies[-1]
        assert sent["tool_choice"] == choice and sent["tools"][-1]["name"] == ccproxy.ANSWER
        assert sent["tools"][-1]["input_schema"]["type"] == "object"


def test_what_a_model_gives_at_most_is_learned_where_the_caller_said_nothing(tmp_path, own_key):
    def play(sock):
        sent = json.loads(up.heard[-1][1])["max_tokens"]
        refused = json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message":
            f"max_tokens: {sent} > 8192, which is the maximum allowed number of output tokens"}})
        good = STREAM_HEAD + b"".join(map(chunk, FRAMES_UP)) + b"0\r\n\r\n"
        sock.sendall(good if sent <= 8192 else whole_answer(refused.encode(), status="400 Bad"))
    with Odd(play) as up, relaying(tmp_path, up) as base:
        body = {"model": "claude-old", "messages": ASK_MESSAGES}
        for tries in (2, 3):
            assert ask(base, "POST /api/v1/chat/completions", body=body).text == "Hello"
            assert len(up.heard) == tries
        refused = ask(base, "POST /api/v1/chat/completions", body={**body, "max_tokens": 9999})
        assert refused.status == 400 and "9999 > 8192" in refused.error["message"]


@pytest.mark.parametrize("status", [401, 429, 529])
def test_a_list_of_models_that_fails_is_told_and_not_taken_for_none(tmp_path, own_key, status):
    told = json.dumps({"type": "error", "error": {"type": "x", "message": "the list fails"}})
    with Odd(whole_answer(told.encode(), status=f"{status} No")) as up, relaying(tmp_path, up) as base:
        answer = ask(base, "POST /api/v1/chat/completions", body={"model": "gpt-4o",
                                                                  "messages": ASK_MESSAGES})
        assert answer.status == status and answer.error["message"] == "the list fails"


def test_a_gateway_without_a_list_gets_the_name_as_it_is(tmp_path, own_key):
    told = json.dumps({"type": "error", "error": {"type": "x", "message": "no list"}}).encode()
    good = STREAM_HEAD + b"".join(map(chunk, FRAMES_UP)) + b"0\r\n\r\n"
    with Odd(whole_answer(told, status="404 No"), good) as up, relaying(tmp_path, up) as base:
        for _ in "ab":
            answer = ask(base, "POST /api/v1/chat/completions", body={"model": "house/llama",
                                                                      "messages": ASK_MESSAGES})
            assert answer.text == "Hello" and json.loads(up.heard[-1][1])["model"] == "llama"


def test_a_count_says_nothing_that_a_model_could_refuse(up):
    answer = ask(up.url, "POST /api/v1/responses/input_tokens", body={
        "model": "claude-sonnet-4-0", "input": "hi", "reasoning": {"effort": "high"},
        "temperature": 0.1, "text": {"format": {"type": "json_schema", "name": "n", "schema": CLOSED}}})
    assert answer.status == 200 and set(up.api.counted[0]) == {"model", "messages"}


def test_rules_are_kept_once_and_not_without_end(tmp_path):
    known = ccproxy.Refusals(str(tmp_path / "refusals.json"))
    for n in range(300):
        known.learn("m", [{"drop": "format", "with": [], "value": str(n)},
                          {"drop": "temperature", "with": []}, {"drop": "x", "with": [], "once": True},
                         {"drop": "stop_sequences", "with": [], "value": ["x" * 5000]}])
    drops = [r["drop"] for r in known.rules["m"]]
    assert len(drops) == ccproxy.MOST_RULES and drops.count("temperature") == 1
    assert "stop_sequences" not in drops            # it is long


def test_an_answer_to_a_schema_that_is_none_is_an_error(up):
    answer = up_ask(up, "chat", "NOJSON", response_format={"type": "json_object"})
    assert answer.status == 502 and "schema" in answer.error["message"]


@pytest.mark.parametrize("words, status, kind", [
    ("ERR:429 WAIT:7", 429, "rate_limit_error"), ("ERR:529", 529, "server_error"),
    ("ERR:401", 401, "authentication_error"), ("ERR:404", 404, "invalid_request_error")])
def test_the_apis_own_errors_come_in_the_dialect(up, words, status, kind):
    answer = up_ask(up, "chat", words)
    assert answer.status == status and answer.error["type"] == kind
    assert answer.error["message"].startswith("fake") and len(up.api.bodies) == 1
    assert answer.headers.get("retry-after") == ("7" if status == 429 else None)


def test_an_error_event_of_the_api_ends_the_stream_with_its_words(up):
    told = frames(up_ask(up, "chat", "STREAMERR now", True).body)
    assert told[-2][1]["error"]["message"] == "Overloaded" and told[-1][1] == "[DONE]"
    whole = up_ask(up, "chat", "STREAMERR now")
    assert whole.status == 529 and whole.error["message"] == "Overloaded"


@pytest.mark.parametrize("asked, settings, model", [
    ("sonnet", {}, "claude-sonnet-5"), ("anthropic/sonnet", {}, "claude-sonnet-5"),
    ("opus", {}, "claude-opus-5"), ("sonnet[1m]", {}, "claude-sonnet-5"),
    ("claude-new-9", {}, "claude-new-9"), ("gpt-4o", {}, "claude-sonnet-5"),
    ("house-model", {}, "house-model"), ("gpt-4o", {"model": "opus"}, "claude-opus-5"),
    ("gpt-4o", {"models": {"gpt-*": "opus"}}, "claude-opus-5"),
    ("fast", {"models": {"fast": "claude-x-1"}}, "claude-x-1"), ("haiku", {}, "claude-sonnet-5")])
def test_model_names_mean_what_the_upstream_lists(api, tmp_path, own_key, asked, settings, model):
    api.clear()
    with relaying(tmp_path, api, **settings) as base:
        answer = up_ask(UpstreamBench(base, api), "chat", "hi", model=asked)
        assert answer.json["model"] == asked and api.bodies[0]["model"] == model


def test_the_list_of_models_is_asked_for_once(up):
    for _ in range(3):
        assert up_ask(up, "chat", "hi", model="sonnet").status == 200
    assert sum(path.startswith("/v1/models") for _, path, _ in up.api.heads) == 1


def test_counting_asks_the_upstream(up):
    told = up_ask(up, "responses", "hi")
    counted = ask(up.url, "POST /api/v1/responses/input_tokens",
                  body={"model": "sonnet", "input": "hi"})
    assert counted.json == {"object": "response.input_tokens", "input_tokens": 15} and told.status == 200
    assert set(up.api.counted[0]) == {"model", "messages"}


def test_stored_responses_go_on_over_the_upstream(up):
    first = up_ask(up, "responses", "one")
    up_ask(up, "responses", "two", previous_response_id=first.json["id"])
    assert [role for role, _ in heard(up.api.bodies[1])] == ["user", "assistant", "user"]


# -- as the default backend

def test_as_the_default_backend_the_api_serves_every_route_and_no_cli_is_started(api, tmp_path, own_key):
    api.clear()
    fake = cli(tmp_path)
    with relaying(tmp_path, api, backend="api", claude=fake.path, warm=2) as base:
        assert relay(base, "POST /v1/messages").json["content"][0]["text"] == "You said: hé"
        assert json.loads(ASK_UP) == api.bodies[0]
        assert relay(base, "POST /v1/chat/completions").text == "You said: hé"
        assert relay(base, "POST /v1/messages/count_tokens").json["input_tokens"] > 0
        listed = ask(base, "GET /v1/models").json
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [
            "claude-opus-5", "claude-sonnet-5", "claude-sonnet-4-6", "house-model"]
        assert listed["data"][0]["owned_by"] == "anthropic" and listed["data"][0]["display_name"]
        assert ask(base, "GET /v1/files?x=1").status == 404 and api.heads[-1][1] == "/v1/files?x=1"
        assert ask(base, "GET /nothing").status == 404 and api.heads[-1][1] == "/v1/files?x=1"
        assert ask(base, "GET /readyz").json["upstream"] == api.url
        assert ask(base, "GET /status").json["backend"] == "api" and not fake.pids
        assert ask(base, "POST /chat/v1/messages", body=question("hi")).text == "fine"
        assert fake.pids


def test_claude_codes_probe_is_answered_here(url):
    assert ask(url, "HEAD /api/hello").status == 200 and ask(url, "GET /api/hello").status == 200


def test_doctor_looks_at_the_upstream_if_that_serves(api, tmp_path):
    told = run(tmp_path, "doctor", "--backend", "api", "--upstream-url", api.url, "--claude", "echo",
               ANTHROPIC_API_KEY="sk-ant-own")
    assert told.returncode == 0 and f"upstream {api.url}, models: claude-opus-5" in told.stdout
    failed = run(tmp_path, "doctor", "--backend", "api", "--upstream-url", "http://127.0.0.1:1",
                 "--claude", "echo", ANTHROPIC_API_KEY="sk-ant-own")
    assert failed.returncode == 1 and "refuses connections" in failed.stdout
    assert "next: ccproxy.py auth status" in failed.stdout
    deep = run(tmp_path, "doctor", "--deep", "--backend", "api", "--upstream-url", api.url,
               ANTHROPIC_API_KEY="sk-ant-own")
    assert deep.returncode == 0 and "'You said: Answer: yes'" in deep.stdout
    with Odd(whole_answer(b"{}", status="404 No")) as up:
        told = run(tmp_path, "doctor", "--backend", "api", "--upstream-url", up.url)
        assert told.returncode == 0 and "not listed" in told.stdout


def test_the_log_tells_model_usage_and_reason_of_what_was_relayed(api, tmp_path):
    with command(tmp_path, "--upstream-url", api.url, ANTHROPIC_API_KEY="sk-ant-own") as proxy:
        relay(proxy.url)
        relay(proxy.url, body={**json.loads(ASK_UP), "stream": True})
        assert until(lambda: len(proxy.log) == 2)
        for line in proxy.log:
            assert re.search(r"POST /api/v1/messages claude-sonnet-5 200 first \d+ ms total \d+ ms in 18 "
                             r"out [17] end_turn req_", line), line
        assert "sk-ant" not in proxy.stderr.read_text()


# -- pure

@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_events_are_found_however_the_stream_is_cut(line_end):
    data = (b": comment\n\n" + b"".join(FRAMES_UP) + b"data: [DONE]\n\nid: 7\n\n").replace(b"\n", line_end)
    for pieces in every_split(data):
        found = ccproxy.Frames()
        assert [json.dumps(e) for piece in pieces for e in found.feed(piece)] == EVENTS_UP


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: 1\n\n", b"data: {}\n\n", b"data: \xff\n\n",
                                  b'data: {"type": 0}\n\ndata: [' + b"[" * 10**5 + b"\n\n"])
def test_an_event_that_is_none_is_a_502(data):
    with pytest.raises(ApiError) as caught:
        found = ccproxy.Frames().feed(data)
        raise AssertionError(found)
    assert caught.value.status == 502


def test_a_long_event_in_many_pieces_takes_linear_time():
    counted = ccproxy.Frames()
    pieces = [b'data: {"type": "x", "t": "'] + [b"y" * 65536] * 200 + [b'"}\n\n']
    assert [len(e["t"]) for piece in pieces for e in counted.feed(piece)] == [200 * 65536]
    with pytest.raises(ApiError):
        for _ in range(2000):
            counted.feed(b"y" * 65536)


@pytest.mark.parametrize("coding", ["", "gzip", "br"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_tap_reads_both_ends_of_an_answer_of_any_length(coding, stream):
    import gzip
    filler = 'Some \\"usage\\": {\\"output_tokens\\": 99} text. ' * 20_000
    if stream:
        delta = f'data: {{"type":"content_block_delta","delta":{{"text":"{filler[:900]}"}}}}\n\n'
        data = b"".join(FRAMES_UP[:2]) + delta.encode() * 500 + b"".join(FRAMES_UP[4:])
    else:
        data = (f'{{"model":"claude-sonnet-5","content":[{{"type":"text","text":"{filler}"}}],'
                '"stop_reason":"end_turn","usage":{"input_tokens":11,"output_tokens":7}}').encode()
    data, tap = gzip.compress(data) if coding == "gzip" else data, ccproxy.Tap(coding)
    for at in range(0, len(data), 1000):
        tap.feed(data[at:at + 1000])
    message = tap.message()
    if coding == "br":
        assert not any(message.tokens()) and message.stop_reason is None
    else:
        assert message.tokens() == (11, 0, 7) and message.stop_reason == "end_turn"
        assert message.start["model"] == "claude-sonnet-5"


def test_the_tap_is_not_troubled_by_what_is_no_answer():
    for coding in ("", "gzip", "deflate"):
        for data in (b"", b"\x1f\x8b garbage", b'"usage": {', b'"usage": [1]', b'"stop_reason": null'):
            tap = ccproxy.Tap(coding)
            tap.feed(data)
            assert tap.message().tokens() == (0, 0, 0)


@pytest.mark.parametrize("turn, expected", [
    ({"fields": {}}, {"max_tokens": ccproxy.MAX_OUTPUT}),
    ({"fields": {"thinking": {"type": "enabled", "budget_tokens": 50_000}}},
     {"max_tokens": ccproxy.MAX_OUTPUT + 50_000}),
    ({"fields": {"max_tokens": 5}}, {"max_tokens": 5}),
    ({"fields": {"stop_sequences": ["x"], "top_k": 3}}, {"stop_sequences": ["x"], "top_k": 3}),
    ({"fields": {"effort": "low"}}, {"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}),
    ({"system": "S"}, {"system": [{"type": "text", "text": "S"}]}),
])
def test_a_turn_becomes_a_messages_request(turn, expected):
    messages = ({"role": "user", "content": [{"type": "text", "text": "hi"}]},)
    made = ccproxy.messages_request(ccproxy.upstream_turn(ccproxy.Turn("m", messages, **turn)), "m")
    assert {name: made[name] for name in expected} == expected
    assert made["model"] == "m" and made["stream"] is True and made["messages"] == list(messages)


# == (h) agents ====================================================================================

@contextlib.contextmanager
def agency(tmp_path, **settings):
    """A proxy whose agents are stand-ins; its key is k, its workspaces web and docs."""
    for name in ("web", "docs"):
        (tmp_path / name).mkdir(exist_ok=True)
    with serving(tmp_path, **{"api_key": "k", "workspaces": {
            name: str(tmp_path / name) for name in ("web", "docs")}, **settings}) as base:
        yield base


UNASKED = {"permission_mode": "bypassPermissions", "i_am_sandboxed": True}


def permit(url, name, **body):
    return post(url, f"/permissions/{name}/respond", body, AGENT_KEY)


def listing(url, path="/permissions"):
    return post(url, path, None, AGENT_KEY, "GET")[2]


# -- who may call, how it is started

def test_agents_need_a_key_also_on_loopback_and_one_is_made_once(tmp_path):
    with command(tmp_path) as proxy:
        key = proxy.key
        assert http_post(proxy.url, "hi").status == 200         # without tools nobody asks for it
        for path in ("/sdk/v1/messages", "/sdk/v1/chat/completions", "/sdk/responses"):
            refused = ask(proxy.url, "POST " + path, body=question("hi"))
            assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
            answer = ask(proxy.url, "POST " + path, f"x-api-key: {key}", body=(
                {"model": "echo", "input": "hi"} if "responses" in path else question("hi")))
            assert answer.status == 200, answer.body
        for path in ("/permissions", "/permissions/x", "/permissions/stream", "/sessions",
                     "/sessions/x", "/sdk/v1/permissions"):
            assert ask(proxy.url, "GET " + path).status == 401
        assert ask(proxy.url, "POST /mcp/permission/check", body={}).status == 401
    kept = "".join(path.read_text(errors="replace") for path in (tmp_path / "state").rglob("*")
                   if path.is_file())
    assert key not in kept and hashlib.sha256(key.encode()).hexdigest() in kept
    if os.name == "posix":
        assert (tmp_path / "state" / "agent-key.sha256").stat().st_mode & 0o777 == 0o600
    with command(tmp_path, "--backend", "agent") as proxy:
        assert "ccp-" not in proxy.stderr.read_text()
        assert "(the key made at the first start)" in proxy.banner
        assert ask(proxy.url, "POST /v1/messages", body=question("hi")).status == 401
        assert ask(proxy.url, "POST /v1/messages", f"authorization: Bearer {key}",
                   body=question("hi")).status == 200


def test_a_key_of_the_operators_is_the_only_one(tmp_path):
    with agency(tmp_path) as url:
        assert not (tmp_path / "state" / "agent-key.sha256").exists()
        assert Agent(url).ask("hi").text == "hi"


def test_a_key_for_agents_that_cannot_be_kept_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy", full)
    with pytest.raises(OSError, match="No space left"):
        ccproxy.agent_key(str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, problem", [("", "no digest"), ("x" * 64, "no digest"),
                                           ("\u00e9" * 64, "no digest")])
def test_a_broken_file_of_the_agents_key_is_said(tmp_path, text, problem):
    (tmp_path / "agent-key.sha256").write_text(text, encoding="utf-8")
    with pytest.raises(OSError, match=problem):
        ccproxy.agent_key(str(tmp_path))


def test_two_starts_at_once_agree_on_one_key(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ccproxy.agent_key(str(tmp_path / "s")), range(8)))
    assert len({digest for digest, _ in made}) == 1 and sum(bool(key) for _, key in made) == 1
    assert sorted(os.listdir(tmp_path / "s")) == ["agent-key.sha256"]


@pytest.mark.parametrize("values, problem", [
    ({"workspaces": {"web": "/none/such"}}, "workspaces: /none/such is no directory"),
    ({"workspaces": "web=/none/such"}, "is no directory"),
    ({"workspaces": {"a b": "/"}}, "names of letters"),
    ({"cwd": "/none/such"}, "cwd: /none/such is no directory"),
    ({"models": {"a": {"workspace": "web"}}}, "a.workspace: 'web' is not among"),
    ({"models": {"a": {"color": "red"}}}, "a.color: expected one of model, workspace"),
    ({"models": {"a": {"effort": "huge"}}}, "a.effort: expected one of"),
    ({"models": {"a": {"backend": "none"}}}, "a.backend: expected one of chat, agent, api"),
    ({"models": {"a": {"model": 1}}}, "a.model: expected a text"),
    ({"permission_mode": "any"}, "permission_mode: expected one of default"),
    ({"claude_arg": "'"}, "claude_arg: No closing quotation"),
    ({"allowed_tools": "Bash(git log:*"}, "allowed_tools: '(' is no rule"),
    ({"allowed_tools": "Bash(a), b)"}, "allowed_tools: ')' is no rule"),
    ({"allowed_tools": ["Bash(a", "Read"]}, "allowed_tools: '(' is no rule"),
    ({"disallowed_tools": "Bash (rm)"}, "disallowed_tools: 'Bash (rm)' is no rule"),
    ({"add_dir": "/none/such"}, "add_dir: /none/such is no directory"),
    ({"mcp_config": "/none/such.json"}, "mcp_config: /none/such.json is no file"),
    ({"ask_workspace": True}, "ask_workspace: there are no workspaces"),
])
def test_a_setting_of_agents_that_cannot_be_used_is_an_error_at_start(values, problem):
    with pytest.raises(ccproxy.ConfigError, match=re.escape(problem)):
        ccproxy.Settings(**values)


def test_a_blank_directory_is_none_and_not_where_the_proxy_stands():
    assert ccproxy.Settings(cwd=" ").cwd == ""


@pytest.mark.parametrize("values", [{"permission_mode": "bypassPermissions"},
                                    {"models": {"a": {"permission_mode": "bypassPermissions"}}}])
def test_root_bypasses_permissions_only_in_a_sandbox(monkeypatch, values):
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    with pytest.raises(ccproxy.ConfigError, match="--i-am-sandboxed"):
        ccproxy.Settings(**values)
    assert ccproxy.Settings(i_am_sandboxed=True, **values)
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert ccproxy.Settings(**values)
    assert "IS_SANDBOX" in ccproxy.agent_env((2, 1, 330), True)
    assert "IS_SANDBOX" not in ccproxy.agent_env((2, 1, 330), False)


def test_an_agents_command_line_says_what_the_operator_has_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "m.json").write_text("{}")
    flags = {"allowed_tools": ["Read,Bash(git log:*, x)", "Edit"], "disallowed_tools": ["WebFetch"],
             "max_turns": "7", "add_dir": f"{tmp_path}/a,{tmp_path}/b/",
             "mcp_config": os.path.relpath(tmp_path / "m.json"),
             "claude_arg": ["--foo 'a b'", "--bar"], "permission_mode": "plan"}
    settings = ccproxy.load_settings(flags, {})
    launch = ccproxy.Launch(True, "", "", "plan")
    argv = ccproxy.claude_argv(["claude"], "opus", ccproxy.agent_options(launch, settings))
    assert argv[-7:] == [f"--add-dir={tmp_path}/a", f"--add-dir={tmp_path}/b",
                         f"--mcp-config={tmp_path}/m.json", "--foo", "a b", "--bar", "--model=opus"]
    assert {"--permission-mode=plan", "--max-turns=7", "--no-session-persistence",
            "--allowedTools=Read,Bash(git log:*, x),Edit"} <= set(argv)
    [denied] = [word for word in argv if word.startswith("--disallowedTools=")]
    assert denied.endswith("CronList,WebFetch")
    assert not [word for word in argv if word.startswith(("--tools", "--setting-sources"))]
    kept = dataclasses.replace(launch, kept=True, resume="uuid")
    more = ccproxy.agent_options(kept, settings)
    assert "--resume=uuid" in more and "--no-session-persistence" not in more


def test_an_agents_environment_keeps_compaction_and_old_ones_read_no_mentions():
    new, old = (ccproxy.claude_env({}, 2, 9, ccproxy.agent_env(version, False))
                for version in ((2, 1, 330), (2, 1, 110)))
    assert "DISABLE_COMPACT" not in new and "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE" not in new
    assert "CLAUDE_AGENT_SDK_MCP_NO_PREFIX" not in new
    assert new["CLAUDE_CODE_DISABLE_FILE_MENTIONS"] == "1"
    assert "CLAUDE_CODE_DISABLE_ATTACHMENTS" not in new
    assert old["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


def test_flags_of_agents_may_be_repeated(tmp_path):
    flags = vars(ccproxy.argument_parser().parse_args([
        "--allowed-tools", "Read", "--allowed-tools", "Bash(a,b)", "--claude-arg=--x 1",
        "--claude-arg=--y", "--i-am-sandboxed"]))
    settings = ccproxy.load_settings(flags, {"CCPROXY_DISALLOWED_TOOLS": "A, Bash(x, y)"})
    assert settings.allowed_tools == ["Read", "Bash(a,b)"] and settings.i_am_sandboxed is True
    assert settings.claude_arg == ["--x", "1", "--y"]
    assert settings.disallowed_tools == ["A", "Bash(x, y)"]


# -- workspaces, aliases

@pytest.mark.parametrize("field, value, param", [
    ("Workspace", "none", "X-CC-Workspace"), ("Workspace", "/etc", "X-CC-Workspace"),
    ("Workspace", "../web", "X-CC-Workspace"), ("Verbosity", "loud", "X-CC-Verbosity"),
    ("Session", "a b", "X-CC-Session"), ("Session", "x" * 129, "X-CC-Session"),
    ("Session", "..", "X-CC-Session"), ("Session", "a/b", "X-CC-Session"),
    ("Session-Busy", "maybe", "X-CC-Session-Busy"), ("Effort", "huge", "X-CC-Effort")])
@both_dialects
def test_a_bad_header_of_agents_is_a_400_that_names_it(tmp_path, dialect, field, value, param):
    with agency(tmp_path) as url:
        answer = ask(url, "POST /sdk" + PATHS[dialect], "x-api-key: k", f"X-CC-{field}: {value}",
                     body=question("hi"))
        assert answer.status == 400 and param in answer.error["message"]
        if dialect == "chat":
            assert answer.error["param"] == param


def test_an_alias_says_model_workspace_verbosity_and_backend(tmp_path):
    models = {"coder": {"model": "echo", "workspace": "web", "verbosity": "narrated",
                        "backend": "agent", "system": "Be brief."}, "plain": "echo"}
    with agency(tmp_path, models=models, **UNASKED) as url:
        client = Client(url, "messages", model="coder")
        client.headers = AGENT_KEY
        said = client.ask("/run ls")
        assert said.headers["X-CC-Workspace"] == "web" and "[Bash: ls]" in said.text
        assert said.raw["model"] == "coder"
        client.headers = {**AGENT_KEY, "X-CC-Workspace": "docs", "X-CC-Verbosity": "text"}
        said = client.ask("/run ls")
        assert said.headers["X-CC-Workspace"] == "docs" and "[Bash" not in said.text
        plain = ask(url, "POST /v1/messages", "x-api-key: k", "X-CC-Workspace: web",
                    body=question("/run ls", model="plain", session_id="s"))
        assert plain.text == "/run ls"
        assert plain.headers["x-cc-ignored-params"] == "X-CC-Workspace, session_id"
        ids = [m["id"] for m in listing(url, "/v1/models")["data"]]
        assert {"coder", "plain"} <= set(ids)


def test_an_alias_of_another_backend_is_served_where_messages_are_relayed(tmp_path, api, own_key):
    models = {"coder": {"model": "echo", "backend": "agent"}, "bare": {"backend": "chat"},
              "up": {"model": "claude-sonnet-5", "backend": "api"}}
    with agency(tmp_path, backend="api", upstream_url=api.url, models=models, **UNASKED) as url:
        for model, text in (("coder", "ran: x"), ("bare", "/run x"), ("claude-sonnet-5", "You said")):
            answer = ask(url, "POST /v1/messages", "x-api-key: k",
                         body=question("/run x", model=model, max_tokens=9))
            assert answer.status == 200 and text in answer.text, answer.body
        tokens = ask(url, "POST /v1/messages/count_tokens", "x-api-key: k",
                     body=question("hi", model="coder"))
        assert tokens.status == 200 and tokens.json["input_tokens"] > 0
    with agency(tmp_path, upstream_url=api.url, models=models) as url:
        answer = ask(url, "POST /v1/messages", "x-api-key: k",
                     body=question("hi", model="up", max_tokens=9))
        assert answer.status == 200 and "You said: hi" in answer.text
        assert answer.json["model"] == "up"


def test_an_agent_without_a_workspace_has_a_directory_of_its_own_that_goes_with_it(tmp_path):
    fake = noted_stand_in(tmp_path)
    with agency(tmp_path, claude=fake.path, idle_ttl=0.2) as url:
        assert Agent(url).ask("hi").text == "hi"
        if not os.path.isdir("/proc/self"):
            return
        [pid] = fake.pids
        home = os.readlink(f"/proc/{pid}/cwd")
        assert os.path.isdir(home) and os.path.basename(home).startswith("agent-")
        assert os.stat(home).st_mode & 0o777 == 0o700
        assert until(lambda: not os.path.exists(home), 10)


NAMES_WS = ["web", "docs", "web-2"]


@pytest.mark.parametrize("said, name", [
    ("1", "web"), (" 2. ", "docs"), ("docs", "docs"), ("`Web`", "web"), ("the docs please", "docs"),
    ("web-2", "web-2"), ("use web-2!", "web-2"), ("4", ""), ("", ""), ("web or docs", ""),
    ("webs", "")])
def test_a_named_workspace_is_found_in_the_answer(said, name):
    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}] * bool(text)}
    task, after = message("user", "do it"), message("user", "more")
    asked = message("assistant", ccproxy.WHICH + " ...")
    talk = (task, asked, message("user", said))
    assert ccproxy.chosen_workspace(talk, NAMES_WS) == (name, (task,) if name else talk)
    if name:
        longer = (*talk, message("assistant", "done"), after)
        assert ccproxy.chosen_workspace(longer, NAMES_WS) == (
            name, (task, message("assistant", "done"), after))
        twice = (task, asked, message("user", "?"), *talk[1:])
        assert ccproxy.chosen_workspace(twice, NAMES_WS) == (name, (task,))
    assert ccproxy.chosen_workspace((task,), NAMES_WS) == ("", (task,))
    assert ccproxy.chosen_workspace((task, message("assistant", "x"), after), NAMES_WS)[0] == ""


@ALL
@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_window_is_asked_for_the_workspace_first(tmp_path, dialect, streamed):
    with agency(tmp_path, ask_workspace=True) as url:
        agent = Agent(url, dialect)
        asked = agent.ask("the task", streamed=streamed)
        assert asked.status == 200 and asked.text.startswith(ccproxy.WHICH)
        assert "1. web\n2. docs" in asked.text and "X-CC-Workspace" not in asked.headers
        again = agent.ask("neither", streamed=streamed)
        assert again.text == asked.text
        said = agent.ask("2", streamed=streamed)
        assert (said.text, said.headers["X-CC-Workspace"]) == ("the task", "docs")
        more = agent.ask("and more", streamed=streamed)
        assert (more.text, more.headers["X-CC-Workspace"]) == ("and more", "docs")
        assert more.headers["X-CC-Conversation"] == "continued"
        assert Agent(url, dialect, Workspace="web").ask("hi").text == "hi"


def test_an_aliass_permission_mode_stays_in_its_workspace(tmp_path):
    models = {"free": {"model": "echo", "workspace": "web",
                       "permission_mode": "bypassPermissions"}}
    with agency(tmp_path, models=models, i_am_sandboxed=True) as url:
        assert "ran: ls" in Agent(url, "chat", {"model": "free"}).ask("/run ls").text
        assert "ran: ls" in Agent(url, "chat", {"model": "free"}, Workspace="web").ask(
            "/run ls").text
        said = Agent(url, "chat", {"model": "free"}, Workspace="docs").ask("/run ls")
        assert (said.status, said.raw["error"]["param"]) == (400, "X-CC-Workspace")


def test_a_workspace_that_goes_is_told_without_its_path_and_harms_no_other(tmp_path):
    with agency(tmp_path, warm=1) as url:
        assert Agent(url, Workspace="docs").ask("hi").status == 200
        shutil.rmtree(tmp_path / "docs")
        time.sleep(0.1)
        said = [Agent(url, Workspace="docs").ask("hi") for _ in range(2)][-1]
        assert said.status == 503 and "(workspace docs)" in said.raw["error"]["message"]
        assert str(tmp_path) not in json.dumps(said.raw)
        assert Agent(url, Workspace="web").ask("hi").status == 200
        assert until(lambda: listing(url, "/status")["trouble"] is None)


def test_paths_of_the_api_that_are_also_ours_are_relayed_where_it_is_the_default(
        tmp_path, api, own_key):
    api.clear()
    with agency(tmp_path, backend="api", upstream_url=api.url, models={"*": {
            "backend": "chat"}}) as url:
        assert ask(url, "GET /v1/sessions", "x-api-key: k").status == 404
        assert [head[:2] for head in api.heads] == [("GET", "/v1/sessions")]
        assert listing(url, "/sessions") == {"object": "list", "data": []}
        assert ask(url, "POST /v1/messages", "x-api-key: k", body={}).status == 400


# -- how its tools show

SHOWN_AS = {
    "text": "I will run it.\n\nran: ls",
    "narrated": "I will run it.\n\n[Bash: ls]\n\n[Bash gave: ran: ls]\n\nran: ls",
    "verbose": 'I will run it.\n\n**Bash**\n\n```json\n{\n  "command": "ls"\n}\n```\n\n'
               "```\nran: ls\n```\n\nran: ls",
    "formatted": 'I will run it.\n\n<tool_use id="ID" name="Bash">{"command": "ls"}</tool_use>\n\n'
                 '<tool_result tool_use_id="ID">ran: ls</tool_result>\n\nran: ls'}


@ALL
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("verbosity", ccproxy.VERBOSITIES)
def test_what_an_agent_runs_shows_as_its_caller_wants(tmp_path, dialect, streamed, verbosity):
    with agency(tmp_path, **UNASKED) as url:
        agent = Agent(url, dialect, Verbosity=verbosity)
        said = agent.ask("/run ls", streamed=streamed)
        assert said.status == 200 and said.finish in ("stop", ("end_turn", None))
        text = re.sub("toolu_[0-9a-f]+", "ID", said.text)
        if verbosity != "verbose" or dialect == "chat":
            assert text == SHOWN_AS[verbosity]
        elif dialect == "messages":
            kinds = [b["type"] for b in said.message["content"]]
            assert kinds == ["text", "mcp_tool_use", "mcp_tool_result", "text"]
            use, result = said.message["content"][1:3]
            assert use["id"] == result["tool_use_id"] and use["server_name"] == "claude_code"
            assert result["content"] == [{"type": "text", "text": "ran: ls"}]
            assert result["is_error"] is False
        else:
            kinds = [item["type"] for item in said.message]
            assert kinds == ["message", "mcp_call", "message"]
            item = said.message[1]
            assert (item["name"], item["output"], item["error"], item["status"]) == (
                "Bash", "ran: ls", None, "completed")
            assert json.loads(item["arguments"]) == {"command": "ls"}
        more = agent.ask("and now", streamed=streamed)          # it may come back as it is
        assert (more.text, more.headers["X-CC-Conversation"]) == ("and now", "continued")


def own_call(index, ident, name, *pieces):
    return block(index, {"type": "mcp_tool_use", "id": ident, "name": name,
                         "server_name": "claude_code", "input": {}},
                 *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


def own_result(index, ident, said, is_error=False):
    return block(index, {"type": "mcp_tool_result", "tool_use_id": ident, "is_error": is_error,
                         "content": [{"type": "text", "text": said}]})


@pytest.mark.parametrize("said, shown", [
    ({"command": "a\n\n  b"}, "[T: a b]"), ({"file_path": "/f", "content": "x"}, "[T: /f]"),
    ({}, "[T]"), ({"n": 1}, '[T: {"n": 1}]'), ({"command": "x" * 200}, "[T: " + "x" * 117 + "...]")])
def test_a_call_is_narrated_by_its_most_telling_argument(said, shown):
    events = own_call(0, "t1", "T", json.dumps(said))
    [text] = fold([start(), *ccproxy.Rendering("narrated", True).events(events)]).content
    assert text == {"type": "text", "text": shown}


def test_results_are_narrated_by_their_beginning_and_a_failure_is_named():
    events = [*own_call(0, "t1", "Bash", '{"command": "x"}'), *own_result(1, "t1", "a\nb\nc"),
              *own_call(2, "t2", "Read", "{}"), *own_result(3, "t2", "gone", True),
              *own_result(4, "t0", "")]
    message = fold([start(), *ccproxy.Rendering("narrated", True).events(events)])
    assert "".join(b["text"] for b in message.content) == (
        "[Bash: x]\n\n[Bash gave: a b c (3 lines)]\n\n[Read]\n\n[Read failed: gone]\n\n"
        "[it gave: nothing]")


@pytest.mark.parametrize("native", [True, False])
def test_a_result_without_its_call_is_told_as_text(native):
    rendering = ccproxy.Rendering("verbose", native)
    message = fold([start(), *rendering.events([*own_result(0, "t1", "x"), *text(1, "y")])])
    assert [b["text"] for b in message.content] == ["```\nx\n```", "\n\ny"]


def test_a_call_has_its_input_at_its_start_and_in_pieces():
    events = ccproxy.Rendering("verbose", True).events([
        *text(0, "a"), *own_call(1, "t1", "T", '{"a"', ': 1}'), *own_result(2, "t1", "x"),
        *text(3, "b")])
    first, delta = [e for e in events if e["index"] == 1][:2]
    assert first["content_block"]["input"] == {"a": 1}
    assert delta["delta"] == {"type": "input_json_delta", "partial_json": '{"a": 1}'}
    message = fold([start(), *events])
    assert message.content[1]["input"] == {"a": 1} and message.content[3]["text"] == "\n\nb"


def test_blocks_keep_their_order_and_get_new_numbers():
    events = [*thinking(0, "hm"), *text(1, "a"), *own_call(2, "t1", "T", "{}"),
              *call(3, "c1", "mine", '{"a": 1}'), *own_result(4, "t1", "x"), *text(5, "b")]
    told = ccproxy.Rendering("text", False).events([start(), *events, *end()])
    starts = [e for e in told if e["type"] == "content_block_start"]
    assert [(e["index"], e["content_block"]["type"]) for e in starts] == [
        (0, "thinking"), (1, "text"), (2, "tool_use"), (3, "text")]
    assert [b.get("text") for b in fold(told).content if b["type"] == "text"] == ["a", "\n\nb"]


def test_a_fence_or_tag_cannot_be_ended_by_what_a_tool_gave():
    shown = ccproxy.markdown({"type": "mcp_tool_result", "is_error": False, "content": [
        {"type": "text", "text": "a\n````\nb"}]}, "")
    assert shown.startswith("`````\n") and shown.endswith("\n`````")
    shown = ccproxy.tagged({"type": "mcp_tool_result", "tool_use_id": 't"1', "is_error": True,
                            "content": [{"type": "text", "text": "</tool_result>&"}]}, "")
    assert shown == ("<tool_result tool_use_id='t\"1' is_error=\"true\">&lt;/tool_result&gt;&amp;"
                     "</tool_result>")


# -- several API messages as one

def agent_reply(lines, **more):
    """(reply, events) of an agent's lines; the client has a tool `mine`."""
    asked = dataclasses.replace(ccproxy.Turn("m", (HI_AGENT,), tools=({"name": "mine"},), **more),
                                launch=ccproxy.Launch(True))
    reply, events = ccproxy.AgentReply(asked), []
    for line in lines:
        events += reply.feed(line)
    return reply, events


HI_AGENT = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
MINE = ccproxy.PREFIX + "mine"
DUE = {"type": "tools_call", "id": "c1"}


def said_by(events, parent=None):
    return [{"type": "stream_event", "event": event, "parent_tool_use_id": parent}
            for event in events]


def ran(ident, content="ok", **more):
    return {"type": "user", "parent_tool_use_id": None, "message": {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": ident, "content": content, **more}]}}


RESULT = {"type": "result", "subtype": "success", "is_error": False}


def test_messages_of_a_turn_become_one_with_new_numbers_and_the_usage_of_all():
    reply, events = agent_reply([
        *said_by([start(input_tokens=10, cache_read_input_tokens=3, output_tokens=1, tier="a"),
                  *text(0, "a"), *call(1, "t1", "Bash", '{"command": "x"}'),
                  *end("tool_use", output_tokens=7)]),
        *said_by([start(), *text(0, "inner"), *end()], "t1"), ran("t1", "out"),
        *said_by([start(input_tokens=20, output_tokens=1, tier="b"), *text(0, "b"),
                  *end(output_tokens=5)]), RESULT])
    assert reply.done and reply.reusable and not reply.failed
    assert [e["type"] for e in events].count("message_start") == 1
    assert events[-1] == {"type": "message_stop"}
    message = fold(events)
    assert [b["type"] for b in message.content] == ["text", "mcp_tool_use", "mcp_tool_result",
                                                    "text"]
    assert message.content[1]["input"] == {"command": "x"} and message.stop_reason == "end_turn"
    assert message.content[2]["content"] == [{"type": "text", "text": "out"}]
    assert message.usage == {"input_tokens": 30, "cache_read_input_tokens": 3, "output_tokens": 12,
                             "tier": "b"}
    indexes = [e["index"] for e in events if e["type"] == "content_block_start"]
    assert indexes == [0, 1, 2, 3]


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_null_in_the_usage_of_a_message_counts_for_nothing(at):
    nothing = {"cache_read_input_tokens": None}
    first = said_by([start(input_tokens=10, cache_read_input_tokens=3, output_tokens=1), *text(
        0, "a"), *call(1, "t1", "Bash", "{}"), *end("tool_use", output_tokens=7)])
    second = said_by([
        start(input_tokens=10, output_tokens=1, **nothing if at == "start" else {
            "cache_read_input_tokens": 4}),
        *text(0, "b"), *end(output_tokens=5, **nothing if at == "end" else {})])
    message = fold(agent_reply([*first, ran("t1"), *second, RESULT])[1])
    assert message.usage == {"input_tokens": 20, "output_tokens": 12,
                             "cache_read_input_tokens": 3 if at == "start" else 7}


@pytest.mark.parametrize("name, words, failed", [
    ("agent-permission-allow", "File created successfully", False),
    ("agent-permission-deny", "User said no", True)])
def test_a_recorded_turn_of_an_agents_is_one_message_with_the_clis_own_usage(name, words, failed):
    lines = from_cli(name)
    reply, events = agent_reply(lines)
    message, result = fold(events), lines[-1]
    assert reply.done and reply.reusable and result["type"] == "result"
    use, ran_, said = message.content
    assert (use["type"], use["name"], use["input"]["content"]) == ("mcp_tool_use", "Write", "hi")
    assert (ran_["type"], ran_["tool_use_id"], ran_["is_error"]) == (
        "mcp_tool_result", use["id"], failed)
    assert words in ccproxy.result_text(ran_) and words in said["text"]
    assert message.usage == {       # as the CLI's result said it, before it was trimmed
        "input_tokens": 20, "output_tokens": 14, "cache_read_input_tokens": 0}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("first", ["own", "mine"])
def test_the_message_ends_when_a_client_tool_is_due(early, first):
    blocks = [call(0, "t1", "Write", "{}"), call(1, "c1", MINE, '{"a": 1}')]
    if first == "mine":
        blocks = [call(0, "c1", MINE, '{"a": 1}'), call(1, "t1", "Write", "{}")]
    *rest, stop = said_by([start(), *blocks[0], *blocks[1], *end("tool_use")])
    lines = [*rest, DUE, stop] if early else [*rest, stop, DUE]
    if first == "own":
        lines.insert(lines.index(DUE), ran("t1"))
    for at, line in enumerate(lines):
        reply, events = agent_reply(lines[:at + 1])
        assert reply.done == (at == len(lines) - 1)
    message = fold(events)
    assert reply.reusable and message.stop_reason == "tool_use"
    [mine] = [b for b in message.content if b["type"] == "tool_use"]
    assert (mine["name"], mine["input"]) == ("mine", {"a": 1})
    assert [b["type"] for b in message.content] == (
        ["tool_use"] if first == "mine" else ["mcp_tool_use", "tool_use", "mcp_tool_result"])
    assert list(reply.owed) == (["t1"] if first == "mine" else [])
def test_what_came_of_an_own_call_after_a_clients_result_is_told_in_the_next_message():
    lines = [ran("c1", "the client's"), ran("t1", [{"type": "text", "text": "x"},
                                                   {"type": "image", "source": {}}]),
             {"type": "system", "subtype": "status", "status": "requesting"},
             *said_by([start(), *text(0, "b"), *end()]), RESULT]
    asked = ccproxy.Turn("m", ({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": []}]},), launch=ccproxy.Launch(True))
    reply = ccproxy.AgentReply(asked)
    reply.owed = {"t1": {"type": "mcp_tool_use", "id": "t1", "name": "Read", "server_name": "s",
                         "input": {"a": 1}}}
    message = fold([event for line in lines for event in reply.feed(line)])
    assert reply.done and [b["type"] for b in message.content] == [
        "mcp_tool_use", "mcp_tool_result", "text"]
    assert message.content[0]["input"] == {"a": 1} and not reply.owed
    assert message.content[1]["content"] == [{"type": "text", "text": "x"},
                                             {"type": "text", "text": "[image]"}]


@pytest.mark.parametrize("subtype", ["error_max_turns", "error_max_budget_usd"])
def test_a_limit_of_the_turn_is_a_pause(subtype):
    reply, events = agent_reply([
        *said_by([start(), *call(0, "t1", "Bash", "{}"), *end("tool_use")]), ran("t1"),
        {"type": "result", "subtype": subtype, "is_error": True}])
    assert reply.done and not reply.reusable and fold(events).stop_reason == "pause_turn"


@pytest.mark.parametrize("lines, status, words", [
    ([{"type": "assistant", "error": "rate_limit", "message": {
        "model": "<synthetic>", "content": [{"type": "text", "text": "API Error: 429 slow down"}]}},
      {**RESULT, "is_error": True}], 429, "slow down"),
    ([RESULT], 502, "without an answer"),
    ([*said_by([start(), *text(0, "a")]), *said_by([start()])], 502, "began its answer again"),
    ([*said_by([start(), *text(0, "a")]), {"type": "system", "status": "requesting"}], 502,
     "broke off")])
def test_a_turn_of_an_agents_that_fails_says_why(lines, status, words):
    reply, _ = agent_reply(lines)
    assert reply.failed.status == status and words in reply.failed.message


@pytest.mark.parametrize("reason", ["max_tokens", "refusal", "model_context_window_exceeded"])
def test_a_message_that_was_cut_off_ends_an_agents_turn_at_once(reason):
    reply, events = agent_reply(said_by([start(), *text(0, "a"), *end(reason)]))
    assert reply.done and not reply.reusable and fold(events).stop_reason == reason


def test_an_agent_is_not_silent_while_its_tools_run():
    lines = said_by([start(), *call(0, "t1", "Bash", "{}"), *end("tool_use")])
    assert not agent_reply(lines[:-2])[0].working and agent_reply(lines)[0].working
    assert not agent_reply([*lines, ran("t1"), *said_by([start()])])[0].working


def test_names_of_client_tools_hold_behind_the_prefix():
    tools = tuple({"name": name, "description": "d", "input_schema": {
        "type": "object", "properties": [], "required": ["a"]}} for name in ("a b", "x" * 120, "ok"))
    turn_ = ccproxy.Turn("m", tools=tools, launch=ccproxy.Launch(True))
    listed = ccproxy.wire_tools(turn_)
    assert all(len(ccproxy.PREFIX + t["name"]) <= 128 for t in listed) and listed[2]["name"] == "ok"
    reply = ccproxy.AgentReply(dataclasses.replace(turn_, messages=(HI_AGENT,)))
    assert reply._names == {ccproxy.PREFIX + t["name"]: own["name"]
                            for t, own in zip(listed, tools)}
    answer = ccproxy.mcp_answer({"method": "tools/list"}, listed, whole=True)
    for told in answer["mcp_response"]["result"]["tools"]:
        assert told["description"] == "d"
        assert told["inputSchema"] == {"type": "object", "required": ["a"]}
    request = ccproxy.settings_request(dataclasses.replace(turn_, fields={
        "tool_choice": {"type": "tool", "name": "ok"}}), None)["settings"]
    body = json.loads(request["env"]["CLAUDE_CODE_EXTRA_BODY"])
    assert body == {"tool_choice": {"type": "tool", "name": MINE.replace("mine", "ok")}}


def test_a_forced_choice_would_never_end_and_is_reported(tmp_path):
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    with agency(tmp_path) as url:
        for choice, ignored in (({"type": "any"}, "tool_choice"), ({"type": "none"}, "tool_choice"),
                                ({"type": "auto"}, None), ({"type": "tool", "name": "look"}, None)):
            said = Agent(url, "messages", {"tools": tools, "tool_choice": choice}).ask("hi")
            assert said.status == 200 and said.headers["X-CC-Ignored-Params"] == ignored


def test_a_clients_tool_in_an_agents_turn_goes_there_and_back(tmp_path):
    with agency(tmp_path, **UNASKED) as url:
        agent = Agent(url, "chat", {"tools": [tool("look")]})
        said = agent.ask('/call look {"a": 1}', streamed=True)
        assert said.finish == "tool_calls" and said.calls[0][1:] == ("look", {"a": 1})
        told = agent.ask(*agent.results((said.calls[0][0], "/run found")))
        assert told.text == "I will run it.\n\nran: found"
        assert told.headers["X-CC-Conversation"] == "continued"


# -- permissions

def asking(url, pool, *said, **more):
    """An agent's turn that waits for a permission: (its future answer, the question)."""
    before = {q["id"] for q in listing(url)["data"]}
    future = pool.submit(Agent(url, **more).ask, *(said or ("/run ls",)))
    assert until(lambda: [q for q in listing(url)["data"] if q["id"] not in before])
    return future, [q for q in listing(url)["data"] if q["id"] not in before][0]


def test_a_question_is_told_listed_shown_and_answered_once(tmp_path):
    with agency(tmp_path) as url, Listener(url) as one, Listener(url) as two, (
            ThreadPoolExecutor(2)) as pool:
        future, asked = asking(url, pool, Workspace="web")
        assert (asked["tool_name"], asked["input"]) == ("Bash", {"command": "ls"})
        assert (asked["status"], asked["workspace"]) == ("pending", "web")
        assert asked["expires_at"] - asked["created_at"] == 120
        assert str(tmp_path) not in json.dumps(asked)
        assert listing(url, f"/permissions/{asked['id']}") == asked
        with Listener(url) as late:
            assert until(lambda: late.events == [("request", asked)])
            status, _, said = permit(url, asked["id"], behavior="allow")
            assert (status, said["status"]) == (200, "allowed")
            assert future.result(5).text == "I will run it.\n\nran: ls"
            for listener in (one, two, late):
                assert until(lambda: len(listener.events) == 2)
                assert listener.events[1] == ("resolved", {**asked, "status": "allowed"})
        again = permit(url, asked["id"], behavior="deny")
        assert again[0] == 409 and "already allowed" in again[2]["error"]["message"]
        assert listing(url)["data"] == []
        assert listing(url, f"/permissions/{asked['id']}")["status"] == "allowed"


@pytest.mark.parametrize("body, text", [
    ({"behavior": "deny"}, "The operator has denied Bash."),
    ({"behavior": "deny", "message": "not today"}, "not today"),
    ({"behavior": "allow", "updatedInput": {"command": "pwd"}}, "ran: pwd"),
    ({"behavior": "allow", "scope": "conversation"}, "ran: ls"),
    ({"behavior": "allow", "scope": "once", "message": None}, "ran: ls")])
def test_an_answer_may_deny_with_words_or_change_the_input(tmp_path, body, text):
    with agency(tmp_path) as url, Listener(url, lambda question: body) as listener:
        assert Agent(url).ask("/run ls").text == f"I will run it.\n\n{text}"
        assert until(lambda: listener.status == 200)


@pytest.mark.parametrize("body, param", [
    ({}, "behavior"), ({"behavior": "maybe"}, "behavior"), ({"behavior": True}, "behavior"),
    ({"behavior": "allow", "updatedInput": []}, "updatedInput"),
    ({"behavior": "allow", "scope": "ever"}, "scope"), ({"behavior": "allow", "x": 1}, "x"),
    ({"behavior": "deny", "message": 1}, "message"),
    ({"behavior": "deny", "updatedInput": {}}, "updatedInput"),
    ({"behavior": "deny", "scope": "once"}, "scope"),
    ({"behavior": "allow", "scope": "conversation", "updatedInput": {}}, "scope")])
def test_an_answer_that_says_nothing_clear_is_a_400_and_the_question_stays(tmp_path, body, param):
    with agency(tmp_path) as url, Listener(url), ThreadPoolExecutor(1) as pool:
        future, asked = asking(url, pool)
        status, _, said = post(url, f"/permissions/{asked['id']}/respond", body, AGENT_KEY)
        assert (status, said["error"]["param"]) == (400, param)
        assert permit(url, asked["id"], behavior="allow")[0] == 200
        assert future.result(5).status == 200


def test_odd_requests_about_permissions_are_errors(tmp_path):
    with agency(tmp_path) as url:
        for method, path, status in (
                ("GET", "/permissions/none", 404), ("POST", "/permissions/none/respond", 404),
                ("POST", "/permissions/none", 404), ("GET", "/permissions/none/respond", 404),
                ("DELETE", "/permissions/none", 405), ("POST", "/permissions/stream", 405),
                ("GET", "/sessions/none", 404), ("DELETE", "/sessions/none", 404)):
            body = {"behavior": "allow"} if method == "POST" else None
            answer = ask(url, f"{method} {path}", "x-api-key: k", body=body)
            assert answer.status == status, (method, path)
            assert answer.error["message"]
        answer = ask(url, "POST /permissions/x/respond", "x-api-key: k", "content-type: text/plain",
                     body=b"{}")
        assert answer.status == 415


def test_nobody_there_and_no_answer_in_time_both_deny_with_words_that_help(tmp_path):
    with agency(tmp_path, permission_timeout=0.3) as url:
        assert "ccproxy.py approve" in Agent(url).ask("/run ls").text
        with Listener(url) as listener:
            assert "nobody approved it within 0.3 s" in Agent(url).ask("/run ls").text
            assert until(lambda: [event for event, _ in listener.events] == ["request", "expired"])
            asked = listener.events[1][1]
            assert asked["status"] == "expired"
            assert permit(url, asked["id"], behavior="allow")[0] == 409
        assert until(lambda: not listing(url, "/status")["permissions"]["listeners"])
        assert "ccproxy.py approve" in Agent(url).ask("/run ls").text


def test_a_client_that_goes_takes_its_question_along(tmp_path):
    with agency(tmp_path) as url, Listener(url) as listener:
        body = {"model": "echo", "messages": [{"role": "user", "content": "/run ls"}],
                "stream": True}
        connection, response = connect(url, "/sdk/v1/chat/completions", body,
                                       {**AGENT_KEY, "X-Request-Id": "mine"})
        assert until(lambda: listener.events)
        assert listener.events[0][1]["request_id"] == "mine"
        assert post(url, "/v1/requests/mine", None, AGENT_KEY, "DELETE")[0] == 200
        assert until(lambda: [q["status"] for _, q in listener.events] == ["pending", "cancelled"])
        connection.close()
        response.close()
        assert listing(url)["data"] == []


def test_listeners_are_few_and_do_not_delay_the_end(tmp_path):
    with agency(tmp_path, drain_timeout=30) as url:
        with contextlib.ExitStack() as stack:
            for _ in range(ccproxy.LISTENERS):
                stack.enter_context(Listener(url))
            answer = ask(url, "GET /permissions/stream", "x-api-key: k")
            assert answer.status == 429
        assert until(lambda: not listing(url, "/status")["permissions"]["listeners"])
        listener = Listener(url)
        listener.__enter__()
    listener.thread.join(5)                 # the proxy has ended the stream, and itself
    assert not listener.thread.is_alive()


def test_listeners_that_come_and_go_while_questions_are_asked_leave_no_place_taken(tmp_path):
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": "check", "arguments": {"tool_name": "x", "input": {}}}}
    with agency(tmp_path, permission_timeout=0.02) as url, ThreadPoolExecutor(2) as pool:
        until_ = time.monotonic() + 1.5

        def ask_on():
            while time.monotonic() < until_:
                post(url, "/mcp/permission/check", asked, AGENT_KEY)
        asking_ = [pool.submit(ask_on) for _ in range(2)]
        while time.monotonic() < until_:
            sock = http_connect(url, request("GET /permissions/stream", "x-api-key: k"))
            sock.recv(400)
            sock.close()
        assert all(future.result(9) is None for future in asking_)
        assert until(lambda: not listing(url, "/status")["permissions"]["listeners"])


def test_a_listener_is_told_now_and_then_that_the_proxy_lives(tmp_path):
    with agency(tmp_path, heartbeat=0.05) as url:
        connection, response = connect(url, "/permissions/stream", None, AGENT_KEY, "GET")
        assert [response.readline() for _ in range(6)] == [
            b": listening\n", b"\n", b":\n", b"\n", b":\n", b"\n"]
        response.close()
        connection.close()


def test_the_same_question_as_a_tool_of_mcp(tmp_path):
    def rpc(method, params=None, **more):
        status, _, said = post(url, "/mcp/permission/check", {
            "jsonrpc": "2.0", "id": 1, "method": method, "params": params, **more}, AGENT_KEY)
        assert (status, said["id"]) == (200, 1)
        return said["result"] if "result" in said else said["error"]
    with agency(tmp_path) as url:
        said = rpc("initialize", {"protocolVersion": "2024-11-05"})
        assert said["protocolVersion"] == "2024-11-05" and "tools" in said["capabilities"]
        assert [t["name"] for t in rpc("tools/list")["tools"]] == ["check"]
        assert rpc("ping") == {}
        assert rpc("resources/list")["code"] == -32601
        assert rpc("tools/call", {"name": "other"})["code"] == -32602
        said = rpc("tools/call", {"name": "check", "arguments": {"tool_name": "x"}})
        assert said["code"] == -32602 and "params.arguments.input" in said["message"]
        for name in ("tool_name", "tool_use_id"):
            said = rpc("tools/call", {"name": "check", "arguments": {name: "x" * 257}})
            assert said["code"] == -32602 and f"params.arguments.{name}" in said["message"]
        asked = {"name": "check", "arguments": {"tool_name": "Bash", "input": {"command": "ls"}}}
        verdict = json.loads(rpc("tools/call", asked)["content"][0]["text"])
        assert verdict["behavior"] == "deny" and "ccproxy.py approve" in verdict["message"]
        with Listener(url, lambda question: {"behavior": "allow", "scope": "conversation"}):
            verdict = json.loads(rpc("tools/call", asked)["content"][0]["text"])
        assert verdict == {"behavior": "allow", "updatedInput": {"command": "ls"}}
        notice = ask(url, "POST /mcp/permission/check", "x-api-key: k", body={
            "jsonrpc": "2.0", "method": "notifications/initialized"})
        assert (notice.status, notice.body) == (202, b"")
        for body, param in (({}, "method"), ({"method": 1, "id": 1}, "method"),
                            ({"method": "ping", "id": 1, "params": []}, "params")):
            answer = ask(url, "POST /mcp/permission/check", "x-api-key: k", body=body)
            assert (answer.status, answer.error["param"]) == (400, param)


# -- approve

ASKED = {"id": "perm_1", "tool_name": "Bash", "input": {"command": "ls"}, "workspace": "web",
         "description": None, "decision_reason": None}


@pytest.mark.parametrize("more, shown", [
    ({}, "Bash in web\n    ls"),
    ({"workspace": "", "description": "List\n[y]es?", "decision_reason": "not allowed",
      "always": "this very call"},
     "Bash in its own directory\n    ls\nabout: List [y]es?\nasked because: not allowed\n"
     "always means: this very call"),
    ({"input": {"command": "ls", "args": ["; rm"]}},
     'Bash in web\n    ls\n    {\n      "args": [\n        "; rm"\n      ]\n    }'),
    ({"tool_name": "Edit", "input": {"file_path": "/f\n[y]es?", "old_string": "--a",
                                     "new_string": "++b", "replace_all": True}},
     'Edit in web\n    /f\\n[y]es?\n    @@ -1 +1 @@\n    ---a\n    +++b\n    {\n      '
     '"replace_all": true\n    }'),
    ({"tool_name": "MultiEdit", "input": {"file_path": "/f", "edits": [
        {"old_string": "a", "new_string": "b", "replace_all": True}]}},
     'MultiEdit in web\n    /f\n    @@ -1 +1 @@\n    -a\n    +b\n    {"replace_all": true}'),
    ({"input": {"command": "a\n\x1b]0;x\x07b\u202e"}},
     "Bash in web\n    a\n    \\x1b]0;x\\x07b\\x202e"),
    ({"tool_name": "Edit", "input": {"file_path": "/f", "old_string": "a\nb\nc",
                                     "new_string": "a\nB\nc"}},
     "Edit in web\n    /f\n    @@ -1,3 +1,3 @@\n     a\n    -b\n    +B\n     c"),
    ({"tool_name": "Edit", "input": {"file_path": "/f", "notebook_path": "/g", "old_string": "a\n",
                                     "new_string": "a\r\n"}},
     'Edit in web\n    /f\n    -"a\\n"\n    +"a\\r\\n"\n    {\n      "notebook_path": "/g"\n    }'),
    ({"tool_name": "Write", "input": {"file_path": "/f", "content": "x\ny"}},
     "Write in web\n    /f\n    @@ -0,0 +1,2 @@\n    +x\n    +y"),
    ({"tool_name": "MultiEdit", "input": {"file_path": "/f", "edits": [5]}},
     'MultiEdit in web\n    /f\n    {\n      "edits": [\n        5\n      ]\n    }'),
    ({"tool_name": "Odd", "input": {"a": [1, "\u00e9"]}},
     'Odd in web\n    {\n      "a": [\n        1,\n        "\u00e9"\n      ]\n    }')])
def test_a_question_is_shown_so_that_it_can_be_judged_and_does_no_harm(more, shown):
    assert ccproxy.shown_question({**ASKED, **more}) == shown


def test_a_very_long_question_has_its_end_and_says_what_is_left_out():
    command = "x\n" * 4999 + "rm -rf ~"
    lines = ccproxy.shown_question({**ASKED, "input": {"command": command}}).splitlines()
    assert len(lines) == 2002 and lines[-1].strip() == "rm -rf ~"
    assert lines[1001].strip() == "... 3000 MORE LINES ARE NOT SHOWN ..."
    whole = "a" * 3000
    assert whole in ccproxy.shown_question({**ASKED, "always": whole})


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_approve_asks_in_a_terminal_and_sees_what_others_answer(tmp_path):
    with agency(tmp_path) as url, terminal(tmp_path, url) as (read, write), (
            ThreadPoolExecutor(2)) as pool:
        read(f"listening at {url}")
        future, _ = asking(url, pool, "/run one", Workspace="web")
        assert "Bash in web\n    one\n" in read("conversation? ")
        write("what\n")
        read("y, n or a? ")
        write("n ask me later\n")
        assert "ask me later" in future.result(5).text
        read("(Bash: denied)")
        future, asked = asking(url, pool, "/run two")
        other, _ = asking(url, pool, "/run three")
        read("conversation? ")
        assert permit(url, asked["id"], behavior="allow")[0] == 200
        assert "ran: two" in future.result(5).text
        assert "three" in read("conversation? ")        # the next one, without a key pressed
        write("y\n", 0)
        read("(that came too early) y, n or a? ")       # it may have been meant for the other
        for line in ("a moment please", "y no wait"):
            write(line + "\n")
            read("y, n or a? ")
        write("a\n")
        assert "ran: three" in other.result(5).text


def test_approve_says_when_it_is_refused_or_nobody_is_there(tmp_path):
    with agency(tmp_path) as url:
        told = run(tmp_path, "approve", "--url", url, "--key", "wrong")
        assert told.returncode == 1 and "a valid key is needed" in told.stderr
    told = run(tmp_path, "approve", "--url", "http://127.0.0.1:9", "--key", "k")
    assert told.returncode == 1 and "cannot reach http://127.0.0.1:9" in told.stderr
    half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n30\r\nevent: re"
    for answer in (b"SSH-2.0-x\r\n", half, b"HTTP/1.1 502 Bad\r\nContent-Length: 50\r\n\r\n<html>"):
        with Odd(lambda sock: sock.sendall(answer) or False) as odd:
            with subprocess.Popen([sys.executable, ccproxy.__file__, "approve", "--url", odd.url],
                                  stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                  stderr=subprocess.PIPE, env=environment(tmp_path)) as process:
                assert f"cannot reach {odd.url}" in process.stderr.readline()
                process.stdin.close()       # it listens on, until that
                assert process.wait(5) == 1 and process.stderr.read() == ""


# -- sessions

def test_a_session_continues_by_its_name_alone(tmp_path):
    with agency(tmp_path) as url:
        for number, kind in enumerate(("new", "continued", "continued")):
            fields = {"session_id": "mine"} if number else ()
            headers = {} if number else {"Session": "mine"}
            said = Agent(url, "chat", fields, **headers).ask(f"q{number}")
            assert (said.text, said.headers["X-CC-Conversation"]) == (f"q{number}", kind)
            assert said.headers["X-CC-Session"] == "mine"
        [session] = listing(url, "/sessions")["data"]
        assert session == listing(url, "/v1/sessions/mine")
        assert (session["id"], session["object"], session["workspace"]) == ("mine", "session", None)
        assert post(url, "/sessions/mine", None, AGENT_KEY, "DELETE")[2] == {
            "id": "mine", "object": "session", "deleted": True}
        assert listing(url, "/sessions")["data"] == []
        assert not os.listdir(tmp_path / "state" / "sessions")
        assert Agent(url, Session="mine").ask("q").headers["X-CC-Conversation"] == "new"


def test_a_session_is_resumed_by_another_proxy_in_its_own_directory(tmp_path):
    fake, homes = noted_stand_in(tmp_path), []
    for kind in ("new", "resumed"):
        with agency(tmp_path, claude=fake.path) as url:
            said = Agent(url, Session="mine").ask("hi")
            assert (said.text, said.headers["X-CC-Conversation"]) == ("hi", kind)
            if os.path.isdir("/proc/self"):
                homes.append(os.readlink(f"/proc/{fake.pids[-1]}/cwd"))
    assert len(set(homes)) <= 1
    if homes:
        assert os.path.dirname(homes[0]) == str(tmp_path / "state" / "sessions")


def test_a_session_belongs_to_its_workspace(tmp_path):
    with agency(tmp_path) as url:
        assert Agent(url, Session="s", Workspace="web").ask("hi").status == 200
        said = Agent(url, Session="s").ask("hi")
        assert said.headers["X-CC-Workspace"] == "web"
        said = Agent(url, Session="s", Workspace="docs").ask("hi")
        assert said.status == 409 and "another workspace" in said.raw["error"]["message"]
    with agency(tmp_path, workspaces={"docs": str(tmp_path / "docs")}) as url:
        assert Agent(url, Session="s").ask("hi").status == 409      # the operator took it away


def test_a_session_never_goes_on_with_another_permission_mode_or_prompt(tmp_path):
    models = {"free": {"model": "echo", "permission_mode": "bypassPermissions"}, "asked": "echo"}
    with agency(tmp_path, models=models, i_am_sandboxed=True) as url:
        told = []
        for model, system in (("free", "S"), ("free", "S"), ("asked", "S"), ("asked", "T")):
            agent = Agent(url, "messages", {"model": model, "system": system}, Session="s")
            said = agent.ask("/run ls")
            told.append((said.headers["X-CC-Conversation"], "ran: ls" in said.text))
        assert told == [("new", True), ("continued", True), ("resumed", False), ("resumed", False)]
        assert until(lambda: listing(url, "/status")["processes"]["all"] == 1)


def test_a_session_that_went_on_elsewhere_is_resumed_and_a_deleted_one_is_new(tmp_path):
    with agency(tmp_path) as one, agency(tmp_path) as two:
        kinds = [Agent(url, Session="s").ask("hi").headers["X-CC-Conversation"]
                 for url in (one, one, two, one, one)]
        assert kinds == ["new", "continued", "resumed", "resumed", "continued"]
        assert post(two, "/sessions/s", None, AGENT_KEY, "DELETE")[0] == 200
        assert Agent(one, Session="s").ask("hi").headers["X-CC-Conversation"] == "new"


def test_a_window_with_a_session_that_sends_only_what_is_new_is_asked_for_the_workspace(tmp_path):
    with agency(tmp_path, ask_workspace=True) as url:
        told = [Agent(url, Session="s").ask(text) for text in (
            "the task", "?", "docs", "more", "web")]
        assert [said.text.startswith(ccproxy.WHICH) for said in told[:2]] == [True, True]
        assert [said.text for said in told[2:]] == ["the task", "more", "web"]
        assert [said.headers["X-CC-Workspace"] for said in told] == [None, None] + ["docs"] * 3
        assert Agent(url, Session="u").ask("old task").text.startswith(ccproxy.WHICH)
        assert Agent(url, Session="u", Workspace="web").ask("task").text == "task"
        assert post(url, "/sessions/u", None, AGENT_KEY, "DELETE")[0] == 200
        assert Agent(url, Session="u").ask("look at the docs").text.startswith(ccproxy.WHICH)
        whole = Agent(url, Session="v")
        whole.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert whole.ask("task").text.startswith(ccproxy.WHICH)
        assert Agent(url, Session="v").ask("web").text == "task"


def test_an_old_session_is_not_deleted_while_its_turn_runs(tmp_path):
    with agency(tmp_path) as url, ThreadPoolExecutor(1) as pool:
        Agent(url, Session="s").ask("hi")
        turn_ = pool.submit(Agent(url, Session="s").ask, "/slow a b c d e f")
        time.sleep(0.3)
        db = sqlite3.connect(tmp_path / "state" / "store.db")
        with db:
            db.execute("UPDATE sessions SET used_at = 1")
        db.close()
        assert post(url, "/sessions/s", None, AGENT_KEY, "GET")[0] == 404
        assert turn_.result(9).status == 200
        assert Agent(url, Session="s").ask("hi").headers["X-CC-Conversation"] == "continued"


@pytest.mark.parametrize("busy, timeout, status", [
    ("reject", 9, 409), ("wait", 9, 200), (None, 9, 200), (None, 0.2, 409)])
def test_a_session_plays_one_turn_at_a_time(tmp_path, busy, timeout, status):
    with agency(tmp_path, queue_timeout=timeout) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(Agent(url, Session="s").ask, "/slow a b c d e f g h")
        assert until(lambda: listing(url, "/status")["processes"]["all"])
        time.sleep(0.2)
        more = {"Session_Busy": busy} if busy else {}
        said = Agent(url, Session="s", **more).ask("second")
        assert said.status == status, said.raw
        if status == 409:
            assert "busy" in said.raw["error"]["message"]
        assert first.result(9).status == 200
        assert Agent(url, Session="s").ask("third").headers["X-CC-Conversation"] == "continued"


def test_sessions_are_their_callers_and_go_when_they_are_old(tmp_path):
    store = ccproxy.Store(str(tmp_path), 30, 2**20, 2**20)

    async def work():
        sessions = ccproxy.Sessions(store, 30, str(tmp_path / "sessions"))
        own, other = (tmp_path / "sessions" / name for name in ("agent-x", "agent-y"))
        foreign = tmp_path / "agent-smith"      # the operator's own
        for path in (own, other, foreign):
            path.mkdir(parents=True)
        await sessions.keep("a", "s", "", str(own), "uuid")
        await sessions.keep("a", "t", "", str(foreign), "uuid")
        assert await sessions.find("b", "s") is None and not await sessions.list("b")
        assert not await sessions.delete("b", "s")
        assert (await sessions.find("a", "s"))["cli"] == "uuid"
        assert await sessions.delete("a", "t") and foreign.exists() and own.exists()
        await store.run(lambda: store._db.execute("UPDATE sessions SET used_at = used_at - 2592001"))
        assert await sessions.list("a") == [] and own.exists()
        assert await sessions.find("a", "s") is None and not own.exists()
        await sessions.keep("b", "s", "", str(other), "uuid")
        await store.run(lambda: store._db.execute("UPDATE sessions SET used_at = used_at - 2592001"))
        sessions._swept -= 3600                 # an hour later
        async with sessions.alone("b", "s", 1):         # its turn is running
            await sessions.find("c", "s")
            assert other.exists()
        sessions._swept -= 3600
        await sessions.find("c", "s")
        assert not other.exists() and foreign.exists()
        left = {name: tmp_path / "sessions" / name for name in ("agent-old", "agent-new",
                                                                "agent-home", "notes")}
        for name, path in left.items():
            path.mkdir()
            long_ago = time.time() - 3 * 86400 * (name != "agent-new")
            os.utime(path, (long_ago, long_ago))
        sessions._homes, sessions._swept = lambda: [str(left["agent-home"]), ""], 0
        await sessions.find("c", "s")
        assert [name for name, path in left.items() if not path.exists()] == ["agent-old"]
        await store.close()
    asyncio.run(work())


def test_unused_directories_go_also_where_another_proxy_removes_them_meanwhile(
        tmp_path, monkeypatch):
    scandir = os.scandir

    def raced(place):
        if place != str(tmp_path):
            return scandir(place)
        entries = sorted(scandir(place), key=lambda entry: entry.name)
        os.rmdir(entries[0].path)
        return entries
    for name in ("agent-a", "agent-b"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9, 1e9))
    monkeypatch.setattr(os, "scandir", raced)
    ccproxy.Sessions(None, 30, str(tmp_path))._remove_unused(set())
    assert os.listdir(tmp_path) == []


def test_what_the_cli_wrote_of_a_session_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    name, other = str(uuid.uuid4()), str(uuid.uuid4())
    folder = tmp_path / "projects" / "-x"
    (folder / name).mkdir(parents=True)
    for ident in (name, other):
        (folder / f"{ident}.jsonl").write_text("{}")
    store = ccproxy.Store(str(tmp_path / "state"), 30, 2**20, 2**20)

    async def work():
        sessions = ccproxy.Sessions(store, 30, str(tmp_path / "sessions"))
        await sessions.keep("a", "s", "web", str(tmp_path), "*")
        await sessions.delete("a", "s")
        assert len(os.listdir(folder)) == 3
        await sessions.keep("a", "s", "web", str(tmp_path), name)
        await sessions.keep("a", "s", "web", str(tmp_path), other)      # it began anew
        assert os.listdir(folder) == [f"{other}.jsonl"]
        await sessions.delete("a", "s")
        assert os.listdir(folder) == [] and tmp_path.exists()
        await store.close()
    asyncio.run(work())


def test_two_turns_of_a_session_never_play_at_once(tmp_path):
    store, playing, most = ccproxy.Store(str(tmp_path), 30, 2**20, 2**20), [0], [0]

    async def work():
        sessions = ccproxy.Sessions(store, 30, str(tmp_path))

        async def turn_of(number):
            async with sessions.alone("a", "s", 5):
                playing[0] += 1
                most[0] = max(most[0], playing[0])
                for _ in range(number % 3):
                    await asyncio.sleep(0)
                playing[0] -= 1

        async def impatient():
            with contextlib.suppress(ApiError, asyncio.TimeoutError):
                await asyncio.wait_for(turn_of(1), 0.0005)
        await asyncio.gather(*map(turn_of, range(200)), *(impatient() for _ in range(50)))
        assert most == [1] and not sessions._busy
        await store.close()
    asyncio.run(work())


@ALL
def test_a_session_takes_a_tools_result_alone(tmp_path, dialect):
    tools = {"chat": [tool("look")], "responses": [tool("look")["function"]],
             "messages": [{"name": "look", "input_schema": {"type": "object"}}]}[dialect]
    tools = [{"type": "function", **tools[0]}] if dialect == "responses" else tools

    def agent():
        return Agent(url, dialect, {"tools": tools}, Session="s")
    with agency(tmp_path, park_ttl=1.5) as url:
        said = agent().ask('/call look {"a": 1}')
        told = agent().ask(*agent().results((said.calls[0][0], "found")))
        assert (told.text, told.headers["X-CC-Conversation"]) == ("found", "continued")
        assert len(listing(url, "/sessions")["data"]) == 1
        for wrong in ("other", said.calls[0][0]):       # nobody waits for it
            told = agent().ask(*agent().results((wrong, "found")))
            assert told.status == 409 and "waits for no such tool result" in (
                told.raw["error"]["message"])
        said = agent().ask('/call look {"a": 1}')
        told = agent().ask(*agent().results(("other", "x")))
        assert told.status == 409 and said.calls[0][0] in told.raw["error"]["message"]
        more = {"messages": [{"type": "text", "text": "and"}]}.get(dialect, [])
        message = agent().results((said.calls[0][0], "found"))[0]
        if more:                            # a text beside the result
            message["content"] += more
        told = agent().ask(message)
        assert (told.text, told.headers["X-CC-Conversation"]) == (
            "found and" if more else "found", "continued")
        said = agent().ask('/call look {"a": 1}')
        assert until(lambda: not listing(url, "/status")["processes"]["parked"])
        told = agent().ask(*agent().results((said.calls[0][0], "late")))
        assert told.headers["X-CC-Conversation"] == "resumed"
        assert told.text == f"[The result of the tool call {said.calls[0][0]}] late"
        plain = Agent(url, dialect, {"tools": tools})
        assert plain.ask(*plain.results((said.calls[0][0], "found"))).status == 400


@ALL
@pytest.mark.parametrize("odd", [
    {"type": "mcp_tool_result", "content": 5}, {"type": "mcp_tool_result", "content": [5]},
    {"type": "mcp_tool_result", "content": [{"type": "text", "text": 5}]},
    {"type": "mcp_tool_use"}, {"type": "mcp_tool_use", "name": 5},
    {"type": "mcp_tool_use", "name": "x", "input": []}])
def test_an_odd_block_of_an_agents_own_is_a_400(tmp_path, dialect, odd, url):
    path = PATHS[dialect]
    for prefix in ("", "/sdk"):
        items = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [odd]},
                 {"role": "user", "content": "r"}]
        body = {"model": "echo", "max_tokens": 9,
                "input" if dialect == "responses" else "messages": items}
        answer = ask(url, "POST " + path, body=body)
        assert answer.status == 400 and "[1].content[0]" in answer.error["message"]


@pytest.mark.parametrize("told", [
    {"type": "mcp_tool_result", "tool_use_id": ["x"], "content": "plain text"},
    {"type": "mcp_tool_result", "tool_use_id": "x"},
    {"type": "mcp_tool_use", "id": 5, "name": "x", "text": 5}])
def test_blocks_of_an_agents_own_come_back_in_a_history_as_lines(url, told):
    items = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [told]},
             {"role": "user", "content": "r"}]
    assert http_post(url, items, "messages").text == "r"
    answer = http_post(url, [{"role": "user", "content": [told]}], "messages")
    assert answer.status == 400 and "are the assistant's" in answer.error["message"]


# -- processes

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux")
def test_the_family_of_a_process_has_its_orphans():
    mark = f"{ccproxy.MARK}=test.{random.random()}"
    name, _, value = mark.partition("=")
    seconds = str(7000 + random.randrange(100_000))
    shell = subprocess.Popen(["sh", "-c", f"(setsid sleep {seconds} &); sleep {seconds}; true"],
                             env={**os.environ, name: value}, start_new_session=True)

    def asleep():
        return {pid for pid in ccproxy.family(shell.pid, mark) if os.path.exists(f"/proc/{pid}")
                and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")}
    try:
        assert until(lambda: len(asleep()) == 2, 20), (shell.poll(), processes())
        assert len(ccproxy.family(shell.pid, "none=1")) == 1
        assert ccproxy.family(shell.pid, mark) == asleep()
    finally:
        for pid in (*ccproxy.family(shell.pid, mark), shell.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shell.wait()


def test_spares_wait_for_each_launch_in_use(tmp_path):
    with agency(tmp_path, warm=1, max_processes=8) as url:
        def spares():
            return listing(url, "/status")["processes"]["spare"]
        assert until(lambda: spares() == 1)
        for number, name in enumerate(("web", "docs", "web"), 2):
            assert Agent(url, Workspace=name).ask("hi").status == 200
            assert until(lambda: spares() == min(number, 3)), spares()


def test_an_agents_process_never_continues_a_chat_or_another_workspace(tmp_path):
    with agency(tmp_path) as url:
        agent = Agent(url, Workspace="web")
        agent.ask("one")
        for headers, prefix in ((AGENT_KEY, "/chat"), (AGENT_KEY, "/sdk"),
                                ({**AGENT_KEY, "X-CC-Workspace": "docs"}, "/sdk")):
            other = Agent(url)
            other.prefix, other.headers, other.messages = prefix, headers, agent.messages
            assert other.ask("two").headers["X-CC-Conversation"] == "rebuilt"
        assert agent.ask("two").headers["X-CC-Conversation"] == "continued"


# == The real CLI ==================================================================================

DIALECTS_REAL = ("chat", "messages")
MODES = [(dialect, streamed) for dialect in DIALECTS_REAL for streamed in (False, True)]
real_both_dialects = pytest.mark.parametrize("dialect", DIALECTS_REAL)


def real_text(value):
    return {"type": "text", "text": value}


def use(call, name, **arguments):
    return {"type": "tool_use", "id": call, "name": name, "input": arguments}


def real_result(call, *content, **more):
    return {"type": "tool_result", "tool_use_id": call, "content": list(content), **more}


def tool(name, **more):
    return {"type": "function", "function": {
        "name": name, "parameters": {"type": "object", "properties": {}}, **more}}


# -- 1. text

@pytest.mark.real_cli
@real_both_dialects
def test_every_turn_of_a_conversation_reaches_the_model_as_a_turn(real, dialect):
    system = {"chat": {}, "messages": {"system": [{"type": "text", "text": "Be brief."}]}}[dialect]
    client = Client(real.url, dialect, **{**system, "model": "gpt-4o"})
    client.messages += [{"role": "system", "content": "Be brief."}] * (dialect == "chat")
    kinds = []
    for turn in range(4):
        said = client.ask([real_text(f"hello {turn} "), real_text("é\u2028")], streamed=turn % 2 == 0)
        assert (said.status, said.text) == (200, "You said: é\u2028")
        kinds.append(said.headers["X-CC-Conversation"])
    assert kinds == ["new", "continued", "continued", "continued"]
    body = real.api.bodies[-1]
    assert len(real.api.bodies) == 4 and body["model"] == MODEL
    assert [block["text"] for block in body["system"]].count("Be brief.") == 1
    asked = [("user", [real_text(f"hello {turn} "), real_text("é\u2028")]) for turn in range(4)]
    answer = ("assistant", [real_text("You said: é\u2028")])
    assert heard(body) == [asked[0], answer, asked[1], answer, asked[2], answer, asked[3]]
    if dialect == "messages":
        client.messages[2] = {"role": "user", "content": "edited"}
        said = client.ask("end")
        assert (said.headers["X-CC-Conversation"], said.raw["model"]) == ("rebuilt", "gpt-4o")
        assert heard(real.api.bodies[-1]) == [
            asked[0], answer, ("user", [real_text("edited")]), answer, asked[2], answer, asked[3],
            answer, ("user", [real_text("end")])]


@pytest.mark.real_cli
def test_chat_contents_of_every_form_reach_the_model_on_every_role(real):
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    client = Client(real.url, "chat", tools=[tool("look")])
    said = client.ask(
        {"role": "developer", "content": [real_text("First.")]}, "one",
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [real_text("a"), real_text("b")]},
        {"role": "assistant", "content": [real_text("fine")]},
        {"role": "system", "content": "Second."},
        [{"type": "input_text", "text": "two"}])
    assert (said.status, said.headers["X-CC-Conversation"]) == (200, "rebuilt")
    body = real.api.bodies[0]
    assert body["system"][-1]["text"] == "First.\n\nSecond."
    assert heard(body) == [
        ("user", [real_text("one")]), ("assistant", [use("call_1", "look")]),
        ("user", [real_result("call_1", real_text("a"), real_text("b"))]),
        ("assistant", [real_text("fine")]), ("user", [real_text("two")])]


@pytest.mark.real_cli
def test_conversations_at_once_do_not_mix(real):
    def talk(number):
        client = Client(real.url, DIALECTS_REAL[number % 2], user=str(number))
        return [client.ask(f"number {number} turn {turn}", streamed=number > 0).text
                for turn in range(3)]
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(talk, range(3)))
    assert told == [[f"You said: number {n} turn {turn}" for turn in range(3)] for n in range(3)]
    for body in real.api.bodies:
        numbers = re.findall(r"number (\d)", json.dumps(heard(body)))
        assert len(set(numbers)) == 1


# -- 2. images and documents

def data_url(media, data):
    return f"data:{media};base64,{data}"


CALL_REAL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
PNG_REAL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
       "rkJggg==")
PDF_REAL = base64.b64encode(
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count "
    b"1>>endobj\n3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\ntrailer<</Root 1 0 R>>"
    b"\n%%EOF\n").decode()
IMAGE_REAL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG_REAL}}
IMAGE_URL = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
DOCUMENT_REAL = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf",
                                           "data": PDF_REAL}, "title": "a.pdf"}
NOTE = {"type": "document", "title": "a.txt", "source": {
    "type": "text", "media_type": "text/plain", "data": "a note"}}
MEDIA_REAL = [IMAGE_REAL, IMAGE_URL, DOCUMENT_REAL, NOTE]
CHAT_MEDIA = [
    {"type": "image_url", "image_url": {"url": data_url("image/png", PNG_REAL), "detail": "low"}},
    {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": data_url("application/pdf", PDF_REAL)}},
    {"type": "file", "file": {"filename": "a.txt", "file_data": data_url(
        "text/plain", base64.b64encode(b"a note").decode())}}]


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, parts", [("chat", CHAT_MEDIA), ("messages", MEDIA_REAL)])
def test_images_and_documents_reach_the_model_also_in_tool_results(real, dialect, parts):
    client = Client(real.url, dialect, tools=[tool("look")])
    called = {"role": "assistant", **({"content": None, "tool_calls": [CALL_REAL]} if dialect == "chat"
                                      else {"content": [use("c1", "look")]})}
    said = client.ask([real_text("see"), *parts], called,
                      *client.results(("c1", [real_text("found"), *parts])), streamed=True)
    assert (said.status, said.text) == (200, "You said: found")
    assert heard(real.api.bodies[0]) == [
        ("user", [real_text("see"), *MEDIA_REAL]), ("assistant", [use("c1", "look")]),
        ("user", [real_result("c1", real_text("found"), *MEDIA_REAL)])]
    assert not real.api.refusals


# -- 3. client tools

WEATHER_REAL = {"name": "get_weather", "description": "Weather\u200b of a city. " + "Long. " * 1000,
           "input_schema": {"type": "object", "properties": {"city": {"type": "string"}},
                            "required": ["city"]}}
CLOCK = {"name": "a_clock", "description": "Now.",
         "input_schema": {"type": "object", "properties": {}}}


def chat_tools(*tools):
    return [{"type": "function", "function": {
        "name": t["name"], "description": t["description"], "parameters": t["input_schema"]}}
        for t in tools]


@pytest.mark.real_cli
@real_both_dialects
def test_parallel_calls_are_parked_and_their_results_continue_the_same_process(real, dialect):
    tools = [WEATHER_REAL, CLOCK] if dialect == "messages" else chat_tools(WEATHER_REAL, CLOCK)
    image, failed = (CHAT_MEDIA[0], {}) if dialect == "chat" else (IMAGE_REAL, {"is_error": True})
    client = Client(real.url, dialect, tools=tools)
    for streamed in (True, False):      # Chat has no word for a failed result
        real.api.clear()
        said = client.ask('SAY CALL:get_weather ARGS:{"city": "Rome"} CALL:a_clock ARGS:{} '
                          'CALL:get_weather ARGS:{"city": "Oslo"}', streamed=streamed)
        assert said.text == "Let me look."
        assert said.finish in ("tool_calls", ("tool_use", None))
        assert [call[1:] for call in said.calls] == [
            ("get_weather", {"city": "Rome"}), ("a_clock", {}), ("get_weather", {"city": "Oslo"})]
        assert real.api.bodies[0]["tools"] == [WEATHER_REAL, CLOCK]
        first, second, third = [call[0] for call in said.calls]
        said = client.ask(*client.results((third, "cold"), (first, [real_text("sun"), image]),
                                          (second, "no", True)), streamed=streamed)
        assert said.headers["X-CC-Conversation"] == "continued"
        assert heard(real.api.bodies[1])[-2] == ("assistant", [
            real_text("Let me look."), use(first, "get_weather", city="Rome"), use(second, "a_clock"),
            use(third, "get_weather", city="Oslo")])
        role, blocks = heard(real.api.bodies[1])[-1]
        assert role == "user" and sorted(blocks, key=lambda b: b["tool_use_id"]) == [
            real_result(first, real_text("sun"), IMAGE_REAL), real_result(second, real_text("no"), **failed),
            real_result(third, real_text("cold"))]
        assert len(real.api.bodies) == 2 and not real.api.refusals


@pytest.mark.real_cli
@real_both_dialects
def test_a_result_may_lead_to_another_call(real, dialect):
    client = Client(real.url, dialect, tools=[tool("look")])
    said = client.ask("CALL:look ARGS:{\"n\": 0}")
    for turn in range(1, 4):
        [(call, _, arguments)] = said.calls
        assert arguments == {"n": turn - 1}
        answer = f'CALL:look ARGS:{{"n": {turn}}}' if turn < 3 else "done"
        said = client.ask(*client.results((call, answer)), streamed=turn % 2 == 0)
        assert said.headers["X-CC-Conversation"] == "continued"
    assert said.text == "You said: done" and len(real.api.bodies) == 4


@pytest.mark.real_cli
def test_tool_names_of_every_kind_come_back_as_the_client_wrote_them(real):
    names = ["a.b", "__proto__", "StructuredOutput", "constructor", "x" * 100, "имя", "a b"]
    client = Client(real.url, "messages", tools=[tool(name) for name in names])
    assert client.ask("hello").text == "You said: hello"
    sent = [t["name"] for t in real.api.bodies[0]["tools"]]
    assert len(set(sent)) == len(names)
    said = client.ask(" ".join(f"CALL:{name} ARGS:{{}}" for name in sent), streamed=True)
    assert [name for _, name, _ in said.calls] == names
    said = client.ask(*client.results(*((call, name) for call, name, _ in said.calls)))
    assert (said.status, said.headers["X-CC-Conversation"]) == (200, "continued")
    history = heard(real.api.bodies[-1])
    assert [b["name"] for b in history[-2][1]] == sent
    assert {b["tool_use_id"]: b["content"] for b in history[-1][1]} == {
        b["id"]: [real_text(name)] for b, name in zip(history[-2][1], names)}


CHOICES = [     # Chat's fields, Messages' fields, what the model is told
    ({"tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}, {"type": "auto"}),
    ({"tool_choice": "none"}, {"tool_choice": {"type": "none"}}, {"type": "none"}),
    ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}, {"type": "any"}),
    ({"tool_choice": {"type": "function", "function": {"name": "a.b"}}},
     {"tool_choice": {"type": "tool", "name": "a.b"}}, {"type": "tool", "name": 1}),
    ({"parallel_tool_calls": False},
     {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
     {"type": "auto", "disable_parallel_tool_use": True}),
    ({"tool_choice": "required", "parallel_tool_calls": False},
     {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
     {"type": "any", "disable_parallel_tool_use": True}),
    ({}, {}, None)]


@pytest.mark.real_cli
@real_both_dialects
def test_every_form_of_tool_choice_reaches_the_model(real, dialect):
    client = Client(real.url, dialect, tools=chat_tools(WEATHER_REAL) + [tool("a.b")])
    for chat_fields, messages_fields, wanted in CHOICES:
        fields = chat_fields if dialect == "chat" else messages_fields
        assert client.ask(f"with {fields}", **fields).status == 200
        body = real.api.bodies[-1]
        if wanted and wanted.get("name"):
            wanted = {**wanted, "name": body["tools"][wanted["name"]]["name"]}
        assert body.get("tool_choice") == wanted
    assert not real.api.refusals and len(real.api.bodies) == len(CHOICES)


@pytest.mark.real_cli
def test_old_style_functions_are_called_and_answered(real):
    client = Client(real.url, "chat", function_call="auto",
                    functions=[chat_tools(WEATHER_REAL)[0]["function"]])
    said = client.ask('CALL:get_weather ARGS:{"city": "Rome"}', streamed=True)
    assert said.finish == "function_call"
    assert said.message["function_call"]["name"] == "get_weather"
    assert json.loads(said.message["function_call"]["arguments"]) == {"city": "Rome"}
    said = client.ask({"role": "function", "name": "get_weather", "content": "sun"})
    assert (said.text, said.finish) == ("You said: sun", "stop")
    (_, [call]), (_, [answer]) = heard(real.api.bodies[-1])[-2:]
    assert call == use(answer["tool_use_id"], "get_weather", city="Rome")
    assert answer["content"] == [real_text("sun")]


# -- 4. parameters

BUDGET = {"type": "enabled", "budget_tokens": 2000}
PARAMETERS = [  # fields of the request, dialect or "" for both, what reaches the API
    ({"temperature": 0.3}, "", {"temperature": 0.3}),
    ({"top_p": 0.9}, "", {"top_p": 0.9}),
    ({"top_k": 5}, "", {"top_k": 5}),
    ({"temperature": 0}, "", {"temperature": 0}),
    ({"max_tokens": 321}, "", {"max_tokens": 321}),
    ({"max_completion_tokens": 4321}, "chat", {"max_tokens": 4321}),
    ({"stop": "NOWHERE"}, "chat", {"stop_sequences": ["NOWHERE"]}),
    ({"stop": ["A1", "B2"]}, "chat", {"stop_sequences": ["A1", "B2"]}),
    ({"stop_sequences": ["A1"]}, "messages", {"stop_sequences": ["A1"]}),
    ({"thinking": BUDGET, "max_tokens": 9000}, "", {"thinking": BUDGET, "max_tokens": 9000}),
    ({"thinking": {"type": "adaptive"}}, "", {"thinking": {"type": "adaptive"}}),
    ({"thinking": {"type": "disabled"}}, "", {"thinking": {"type": "disabled"}}),
    ({"reasoning_effort": "high"}, "chat", {"output_config": {"effort": "high"}}),
    ({"reasoning_effort": "minimal"}, "chat", {"output_config": {"effort": "low"}}),
    ({"reasoning_effort": "none"}, "chat", {"thinking": {"type": "disabled"}}),
    ({"output_config": {"effort": "low"}}, "messages", {"output_config": {"effort": "low"}})]


@pytest.mark.real_cli
@real_both_dialects
def test_parameters_reach_the_model_for_their_own_turn_only(real, dialect):
    client = Client(real.url, dialect)
    for at, (fields, only, wanted) in enumerate(PARAMETERS):
        if only in ("", dialect):
            said = client.ask("now " + json.dumps(fields), streamed=at % 2 == 1, **fields)
            assert (said.status, said.headers["X-CC-Ignored-Params"]) == (200, None), fields
            body = real.api.bodies[-1]
            shown = {name: body.get(name) for name in wanted}
            if "thinking" in wanted:        # the CLI may say how it wants to see it
                shown["thinking"] = {k: v for k, v in shown["thinking"].items() if k != "display"}
            assert shown == wanted
            assert not {"top_p", "top_k", "stop_sequences"} & set(body) - set(wanted), fields
            assert "temperature" in wanted or body.get("temperature", 1) == 1, fields
            assert said.headers["X-CC-Conversation"] == ("continued" if at else "new")
    assert not real.api.refusals


@pytest.mark.real_cli
def test_what_cannot_be_honoured_is_named_and_the_rest_is_served(real):
    said = Client(real.url, "chat").ask("hi", seed=7, logit_bias={"1": 2}, temperature=1.5)
    assert (said.status, said.text) == (200, "You said: hi")
    assert set(said.headers["X-CC-Ignored-Params"].split(", ")) == {
        "seed", "logit_bias", "temperature"}
    assert real.api.bodies[0]["temperature"] == 1


FORCED = {"tool_choice": {"type": "tool", "name": "look"}}
REFUSALS = [    # model, what it refuses (CLI-PROTOCOL 7), what may be reported as dropped
    ("claude-opus-4-7", {"temperature": 0.2, "top_p": 0.9, "top_k": 5},
     "temperature, top_k, top_p"),
    ("claude-opus-4-8", {"thinking": BUDGET}, "thinking"),
    ("claude-opus-5-5", {"thinking": {"type": "disabled"}}, "thinking"),
    ("claude-fable-5-1", {"max_tokens": 64}, ""),
    ("claude-sonnet-5-5", FORCED, "tool_choice"),
    ("claude-sonnet-4-6", {"thinking": BUDGET, "temperature": 0.2}, "temperature"),
    ("claude-sonnet-4-5", {"thinking": BUDGET, "tool_choice": {"type": "any"}},
     "tool_choice|thinking"),
    ("claude-haiku-4-5", {"temperature": 0.2, "top_p": 0.9}, "temperature|top_p"),
    ("claude-fable-5-2", {}, "")]       # an old CLI thinks with a budget, unasked


@pytest.mark.real_cli
def test_what_a_model_refuses_is_met_once_and_never_again_even_after_a_restart(real):
    def ask_all(pool, clients):
        real.api.clear()
        answers = pool.map(lambda client, row: client.ask("hi", **{**client.fields, **row[1]}),
                           clients, REFUSALS)
        return [(row, said.status, dropped, said.status != 200 and said.raw)
                for row, said in zip(REFUSALS, answers)
                for dropped in [said.headers["X-CC-Ignored-Params"] or ""]
                if said.status != 200 or dropped not in row[2].split("|")]

    def clients(url):
        return [Client(url, "messages", model=row[0], tools=[tool("look")]) for row in REFUSALS]
    with ThreadPoolExecutor(3) as pool:
        with real.proxy("learned") as url:
            talks = clients(url)
            assert ask_all(pool, talks) == []
            assert len(real.api.refusals) >= len(REFUSALS) - 1
            assert (ask_all(pool, talks), real.api.refusals) == ([], [])
        with real.proxy("learned") as url:
            assert (ask_all(pool, clients(url)), real.api.refusals) == ([], [])


@pytest.mark.real_cli
def test_a_strict_tool_that_the_api_refuses_is_sent_without_and_learned_for_its_schema(real):
    def numbered(most):
        return tool("look", strict=True, parameters={"type": "object", "properties": {
            "n": {"type": "integer", "minimum": 1, "maximum": most}}})
    with real.proxy("strict") as url:
        for tools, met in (([numbered(5)], True), ([numbered(5)], False), ([numbered(6)], True),
                           ([tool("look", strict=True)], False)):
            real.api.clear()
            said = Client(url, "chat", tools=tools).ask("hi")
            dropped = said.headers["X-CC-Ignored-Params"]
            assert (said.status, bool(real.api.refusals)) == (200, met)
            strict = tools[0]["function"]["parameters"]["properties"] == {}
            assert dropped == (None if strict else "tools.strict")
            assert real.api.bodies[-1]["tools"][0].get("strict") == (True if strict else None)


@pytest.mark.real_cli
def test_a_refusal_of_thinking_blocks_is_never_seen_and_learned_where_the_cli_lets_it_through(real):
    """2.1.330 drops the blocks by itself and tries again: the proxy sees no refusal to learn."""
    block = {"type": "thinking", "thinking": "hm", "signature": "REFUSED"}
    with real.proxy("thoughts", warm=0) as url:
        for time_asked in (1, 2):
            said = Client(url, "messages").ask(
                "one", {"role": "assistant", "content": [block, real_text("two")]}, "three")
            assert said.status == 200
            assert heard(real.api.bodies[-1])[1] == ("assistant", [real_text("two")])
    learned = os.path.exists(os.path.join(real.folder, "thoughts", "refusals.json"))
    assert len(real.api.refusals) == (1 if learned else 2)


@pytest.mark.real_cli
@real_both_dialects
def test_several_choices_are_refused_with_what_to_do(real, dialect):
    said = Client(real.url, dialect).ask("hi", n=2)
    assert said.status == 400 and "send n requests" in said.raw["error"]["message"]
    assert real.api.bodies == []


# -- 5. structured output

SCHEMA_REAL = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
          "properties": {"answer": {"type": "string"},
                         "at": {"type": "string", "format": "date-time"}},
          "required": ["answer"], "additionalProperties": False}
PLAIN_SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}},
                "required": ["answer"], "additionalProperties": False}


def chat_format(schema, **more):
    return {"response_format": {"type": "json_schema", "json_schema": {
        "name": "it", "schema": schema, **more}}}


STRICT_CHAT = chat_format(PLAIN_SCHEMA, strict=True)
MESSAGES_FORMAT = {"output_config": {"format": {"type": "json_schema", "schema": PLAIN_SCHEMA}}}
DATED = {"answer": "it is so", "at": "2026-01-01T00:00:00Z"}
FORMATS = [
    ("chat", False, STRICT_CHAT, {"answer": "yes"}), ("chat", True, chat_format(SCHEMA_REAL), DATED),
    ("chat", True, {"response_format": {"type": "json_object"}}, {"anything": [1, {"b": None}]}),
    ("messages", False, {"output_format": {"type": "json_schema", "schema": SCHEMA_REAL}}, DATED),
    ("messages", True, MESSAGES_FORMAT, {"answer": "yes"}),
    ("responses", True, {"text": {"format": {"type": "json_schema", "name": "n", "strict": True,
                                             "schema": PLAIN_SCHEMA}}}, {"answer": "yes"}),
    ("responses", False, {"text": {"format": {"type": "json_object"}}}, {"anything": [1]})]


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, streamed, fields, wanted", FORMATS)
def test_json_arrives_as_text_and_ends_normally(real, dialect, streamed, fields, wanted):
    said = Client(real.url, dialect, **fields).ask("JSON:" + json.dumps(wanted), streamed=streamed)
    assert (said.status, json.loads(said.text)) == (200, wanted)
    assert said.finish in ("stop", ("end_turn", None)) and not said.calls and said.usage
    [body] = real.api.bodies                # the model is asked once
    [answer] = body["tools"]
    assert set(answer["input_schema"].get("properties", wanted)) == set(wanted)
    assert (body.get("tool_choice") or {}).get("type") not in ("any", "tool")
    pieces = [data for _, data in said.raw if '"delta": ' in json.dumps(data)] if streamed else []
    assert not streamed or len(pieces) > 2  # it comes as it is written


@pytest.mark.real_cli
def test_the_cli_asks_no_further_after_valid_json_however_late_it_is_ended(real, monkeypatch):
    def later(talk, claude):
        asyncio.get_running_loop().call_later(0.5, close, talk, claude)
    close = ccproxy.Conversations._close
    monkeypatch.setattr(ccproxy.Conversations, "_close", later)
    monkeypatch.setattr(ccproxy.Claude, "signal", lambda *_: None)
    said = Client(real.url, "chat", **STRICT_CHAT).ask('JSON:{"answer": "yes"}', streamed=True)
    assert (said.status, said.text) == (200, '{"answer": "yes"}')
    time.sleep(0.4)
    assert len(real.api.bodies) == 1


@pytest.mark.real_cli
def test_invalid_json_is_tried_again_for_a_whole_answer(real):
    said = Client(real.url, "chat", **STRICT_CHAT).ask('JSON:{"wrong": 1} THEN:{"answer": "right"}')
    assert (said.status, said.text) == (200, '{"answer": "right"}')
    assert len(real.api.bodies) == 2


@pytest.mark.real_cli
@pytest.mark.parametrize("word", ['JSON:{"wrong": 1} THEN:{"wrong": 2}', "NOJSON"])
def test_json_that_never_matches_ends_in_an_error(real, word):
    said = Client(real.url, "chat", **STRICT_CHAT).ask(word)
    message = said.raw["error"]["message"]
    assert said.status == 502 and re.search("schema|structured output", message)
    assert message[0] not in "[{" and len(real.api.bodies) <= 10


@pytest.mark.real_cli
@real_both_dialects
def test_invalid_json_ends_a_stream_with_an_error(real, dialect):
    fields = STRICT_CHAT if dialect == "chat" else MESSAGES_FORMAT
    said = Client(real.url, dialect, **fields).ask('JSON:{"wrong": 1}', streamed=True)
    assert_ends_in_error(said, dialect, "schema")


@pytest.mark.real_cli
@real_both_dialects
def test_a_schema_beside_tools_leaves_the_model_both(real, dialect):
    streamed = dialect == "chat"
    fields = STRICT_CHAT if dialect == "chat" else MESSAGES_FORMAT
    client = Client(real.url, dialect, tools=[tool("look")], **fields)
    said = client.ask("SAY CALL:look ARGS:{}", streamed=streamed)
    assert ([name for _, name, _ in said.calls], said.text) == (["look"], "Let me look.")
    assert [t["name"] for t in real.api.bodies[0]["tools"]] == ["look", "StructuredOutput"]
    said = client.ask(*client.results((said.calls[0][0], "found")), streamed=streamed)
    assert (said.status, json.loads(said.text)) == (200, {"answer": "x"})
    assert said.headers["X-CC-Conversation"] == "continued"
    live = told(real.api.bodies[-1])
    kill_children(real.url)
    assert client.again().headers["X-CC-Conversation"] == "rebuilt"
    assert told(real.api.bodies[-1]) == live


def assert_ends_in_error(said, dialect, *words):
    """The stream ends in the dialect's error, and nowhere says that it ended well."""
    assert said.status == 200
    kinds = [kind for kind, _ in said.raw]
    if dialect == "chat":
        assert said.raw[-1][1] == "[DONE]"
        error = said.raw[-2][1]["error"]
        assert said.finish is None
    else:
        assert kinds[-1] == "error" and "message_stop" not in kinds and "message_delta" not in kinds
        assert kinds.count("content_block_start") == kinds.count("content_block_stop")
        error = said.raw[-1][1]["error"]
    assert any(word in error["message"] for word in words)


# -- 6. and 7. thinking, usage, finish reasons

@pytest.mark.real_cli
@real_both_dialects
def test_thinking_usage_and_the_reason_of_the_end_are_told(real, dialect):
    slot = "stop" if dialect == "chat" else "stop_sequences"
    client = Client(real.url, dialect)
    for streamed in (True, False):
        said = client.ask("THINK hi", streamed=streamed)
        assert (said.thinking, said.text) == ("let me see", "You said: THINK hi")
        if dialect == "messages":
            block = {"type": "thinking", "thinking": "let me see", "signature": "SIGNED"}
            assert said.message["content"] == [block, real_text("You said: THINK hi")]
            assert (said.finish, said.usage) == (("end_turn", None), {**USAGE, "output_tokens": 7})
        else:
            sums = [said.usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
            assert (said.finish, sums) == ("stop", [18, 7, 25])
            assert said.usage["prompt_tokens_details"]["cached_tokens"] == 5
        said = client.ask("up to END1", streamed=streamed, **{slot: ["X9", "END1"]})
        assert said.finish == ("stop" if dialect == "chat" else ("stop_sequence", "END1"))
        assert said.headers["X-CC-Conversation"] == "continued"
        assert heard(real.api.bodies[-1])[-2] == ("assistant", [
            {"type": "thinking", "thinking": "let me see", "signature": "SIGNED"},
            real_text("You said: THINK hi")])


@pytest.mark.real_cli
def test_a_chat_stream_tells_usage_only_when_it_is_asked_to(real):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    events = stream(real.url, PATHS["chat"], body)
    assert len(events) > 3 and not any("usage" in data for _, data in events[:-1])
    assert all(data["choices"] for _, data in events[:-1])


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, streamed, word, finish", [
    ("chat", True, "MAXTOK", "length"), ("messages", False, "MAXTOK", ("max_tokens", None)),
    ("chat", False, "REFUSE", "content_filter"), ("messages", True, "REFUSE", ("refusal", None)),
    ("chat", True, "CONTEXT", "length")])
def test_an_answer_that_was_cut_short_says_so_and_the_model_is_not_asked_on(
        real, dialect, streamed, word, finish):
    said = Client(real.url, dialect).ask(f"{word} hi", streamed=streamed)
    assert (said.status, said.text, said.finish) == (200, f"You said: {word} hi", finish)
    assert said.usage
    time.sleep(0.5)         # 2.1.330 asks again within milliseconds: one such request is tolerated
    assert len(real.api.bodies) <= 2


# -- 8. history

@pytest.mark.real_cli
def test_a_messages_history_reaches_the_model_as_it_was(real):
    thought = {"type": "thinking", "thinking": "", "signature": "SIGNED=="}
    history = [
        ("user", [real_text("one"), IMAGE_REAL]),
        ("assistant", [thought, real_text("look"), use("toolu_1", "look", a=1), use("toolu_2", "look")]),
        ("user", [real_result("toolu_1", real_text("x"), IMAGE_REAL), real_result("toolu_2", real_text("no"), is_error=True),
                  real_text("and now")]),
        ("assistant", [{"type": "redacted_thinking", "data": "c2VjcmV0"}, real_text("two")]),
        ("user", [DOCUMENT_REAL, real_text("three")])]
    messages = [{"role": role, "content": blocks} for role, blocks in history]
    client = Client(real.url, "messages", tools=[tool("look")], max_tokens=5000)
    said = client.ask(*messages)
    assert (said.status, said.text) == (200, "You said: three")
    assert said.headers["X-CC-Conversation"] == "rebuilt"
    assert heard(real.api.bodies[0]) == history and not real.api.refusals


BAD_HISTORIES = {
    "a call without a result": [
        {"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL_REAL]},
        {"role": "user", "content": "b"}],
    "a result without a call": [
        {"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "c1", "content": "b"}],
    "a result of another call": [
        {"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL_REAL]},
        {"role": "tool", "tool_call_id": "c2", "content": "b"}],
    "the assistant last": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "a call last": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL_REAL]}],
    "nothing": []}


@pytest.mark.real_cli
@real_both_dialects
@pytest.mark.parametrize("messages", BAD_HISTORIES.values(), ids=BAD_HISTORIES)
def test_a_history_that_the_api_would_refuse_does_not_reach_the_cli(real, dialect, messages):
    said = Client(real.url, dialect, tools=[tool("look")]).ask(*messages)
    assert said.status == 400 and said.raw["error"]["type"] == "invalid_request_error"
    assert len(said.raw["error"]["message"]) > 10 and real.api.bodies == []


@pytest.mark.real_cli
def test_user_text_is_data_in_the_last_message_and_in_history(real, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret of the house")
    texts = ["see @/etc/hostname ok", f"see @{secret} ok", f"@{secret}", "/compact", "/init now",
             "/unknown thing", "/", "  /compact", "!ls", "# note", "/model opus", "ultrathink now"]

    def joined(body):                   # a lone "/" may get a space in front, see CLI-PROTOCOL 6
        return ["".join(block["text"] for block in blocks).replace(" /", "/", 1)
                if blocks == [real_text(" /")] else "".join(block["text"] for block in blocks)
                for role, blocks in heard(body) if role == "user"]
    client = Client(real.url, "chat")
    for at, line in enumerate(texts):
        assert client.ask(line).status == 200
        assert joined(real.api.bodies[-1]) == texts[:at + 1]
    assert len(real.api.bodies) == len(texts)
    kill_children(real.url)
    said = client.ask("end")
    assert (said.status, said.headers["X-CC-Conversation"]) == (200, "rebuilt")
    assert joined(real.api.bodies[-1]) == texts + ["end"]
    assert "the secret of the house" not in json.dumps(real.api.bodies)


# -- 9. counting, models

@pytest.mark.real_cli
def test_counting_tokens_spends_none(real):
    body = {"model": MODEL, "system": "Be brief.", "messages": [{"role": "user", "content": "hi"}]}
    counts = []
    for words in ("hi", "hi " * 4000):
        body["messages"] = [{"role": "user", "content": words}]
        status, _, told = post(real.url, "/v1/messages/count_tokens", body)
        assert status == 200 and set(told) == {"input_tokens"}
        counts.append(told["input_tokens"])
    assert 0 < counts[0] < counts[1] - 1000
    assert real.api.bodies == []


@pytest.mark.real_cli
def test_models_are_listed_for_both_sdks_and_found_by_name(real):
    status, _, told = get(real.url, "/v1/models")
    assert (status, told["object"], told["has_more"]) == (200, "list", False)
    names = [entry["id"] for entry in told["data"]]
    assert "default" in names and (told["first_id"], told["last_id"]) == (names[0], names[-1])
    for entry in told["data"]:
        assert set(entry) >= {"id", "object", "created", "owned_by", "type", "display_name",
                              "created_at"}
        assert get(real.url, f"/v1/models/{entry['id']}")[::2] == (200, entry)
    status, _, told = get(real.url, "/v1/models/none-such")
    assert (status, told["error"]["type"]) == (404, "not_found_error")
    assert real.api.bodies == []


@pytest.mark.real_cli
@pytest.mark.parametrize("asked", ["opus", "anthropic/claude-haiku-4-5"])
def test_another_model_is_used_and_the_conversation_holds_no_word_of_it(real, asked):
    said = Client(real.url, "messages", model=asked).ask("hi")
    body = real.api.bodies[0]
    assert (said.status, said.raw["model"]) == (200, asked)
    assert asked.rpartition("/")[2] in body["model"] and said.headers["X-CC-Model"] == body["model"]
    assert heard(body) == [("user", [real_text("hi")])]


# -- 10. errors

STATUSES = {status: MODES[at % 4] for at, status in enumerate(ERROR_TYPES)}
REWORDED = {404: "model", 413: "too large"}     # the CLI drops the API's own message for these
RETRIED = {400: 3, 404: 2}      # requests at most: 2.1.330 tries to heal a 400, both of them a 404


@pytest.mark.real_cli
@pytest.mark.parametrize("status", ERROR_TYPES)
def test_an_error_of_the_api_keeps_its_status_and_message(real, status):
    dialect, streamed = STATUSES[status]
    said = Client(real.url, dialect).ask(f"ERR:{status}", streamed=streamed)
    raw = said.raw[0][1] if streamed else said.raw
    assert said.status == status
    assert REWORDED.get(status, f"fake {ERROR_TYPES[status]}") in raw["error"]["message"]
    if dialect == "messages":
        assert (raw["type"], raw["error"]["type"]) == ("error", ERROR_TYPES[status])
    else:
        assert set(raw["error"]) >= {"message", "type", "param", "code"}
    assert len(real.api.bodies) <= RETRIED.get(status, 1)       # --retries 0


@pytest.mark.real_cli
def test_the_cli_tries_again_as_often_as_retries_says_and_retry_after_is_kept(real):
    with real.proxy(retries=1, warm=0) as url:
        for words, status, times, waits in (("ERR:500", 500, 2, [None]), (
                "ERR:429 WAIT:1", 429, 2, range(1, 3)), ("ERR:429 WAIT:60", 429, 1, range(60, 80))):
            real.api.clear()        # newer CLIs add up to a quarter to what the API asks for
            said = Client(url, "chat").ask(words)
            assert (said.status, len(real.api.bodies)) == (status, times), words
            wait = said.headers["Retry-After"]
            assert (wait and int(wait)) in waits, words


BREAKS = {"STREAMERR": ["Overloaded"], "DROP": ["lost", "terminated", "socket", "reset"]}


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, word", [
    ("chat", "STREAMERR"), ("messages", "STREAMERR"), ("messages", "DROP")])
def test_a_stream_that_breaks_ends_in_the_error_of_the_dialect(real, dialect, word):
    said = Client(real.url, dialect).ask(f"{word} one two three four", streamed=True)
    assert said.text.startswith("You said:") and "three" not in said.text
    assert_ends_in_error(said, dialect, *BREAKS[word])


@pytest.mark.real_cli
@pytest.mark.parametrize("word, statuses", [("STREAMERR", (529, 502)), ("DROP", (502,))])
def test_a_whole_answer_that_breaks_is_no_answer(real, word, statuses):
    said = Client(real.url, "chat").ask(f"{word} one two three four")
    assert said.status in statuses and said.raw["error"]["message"]


# -- 12. Responses

FREE_REAL = {"type": "custom", "name": "apply_patch", "description": "Edit files.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: patch"}}
FLAT_REAL = [{"type": "function", "strict": name == "look", "name": name, "description": "Look.",
              "parameters": {"type": "object", "properties": {}}} for name in ("look", "find")]
BUDGET_REAL = {"type": "enabled", "budget_tokens": 2000}
ROUND = ('THINK SAY CALL:look ARGS:{"at": "é"} CALL:apply_patch ARGS:{"input": "*** Begin"} '
         "CALL:find ARGS:{}")


@pytest.mark.real_cli
@pytest.mark.parametrize("stored", [False, True])
def test_a_round_of_tools_in_responses_is_a_round_of_tools_for_the_model(real, stored):
    tools = [*FLAT_REAL, FREE_REAL, {"type": "web_search"}]
    fields = {"tools": tools, "instructions": "Be brief.", "store": stored, "metadata": {"a": "b"},
              "thinking": BUDGET_REAL, "include": ["reasoning.encrypted_content"]}
    client = Client(real.url, "responses", **fields)
    said = client.ask(ROUND, streamed=True)
    assert said.headers["X-CC-Ignored-Params"] == "tools[3].web_search"
    assert (said.thinking, said.text, said.finish) == ("let me see", "Let me look.", "tool_calls")
    assert [call[1:] for call in said.calls] == [
        ("look", {"at": "é"}), ("apply_patch", "*** Begin"), ("find", {})]
    assert [item["type"] for item in said.message] == [
        "reasoning", "message", "function_call", "custom_tool_call", "function_call"]
    first, second, third = [call[0] for call in said.calls]
    body = real.api.bodies[0]
    assert [t["name"] for t in body["tools"]] == ["look", "find", "apply_patch"]
    assert [t.get("strict") for t in body["tools"]] == [True, None, None]
    assert body["tools"][2]["input_schema"]["required"] == ["input"]
    assert "start: patch" in body["tools"][2]["description"]
    assert [block["text"] for block in body["system"]].count("Be brief.") == 1
    results = [*client.results((third, "found"), (first, [
        {"type": "input_text", "text": "seen"},
        {"type": "input_image", "detail": "auto", "image_url": data_url("image/png", PNG_REAL)}])),
        {"type": "custom_tool_call_output", "call_id": second, "output": "Done!"}]
    if stored:
        client.messages = []
        results.append({"role": "user", "content": "now?"})     # no parked call can take that
        fields = {"previous_response_id": said.raw[-1][1]["response"]["id"]}
    answer = client.ask(*results, **(fields if stored else {}))
    assert answer.headers["X-CC-Conversation"] == ("rebuilt" if stored else "continued")
    live = told(real.api.bodies[-1])
    assert live["messages"][1] == ("assistant", [
        {"type": "thinking", "thinking": "let me see", "signature": "SIGNED"},
        real_text("Let me look."), use(first, "look", at="é"),
        use(second, "apply_patch", input="*** Begin"), use(third, "find")])
    role, blocks = live["messages"][2]
    assert role == "user" and sorted(blocks[:3], key=lambda b: b["tool_use_id"]) == [
        real_result(first, real_text("seen"), IMAGE_REAL), real_result(second, real_text("Done!")),
        real_result(third, real_text("found"))]
    assert blocks[3:] == [real_text("now?")] * stored
    kill_children(real.url)
    again = client.again(streamed=True)
    assert (again.headers["X-CC-Conversation"], again.text) == ("rebuilt", answer.text)
    assert told(real.api.bodies[-1]) == live and not real.api.refusals


@pytest.mark.real_cli
def test_a_stored_response_is_continued_in_its_process_and_after_a_restart(real):
    tools = {"tools": [FLAT_REAL[0]]}

    def ask(url, given, before=None):
        fields = {"model": MODEL, "input": given, **tools}
        if before:
            fields["previous_response_id"] = before.raw["id"]
        client = Client(url, "responses")
        client.body = fields
        return client.again()
    with real.proxy("stored") as url:
        first = ask(url, "SAY CALL:look ARGS:{}")
        result = [{"type": "function_call_output", "call_id": first.calls[0][0], "output": "seen"}]
        second = ask(url, result, first)
        third = ask(url, "more", second)
        assert [said.headers["X-CC-Conversation"] for said in (first, second, third)] == [
            "new", "continued", "continued"]
        live = told(real.api.bodies[-1])
        branch = ask(url, "other", second)
        assert (branch.headers["X-CC-Conversation"], branch.text) == ("rebuilt", "You said: other")
    with real.proxy("stored") as url:
        again = ask(url, "more", second)
        assert (again.headers["X-CC-Conversation"], again.text) == ("rebuilt", "You said: more")
        assert told(real.api.bodies[-1]) == live
        assert [role for role, _ in live["messages"]] == ["user", "assistant"] * 2 + ["user"]


@pytest.mark.real_cli
def test_parameters_and_media_of_responses_reach_the_model(real):
    client = Client(real.url, "responses", instructions="Be brief.")
    said = client.ask([{"type": "input_text", "text": "see"},
                       {"type": "input_image", "image_url": data_url("image/png", PNG_REAL)},
                       {"type": "input_file", "filename": "a.pdf", "file_data":
                        data_url("application/pdf", PDF_REAL)}],
                      max_output_tokens=600, temperature=0.5, stop=["END1"], truncation="disabled")
    assert (said.status, said.headers["X-CC-Ignored-Params"]) == (200, None)
    body = real.api.bodies[-1]
    assert (body["max_tokens"], body["temperature"], body["stop_sequences"]) == (600, 0.5, ["END1"])
    assert heard(body) == [("user", [real_text("see"), IMAGE_REAL, {
        **DOCUMENT_REAL, "title": "a.pdf"}])]
    assert said.usage["input_tokens"] == 18 and said.usage["total_tokens"] == 25
    said = client.ask("hi", reasoning={"effort": "high", "summary": "auto"})
    assert real.api.bodies[-1]["output_config"]["effort"] == "high"
    assert said.headers["X-CC-Conversation"] == "continued"


@pytest.mark.real_cli
def test_what_cursor_sends_to_chat_is_answered_in_chat(real):
    """Agent mode: a body of Responses, a free tool whose text comes in a function's envelope."""
    tools = [FLAT_REAL[0], FREE_REAL]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [
        {"type": "input_text", "text": 'SAY CALL:apply_patch ARGS:{"input": "*** Begin"} '
                                       "CALL:look ARGS:{}"}]}]
    body = {"model": MODEL, "input": asked, "tools": tools, "stream": True,
            "reasoning": {"effort": "high"}, "text": {"verbosity": "low"}}
    answer = read_chat(stream(real.url, "/v1/chat/completions", body))
    first, second = answer["choices"][0]["message"]["tool_calls"]
    assert first["function"] == {"name": "apply_patch", "arguments": "*** Begin"}
    assert (second["function"]["name"], answer["finishes"]) == ("look", ["tool_calls"])
    history = [*asked, {"role": "assistant", "content": "Let me look.", "tool_calls": [
        first, second]}, *({"role": "tool", "tool_call_id": call["id"], "content": text}
                           for call, text in ((first, "Done!"), (second, "seen")))]
    status, headers, told = post(real.url, "/v1/chat/completions", {
        "model": MODEL, "messages": history, "tools": tools, "reasoning_effort": "high"})
    assert (status, headers["X-CC-Conversation"]) == (200, "continued")
    assert told["choices"][0]["message"]["content"]
    assert heard(real.api.bodies[-1])[1:] == [
        ("assistant", [real_text("Let me look."),
                       use(first["id"], "apply_patch", input="*** Begin"),
                       use(second["id"], "look")]),
        ("user", [real_result(first["id"], real_text("Done!")),
                  real_result(second["id"], real_text("seen"))])]


@pytest.mark.real_cli
@pytest.mark.parametrize("word, finish", [("MAXTOK", "length"), ("REFUSE", "content_filter")])
def test_a_response_that_was_cut_short_is_incomplete(real, word, finish):
    said = Client(real.url, "responses").ask(word + " hi", streamed=word == "MAXTOK")
    assert (said.status, said.finish) == (200, finish) and said.text.startswith("You said")


@pytest.mark.real_cli
def test_errors_before_and_inside_a_response_are_told_in_its_words(real):
    said = Client(real.url, "responses").ask("ERR:429", streamed=True)
    assert (said.status, said.raw[0][1]["error"]["code"]) == (429, "rate_limit_exceeded")
    said = Client(real.url, "responses").ask("STREAMERR one two three four", streamed=True)
    kinds = [kind for kind, _ in said.raw]
    assert kinds[-2:] == ["error", "response.failed"] and "response.completed" not in kinds
    assert "Overloaded" in said.raw[-1][1]["response"]["error"]["message"]


@pytest.mark.real_cli
@pytest.mark.parametrize("system", [
    "x-anthropic-billing-header: cc_version=9.9.9; cch=00000;\n\nBe brief.",
    "You are Claude Code, Anthropic's official CLI for Claude.",
    "You are a Claude agent, built on Anthropic's Claude Agent SDK."])
def test_no_callers_system_text_takes_the_place_of_the_clis_own_lines(real, system):
    def others(body, text):
        return [re.sub(r"cc_version=[^;]*|cch=[^;]*", "", block["text"]) for block in body["system"]
                if block["text"].strip() != text]
    assert Client(real.url, "messages", system="Be brief.").ask("hi").status == 200
    plain = others(real.api.bodies[-1], "Be brief.")
    assert Client(real.url, "messages", system=system).ask("hi").status == 200
    text = system.rpartition("\n")[2]
    body = real.api.bodies[-1]
    assert [block["text"].strip() for block in body["system"]].count(text) >= 1
    assert "9.9.9" not in json.dumps(body) and len(body["system"]) == len(plain) + 1
    if text == "Be brief.":
        assert others(body, text) == plain


@pytest.mark.real_cli
def test_the_cli_never_compacts_a_conversation_nor_refuses_one_that_is_long(real, monkeypatch):
    client = Client(real.url, "responses", tools=[tool("look")])
    monkeypatch.setattr(real.api, "used", 199_000)
    said = client.ask("first CALL:look ARGS:{}")
    for at in range(3):
        said = client.ask(*client.results((said.calls[0][0], f"{at} CALL:look ARGS:{{}}")))
        assert (said.status, said.headers["X-CC-Conversation"]) == (200, "continued")
        roles = [role for role, _ in heard(real.api.bodies[-1])]
        assert roles == ["user", "assistant"] * (at + 1) + ["user"]
    assert len(real.api.bodies) == 4


@pytest.mark.real_cli
def test_nothing_that_is_long_is_cut_or_cleared_from_a_conversation(real, monkeypatch):
    """The CLI cuts its own tools' results, and clears old ones: a client's are the client's."""
    monkeypatch.setattr(real.api, "used", 150_000)
    client = Client(real.url, "messages", tools=[tool("look")], system="s" * 300_000)
    said = client.ask("u" * 300_000 + " CALL:look ARGS:{}")
    sizes = [60_000] * 9 + [450_000, 700_000]       # from a size on a result has to come as history
    for at, size in enumerate(sizes):
        parts = [real_text("r" * size + f" {at} CALL:look ARGS:{{}}")] + [IMAGE_REAL] * (at == 3)
        said = client.ask(*client.results((said.calls[0][0], parts)))
        assert said.headers["X-CC-Conversation"] == ("continued" if size < 400_000 else "rebuilt")
        asked = [blocks for role, blocks in heard(real.api.bodies[-1]) if role == "user"]
        assert len(asked) == at + 2 and len(asked[0][0]["text"]) > 300_000
        for earlier, [block] in enumerate(asked[1:]):
            assert len(block["content"][0]["text"]) > sizes[earlier], earlier
        assert at < 3 or asked[4][0]["content"][1] == IMAGE_REAL
    assert len(real.api.bodies) == len(sizes) + 1 and not real.api.refusals


@pytest.mark.real_cli
def test_a_prompt_that_the_api_finds_too_long_is_told_to_the_client_and_not_cut(real, monkeypatch):
    client = Client(real.url, "responses", tools=[tool("look")])
    said = client.ask("first CALL:look ARGS:{}")
    monkeypatch.setattr(real.api, "limit", 1000)
    said = client.ask(*client.results((said.calls[0][0], "long " * 500)))
    assert (said.status, said.raw["error"]["code"]) == (400, "context_length_exceeded")
    assert len(heard(real.api.bodies[-1])) == 3


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect", PATHS)
def test_an_error_behind_a_finished_call_ends_the_stream_at_once(real, dialect):
    client = Client(real.url, dialect, tools=[tool("look")])
    started = time.monotonic()
    said = client.ask("STREAMERR CALL:look ARGS:{}", streamed=True)
    assert said.status == 200 and time.monotonic() - started < 10
    assert re.search("Overloaded|Server error mid-response", json.dumps(said.raw[-2:]))
    assert said.finish in (None, "stop", (None, None))


@pytest.mark.real_cli
def test_one_process_serves_a_conversation_through_all_three_dialects(real):
    history, kinds = [], []
    for at, dialect in enumerate(["chat", "responses", "messages", "responses", "chat"]):
        client = Client(real.url, dialect)
        client.messages = [dict(message) for message in history]
        said = client.ask(f"turn {at}")
        kinds.append(said.headers["X-CC-Conversation"])
        history += [{"role": "user", "content": f"turn {at}"},
                    {"role": "assistant", "content": said.text}]
    assert kinds == ["new"] + ["continued"] * 4
    assert heard(real.api.bodies[-1]) == [(m["role"], [real_text(m["content"])])
                                          for m in history[:-1]]


# -- conversations and processes

def told(body):
    """All that the API was told, but for the CLI's notes and ids that it makes up anew."""
    fixed = {k: v for k, v in body.items() if k not in ("metadata", "messages", "system")}
    system = [block["text"] for block in body["system"] if "billing" not in block["text"]]
    return {**fixed, "system": system, "messages": heard(body)}


@pytest.mark.real_cli
@real_both_dialects
def test_rebuilding_after_kill_9_gives_the_model_the_same_messages(real, dialect):
    media = CHAT_MEDIA if dialect == "chat" else MEDIA_REAL
    client = Client(real.url, dialect, tools=[tool("look"), tool("a.b")], temperature=0.5,
                    **({"system": "Be brief."} if dialect == "messages" else {}))
    think = "THINK " if dialect == "messages" else ""       # Chat has no way to send it back
    client.ask([real_text("/one"), media[0], real_text(f"{think}two")])
    said = client.ask(f"{think}SAY CALL:look ARGS:{{}} CALL:look ARGS:{{\"a\": [1, 2.5]}}")
    results = client.results((said.calls[0][0], [real_text("x"), media[0]]),
                             (said.calls[1][0], "y", True))
    for messages in (results, [[media[2], real_text(f"/{think}four")]]):
        said = client.ask(*messages)
        live = real.api.bodies[-1]
        assert (said.status, said.headers["X-CC-Conversation"]) == (200, "continued")
        kill_children(real.url)
        said = client.again(streamed=True)
        assert (said.status, said.headers["X-CC-Conversation"]) == (200, "rebuilt")
        assert told(real.api.bodies[-1]) == told(live)
    assert not real.api.refusals


@pytest.mark.real_cli
def test_a_spare_that_was_initialised_ahead_leaves_no_trace(real):
    fields = {"tools": [tool("look")], "system": "Be brief."}
    with real.proxy(warm=2) as url:
        for line in ("first", "second"):
            client = Client(url, "messages", **fields)
            assert client.ask(line).headers["X-CC-Conversation"] == "new"
            assert heard(real.api.bodies[-1]) == [("user", [real_text(line)])]
            assert until(lambda: get(url, "/status")[2]["processes"]["spare"] == 2, 10)
    assert len(real.api.bodies) == 2
    first, second = map(told, real.api.bodies)
    assert first == {**second, "messages": first["messages"]}


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, streamed", [("chat", True), ("messages", False)])
def test_a_client_that_goes_ends_the_turn_and_its_process_within_2_s(real, dialect, streamed):
    body = {"model": MODEL, "max_tokens": 5000, "stream": streamed,
            "messages": [{"role": "user", "content": "SLOW LONG:300"}]}
    parts = urllib.parse.urlsplit(real.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    connection.request("POST", PATHS[dialect], json.dumps(body),
                       {"Content-Type": "application/json"})
    if streamed:
        assert connection.getresponse().read(20)
    assert until(lambda: real.api.bodies, 10)
    before = children()
    connection.close()
    assert until(lambda: before - children() and real.api.broken, 2)
    now = get(real.url, "/status")[2]["processes"]
    assert now["all"] == now["spare"] + now["idle"] + now["parked"]


@pytest.mark.real_cli
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number, code", [("SIGTERM", 0), ("SIGKILL", -9)])
def test_no_child_is_left_when_the_proxy_has_ended(real, tmp_path, number, code):
    proxy = subprocess.Popen(
        [sys.executable, ccproxy.__file__, "--port", "0", "--claude", real.claude, "--model", MODEL,
         "--warm", "1", "--drain-timeout", "0.3", "--state-dir", str(tmp_path)], cwd=str(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        line = proxy.stdout.readline().decode()
        url = re.search(r"ANTHROPIC_BASE_URL=(\S+)", line).group(1)
        assert Client(url, "messages", tools=[tool("look")]).ask("CALL:look ARGS:{}").calls
        body = {"model": MODEL, "stream": True,
                "messages": [{"role": "user", "content": "SLOW LONG:99"}]}
        connection, response = connect(url, PATHS["chat"], body)
        assert response.read(20)
        started = children(proxy.pid)
        assert len(started) >= 2
        proxy.send_signal(getattr(signal, number))
        assert proxy.wait(10) == code
        assert until(lambda: not started & set(processes()), 0.1 if code == 0 else 5)
        connection.close()
    finally:
        proxy.kill()
        proxy.communicate()


# -- agents

def calls(*wanted):
    """What makes the fake API call tools:  calls(("Bash", {"command": "ls"}))."""
    return " ".join(f"CALL:{name} ARGS:{json.dumps(said)}" for name, said in wanted)


@contextlib.contextmanager
def agents(real, tmp_path, **settings):
    """A proxy whose agents work in tmp_path/web, the workspace `web`."""
    (tmp_path / "web").mkdir(exist_ok=True)
    real.api.clear()
    with real.proxy(**{"state": str(tmp_path / "state"), "api_key": "k", "warm": 0,
                       "workspaces": {"web": str(tmp_path / "web")}, **settings}) as url:
        yield url


def main_bodies(real):
    """The Messages requests of agents themselves, not of their subagents."""
    return [body for body in real.api.bodies if "You are a Claude agent" not in str(body["system"])]


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, streamed", [
    ("chat", True), ("messages", False), ("responses", True)])
def test_an_agent_works_in_its_workspace_and_its_files_are_there_when_it_has_answered(
        real, tmp_path, dialect, streamed):
    path = str(tmp_path / "web" / "f.txt")
    with agents(real, tmp_path, permission_mode="acceptEdits", allowed_tools="Bash(wc:*)") as url:
        agent = Agent(url, dialect, Workspace="web", Verbosity="narrated")
        said = agent.ask("SAY " + calls(
            ("Write", {"file_path": path, "content": "one two"}),
            ("Edit", {"file_path": path, "old_string": "two", "new_string": "three"}),
            ("Bash", {"command": "wc -c f.txt", "description": "count"}),
            ("Read", {"file_path": path})), streamed=streamed)
        assert said.status == 200, said.raw
        assert Path(path).read_text() == "one three"
        assert said.headers["X-CC-Workspace"] == "web"
        lines = said.text.split("\n\n")
        assert lines[0] == "Let me look." and "You said: " in said.text
        assert f"[Write: {path}]" in lines and "[Bash: wc -c f.txt]" in lines
        assert any(line.startswith("[Bash gave: 9 f.txt") for line in lines)
        assert said.finish in ("stop", ("end_turn", None))
        first, second = real.api.bodies
        system = "\n".join(block["text"] for block in first["system"])
        assert "Claude Code" in system or "Claude agent" in system
        assert {"Bash", "Read", "Write", "Edit"} <= {t["name"] for t in first["tools"]}
        assert not {"AskUserQuestion", "ScheduleWakeup"} & {t["name"] for t in first["tools"]}
        results = [b for m in second["messages"] for b in blocks_of(m["content"])
                   if b["type"] == "tool_result"]
        assert len(results) == 4 and not any(b.get("is_error") for b in results)
        assert said.usage and agent.ask("and now?").headers["X-CC-Conversation"] == "continued"
        assert len(real.api.bodies[-1]["messages"]) > len(second["messages"])
    assert not real.api.refusals


@pytest.mark.real_cli
def test_a_permission_is_asked_of_who_listens(real, tmp_path):
    path, asked = str(tmp_path / "web" / "f.txt"), []

    def answer(question):
        asked.append(question)
        said = question["input"].get("content", "")
        return {"no": {"behavior": "deny", "message": "not this file"},
                "edit": {"behavior": "allow", "updatedInput": {**question["input"],
                                                               "content": "edited"}},
                }.get(said, {"behavior": "allow", "scope": "conversation"})
    with agents(real, tmp_path) as url, Listener(url, answer) as listener:
        agent = Agent(url, Workspace="web")
        for said, there in (("no", False), ("edit", True)):
            told = agent.ask(calls(("Write", {"file_path": path, "content": said})))
            assert told.status == 200 and os.path.exists(path) == there, told
            if not there:
                assert "not this file" in told.text
        assert Path(path).read_text() == "edited"
        for said in ("one", "two"):
            agent.ask(calls(("Write", {"file_path": path, "content": said})))
            assert Path(path).read_text() == said
        assert [q["input"]["content"] for q in asked] == ["no", "edit", "one"]
        assert all(q["tool_name"] == "Write" and q["workspace"] == "web" for q in asked)
        assert asked[0]["request_id"].startswith("req_")
        assert [event for event, _ in listener.events] == ["request", "resolved"] * 3


@pytest.mark.real_cli
def test_always_means_what_was_shown_and_no_more(real, tmp_path):
    asked = []

    def answer(question):
        asked.append(question)
        return {"behavior": "allow", "scope": "conversation"}
    with agents(real, tmp_path) as url, Listener(url, answer):
        agent = Agent(url, Workspace="web")
        for line in ("touch $(echo a)", "touch $(echo a)", "touch $(echo b)", "touch c", "touch d"):
            said = agent.ask(calls(("Bash", {"command": line, "description": "x"})))
            assert said.status == 200
        assert sorted(os.listdir(tmp_path / "web")) == ["a", "b", "c", "d"]
        lines = [q["input"]["command"] for q in asked]
        assert lines[:2] == ["touch $(echo a)", "touch $(echo b)"] and lines[2] == "touch c"
        assert asked[0]["always"] == "this very call"
        if "touch d" not in lines:          # the CLI's own suggestion covered it: that was shown
            assert asked[2]["always"] != "this very call"


@pytest.mark.real_cli
def test_the_model_of_a_session_may_change_and_change_back(real, tmp_path):
    with agents(real, tmp_path, model="sonnet") as url:
        agent = Agent(url, Session="s")
        told = [(agent.ask("hi", model=model).headers["X-CC-Conversation"],
                 "haiku" in real.api.bodies[-1]["model"])
                for model in ("sonnet", "haiku", "sonnet")]
        assert told == [("new", False), ("continued", True), ("continued", False)]


@pytest.mark.real_cli
def test_nobody_there_means_no_with_words_that_help(real, tmp_path):
    path = str(tmp_path / "web" / "f.txt")
    with agents(real, tmp_path) as url:
        said = Agent(url, Workspace="web").ask(calls(("Write", {"file_path": path,
                                                                "content": "x"})))
        assert said.status == 200 and not os.path.exists(path)
        assert "ccproxy.py approve" in said.text


@pytest.mark.real_cli
@pytest.mark.parametrize("first", ["Write", "look up"])
@pytest.mark.parametrize("verbosity", ["text", "verbose"])
def test_a_tool_of_the_clients_and_one_of_the_agents_in_one_message(
        real, tmp_path, first, verbosity):
    path = tmp_path / "web" / "f.txt"
    own = ("Write", {"file_path": str(path), "content": "x"})
    name = ccproxy.wire_name("look up", ccproxy.PREFIX)
    wanted = (own, (name, {"q": 1})) if first == "Write" else ((name, {"q": 1}), own)
    with agents(real, tmp_path, permission_mode="acceptEdits") as url:
        agent = Agent(url, "messages", {"tools": [{
            "name": "look up", "description": "Looks it up.", "input_schema": {
                "type": "object", "properties": {"q": {"type": "integer"}}}}]},
            Workspace="web", Verbosity=verbosity)
        said = agent.ask("SAY " + calls(*wanted), streamed=first == "Write")
        assert said.finish[0] == "tool_use" and [c[1:] for c in said.calls] == [
            ("look up", {"q": 1})]
        assert path.exists() == (first == "Write")
        [listed] = [t for t in real.api.bodies[0]["tools"] if t["name"] == name]
        assert listed["description"] == "Looks it up."
        assert listed["input_schema"]["properties"] == {"q": {"type": "integer"}}
        told = agent.ask(*agent.results((said.calls[0][0], "found it")))
        assert told.headers["X-CC-Conversation"] == "continued", told.raw
        assert told.status == 200, told.raw
        assert "found it" in told.text and path.exists()
        results = [b for b in blocks_of(real.api.bodies[-1]["messages"][-1]["content"])
                   if b["type"] == "tool_result"]
        assert len(results) == 2 and len(real.api.bodies) == 2
        types = [[b["type"] for b in m["content"] if b["type"].startswith("mcp")]
                 for m in agent.messages if m["role"] == "assistant"]
        pair = ["mcp_tool_use", "mcp_tool_result"] * (verbosity == "verbose")
        assert types[:2] == ([pair, []] if first == "Write" else [[], pair])
        assert agent.ask("next").headers["X-CC-Conversation"] == "continued"


@pytest.mark.real_cli
def test_an_agent_that_is_gone_is_rebuilt_from_the_visible_turns(real, tmp_path):
    with agents(real, tmp_path, permission_mode="acceptEdits") as url:
        agent = Agent(url, "messages", {"system": "Speak German."}, Workspace="web",
                      Verbosity="verbose")
        agent.ask(calls(("Read", {"file_path": str(tmp_path / "none")})))
        for pid in children() - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        assert until(lambda: post(url, "/status", None, AGENT_KEY, "GET")[2]["processes"]["all"] == 0,
                          5)
        said = agent.ask("second")
        assert (said.status, said.headers["X-CC-Conversation"]) == (200, "rebuilt"), said.raw
        roles = heard(real.api.bodies[-1])
        assert [role for role, _ in roles] == ["user", "assistant", "user"]
        texts = [b["text"] for b in roles[1][1]]
        assert texts[0].startswith("[Read: ") and texts[1].startswith("[it failed: ")
        assert real.api.bodies[-1]["system"][-1]["text"].endswith("Speak German.")
    assert not real.api.refusals


@pytest.mark.real_cli
def test_a_users_text_is_no_command_of_an_agents(real, tmp_path):
    (tmp_path / "web" ).mkdir()
    (tmp_path / "web" / "secret.txt").write_text("heron")
    with agents(real, tmp_path) as url:
        for text in ("see @secret.txt ok", f"see @{tmp_path}/web/secret.txt ok", "/compact",
                     "/init now", "!ls", "# note"):
            said = Agent(url, Workspace="web").ask(text)
            assert said.status == 200
            sent = "".join(b["text"] for b in heard(real.api.bodies[-1])[-1][1])
            assert sent.strip() == text
    assert "heron" not in json.dumps(real.api.bodies)


@pytest.mark.real_cli
@pytest.mark.parametrize("dialect, finish", [("chat", "length"), ("responses", "length"),
                                             ("messages", ("pause_turn", None))])
def test_a_turn_that_reaches_max_turns_says_so(real, tmp_path, dialect, finish):
    with agents(real, tmp_path, max_turns=1) as url:
        said = Agent(url, dialect, Workspace="web").ask(
            "SAY " + calls(("Read", {"file_path": str(tmp_path / "none")})))
        assert (said.status, said.finish, said.text) == (200, finish, "Let me look.")


@pytest.mark.real_cli
def test_an_answer_that_is_refused_or_too_long_says_so_in_an_agent_too(real, tmp_path):
    with agents(real, tmp_path) as url:
        for word, finish in (("REFUSE", "content_filter"), ("MAXTOK", "length")):
            assert Agent(url, "chat").ask(word).finish == finish


@pytest.mark.real_cli
def test_subagents_are_kept_out(real, tmp_path):
    with agents(real, tmp_path, permission_mode="bypassPermissions", i_am_sandboxed=True) as url:
        said = Agent(url, "messages", Workspace="web", Verbosity="narrated").ask(calls(
            ("Task", {"description": "a task", "prompt": "LONG:9 of the subagent",
                      "subagent_type": "general-purpose"})))
        assert said.status == 200 and len(real.api.bodies) == 3
        assert said.text.split("\n\n")[0] == "[Task: a task]"
        assert said.text.count("w0 w1 w2") < 3      # in the line, if it is not cut, and the echo


@pytest.mark.real_cli
def test_a_schema_is_answered_by_an_agent(real, tmp_path):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    with agents(real, tmp_path) as url:
        said = Agent(url, "chat", {"response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": schema}}}, Workspace="web", Verbosity="verbose").ask(
            'JSON:{"a": 1}')
        assert (said.status, said.text, said.finish) == (200, '{"a": 1}', "stop"), said.raw


@pytest.mark.real_cli
def test_a_session_is_resumed_after_kill_9_of_the_proxy(real, tmp_path):
    (tmp_path / "web").mkdir()
    config = tmp_path / "c.json"
    config.write_text(json.dumps({
        "workspaces": {"web": str(tmp_path / "web")}, "model": MODEL, "warm": 0,
        "permission_mode": "acceptEdits", "retries": 0}))
    for number, pause in enumerate((1, 0)):
        real.api.clear()
        with command(tmp_path, "--config", str(config), claude=real.claude,
                     CCPROXY_API_KEY="k", **cli_environment()) as proxy:
            agent = Agent(proxy.url, Workspace="web", Session="mine")
            said = agent.ask(f"question {number}")
            assert said.status == 200, said.raw
            assert said.headers["X-CC-Conversation"] == ("resumed" if number else "new")
            assert said.headers["X-CC-Session"] == "mine"
            if number:
                texts = [b["text"] for _, blocks in heard(real.api.bodies[-1]) for b in blocks]
                assert texts == ["question 0", "You said: question 0", "question 1"]
            time.sleep(pause)
            started = children(proxy.process.pid)
            proxy.process.kill()
            assert until(lambda: not started & set(processes()), 5)


def cli_environment():
    return {name: os.environ[name] for name in ("HOME", "USERPROFILE", "ANTHROPIC_BASE_URL",
                                                "ANTHROPIC_API_KEY")}


@pytest.mark.real_cli
def test_a_session_needs_only_what_is_new_and_is_one_callers(real, tmp_path):
    with agents(real, tmp_path, warm=1) as url:
        for number, kind in enumerate(("new", "continued")):
            said = Agent(url, Workspace="web", Session="s").ask(f"heron {number}")
            assert said.headers["X-CC-Conversation"] == kind
        assert [role for role, _ in heard(real.api.bodies[-1])] == ["user", "assistant", "user"]
        [listed] = post(url, "/sessions", None, AGENT_KEY, "GET")[2]["data"]
        assert (listed["id"], listed["workspace"]) == ("s", "web")
        assert str(tmp_path) not in json.dumps(listed)
        assert post(url, "/sessions/s", None, AGENT_KEY, "DELETE")[2]["deleted"] is True
        assert post(url, "/sessions/s", None, AGENT_KEY, "DELETE")[0] == 404
        assert Agent(url, Session="s").ask("q2").headers["X-CC-Conversation"] == "new"
        left = glob.glob(os.path.join(os.environ["HOME"], ".claude", "projects", "*", "*.jsonl"))
        assert not any("heron 0" in Path(path).read_text() for path in left)


def sleeping(word):
    ps = subprocess.run(["ps", "-A", "-o", "args="], stdout=subprocess.PIPE, text=True).stdout
    return [line for line in ps.splitlines() if line.startswith(f"sleep {word}")]


@pytest.mark.real_cli
@pytest.mark.parametrize("how", ["client", "delete", "sigterm", "sigkill"])
def test_a_cancelled_agent_leaves_no_process(real, tmp_path, how):
    (tmp_path / "web").mkdir()
    seconds = str(7000 + random.randrange(100_000))
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"workspaces": {"web": str(tmp_path / "web")}, "model": MODEL,
                                  "warm": 0, "allowed_tools": ["Bash"], "drain_timeout": 0.2}))
    with command(tmp_path, "--config", str(config), claude=real.claude, CCPROXY_API_KEY="k",
                 **cli_environment()) as proxy:
        words = calls(("Bash", {"command": f"(sleep {seconds} &) ; sleep {seconds}",
                                "description": "x"}))
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": words}]}
        connection, response = connect(proxy.url, "/sdk/v1/chat/completions", body,
                                       {**AGENT_KEY, "X-CC-Workspace": "web", "X-Request-Id": "mine"})
        assert until(lambda: len(sleeping(seconds)) == 2, 15)
        before = children(proxy.process.pid)
        if how == "client":
            connection.close()
            response.close()
        elif how == "delete":
            assert post(proxy.url, "/v1/requests/mine", None, AGENT_KEY, "DELETE")[0] == 200
        elif how == "sigterm":
            proxy.process.terminate()
        else:
            proxy.process.kill()
        assert until(lambda: not sleeping(seconds), 2), how
        assert until(lambda: not before & set(processes()), 3)
        connection.close()


@pytest.mark.real_cli
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_approve_in_a_terminal_answers_for_a_real_agent(real, tmp_path):
    path = tmp_path / "web" / "f.txt"
    with agents(real, tmp_path) as url, terminal(tmp_path, url) as (read, write):
        read("listening at")
        agent = Agent(url, Workspace="web")
        with ThreadPoolExecutor(1) as pool:
            for word, there in (("n not now", False), ("y", True)):
                asked = pool.submit(agent.ask, calls(("Write", {"file_path": str(path),
                                                                "content": "good\x1b[2J"})))
                shown = read("conversation? ")
                assert "Write in web" in shown and "+good" in shown and "\x1b[2J" not in shown
                write(word + "\n")
                said = asked.result(20)
                assert said.status == 200 and path.exists() == there
                assert there or "not now" in said.text


@pytest.mark.real_cli
def test_a_cli_elsewhere_asks_by_mcp(real, tmp_path):
    (tmp_path / "web").mkdir()
    path = tmp_path / "web" / "f.txt"
    with agents(real, tmp_path) as url:
        server = {"mcpServers": {"ccproxy": {"type": "http", "url": url + "/mcp/permission/check",
                                             "headers": AGENT_KEY}}}
        with Listener(url, lambda question: {"behavior": "allow"}) as listener:
            told = subprocess.run(
                [real.claude, "-p", calls(("Write", {"file_path": str(path), "content": "x"})),
                 "--model", MODEL, "--mcp-config", json.dumps(server), "--permission-prompt-tool",
                 "mcp__ccproxy__check"], cwd=str(tmp_path / "web"), stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=60, env=environment(
                    tmp_path, **cli_environment()))
            assert path.exists(), told
            assert [q["tool_name"] for event, q in listener.events if event == "request"] == [
                "Write"]


MCP_SERVER = '''
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    method, answer = message.get("method"), {}
    if "id" not in message:
        continue
    if method == "initialize":
        answer = {"protocolVersion": message["params"]["protocolVersion"],
                  "capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}
    elif method == "tools/list":
        answer = {"tools": [{"name": "ping", "inputSchema": {"type": "object"}}]}
    elif method == "tools/call":
        answer = {"content": [{"type": "text", "text": "pong"}]}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": answer}), flush=True)
'''


@pytest.mark.real_cli
def test_what_the_operator_says_at_the_start_reaches_claude_code(real, tmp_path):
    (tmp_path / "server.py").write_text(MCP_SERVER)
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"x": {
        "command": sys.executable, "args": [str(tmp_path / "server.py")]}}}))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "f.txt").write_text("heron")
    alias = {"model": MODEL, "effort": "high", "system": "Speak German.", "verbosity": "narrated",
             "workspace": "web", "backend": "agent"}
    with agents(real, tmp_path, mcp_config=str(tmp_path / "mcp.json"), warm=1,
                allowed_tools="mcp__x__ping", disallowed_tools="WebFetch", models={"a": alias},
                add_dir=[str(tmp_path / "more")], append_system_prompt="Be kind.",
                claude_arg="--disallowedTools NotebookEdit") as url:
        client = Client(url, "chat", model="a")
        client.headers = AGENT_KEY
        said = client.ask(calls(("mcp__x__ping", {}), (
            "Read", {"file_path": str(tmp_path / "more" / "f.txt")})), streamed=True)
        assert "[mcp__x__ping gave: pong]" in said.text and "heron" in said.text
        body = real.api.bodies[0]
        named = {t["name"] for t in body["tools"]}
        assert "mcp__x__ping" in named and not {"WebFetch", "NotebookEdit"} & named
        assert "\n".join(block["text"] for block in body["system"]).endswith(
            "Be kind.\n\nSpeak German.")
        assert body["output_config"]["effort"] == "high" and body["model"] == MODEL
        client.ask("hi", reasoning_effort="medium")
        assert real.api.bodies[-1]["output_config"]["effort"] == "medium"
        client.headers = {**AGENT_KEY, "X-CC-Effort": "low"}
        client.ask("hi", reasoning_effort="medium")
        assert real.api.bodies[-1]["output_config"]["effort"] == "low"


@pytest.mark.real_cli
def test_an_agent_works_in_cwd_where_no_workspace_is_named(real, tmp_path):
    with agents(real, tmp_path, cwd=str(tmp_path / "web"), allowed_tools="Bash") as url:
        said = Agent(url, "chat").ask(calls(("Bash", {"command": "pwd", "description": "x"})))
        assert f"{tmp_path}/web" in said.text
        status, _, counted = post(url, "/sdk/v1/messages/count_tokens", {
            "model": MODEL, "messages": [{"role": "user", "content": "hi"}]}, AGENT_KEY)
        assert status == 200 and counted["input_tokens"] > 1000     # its own prompt, tools


@pytest.mark.real_cli
def test_an_agents_spare_that_was_initialised_ahead_leaves_no_trace(real, tmp_path):
    with agents(real, tmp_path, warm=2) as url:
        for line, more in (("first", {}), ("second", {}), ("third", {"Session": "s"}),
                           ("fourth", {"Session": "t"})):
            said = Agent(url, "messages", {"system": "Be brief."}, Workspace="web", **more).ask(line)
            assert said.headers["X-CC-Conversation"] == "new"
            assert heard(real.api.bodies[-1]) == [("user", [real_text(line)])]
            assert until(lambda: listing(url, "/status")["processes"]["spare"] >= 2, 20)
        assert Agent(url, Session="t", fields={"system": "Be brief."}).ask("fifth").headers[
            "X-CC-Conversation"] == "continued"
    assert len(real.api.bodies) == 5


@pytest.mark.real_cli
def test_a_subagent_cannot_call_a_clients_tool_and_nothing_waits_for_it(real, tmp_path):
    name = ccproxy.PREFIX + "look"
    prompt = "\n" + calls((name, {"q": 1}))
    with agents(real, tmp_path, permission_mode="bypassPermissions", i_am_sandboxed=True,
                request_timeout=25) as url:
        said = Agent(url, "messages", {"tools": [{"name": "look", "input_schema": {
            "type": "object"}}]}, Workspace="web").ask(calls(
                ("Task", {"description": "d", "prompt": prompt, "subagent_type":
                          "general-purpose"})))
        assert said.status == 200 and not said.calls, said.raw
        assert "Only the main agent can call this tool" in json.dumps(real.api.bodies)


@pytest.mark.real_cli
def test_no_transcript_is_left_of_what_is_no_session(real, tmp_path):
    def transcripts():
        return set(glob.glob(os.path.join(os.environ["HOME"], ".claude", "projects", "*",
                                          "*.jsonl")))
    before = transcripts()
    with agents(real, tmp_path, warm=2) as url:
        assert Agent(url, Session="s", Workspace="web").ask("hi").status == 200
        assert until(lambda: listing(url, "/status")["processes"]["spare"] == 4, 20)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "SLOW LONG:99"}],
                "stream": True}
        connection, response = connect(url, "/sdk/v1/chat/completions", body, {
            **AGENT_KEY, "X-CC-Session": "t", "X-CC-Workspace": "web"})
        assert response.read(20)
        response.close()
        connection.close()
        assert until(lambda: post(url, "/sessions/s", None, AGENT_KEY, "DELETE")[0] == 200, 9)
    assert transcripts() == before


# -- the CLI as a client of /api

@pytest.mark.real_cli
@pytest.mark.parametrize("key", ["", "proxy-key"], ids=["its own key", "the proxy's key"])
def test_claude_code_itself_works_through_the_relay(real, tmp_path, key):
    (tmp_path / "note.txt").write_text("the word is heron")
    settings = {"api_key": key} if key else {}
    with ccproxy.running(claude="echo", warm=0, upstream_url=real.api.url,
                         state_dir=str(tmp_path / "state"), **settings) as base:
        words = f'CALL:Read ARGS:{{"file_path": "{tmp_path}/note.txt"}}'
        told = subprocess.run(
            [real.claude, "-p", words, "--output-format", "json", "--model", MODEL],
            cwd=str(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            env=environment(tmp_path, ANTHROPIC_BASE_URL=f"{base}/api",
                            ANTHROPIC_API_KEY=key or "sk-ant-caller",
                            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1"))
    assert told.returncode == 0, told.stdout + told.stderr
    assert "heron" in json.loads(told.stdout)["result"]
    results = [b for _, blocks in heard(real.api.bodies[-1]) for b in blocks
               if b["type"] == "tool_result"]
    assert len(results) == 1 and "heron" in json.dumps(results)
    asked = [(path, {n.lower(): v for n, v in headers.items()})
             for method, path, headers in real.api.heads if method == "POST"]
    assert len(asked) >= 2 and {path for path, _ in asked} == {"/v1/messages?beta=true"}
    assert {sent["x-api-key"] for _, sent in asked} == {"sk-ant-dummy" if key else "sk-ant-caller"}
    assert all(sent["user-agent"].startswith("claude-cli/") and sent["anthropic-beta"]
               for _, sent in asked)


@real_both_dialects
@pytest.mark.real_cli
def test_a_cancelled_request_ends_at_the_api_too(real, dialect):
    body = {"model": MODEL, "max_tokens": 500, "messages": [{"role": "user", "content": "LONG:99 SLOW"}]}
    connection, response = connect(real.url, PATHS[dialect], {**body, "stream": True},
                                   {"X-Request-Id": "cancel-me"})
    with contextlib.closing(connection):
        assert response.read(20)
        before = children()
        assert post(real.url, "/v1/requests/cancel-me", None, method="DELETE")[0] == 200
        assert b"cancelled" in response.read()
        assert until(lambda: real.api.broken == 1, 3)
        assert until(lambda: before - children(), 2)


@pytest.mark.real_cli
def test_effort_and_model_of_headers_reach_the_api(real):
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "low"}
    status, _, told = post(real.url, PATHS["chat"], body,
                           {"X-CC-Model": "claude-opus-4-6", "X-CC-Effort": "high"})
    assert status == 200 and told["model"] == "gpt-4o"
    sent = real.api.bodies[-1]
    assert sent["model"] == "claude-opus-4-6" and sent["output_config"]["effort"] == "high"
