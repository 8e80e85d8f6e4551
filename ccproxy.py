#!/usr/bin/env python3
"""ccproxy - speak OpenAI or Anthropic to the Claude Code CLI of this machine.

    client --HTTP--> dialect --Turn----> backend --stdin--> claude
    client <--SSE--- dialect <-events--- backend <-stdout-- claude

A request in one of the dialects becomes a Turn; a backend answers it with Anthropic stream events;
one loop folds them into a Message and hands them to the dialect's encoder, whole or streamed.
CLI processes wait warm, so no request starts one.

    python ccproxy.py                   serve on http://127.0.0.1:8082
    python ccproxy.py --claude echo     the same without Claude Code: a built-in stand-in answers
    python ccproxy.py doctor            check the CLI, its login and its models
    python ccproxy.py --backend agent   Claude Code with its own tools instead (always at /sdk)
    python ccproxy.py approve           answer in this terminal what agents may do
    python ccproxy.py --backend api     relay to the Anthropic API instead (always at /api)
    with ccproxy.running() as url: ...  serve in a thread, for scripts and tests

Every name is defined above its first use.  Rooms:  grep -n '^# == ' ccproxy.py
"""
from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import fnmatch
import functools
import glob
import hashlib
import hmac
import importlib
import inspect
import ipaddress
import json
import math
import os
import queue
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from http import HTTPStatus
from typing import Any, AsyncIterator, Callable, Iterable, Iterator, Mapping, NamedTuple

__version__ = "0.1.0"
__all__ = ["Settings", "serve", "running", "ApiError", "DIALECTS"]

CLI_QUIET = (2, 1, 330)     # older ones tell the model in its conversation that it was changed
CLI_FLOOR = (2, 1, 110)     # older ones lack shouldQuery, list-valued systemPrompt and settings.env
INSTALL = "npm install -g @anthropic-ai/claude-code"
POSIX = os.name == "posix"
EFFORTS = {"none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high",
           "xhigh": "xhigh", "max": "max"}
FULL_ID = r"claude-[\w.@:-]{1,100}"        # of a model
FAMILIES = ("opus", "sonnet", "haiku", "fable")     # of models; each name means its newest


# == 1. Vocabulary =================================================================================
# What flows: a Turn in, Anthropic stream events out, a Message as their fold, an ApiError when it
# fails.  Nothing here knows HTTP, a dialect's words, or that a process exists.
# To add an error: one row in ERRORS.

CALLER, SERVER_FAULT = ("invalid_request_error",) * 2, ("api_error", "server_error")
ERRORS: dict[str, tuple[int, str, str]] = {     # kind -> HTTP status, Anthropic's and OpenAI's type
    "invalid_request": (400, *CALLER), "method_not_allowed": (405, *CALLER),
    "request_timeout": (408, *CALLER), "uri_too_long": (414, *CALLER),
    "unsupported_media_type": (415, *CALLER), "upgrade_required": (426, *CALLER),
    "cancelled": (499, *CALLER), "headers_too_large": (431, *CALLER),
    "not_implemented": (501, *CALLER), "http_version": (505, *CALLER),
    "internal_error": (500, *SERVER_FAULT), "backend_error": (502, *SERVER_FAULT),
    "unavailable": (503, *SERVER_FAULT),
    "invalid_api_key": (401, "authentication_error", "authentication_error"),
    "insufficient_quota": (402, "billing_error", "insufficient_quota"),
    "forbidden": (403, "permission_error", "permission_error"),
    "not_found": (404, "not_found_error", "invalid_request_error"),
    "conflict": (409, *CALLER),
    "request_too_large": (413, "request_too_large", "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error", "rate_limit_error"),
    "timeout": (504, "timeout_error", "server_error"),
    "overloaded": (529, "overloaded_error", "server_error"),
}
KIND_OF_STATUS = {row[0]: kind for kind, row in ERRORS.items()}
KIND_OF_TYPE = {row[1]: kind for kind, row in reversed(list(ERRORS.items()))}   # the first counts


class ApiError(Exception):
    """A failure the caller may read: what happened, then what to do about it.

    `kind` is a key of ERRORS; `status` (HTTP) comes from there unless an upstream said another.
    `param` is the request field at fault, `retry_after` seconds, `details` extra envelope data.
    """

    def __init__(self, kind: str, message: str, param: str | None = None, status: int = 0,
                 retry_after: int | None = None, details: dict | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.param = kind, message, param
        self.status = status or ERRORS[kind][0]
        self.retry_after, self.details = retry_after, details


class Died(ApiError):
    """A process ended, or spoke no protocol that is known; a new one may do better."""

    def __init__(self, message: str) -> None:
        super().__init__("backend_error", message)


def status_error(status: int, message: str, retry_after: int | None = None) -> ApiError:
    """The ApiError for an upstream's HTTP status; unknown ones keep their number."""
    kind = KIND_OF_STATUS.get(status, "invalid_request" if 400 <= status < 500 else "backend_error")
    return ApiError(kind, message, status=status, retry_after=retry_after)


def finite(text: str) -> float:
    """A JSON number.  ValueError for NaN, Infinity and 1e400, which other parsers refuse."""
    value = float(text)
    if math.isfinite(value):
        return value
    raise ValueError(f"{text[:20]} is no JSON number")


def parse_input(text: str) -> Any:
    """A tool call's arguments:  '' -> {},  '{"a":1}' -> {"a": 1},  cut off -> the text itself."""
    try:
        return json.loads(text or "{}", parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class Launch:
    """What a CLI process was started as; it stays that to its end."""
    agent: bool = False                     # Claude Code with its own tools; else a bare model
    workspace: str = ""                     # its name, if it has one
    cwd: str = ""                           # working directory; "" for one of its own
    permission_mode: str = ""
    kept: bool = False                      # the CLI keeps the conversation as a session
    resume: str = ""                        # id of the CLI's session that it goes on with


@dataclass(frozen=True)
class Turn:
    """What a caller asks of the model, whatever dialect it asked in."""
    model: str                              # as the caller wrote it; the reply repeats it
    messages: tuple[dict, ...] = ()         # Anthropic's, block lists; the last is the user's
    system: str = ""
    tools: tuple[dict, ...] = ()            # Anthropic tools, run by the client
    fields: Mapping[str, Any] = field(default_factory=dict)  # Messages fields as is, and `effort`
    schema: dict | None = None              # JSON schema that the answer has to match
    stream: bool = False
    said: Mapping[str, str] = field(default_factory=dict)    # our field -> the caller's name for it
    ignored: tuple[str, ...] = ()           # the caller's fields that cannot be honoured
    wants: Mapping[str, Any] = field(default_factory=dict)   # about the wire: "usage", "tools"
    launch: Launch = Launch()               # what has to answer it, if it is a CLI
    session: str = ""                       # the caller's name of a session, if it is one

    @functools.cached_property
    def strict(self) -> str:
        """A digest of the tools if one of them is strict, else ""."""
        if not any(tool.get("strict") for tool in self.tools):
            return ""
        said = json.dumps(self.tools, sort_keys=True).encode("ascii")
        return hashlib.sha256(said).hexdigest()[:16]


TICKET = 28                 # hex digits
DELTAS = {  # delta type -> (its field, the field of the block that it extends)
    "text_delta": ("text", "text"), "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"), "input_json_delta": ("partial_json", "input")}


@dataclass
class Message:
    """The model's message so far: the fold of its events."""
    ticket: str                             # TICKET hex digits, in the ids of OpenAI's dialects
    model: str                              # as the caller wrote it
    created: int                            # Unix seconds
    wants: Mapping[str, Any] = field(default_factory=dict)
    start: dict = field(default_factory=dict)       # the message of message_start: id, real model
    content: list[dict] = field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    calls: int = 0                          # tool_use blocks so far
    arguments: dict[str, str] = field(default_factory=dict)     # id of a call -> as it was written
    openings: int = 0                       # pings and message_start seen: 1 at the first of them
    sent: int = 0                           # frames of it that the caller has been given
    done: bool = False
    open: bool = False                      # a block is
    parts: dict[str, list[str]] = field(default_factory=dict)   # of its text, joined at its end

    def add(self, event: dict) -> None:
        """Fold one event in; types not known yet leave the message as it is."""
        kind = event["type"]
        if kind == "content_block_delta":
            source, target = DELTAS.get(event["delta"].get("type", ""), ("", ""))
            if target:
                self.parts.setdefault(target, []).append(event["delta"].get(source) or "")
            elif event["delta"].get("type") == "citations_delta":
                cited = self.content[-1].get("citations") or []
                self.content[-1]["citations"] = [*cited, event["delta"]["citation"]]
        elif kind == "content_block_start":
            self.content.append(dict(event["content_block"]))
            self.calls += event["content_block"].get("type") == "tool_use"
            self.parts, self.open = {}, True
        elif kind == "content_block_stop":
            block = self.content[-1]
            for target, pieces in self.parts.items():
                text = "".join(pieces)
                if target == "input":
                    self.arguments[block.get("id", "")] = text
                    block[target] = parse_input(text)
                else:
                    block[target] = (block.get(target) or "") + text
            self.open = False
        elif kind == "message_start":
            self.start = event["message"]
        elif kind == "message_delta":
            self.stop_reason = event["delta"].get("stop_reason")
            self.stop_sequence = event["delta"].get("stop_sequence")
        self.openings += kind in ("message_start", "ping")
        self.done |= kind == "message_stop"
        usage = event.get("usage") or event.get("message", {}).get("usage") or {}
        self.usage.update({k: v for k, v in usage.items() if v is not None})

    def said(self, kind: str) -> str:
        """All text of the finished blocks of one type:  said("thinking") -> "let me see"."""
        return "".join(b.get(kind) or "" for b in self.content if b.get("type") == kind)

    def tokens(self) -> tuple[int, int, int]:
        """Usage as (all input tokens, those read from the cache, output tokens)."""
        counts = {k: v for k, v in self.usage.items() if isinstance(v, int)}
        cached, fresh, written, made = (counts.get(name, 0) for name in (
            "cache_read_input_tokens", "input_tokens", "cache_creation_input_tokens",
            "output_tokens"))
        return cached + fresh + written, cached, made


def say(text: str) -> None:
    """One line for the operator, on stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text), file=sys.stderr, flush=True)


# == 2. Settings ===================================================================================
# One table feeds the command line, the environment, .env, the configuration file and the docs.
# Knows nothing of what the options do.  To add an option: one row in OPTIONS.

class ConfigError(Exception):
    """A setting that cannot be used; one line for the person who wrote it."""


def words(value: Any) -> list[str]:
    """"a, b" -> ["a", "b"]; a list is taken as it is."""
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def mapping(value: Any) -> dict[str, Any]:
    """"fast=haiku,gpt-*=sonnet" -> {"fast": "haiku", "gpt-*": "sonnet"}; a dict as it is."""
    pairs = value.items() if isinstance(value, dict) else [w.split("=", 1) for w in words(value)]
    if not all(len(pair) == 2 and all(str(text).strip() for text in pair) for pair in pairs):
        raise ValueError("expected NAME=VALUE,...")
    return {str(name).strip(): target if isinstance(target, dict) else str(target).strip()
            for name, target in pairs}


def rules(value: Any) -> list[str]:
    """"Read, Bash(git log:*), ..." -> its rules; a comma inside of parentheses ends none.
    ValueError for one that could be read as a wider rule."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    inner = r"\([^()]*(?:\([^()]*\)[^()]*)*\)"
    found = list(filter(None, map(str.strip, re.findall(rf"(?:[^,()]|{inner})+|[()]", text))))
    for rule in found:
        if not re.fullmatch(r"[^\s()]+(\(.+\))?", rule, re.S):
            raise ValueError(f"{rule[:60]!r} is no rule; expected Tool or Tool(what)")
    return found


def arguments(value: Any) -> list[str]:
    """Arguments as a shell would read them; a list of such texts one after the other."""
    found = []
    for text in value if isinstance(value, list) else [value]:
        lexer = shlex.shlex(str(text), posix=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        lexer.escape = lexer.escape if POSIX else ""    # else C:\\a
        found += list(lexer)
    return found


def within(kind: type, low: float, high: float = 1e9) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not re.fullmatch(r"\d{1,10}(\.\d+)?", str(value), re.ASCII) or not (
                low <= kind(value) <= high):
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return kind(value)
    return check


def size(value: Any) -> int:
    """Bytes:  "32M" -> 33554432,  "64k" -> 65536,  "1000" -> 1000."""
    found = re.fullmatch(r"([1-9]\d{0,11})([kmg]?)b?", str(value).strip().lower(), re.ASCII)
    if not found:
        raise ValueError("expected bytes, such as 32M")
    return int(found.group(1)) * 1024 ** ("kmg".find(found.group(2) or " ") + 1)


def string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a text")
    return value.strip()


def flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("expected true or false")
    return word in ("1", "true", "yes", "on")


def one_of(*names: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return value
    return check


def base_url(value: Any) -> str:
    """An http(s) base URL without its last slash:  "https://host/v1/" -> "https://host"."""
    url = string(value).rstrip("/")
    if url and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise ValueError("expected http(s)://HOST[:PORT][/PATH]")
    urllib.parse.urlsplit(url).port         # ValueError if it is out of range
    return url[:-3] if url.endswith("/v1") else url


whole, seconds = within(int, 0), within(float, 0.001)
BACKENDS, VERBOSITIES = ("chat", "agent", "api"), ("text", "narrated", "verbose", "formatted")
MODES = ("default", "acceptEdits", "plan", "bypassPermissions", "dontAsk", "auto")
ALIAS: dict[str, Callable[[Any], Any]] = {      # field of [models.NAME] -> check
    "model": string, "workspace": string, "effort": one_of(*EFFORTS), "system": string,
    "permission_mode": one_of(*MODES), "verbosity": one_of(*VERBOSITIES),
    "backend": one_of(*BACKENDS)}


def aliases(value: Any) -> dict[str, dict[str, str]]:
    """"fast=haiku" -> {"fast": {"model": "haiku"}}; in a file a table of ALIAS fields each."""
    found: dict[str, dict[str, str]] = {}
    for name, target in mapping(value).items():
        found[name] = {}
        for key, said in (target if isinstance(target, dict) else {"model": target}).items():
            if key not in ALIAS:
                raise ValueError(f"{name}.{key}: expected one of {', '.join(ALIAS)}")
            try:
                found[name][key] = ALIAS[key](said)
            except (ValueError, TypeError) as exc:
                raise ValueError(f"{name}.{key}: {exc}") from None
    return found


def path_of(kind: str, is_there: Callable[[str], bool]) -> Callable[[Any], str]:
    """A check: the absolute path of what has to be there; "" stays that."""
    def check(value: Any) -> str:
        said = string(value or "")
        path = os.path.abspath(os.path.expanduser(said)) if said else ""
        if path and not is_there(path):
            raise ValueError(f"{path} is no {kind}")
        return path
    return check


def each(check: Callable[[Any], str]) -> Callable[[Any], list[str]]:
    return lambda value: [check(word) for word in words(value)]


folder, plain_file = path_of("directory", os.path.isdir), path_of("file", os.path.isfile)


def folders(value: Any) -> dict[str, str]:
    """"web=/srv/web,..." -> {"web": "/srv/web"}."""
    named = {name: folder(path) for name, path in mapping(value).items()}
    if not all(re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) for name in named):
        raise ValueError("expected names of letters, digits, '.', '_' and '-'")
    return named


OPTIONS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {       # name -> default, check, help
    "host": ("127.0.0.1", string, "address to listen on; others than loopback need a key"),
    "port": (8082, within(int, 0, 65535), "port to listen on; 0 picks a free one"),
    "api_key": ("", string, "key that callers must send (Bearer or x-api-key)"),
    "backend": ("chat", one_of(*BACKENDS), "what answers /v1: the CLI as a model (chat), as Claude "
                "Code with its tools (agent, always at /sdk), the upstream API (api, at /api)"),
    "claude": ("", string, "claude binary; `echo` is the built-in stand-in (default: search)"),
    "model": ("default", string, "model for names that nothing else explains"),
    "models": ({}, aliases, "model names to map, as NAME=MODEL,...; NAME may hold *"),
    "effort": ("", one_of("", *EFFORTS), "effort of requests that say nothing of it or thinking"),
    "workspaces": ({}, folders, "agent: directories by name, as NAME=PATH,..."),
    "cwd": ("", folder, "agent: directory where no workspace is named (default: a private one)"),
    "ask_workspace": (False, flag, "agent: first ask which workspace, if none is named"),
    "permission_mode": ("default", one_of(*MODES), f"agent: {', '.join(MODES)}"),
    "permission_timeout": (120.0, seconds, "agent: seconds to answer whether a tool may run"),
    "allowed_tools": ([], rules, "agent: rules of what may run unasked, as Read,Bash(git log:*)"),
    "disallowed_tools": ([], rules, "agent: rules of what may never run"),
    "max_turns": (0, whole, "agent: messages of the model in one turn; 0 for any number"),
    "add_dir": ([], each(folder), "agent: further directories that tools may use, comma-separated"),
    "mcp_config": ([], each(plain_file), "agent: files with MCP servers, comma-separated"),
    "append_system_prompt": ("", string, "agent: text behind Claude Code's own prompt"),
    "claude_arg": ([], arguments, "agent: further arguments of claude (may be repeated)"),
    "verbosity": ("text", one_of(*VERBOSITIES), "agent: how its tools show in an answer: "
                  f"{', '.join(VERBOSITIES)}"),
    "session_ttl": (30.0, seconds, "agent: days that a session is kept without use"),
    "i_am_sandboxed": (False, flag, "agent: this machine is a sandbox: root, too, may bypass "
                       "permissions"),
    "max_processes": (8, within(int, 1), "CLI processes at once, spares included"),
    "warm": (2, whole, "spare processes that wait for new conversations"),
    "idle_ttl": (600.0, seconds, "seconds an idle conversation keeps its process"),
    "park_ttl": (900.0, seconds, "seconds a process waits for a client's tool result"),
    "queue_timeout": (30.0, seconds, "seconds a request waits for a free process"),
    "stall_timeout": (120.0, seconds, "seconds without output before a turn fails"),
    "request_timeout": (600.0, seconds, "seconds a whole turn may take"),
    "drain_timeout": (20.0, seconds, "seconds running turns get at shutdown"),
    "heartbeat": (15.0, seconds, "seconds of silence before a stream gets a heartbeat"),
    "retries": (2, within(int, 0, 10), "retries of the CLI when the API fails"),
    "upstream_url": ("", base_url, "upstream API (default: ANTHROPIC_BASE_URL, else Anthropic's)"),
    "upstream_ca": ("", string, "further certificates to trust upstream (PEM file)"),
    "connect_timeout": (10.0, seconds, "seconds to connect upstream, and for its TLS handshake"),
    "max_streams": (256, within(int, 1), "requests upstream at once; beyond it 429"),
    "oauth": (False, flag, "let the upstream API have the CLI's own login (terms may forbid it)"),
    "max_body": (32 * 2**20, size, "largest request body in bytes, such as 32M"),
    "max_connections": (1000, within(int, 1), "open connections at once"),
    "allow_hosts": ([], words, "further Host names to answer to, comma-separated"),
    "allow_origins": ([], words, "browser origins that may call, comma-separated"),
    "tls_cert": ("", string, "TLS certificate chain (PEM file)"),
    "tls_key": ("", string, "TLS private key (PEM file)"),
    "state_dir": ("", string, "folder for what is learned and stored (default: the user's)"),
    "store_days": (30.0, seconds, "days that stored responses are kept without use"),
    "store_size": (256 * 2**20, size, "bytes that stored responses may take; the oldest go"),
    "quiet": (False, flag, "no log line per request"),
}


class Settings:
    """Every option as an attribute:  Settings(port=0, claude="echo").  ConfigError if not."""

    def __init__(self, **values: Any) -> None:
        for name in set(values) - set(OPTIONS):
            raise ConfigError(f"unknown setting {name!r}; `ccproxy.py --help` lists them")
        for name, (default, check, _) in OPTIONS.items():
            try:
                setattr(self, name, check(default if values.get(name) is None else values[name]))
            except (ValueError, TypeError) as exc:
                raise ConfigError(f"{name}: {exc}") from None
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key go together")
        for name, alias in self.models.items():
            if alias.get("workspace", "") not in ("", *self.workspaces):
                raise ConfigError(f"models: {name}.workspace: {alias['workspace']!r} is not among "
                                  "the workspaces")
        modes = {self.permission_mode, *(a.get("permission_mode") for a in self.models.values())}
        root = POSIX and os.geteuid() == 0
        if "bypassPermissions" in modes and root and not self.i_am_sandboxed:
            raise ConfigError("permission_mode: bypassPermissions as root lets every caller do "
                              "anything on this machine; --i-am-sandboxed says it is a sandbox")
        if self.ask_workspace and not self.workspaces:
            raise ConfigError("ask_workspace: there are no workspaces to ask for")


def state_dir(settings: Settings) -> str:
    """Where this user's programs keep state:  ~/.local/state/ccproxy  on Linux."""
    home = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Application Support"}.get(
        sys.platform, os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    return os.path.abspath(os.path.expanduser(settings.state_dir or os.path.join(
        home or "~", "ccproxy")))


@contextlib.contextmanager
def drafted(path: str, text: str) -> Iterator[str]:
    """A private file (0600) with this text in the folder of `path`, to be moved or linked there in
    one step: no reader meets half a file.  What is left of it at the end goes.  OSError."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        yield draft
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)


def alias_of(table: Mapping[str, dict[str, str]], asked: str) -> dict[str, str]:
    """What --models says of a name, with or without its vendor: names first, then patterns."""
    names = asked, asked.rpartition("/")[2]
    hits = [key for key in table if key in names] + [
        key for key in table if fnmatch.filter(names, key)]
    return table[hits[0]] if hits else {}


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Flags > CCPROXY_* environment > .env > file (JSON, or TOML from 3.11) > default."""
    path = flags.get("config") or next(filter(os.path.exists, ("ccproxy.toml", "ccproxy.json")), "")
    values: dict[str, Any] = {}
    try:
        if path:
            parser = importlib.import_module("tomllib" if path.endswith(".toml") else "json")
            with open(path, encoding="utf-8") as file:
                values = {**parser.loads(file.read())}
    except ImportError:
        raise ConfigError(f"{path}: TOML needs Python 3.11; use ccproxy.json instead") from None
    except (OSError, ValueError, TypeError, RecursionError) as exc:
        raise ConfigError(f"{path}: {exc}") from None
    dotenv: dict[str, str] = {}
    with contextlib.suppress(OSError), open(".env", errors="replace") as lines:
        for name, _, value in (line.strip().partition("=") for line in lines):
            dotenv[name.replace("export ", "", 1).strip()] = value.strip().strip("\"'")
    for source in (dotenv, environ):
        values.update({name: source["CCPROXY_" + name.upper()] for name in OPTIONS
                       if source.get("CCPROXY_" + name.upper())})
    values.update({name: flags[name] for name in OPTIONS if flags.get(name) is not None})
    return Settings(**values)


# == 3. HTTP wire ==================================================================================
# Bytes to request, response to bytes (RFC 9112, RFC 9110; SSE: HTML standard, 9.2).  Pure: no
# socket, no clock.  What is ambiguous is refused, so that nothing can be smuggled.

MAX_LINE = 8 * 1024             # bytes of a request line
MAX_HEAD = 32 * 1024            # bytes of request line and fields together
MAX_FIELDS = 100
LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
NO_TEXT = re.compile(r"[^\t -~\x80-\xff]")        # nothing that a field's value may hold
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?\r\n")


@dataclass
class Request:
    """One request head.  `length` is None when the body is chunked, 0 when there is none."""
    method: str
    path: str                   # percent-decoded, without the query
    headers: dict[str, str]     # names in lower case; repeated ones joined by ", "
    minor: int = 1              # HTTP/1.<minor>
    length: int | None = 0
    query: dict[str, str] = field(default_factory=dict)
    target: str = "/"           # path and query as they came

    @property
    def keep_alive(self) -> bool:
        said = [word.strip() for word in self.headers.get("connection", "").lower().split(",")]
        return "close" not in said and (self.minor > 0 or "keep-alive" in said)


def parse_target(target: str, request: Request) -> str:
    """The path of a request target; an absolute one's authority replaces Host."""
    absolute = re.match(r"https?://([^/?#]*)", target, re.I)
    if absolute:
        request.headers["host"] = absolute.group(1)
        target = target[absolute.end():] or "/"
    elif request.minor > 0 and "host" not in request.headers:
        raise ApiError("invalid_request", "header fields: Host is missing")
    if not target.startswith(("/", "?")) and (target, request.method) != ("*", "OPTIONS"):
        raise ApiError("invalid_request", "request line: malformed target")
    request.target = target.partition("#")[0]
    path, _, query = request.target.partition("?")
    request.query = dict(urllib.parse.parse_qsl(query))
    return "/" if path == "*" else urllib.parse.unquote(path, errors="replace")


def parse_length(request: Request) -> int | None:
    """Body length in bytes, None when chunked.  Two lengths, or an odd one, are refused."""
    coding, length = request.headers.get("transfer-encoding"), request.headers.get("content-length")
    if coding is None and re.fullmatch(r"[0-9]{1,18}", "0" if length is None else length, re.ASCII):
        return int(length or 0)
    if coding is None or length is not None:
        raise ApiError("invalid_request", "Content-Length: expected one number and no other length")
    if request.minor == 0 or coding.lower() != "chunked":
        raise ApiError("not_implemented", "Transfer-Encoding: only chunked, in HTTP/1.1")
    return None


def parse_head(head: bytes) -> Request:
    """A request head, through its blank line, as a Request.  ApiError if not strictly valid."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    line, headers = LINE.fullmatch(first), {}
    if len(first) > MAX_LINE:
        raise ApiError("uri_too_long", f"request line: longer than {MAX_LINE} bytes")
    if len(lines) > MAX_FIELDS:
        raise ApiError("headers_too_large", f"header fields: more than {MAX_FIELDS}")
    if not line:
        raise ApiError("invalid_request", "request line: expected METHOD TARGET HTTP/1.1")
    method, target, major, minor = line.groups()
    if major != "1":
        raise ApiError("http_version", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    for found in map(FIELD.fullmatch, lines):
        if not found:
            raise ApiError("invalid_request", "header fields: malformed line")
        name, value = found.group(1).lower(), found.group(2).strip(" \t")
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise ApiError("invalid_request", f"header fields: {name} twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    request = Request(method, "", headers, int(minor))
    request.path = parse_target(target, request)
    request.length = parse_length(request)
    return request


def response_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Status line and fields.  Whatever a value holds, it cannot end its line."""
    phrase = next((known.phrase for known in HTTPStatus if known == status), "Status")
    lines = [f"{name}: {NO_TEXT.sub('?', value)}\r\n" for name, value in headers]
    return f"HTTP/1.1 {status} {phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def encode_json(value: Any) -> bytes:
    """Compact JSON in ASCII: lone surrogates and every script survive any transport."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def sse_frame(value: Any, event: str = "") -> bytes:
    data = value if isinstance(value, bytes) else encode_json(value)
    return b"event: %s\ndata: %s\n\n" % (event.encode(), data) if event else b"data: %s\n\n" % data


def parse_json(body: bytes) -> dict:
    """A request body as an object.  ApiError names what is wrong with it."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as exc:
        raise ApiError("invalid_request", f"body: no valid JSON: {str(exc)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError("invalid_request", "body: expected a JSON object")
    return value


# == 4. Dialects ===================================================================================
# Foreign JSON in, Turn out; events in, frames out.  Nothing here awaits, reads a clock, or knows
# that a process exists.  An encoder keeps no state: the fold ran first, it looks at the Message.
# What dialects share is parsed once, as the union of their words: a Chat body may hold Anthropic's
# blocks and tools (Cursor sends them), and nobody has to be told which words are whose.
# To add a field: a row in FIELDS.  To add a dialect: x_frames, x_body, x_error, a row in DIALECTS.

BILLING = re.compile(r"\A\s*x-anthropic-billing-header:.*\n*")   # the CLI writes its own there
IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
SAMPLING = ("temperature", "top_p", "top_k")
CHOICES = {"auto": "auto", "none": "none", "any": "any", "required": "any"}
SINGLE = "disable_parallel_tool_use"       # the field of a tool_choice
SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "code_interpreter", "tool_search",
                "file_search", "mcp", "advisor", "image_generation")    # run by the vendor's API
OWN_CALL, OWN_RESULT = "mcp_tool_use", "mcp_tool_result"    # what Claude Code ran by itself, in the
                                            # API's words for tools that somebody else runs
PASSED_ON = ("redacted_thinking", "search_result", "server_tool_use",
             "web_search_tool_result")      # blocks of the API's own that come back in a history
PAUSED = "pause_turn"       # stop reason of a turn that was cut off, and may be continued
ROLES = ("user", "assistant", "system", "developer", "tool", "function")
SAID = {"function": "arguments", "custom": "input"}     # envelope of a call -> its field of text
CALL_ITEMS = {"function_call": "arguments", "custom_tool_call": "input"}    # Responses' items, too
FREE_SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
               "additionalProperties": False}
TOOL_FIELDS = {"type", "name", "description", "parameters", "input_schema", "strict", "format",
               "cache_control"}
THOUGHTS = ("thinking", "redacted_thinking")
SHOWN = ("text", "tool_use", OWN_RESULT, *THOUGHTS)     # blocks that Responses has items for
NAMES = {str: "a string", list: "an array", dict: "an object", bool: "true or false",
         int: "an integer", float: "a number"}


def refusal(where: str, what: str) -> ApiError:
    return ApiError("invalid_request", f"{where}: {what}", param=where)


def need(value: Any, where: str, *kinds: type, among: Any = None, low: float = -math.inf,
         high: float = math.inf) -> Any:
    """`value` if it is of one of the kinds (a bool is no number), in range, among the allowed ones.
    ApiError names the field."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise refusal(where, "expected " + " or ".join(NAMES[kind] for kind in kinds))
    if among is not None and value not in among:
        raise refusal(where, f"expected one of {', '.join(among)}")
    if low > -math.inf and not low <= value <= high:
        upto = f"to {high:g}" if high < math.inf else "or more"
        raise refusal(where, f"expected {low:g} {upto}")
    return value


def optional(body: dict, name: str, kind: type, where: str = "") -> Any:
    """body[name] if it is of the kind; an empty one if it is absent or null."""
    return kind() if body.get(name) is None else need(body[name], where + name, kind)


def typed(*kinds: type, **bounds: float) -> Callable[[Any, str], Any]:
    return lambda value, where: need(value, where, *kinds, **bounds)


# -- content: every part type of every dialect as an Anthropic block

def check_base64(data: Any, where: str) -> str:
    with contextlib.suppress(ValueError):
        if base64.b64decode(need(data, where, str), validate=True):
            return data
    raise refusal(where, "not valid base64")


def media_block(url: Any, where: str, kind: str, title: Any = None) -> dict:
    """A data: or http(s) URL as an image or document block; `kind` says what is expected."""
    head, _, data = need(url, where, str).partition(",")
    media = head[5:].split(";")[0].lower().replace("image/jpg", "image/jpeg")
    named = {"title": str(title)} if title and kind == "document" else {}
    if re.match(r"https?://\S+\Z", url):
        return {"type": kind, "source": {"type": "url", "url": url}, **named}
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise refusal(where, "expected an http(s) URL or data:TYPE;base64,DATA")
    source = {"type": "base64", "media_type": media, "data": check_base64(data, where)}
    if media in IMAGES:
        return {"type": "image", "source": source}
    if kind == "document" and re.match("text/|application/json", media):
        text = base64.b64decode(data).decode("utf-8", "replace")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    elif kind == "image" or media != "application/pdf":
        raise refusal(where, f"cannot use {media!r}; expected a PDF, a text or {', '.join(IMAGES)}")
    return {"type": kind, "source": source, **named}


def clean_id(value: Any, where: str) -> str:
    """A tool call's id in the API's alphabet; others are replaced, the same way everywhere."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", need(value, where, str)):
        return value
    return "toolu_" + hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()[:24]


def parse_part(part: Any, where: str) -> dict:
    """One content part of any dialect as an Anthropic block."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = need(need(part, where, dict).get("type"), where + ".type", str)
    if kind in ("text", "input_text", "output_text", "summary_text", "refusal"):
        name = "refusal" if kind == "refusal" else "text"
        return {"type": "text", "text": need(part.get(name), f"{where}.{name}", str)}
    given = part["file"] if isinstance(part.get("file"), dict) else part
    if given.get("file_id"):
        raise refusal(where + ".file_id", "uploaded files are not kept here; send the data itself")
    if kind in ("image_url", "input_image"):
        url, where = part.get("image_url"), where + ".image_url"
        return media_block(url.get("url") if isinstance(url, dict) else url, where, "image")
    if kind in ("file", "input_file"):
        return media_block(given.get("file_data") or given.get("file_url"), where + ".file_data",
                           "document", given.get("filename"))
    if kind in ("image", "document"):
        source, where = need(part.get("source"), where + ".source", dict), where + ".source"
        types = ("base64", "url") + ("text", "content") * (kind == "document")
        if need(source.get("type"), where + ".type", str, among=types) == "url":
            media_block(source.get("url"), where + ".url", kind)
        elif source["type"] == "base64":
            check_base64(source.get("data"), where + ".data")
            need(source.get("media_type"), where + ".media_type", str,
                 among=IMAGES if kind == "image" else ("application/pdf",))
        elif source["type"] == "text":
            need(source.get("data"), where + ".data", str)
        else:
            need(source.get("content"), where + ".content", str, list)
    elif kind in ("tool_use", OWN_CALL):
        called = {"id": clean_id(part.get("id"), where + ".id")} if kind == "tool_use" else {}
        return {"type": kind, **called, "name": need(part.get("name"), where + ".name", str),
                "input": need(part.get("input", {}), where + ".input", dict)}
    elif kind in ("tool_result", OWN_RESULT):
        result = {"type": kind, "content": parse_parts(part.get("content"), where + ".content")}
        if kind == "tool_result":
            result["tool_use_id"] = clean_id(part.get("tool_use_id"), where + ".tool_use_id")
        return {**result, **({"is_error": True} if part.get("is_error") is True else {})}
    elif kind == "tool_reference":          # Claude Code's tool search; all tools are listed here
        return {"type": "text", "text": f"{need(part.get('tool_name'), where + '.tool_name', str)} "
                                        "can be called now."}
    elif kind == "thinking":
        need(part.get("thinking"), where + ".thinking", str)
    elif kind not in PASSED_ON:
        raise refusal(where + ".type", f"content of type {kind[:40]!r} cannot be used here")
    return {name: value for name, value in part.items() if name != "cache_control"}


def parse_parts(content: Any, where: str) -> list[dict]:
    """String, null or array of parts as Anthropic blocks."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    parts = enumerate(need(content, where, str, list))
    return [parse_part(part, f"{where}[{at}]") for at, part in parts]


def parse_text(content: Any, where: str) -> str:
    """A system text, given as a string or in parts."""
    blocks = parse_parts(content, where)
    if any(block["type"] != "text" for block in blocks):
        raise refusal(where, "expected text parts only")
    return "\n\n".join(block["text"] for block in blocks)


def parse_arguments(said: Any, where: str, free: bool = False) -> dict:
    """A call's arguments:  '{"a": 1}' or {"a": 1} -> {"a": 1},  a free tool's: {"input": text}.

    The model may have written what is no JSON object; it has to come back all the same.
    """
    if free:
        return {"input": need(said, where, str)}
    parsed = parse_input(said.strip()) if isinstance(said, str) else said or {}
    return {"INVALID_JSON": said} if isinstance(said, str) and not isinstance(parsed, dict) else \
        need(parsed, where, dict)


def parse_calls(item: dict, where: str, called: dict[str, str], known: dict) -> list[dict]:
    """Chat's tool_calls and old-style function_call of an assistant message as tool_use blocks."""
    calls, blocks = list(optional(item, "tool_calls", list, where + ".")), []
    old = optional(item, "function_call", dict, where + ".")
    if old:
        called[str(old.get("name"))] = f"call_{where}"
        calls.append({"id": f"call_{where}", "function": old})
    for spot, call in ((f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)):
        slot = "custom" if isinstance(need(call, spot, dict).get("custom"), dict) else "function"
        function, said = need(call.get(slot), f"{spot}.{slot}", dict), SAID[slot]
        free = slot == "custom" or "free" in known.get(str(function.get("name")), {})
        blocks.append(parse_part({
            "type": "tool_use", "id": call.get("id"), "name": function.get("name"),
            "input": parse_arguments(function.get(said), f"{spot}.{slot}.{said}", free)}, spot))
    return blocks


def tool_name(tool: dict, where: str, space: str) -> str:
    """A tool's name, with its namespace if it has one:  "files__read"."""
    if not need(tool.get("name"), where + ".name", str):
        raise refusal(where + ".name", "empty")
    return f"{space}__{tool['name']}" if space else tool["name"]


def parse_reasoning(item: dict, where: str) -> list[dict]:
    """A reasoning item that was made here, as a thinking block; others prove nothing to the API."""
    kind, _, proof = optional(item, "encrypted_content", str, where + ".").partition(":")
    thought = parse_text(item.get("summary"), where + ".summary")
    return [{"type": kind, "data": proof} if kind == THOUGHTS[1] else
            {"type": kind, "thinking": thought, "signature": proof}
            ] if kind in THOUGHTS and proof else []


def parse_item(item: dict, where: str) -> tuple[str, list[dict]]:
    """An item of Responses that is no message, as (role, blocks)."""
    kind = need(item.get("type"), where + ".type", str)
    if kind == "mcp_call":
        name = str(item.get("name"))
        said = item.get("output") if item.get("output") is not None else item.get("error")
        return "assistant", [
            {"type": OWN_CALL, "name": name, "input": parse_arguments(
                item.get("arguments"), where + ".arguments")},
            {"type": OWN_RESULT, "is_error": bool(item.get("error")),
             "content": parse_parts(said, where + ".output")}]
    if kind == "reasoning":
        return "assistant", parse_reasoning(item, where)
    slot = CALL_ITEMS.get(kind.removesuffix("_output"))
    if not slot:
        raise refusal(where + ".type", f"items of type {kind[:40]!r} cannot be used here")
    call = clean_id(item.get("call_id"), where + ".call_id")
    if kind.endswith("_output"):
        return "user", [{"type": "tool_result", "tool_use_id": call,
                         "content": parse_parts(item.get("output"), where + ".output")}]
    return "assistant", [{
        "type": "tool_use", "id": call, "input": parse_arguments(
            item.get(slot), f"{where}.{slot}", slot == "input"),
        "name": tool_name(item, where, optional(item, "namespace", str, where + "."))}]


def finish_history(turns: list[tuple[str, list[dict], str]], slot: str, rest: bool = False
                   ) -> tuple[dict, ...]:
    """(role, blocks, where) as Anthropic messages: neighbours of one role merged, empty text left
    out, tool results first, every call with its result.  ApiError where the real API refuses.
    `rest`: a session knows what came before, and may have called for the first results."""
    merged: list[tuple[str, list[dict], str]] = []
    for role, blocks, where in turns:
        blocks = [b for b in blocks if b["type"] != "text" or b["text"].strip()]
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(blocks)
        elif blocks or role == "user":
            if not merged and role == "assistant":      # front ends that open with a greeting
                merged.append(("user", [{"type": "text", "text": "(start)"}], where))
            merged.append((role, blocks, where))
    calls, known = [], set()
    for role, blocks, where in merged:
        results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
        if rest and blocks is merged[0][1]:
            calls = results
        if not blocks:
            raise refusal(where, "content is empty")
        if role == "user" and any(b["type"] in (OWN_CALL, OWN_RESULT) for b in blocks):
            raise refusal(where, f"{OWN_CALL} and {OWN_RESULT} are the assistant's")
        if sorted(results) != sorted(calls):
            odd = sorted(set(calls) ^ set(results)) or results
            raise refusal(where, f"tool call {odd[0]} has no result in the message after it"
                          if odd[0] in calls and odd[0] not in results else
                          f"the result for {odd[0]} answers no call before, or answers it twice")
        order = {call: at for at, call in enumerate(calls)}     # as a parked process answers them
        blocks.sort(key=lambda b: order[b["tool_use_id"]] if b["type"] == "tool_result"
                    else len(calls))
        calls = [b["id"] for b in blocks if b["type"] == "tool_use"]
        if len(set(calls)) < len(calls) or known & set(calls) or (calls and role == "user"):
            raise refusal(where, "tool calls need unique ids, in an assistant's message")
        known.update(calls)
    if not merged or merged[-1][0] == "assistant":
        raise refusal(merged[-1][2] if merged else slot, "the last message has to be the "
                      "user's, or a tool result: the models take no prefill")
    return tuple({"role": role, "content": blocks} for role, blocks, _ in merged)


def parse_history(items: list, slot: str, known: dict, earlier: int = 0, rest: bool = False
                  ) -> tuple[str, tuple[dict, ...]]:
    """Messages and items of any dialect as (system text, Anthropic's); system text may stand
    anywhere.  `known`: the tools' names in parse_tools; the caller did not send the first items;
    `rest`: see finish_history."""
    system, turns, called = [], [], {}      # called: function name -> id of its last old-style call
    for at, item in enumerate(items, -earlier):
        where = f"{slot}[{at}]"
        if (slot == "input" or at < 0) and need(item, where, dict).get("type") not in (
                None, "message"):
            if item["type"] != "additional_tools":      # those are among the tools
                turns.append((*parse_item(item, where), where))
            continue
        role = need(need(item, where, dict).get("role"), where + ".role", str, among=ROLES)
        if role in ("tool", "function"):
            call = item.get("tool_call_id") or called.get(str(item.get("name")))
            if call is None:
                raise refusal(where + ".tool_call_id", "missing, or no call came before it")
            result = {**item, "type": "tool_result", "tool_use_id": call}
            turns.append(("user", [parse_part(result, where)], where))
        elif role in ("system", "developer"):
            system.append(parse_text(item.get("content"), where + ".content"))
        else:
            blocks = parse_parts(item.get("content"), where + ".content")
            blocks += parse_calls(item, where, called, known) if role == "assistant" else []
            turns.append((role, blocks, where))
    if slot == "input" and turns and turns[-1][0] == "assistant":   # an answer that broke off
        turns.append(("user", [{"type": "text", "text": "(continue)"}], turns[-1][2]))
    return "\n\n".join(filter(None, system)), finish_history(turns, slot, rest)


# -- tools and fields

def parse_tool(tool: dict, where: str, free: bool, ignored: set[str]) -> dict:
    """A tool of any dialect (flat) as an Anthropic tool; a custom one, whose input is free text, as
    a function of one string."""
    if not free and tool.get("type") not in (None, "custom", "function"):   # typed: bash_*, ...
        for name, kind in (("description", str), ("input_schema", dict)):   # most have neither
            optional(tool, name, kind, where + ".")
        return {k: v for k, v in tool.items() if v is not None and k != "cache_control"}
    ignored.update(f"{where}.{name}" for name in set(tool) - TOOL_FIELDS)
    told = optional(tool, "description", str, where + ".")
    slot = "input_schema" if "input_schema" in tool else "parameters"
    schema, rule = (optional(tool, name, dict, where + ".") for name in (slot, "format"))
    if free:
        rule, schema = rule.get("grammar") or rule, FREE_SCHEMA     # Chat nests the grammar
        if isinstance(rule, dict) and rule.get("definition"):
            told = (f"{told}\n\nThe input has to match this {rule.get('syntax')} grammar:\n"
                    f"{rule['definition']}").strip()
    return {"name": tool["name"], **({"description": told} if told else {}),
            "input_schema": {"type": "object", **({} if "type" in schema else {"properties": {}}),
                             **schema}, **({"strict": True} if tool.get("strict") is True else {})}


def listed_tools(tools: list, where: str, space: str = "") -> Iterator[tuple[str, dict, str]]:
    """(where, tool, namespace) of a list of tools and of the namespaces in it."""
    for at, tool in enumerate(tools):
        spot = f"{where}[{at}]"
        if need(tool, spot, dict).get("type") == "namespace":
            yield from listed_tools(optional(tool, "tools", list, spot + "."), spot + ".tools",
                                    tool_name(tool, spot, space))
        else:
            yield spot, tool, space


def envelope(value: dict) -> tuple[str, dict]:
    """Chat's tools, calls and choices in their envelope:  {"custom": {...}} -> "custom", {...};
    flat ones as they are, with ""."""
    slot = next((slot for slot in SAID if isinstance(value.get(slot), dict)), "")
    return slot, value[slot] if slot else value


def parse_tools(body: dict, ignored: set[str]) -> tuple[list[dict], dict[str, dict]]:
    """`tools` and old-style `functions`, and how their caller knows those that are no functions:
    name -> {"free": "function" or "custom", its envelope in Chat} and {"namespace", "name"}.
    What only the vendor could run is reported instead."""
    tools, known = {}, {}
    for where, tool, space in [row for slot in ("tools", "functions") for row in
                               listed_tools(optional(body, slot, list), slot)]:
        kind = str(tool.get("type") or "function")
        slot, inner = envelope(tool)
        where = f"{where}.{slot}" if slot else where
        if kind.startswith(SERVER_TOOLS) or inner.get("name") == "DeferredToolPlaceholder" or (
                kind not in SAID and not inner.get("name")):
            ignored.add(f"{where}.{kind[:40]}")
            continue
        name = tool_name(inner, where, space)
        if name in tools:
            raise refusal(where, f"the name {name[:64]!r} is there twice")
        free = kind == "custom" and "input_schema" not in inner
        tools[name] = {**parse_tool(inner, where, free, ignored), "name": name}
        if free or space:                   # Cursor sends it flat, and reads a function's envelope
            known[name] = {**({"free": slot or "function"} if free else {}),
                           **({"namespace": space, "name": inner["name"]} if space else {})}
    return list(tools.values()), known


def parse_choice(value: Any, where: str) -> dict:
    """tool_choice in any form, "required" or {"type": "function", ...}, as Anthropic's."""
    if isinstance(value, str):
        return {"type": CHOICES[need(value, where, str, among=CHOICES)]}
    kind = need(need(value, where, str, dict).get("type", "function"), where + ".type", str,
                among=(*CHOICES, "tool", "function", "custom", "allowed_tools"))
    single = {SINGLE: True} if value.get(SINGLE) else {}
    if kind in CHOICES:
        return {"type": CHOICES[kind], **single}
    if kind == "allowed_tools":
        value = value[kind] if isinstance(value.get(kind), dict) else value     # Chat nests it
        mode = need(value.get("mode"), where + ".mode", str, among=CHOICES)
        allowed = [need(tool, f"{where}.tools[{at}]", dict) for at, tool in enumerate(
            need(value.get("tools"), where + ".tools", list))]
        return {"type": CHOICES[mode], "allowed": [envelope(tool)[1].get("name")
                                                   for tool in allowed]}
    name = need(envelope(value)[1].get("name"), where + ".name", str)
    return {"type": "tool", "name": name, **single}


def finish_choice(choice: dict | None, tools: list[dict], parallel: bool) -> dict[str, dict]:
    """The choice, fitted to the tools that there are, as fields; those not allowed are removed."""
    allowed = choice.pop("allowed", None) if choice else None
    tools[:] = [tool for tool in tools if allowed is None or tool["name"] in allowed]
    names = [tool["name"] for tool in tools]
    if choice and choice["type"] in ("any", "tool") and choice.get("name", *names[:1]) not in names:
        raise refusal("tool_choice", "forces a tool that is not there, or cannot be served")
    if tools and not parallel and (choice or {}).get("type") != "none":
        choice = {**(choice or {"type": "auto"}), SINGLE: True}
    return {"tool_choice": choice} if choice and tools else {}


def parse_stop(value: Any, where: str) -> list[str]:
    """Stop sequences as a list; the API refuses those of white space alone: left out."""
    texts = [value] if isinstance(value, str) else need(value, where, str, list)
    return [text for at, text in enumerate(texts) if need(text, f"{where}[{at}]", str).strip()]


def parse_thinking(value: Any, where: str) -> dict:
    kinds, kind = ("enabled", "adaptive", "disabled"), need(value, where, dict).get("type")
    if need(kind, where + ".type", str, among=kinds) == "enabled" or "budget_tokens" in value:
        need(value.get("budget_tokens"), where + ".budget_tokens", int, low=1024)
    return value


def parse_effort(value: Any, where: str) -> str:
    """"minimal" -> "low",  "high" -> "high",  "none" -> "none": without thinking."""
    return EFFORTS[need(value, where, str, among=EFFORTS)]


def with_effort(turn: Turn, effort: str, where: str) -> Turn:
    """The turn with an effort said elsewhere than in its body; "none" is without thinking.  `where`
    is "" if it was not the caller who said it."""
    parsed = parse_effort(effort, where or "effort")
    ours, value = ("thinking", {"type": "disabled"}) if parsed == "none" else ("effort", parsed)
    by_effort = turn.said.get("thinking") != "thinking"     # switched off by the body's effort
    fields = {name: kept for name, kept in turn.fields.items()
              if name != "effort" and not (name == "thinking" and by_effort)}
    return replace(turn, fields={**fields, ours: value},
                   said={**turn.said, **({ours: where} if where else {})})


def parse_format(value: Any, where: str) -> dict | None:
    """response_format or output_config.format as a JSON schema; None for plain text."""
    kind = need(need(value, where, dict).get("type"), where + ".type", str,
                among=("text", "json_object", "json_schema"))
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    if "json_schema" in value:
        value, where = optional(value, "json_schema", dict, where + "."), where + ".json_schema"
    schema = need(value.get("schema"), where + ".schema", dict)
    need(schema.get("type", "object"), where + ".schema.type", str, among=("object",))
    return schema


FIELDS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {    # field of a body -> (ours, check)
    "temperature": ("temperature", typed(int, float, low=0, high=2)),
    "top_p": ("top_p", typed(int, float, low=0, high=1)), "top_k": ("top_k", typed(int, low=0)),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"),
                    ("max_tokens", typed(int, low=1))),
    **dict.fromkeys(("stop", "stop_sequences"), ("stop_sequences", parse_stop)),
    **dict.fromkeys(("tool_choice", "function_call"), ("tool_choice", parse_choice)),
    **dict.fromkeys(("reasoning_effort", "reasoning.effort", "output_config.effort"),
                    ("effort", parse_effort)),
    "reasoning.summary": ("", lambda value, where: None),   # it is always told
    **dict.fromkeys(("response_format", "output_format", "output_config.format", "text.format"),
                    ("schema", parse_format)),
    "thinking": ("thinking", parse_thinking),
    "session_id": ("session", typed(str)),
    "stream": ("stream", typed(bool)), "parallel_tool_calls": ("parallel", typed(bool)),
    "stream_options": ("usage", lambda value, where: optional(
        need(value, where, dict), "include_usage", bool, where + ".")),
}
STRUCTURE = {"model", "messages", "input", "system", "instructions", "tools", "functions", "n",
             "output_config", "text", "reasoning", "thread"}


def parse_fields(body: dict, ignored: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What FIELDS knows of a body as (our fields, their names there); the rest is reported."""
    fields, said = {}, {}
    inner = {f"{slot}.{name}": value for slot in ("output_config", "text", "reasoning")
             for name, value in optional(body, slot, dict).items()}
    for name, value in {**body, **inner}.items():
        if value is None or name in STRUCTURE:
            continue
        ours, check = FIELDS.get(name, ("", lambda value, where: []))
        checked = check(value, name)
        if checked == [] or (ours == "stop_sequences" and checked not in (value, [value])):
            ignored.add(name)
        if checked not in (None, []):
            fields[ours], said[ours] = checked, name
    if fields.get("temperature", 0) > 1:    # Anthropic's scale ends at 1
        fields["temperature"] = 1
        ignored.add("temperature")
    if fields.get("thinking", {}).get("budget_tokens", 0) >= fields.get("max_tokens", math.inf):
        raise refusal("thinking.budget_tokens", "expected less than max_tokens")
    if fields.get("effort") == "none":
        fields["thinking"], said["thinking"] = {"type": "disabled"}, said["effort"]
        del fields["effort"]
    return fields, said


def parse_body(body: dict, earlier: list = ()) -> Turn:
    """A request body of any dialect as a Turn; `earlier`: stored items that go before its own."""
    if body.get("thread") is not None:      # anthropic-python's tool_runner falls back on this code
        raise ApiError("invalid_request", "thread: threads are not kept here", param="thread",
                       details={"error_code": "thread_unsupported_request"})
    if body.get("n") is not None and need(body["n"], "n", int, low=1) > 1:
        raise refusal("n", "one choice a request; send n requests instead")
    model, ignored = need(body.get("model"), "model", str), set()
    if len(model) > 256:                    # every chunk repeats it
        raise refusal("model", "longer than 256 characters")
    fields, said = parse_fields(body, ignored)
    slot = "input" if "input" in body and "messages" not in body else "messages"
    items = need(body.get(slot), slot, list, *[str] * (slot == "input"))
    items = [*earlier, *([{"role": "user", "content": items}] if isinstance(items, str) else items)]
    more = [tool for item in items if isinstance(item, dict)
            and item.get("type") == "additional_tools" for tool in optional(item, "tools", list)]
    tools, known = parse_tools({**body, "tools": optional(body, "tools", list) + more}, ignored)
    rest = bool(body.get("session_id")) and not earlier
    system, messages = parse_history(items, slot, known, len(earlier), rest)
    first = [parse_text(body.get(name), name) for name in ("system", "instructions")]
    system, forged = BILLING.subn("", "\n\n".join(filter(None, (*first, system))))
    if forged:
        ignored.add("x-anthropic-billing-header")
    marked = [body.get("system"), body.get("tools"), *(m.get("content") for m in items)]
    if any(isinstance(item, dict) and "cache_control" in item
           for items in marked if isinstance(items, list) for item in items):
        ignored.add("cache_control")        # the CLI sets its own marks; more than four are refused
    wants = {"usage": fields.pop("usage", False), "functions": bool(body.get("functions")),
             "tools": known}
    parallel = fields.pop("parallel", True) and not wants["functions"]  # those have but one call
    fields.update(finish_choice(fields.pop("tool_choice", None), tools, parallel))
    return Turn(model, messages, system, tuple(tools), fields, fields.pop("schema", None),
                fields.pop("stream", False), {**said, "strict": "tools.strict"},
                tuple(sorted(ignored)), {wish: value for wish, value in wants.items() if value},
                session=fields.pop("session", ""))


# -- Messages: https://docs.anthropic.com/en/api/messages

def messages_frames(message: Message, event: dict) -> list[bytes]:
    """The event as it is, but for the model's name; a failure first closes the open block."""
    if event["type"] == "message_start":
        event = {**event, "message": {**event["message"], "model": message.model}}
    frames = [sse_frame(event, event["type"])]
    if event["type"] == "error" and message.open:
        stop = {"type": "content_block_stop", "index": len(message.content) - 1}
        frames.insert(0, sse_frame(stop, "content_block_stop"))
    return frames


def messages_body(message: Message) -> dict:
    content = [{**block, "input": {}} if isinstance(block.get("input"), str) else block
               for block in message.content]
    return {**message.start, "model": message.model, "content": content, "usage": message.usage,
            "stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}


def messages_error(error: ApiError) -> dict:
    details = {"details": error.details} if error.details else {}
    return {"type": "error", "error": {"type": ERRORS[error.kind][1], "message": error.message,
                                       **details}}


# -- Chat Completions: https://platform.openai.com/docs/api-reference/chat

CHAT_FINISH = {"tool_use": "tool_calls", "max_tokens": "length", "refusal": "content_filter",
               "model_context_window_exceeded": "length", PAUSED: "length"}     # others: "stop"


def chat_object(message: Message, kind: str, choices: list[dict], **more: Any) -> dict:
    return {"id": "chatcmpl-" + message.ticket, "object": kind, "created": message.created,
            "model": message.model, "choices": choices, **more}


def chat_choice(message: Message, name: str, said: dict) -> dict:
    """The one choice, with the reason why it ended if it has."""
    finish = CHAT_FINISH.get(message.stop_reason, "stop") if message.stop_reason else None
    if finish == "tool_calls" and "functions" in message.wants:
        finish = "function_call"
    return {"index": 0, name: said, "logprobs": None, "finish_reason": finish}


def chat_chunk(message: Message, delta: dict) -> list[bytes]:
    more = {"usage": None} if "usage" in message.wants else {}
    return [sse_frame(chat_object(message, "chat.completion.chunk",
                                  [chat_choice(message, "delta", delta)], **more))]


def caller_tool(message: Message, block: dict) -> Mapping[str, str]:
    """How the caller knows the tool of a call, as parse_tools found it; {} for a function."""
    return message.wants.get("tools", {}).get(block.get("name"), {})


def call_text(message: Message, block: dict) -> str:
    """The arguments of a finished call as text; of a free tool, what it was given."""
    said = block["input"]
    if "free" in caller_tool(message, block):
        said = parse_input(said + '"}') if isinstance(said, str) else said      # it was cut off
        if isinstance(said, dict) and isinstance(said.get("input"), str):
            return said["input"]
    return message.arguments.get(block["id"]) or json.dumps(said)


def chat_call(message: Message, block: dict, text: str, named: bool = True) -> dict:
    """A tool call with its arguments, or with a piece of them: only the first piece is named."""
    slot = "function" if "functions" in message.wants else (    # the old style knows no other
        caller_tool(message, block).get("free", "function"))
    if not named:
        return {slot: {SAID[slot]: text}}
    return {"id": block["id"], "type": slot, slot: {"name": block["name"], SAID[slot]: text}}


def chat_piece(message: Message, text: str, named: bool = False) -> list[bytes]:
    """A chunk with a piece of the tool call that is being written; the old style has but one."""
    call = chat_call(message, message.content[-1], text, named)
    if "functions" not in message.wants:
        return chat_chunk(message, {"tool_calls": [{"index": message.calls - 1, **call}]})
    return chat_chunk(message, {"function_call": call["function"]}) if message.calls == 1 else []


def chat_usage(message: Message) -> dict:
    sent, cached, made = message.tokens()
    thought = (message.usage.get("output_tokens_details") or {}).get("thinking_tokens") or 0
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought}}


def chat_frames(message: Message, event: dict) -> list[bytes]:
    """What a Chat client is told about `event`; `message` already contains it."""
    kind, delta = event["type"], event.get("delta") or {}
    if delta.get("type") == "text_delta":
        return chat_chunk(message, {"content": delta["text"]})
    if delta.get("type") == "thinking_delta":
        return chat_chunk(message, {"reasoning_content": delta["thinking"]})
    if kind in ("message_start", "ping"):       # the first of them names the role
        opening = {"role": "assistant", "content": ""}
        return chat_chunk(message, opening if message.openings == 1 else {})
    if kind.startswith("content_block_"):
        block = message.content[-1]
        if block["type"] != "tool_use":
            return []
        known, pieces = caller_tool(message, block), message.parts.get("input", [])
        if kind == "content_block_start":
            return chat_piece(message, "", named=True)
        if delta.get("partial_json") and "free" not in known:
            return chat_piece(message, delta["partial_json"])
        late = kind == "content_block_stop" and ("free" in known or not any(pieces))
        return chat_piece(message, call_text(message, block)) if late else []   # "" is no JSON
    if kind == "message_delta":
        return chat_chunk(message, {})
    if kind == "message_stop":
        usage = chat_object(message, "chat.completion.chunk", [], usage=chat_usage(message))
        return [sse_frame(usage)] * ("usage" in message.wants) + [sse_frame(b"[DONE]")]
    return [sse_frame({"error": event["error"]}), sse_frame(b"[DONE]")] if kind == "error" else []


def chat_body(message: Message) -> dict:
    calls = [chat_call(message, block, call_text(message, block))
             for block in message.content if block["type"] == "tool_use"]
    answer = {"role": "assistant", "refusal": None,
              "content": message.said("text") or (None if calls else "")}
    if message.said("thinking"):
        answer["reasoning_content"] = message.said("thinking")
    if calls:
        answer.update({"function_call": calls[0]["function"]} if "functions" in message.wants
                      else {"tool_calls": calls})
    return chat_object(message, "chat.completion", [chat_choice(message, "message", answer)],
                       usage=chat_usage(message))


def chat_error(error: ApiError) -> dict:
    code = None if error.kind == "invalid_request" else error.kind
    code = (error.details or {}).get("code", code)
    if "prompt is too long" in error.message.lower():       # clients compact on this code
        code = "context_length_exceeded"
    return {"error": {"message": error.message, "type": ERRORS[error.kind][2], "param": error.param,
                      "code": code}}


# -- Responses: https://platform.openai.com/docs/api-reference/responses

ECHO: dict[str, Any] = {        # what a response repeats of its request -> where that says nothing
    "background": False, "instructions": None, "max_output_tokens": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None}, "store": True, "temperature": 1.0,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": 1.0,
    "truncation": "disabled", "user": None}
HONOURED: dict[str, Callable[[Any], bool]] = {      # fields of Responses alone -> the values served
    "store": lambda value: isinstance(value, bool), "metadata": lambda value: True,
    "previous_response_id": lambda value: True, "background": lambda value: value is False,
    "truncation": lambda value: value == "disabled",
    "include": lambda value: value in ([], ["reasoning.encrypted_content"])}
UNSERVED = {"background": "responses are not run in the background here; leave it out",
            "conversation": "conversations are not kept here; use previous_response_id",
            "prompt": "prompt templates are not kept here; send `instructions` and `input`"}
CUT_SHORT = {"max_tokens": "max_output_tokens", "refusal": "content_filter",
             "model_context_window_exceeded": "max_output_tokens", PAUSED: "max_output_tokens"}
TOLD = {    # type of an output item -> its events' stem, its part's and index, its field of text
    "message": ("response.output_text", "response.content_part", "content_index", "content"),
    "reasoning": ("response.reasoning_summary_text", "response.reasoning_summary_part",
                  "summary_index", "summary"),
    "function_call": ("response.function_call_arguments", "", "", "arguments"),
    "mcp_call": ("response.mcp_call_arguments", "", "", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input", "", "", "input")}


def parse_responses(body: dict, earlier: list = ()) -> Turn:
    """A request body of Responses as a Turn that wants its own items stored, or not, and knows
    what its response has to repeat."""
    for name, instead in UNSERVED.items():
        if body.get(name):
            raise refusal(name, instead)
    for name, kind in (("metadata", dict), ("store", bool), ("include", list)):
        optional(body, name, kind)
    turn = parse_body({"input": None, **body}, earlier)
    ignored = tuple(name for name in turn.ignored
                    if name not in HONOURED or not HONOURED[name](body[name]))
    echo = {name: default if body.get(name) is None else body[name]
            for name, default in ECHO.items()}
    own = {"items": body.get("messages", body.get("input"))} if echo["store"] else {}
    return replace(turn, ignored=ignored, wants={**turn.wants, **own, "echo": echo})


def response_item(message: Message, at: int, done: bool = True) -> dict:
    """A content block as an output item; {} for one that Responses has no item for."""
    block, last = message.content[at], at == len(message.content) - 1
    cut = last and message.stop_reason in CUT_SHORT
    status = "in_progress" if not done else "incomplete" if cut else "completed"
    kind, known, name = block["type"], caller_tool(message, block), f"{message.ticket}{at:04x}"
    if kind == "text":
        part = {"type": "output_text", "text": block["text"], "annotations": [], "logprobs": []}
        return {"id": "msg_" + name, "type": "message", "status": status, "role": "assistant",
                "content": [part]}
    if kind in THOUGHTS:                    # text and proof come back with the next request
        parts = [{"type": "summary_text", "text": block["thinking"]}] if kind == "thinking" else []
        proof = f"{kind}:{block.get('signature') or block.get('data') or ''}"
        return {"id": "rs_" + name, "type": "reasoning", "status": status, "summary": parts,
                "encrypted_content": proof if done else None}
    if kind == OWN_RESULT:                  # call and result are one item
        call = next(b for b in message.content if b.get("id") == block["tool_use_id"])
        texts = "".join(part.get("text", f"[{part['type']}]") for part in block["content"])
        slot, other = ("error", "output") if block["is_error"] else ("output", "error")
        status = "failed" if done and block["is_error"] else status
        return {"id": "mcp_" + name, "type": "mcp_call", "status": status, "name": call["name"],
                "server_label": call["server_name"], "approval_request_id": None,
                "arguments": call_text(message, call) if done else "", other: None,
                slot: texts if done else None}
    if kind != "tool_use":
        return {}
    called = {"status": status, "call_id": block["id"], "name": block["name"],
              **{slot: known[slot] for slot in ("namespace", "name") if slot in known}}
    text = call_text(message, block) if done else ""
    if "free" in known:
        return {"id": "ctc_" + name, "type": "custom_tool_call", **called, "input": text}
    return {"id": "fc_" + name, "type": "function_call", **called, "arguments": text}


def response_object(message: Message, status: str, **more: Any) -> dict:
    return {"id": "resp_" + message.ticket, "object": "response", "created_at": message.created,
            "status": status, "error": None, "incomplete_details": None,
            **message.wants.get("echo", {}), "model": message.model, "output": [], "usage": None,
            **more}


def responses_body(message: Message) -> dict:
    used, reason = chat_usage(message), CUT_SHORT.get(message.stop_reason)
    written = message.usage.get("cache_creation_input_tokens") or 0
    usage = {"input_tokens": used["prompt_tokens"], "input_tokens_details": {
        **used["prompt_tokens_details"], "cache_write_tokens": written},
        "output_tokens": used["completion_tokens"], "total_tokens": used["total_tokens"],
        "output_tokens_details": used["completion_tokens_details"]}
    items = [response_item(message, at) for at in range(len(message.content))]
    return response_object(
        message, "incomplete" if reason else "completed", output=list(filter(None, items)),
        incomplete_details={"reason": reason} if reason else None, usage=usage)


def block_events(message: Message, at: int, step: str, delta: dict) -> list[dict]:
    """What a Responses client is told of a content block: step "added", "delta" or "done"."""
    item = response_item(message, at, step == "done") if at >= 0 else {}
    if not item:
        return []
    stem, part_stem, index, slot = TOLD[item["type"]]
    head = {"output_index": sum(b["type"] in SHOWN for b in message.content[:at + 1]) - 1}
    inner = {"item_id": item["id"], **head, **({index: 0} if index else {})}
    told = item[slot]                       # a text, or the parts that hold it
    part = [{"type": f"{part_stem}.{step}", **inner, "part": told[0]}] if index and told else []
    ran = item["type"] == "mcp_call"
    if step == "added":
        return [{"type": "response.output_item.added", **head, "item": {**item, slot: told[:0]}},
                *part, *[{"type": "response.mcp_call.in_progress", **inner}] * ran]
    more = {"logprobs": []} if item["type"] == "message" else {}
    late = step == "done" and not index and (       # a free tool's text, or "{}" without a piece
        slot == "input" or not message.arguments.get(item.get("call_id")))
    text = told if late else delta.get(DELTAS.get(delta.get("type"), ("",))[0])
    seen = late or delta.get("type") != "signature_delta" and slot != "input"
    events = [{"type": stem + ".delta", **inner, "delta": text, **more}] if text and seen else []
    if step == "done":
        whole = {"text": told[0]["text"]} if index and told else {slot: told}
        events += [{"type": stem + ".done", **inner, **whole, **more}] * bool(part or not index) + [
            *part, *[{"type": f"response.mcp_call.{item['status']}", **inner}] * ran,
            {"type": "response.output_item.done", **head, "item": item}]
    return events


def response_events(message: Message, event: dict) -> list[dict]:
    """What a Responses client is told about `event`, but for the sequence numbers."""
    kind = event["type"]
    if kind in ("message_start", "ping"):       # the first of them opens, a later ping repeats
        stages = ["created"] * (message.openings == 1) + ["in_progress"] * (
            message.openings == 1 or kind == "ping")
        return [{"type": "response." + stage, "response": response_object(message, "in_progress")}
                for stage in stages]
    if kind == "error":
        error = event["error"]
        failed = response_object(message, "failed", error={
            "code": error["code"] or error["type"], "message": error["message"]})
        return [{**error, "type": "error", "error": error},
                {"type": "response.failed", "response": failed}]
    if kind == "message_stop":
        response = responses_body(message)
        return [{"type": "response." + response["status"], "response": response}]
    last = len(message.content) - 1         # a block's end is told when it is known not to be cut
    if kind == "content_block_start":
        ended = block_events(message, last - 1, "done", {})
        return ended + block_events(message, last, "added", {})
    if kind == "content_block_delta":
        return block_events(message, last, "delta", event["delta"])
    return block_events(message, last, "done", {}) if kind == "message_delta" else []


def responses_frames(message: Message, event: dict) -> list[bytes]:
    return [sse_frame({**told, "sequence_number": number}, told["type"])
            for number, told in enumerate(response_events(message, event), message.sent)]


class Dialect(NamedTuple):
    parse: Callable[..., Turn]              # request body, stored items before it -> Turn, ApiError
    frames: Callable[[Message, dict], list[bytes]]          # event -> SSE frames
    body: Callable[[Message], dict]                         # whole answer
    error: Callable[[ApiError], dict]                       # envelope


DIALECTS: dict[str, Dialect] = {
    "messages": Dialect(parse_body, messages_frames, messages_body, messages_error),
    "chat": Dialect(parse_body, chat_frames, chat_body, chat_error),
    "responses": Dialect(parse_responses, responses_frames, responses_body, chat_error),
}


# == 5. Refusals ===================================================================================
# What models refuse: learned from their errors, not listed, and remembered in the state directory.
# The one loop that tries a turn again, whatever answers it.  Knows turns, no process and no socket.
# To let another field be dropped: a row in REFUSABLE.

REFUSAL_TRIES = 4               # parameters dropped for one request, at most
SMALL_OUTPUT = 4096     # max_tokens below this are not shared with thinking that nobody asked for
MOST_RULES = 200                # of a model; those of single schemas are many
RULE_LIMIT = 4096               # characters of one that is kept: its value is a caller's
REFUSAL_DAYS = 30               # then a model is asked again: vendors lift restrictions, too
REFUSABLE: dict[str, str] = {       # what a turn may set -> how an error message names it
    "strict": r"^tools\.\d+\..*(not supported|strict)",
    "thinking_blocks": r"messages\.\d.*thinking|thinking.{0,40}block|signature",
    "temperature": r"\btemperature\b", "top_p": r"\btop_p\b", "top_k": r"\btop_k\b",
    "stop_sequences": r"\bstop_sequences\b", "tool_choice": r"\btool_choice\b",
    "format": r"output_config(?!\.effort)|output_format|structured output",
    "effort": r"\beffort\b|output_config: ", "thinking": r"\b[Tt]hinking\b"}
ANSWER = "StructuredOutput"             # the CLI's tool for answers that match a schema
VALUE = re.compile("hould|less than|greater than|not found|nvalid|shorter|longer|requires")


def features(turn: Turn) -> dict[str, str]:
    """What a turn sets that a model may refuse: a key of REFUSABLE -> the same with its value.

    {"temperature": "temperature", "thinking": "thinking.disabled", "tool_choice": "tool_choice"};
    "thinking.default" is what the CLI makes of a turn that says nothing.
    """
    found = {name: name for name in REFUSABLE if name in turn.fields}
    found["thinking"] = "thinking." + turn.fields.get("thinking", {}).get("type", "default")
    if turn.fields.get("effort"):
        found["effort"] = "effort." + turn.fields["effort"]
    if turn.fields.get("tool_choice", {}).get("type") in ("auto", "none"):
        del found["tool_choice"]
    if turn.strict:                         # these schemas' fault, not the model's
        found["strict"] = "strict." + turn.strict
    if any(b["type"] in THOUGHTS for m in turn.messages for b in m["content"]):
        found["thinking_blocks"] = "thinking_blocks"
    return found


def without(turn: Turn, name: str) -> Turn:
    """The turn without one of its features; of a forced choice remains what was not forced, and
    instead of the API's own format a tool is forced."""
    fields = {k: v for k, v in turn.fields.items() if k != name}
    if name == "tool_choice" and turn.fields[name].get(SINGLE):
        fields[name] = {"type": "auto", SINGLE: True}
    choice = fields.get("tool_choice", {})
    if name == "format" and choice.get("type") in (None, "auto", "none"):
        free = turn.tools and choice.get("type") != "none"
        fields["tool_choice"] = {**({"type": "any"} if free else {"type": "tool", "name": ANSWER}),
                                 **({SINGLE: True} if choice.get(SINGLE) else {})}
    if name == "thinking" and name not in turn.fields:      # an old CLI with a newer model
        fields[name] = {"type": "adaptive"}
    messages = turn.messages
    if name == "thinking_blocks":
        kept = [[b for b in m["content"] if b["type"] not in THOUGHTS] for m in messages]
        messages = tuple({**m, "content": blocks} for m, blocks in zip(messages, kept) if blocks)
    tools = turn.tools
    if name == "strict":
        tools = tuple({k: v for k, v in tool.items() if k != "strict"} for tool in tools)
    return replace(turn, fields=fields, messages=messages, tools=tools)


def refusal_rule(turn: Turn, message: str) -> dict | None:
    """What to drop, as an error message names it: {"drop": feature, "with": [features]}.

    The first one named is dropped, the others that are set too are the condition; None if the
    message names nothing that the turn sets, or only its size.
    """
    found = features(turn)
    if "Expected `thinking`" in message and "thinking" in turn.fields:  # a history without it
        return {"drop": found["thinking"], "with": [], "once": True}
    named = sorted((match.start(), order, name) for order, (name, pattern) in enumerate(
        REFUSABLE.items()) for match in [re.search(pattern, message)] if match and name in found)
    names = [name for _, _, name in named if "budget_tokens" not in message]
    names = ["thinking_blocks"] if "thinking_blocks" in names else names
    silent = found["thinking"] == "thinking.default" and "type.enabled" not in message
    if silent or ("tool_choice" in names and "thinking" in turn.said):
        names.sort(key=lambda name: name == "thinking")     # a condition, not what is dropped
    if not names or (silent and names == ["thinking"]) or re.match(
            r"(tools|system)\.|messages\.", message) and names[0] in turn.fields:
        return None                         # it speaks of something else
    rule = {"drop": found[names[0]], "with": sorted(found[n] for n in names[1:])}
    if "signature" in message:              # that is the history's fault, not the model's
        return {**rule, "once": True}
    odd = VALUE.search(message) or (names[0] == "format" and "model" not in message)
    return {**rule, "value": turn.fields.get(names[0])} if odd else rule


def with_thinking(turn: Turn, refused: list[str]) -> Turn:
    """Sampling, a forced tool or a small output limit need thinking off, which the CLI turns on.
    If the caller says nothing of it, it is switched off, unless the model refuses that."""
    fields, wanted = turn.fields, {*SAMPLING, "tool_choice"} & set(features(turn))
    small = fields.get("max_tokens", SMALL_OUTPUT) < SMALL_OUTPUT
    if not (wanted or small) or "thinking" in fields or "effort" in fields or \
            "thinking.disabled" in refused:
        return turn
    return replace(turn, fields={**fields, "thinking": {"type": "disabled"}})


@dataclass
class Receipt:
    """How a turn was served, for the response's head and the log."""
    caller: str = ""
    conversation: str = ""                  # new, continued or rebuilt
    ignored: list[str] = field(default_factory=list)
    cost: float | None = None               # US dollars, if the CLI said it
    upstream: str = ""                      # the upstream's own id of the request
    request: str = ""                       # our id of it
    session: str = ""                       # the CLI's id of its session, if one is kept
    home: str = ""                          # and the private directory that belongs to it


def is_fresh(rule: dict) -> bool:
    return rule["at"] > time.time() - REFUSAL_DAYS * 86400


class Refusals:
    """What each model has refused; kept in the state directory, so it is met only once."""

    def __init__(self, path: str) -> None:
        self.path, self.rules = path, {}            # model -> [{"drop", "with", "at"}]
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError,
                                 RecursionError):
            with open(path, encoding="utf-8") as file:
                self.rules = {model: [r for r in rules if is_fresh(r) and all(
                    isinstance(name, str) for name in (r["drop"], *r["with"]))]
                              for model, rules in json.load(file).items()}

    def apply(self, turn: Turn, model: str, more: list[dict]) -> Turn:
        """The turn without what the model is known to refuse, and without `more`."""
        rules = [*filter(is_fresh, self.rules.get(model, [])), *more]
        always = [rule for rule in rules if not rule["with"]]
        turn = self._obey(turn, [r for r in always if not r["drop"].startswith("thinking.")])
        return self._obey(with_thinking(turn, [rule["drop"] for rule in always]), rules)

    @staticmethod
    def _obey(turn: Turn, rules: list[dict]) -> Turn:
        found = features(turn)
        for rule in rules:
            name = rule["drop"].partition(".")[0]       # of the feature, without its value
            same = rule.get("value") in (None, turn.fields.get(name))
            if found.get(name) == rule["drop"] and same and {*rule["with"]} <= {*found.values()}:
                turn = without(turn, name)
                found = features(turn)
        return turn

    def learn(self, model: str, rules: list[dict]) -> None:
        """Remember rules that have helped."""
        known = self.rules.setdefault(model, [])
        for rule in ({**rule, "at": int(time.time())} for rule in rules
                     if not rule.get("once") and len(json.dumps(rule)) <= RULE_LIMIT):
            known[:] = [old for old in known if {**old, "at": rule["at"]} != rule] + [rule]
        del known[:-MOST_RULES]
        try:
            with drafted(self.path, json.dumps(self.rules)) as draft:
                os.replace(draft, self.path)
        except OSError as exc:
            say(f"cannot keep what models refuse in {self.path}: {exc}")

    async def insist(self, turn: Turn, full_id: Callable[[], str], message: Message,
                     receipt: Receipt, play: Callable[[Turn], AsyncIterator[list[dict]]]
                     ) -> AsyncIterator[list[dict]]:
        """The bursts of events that `play` gives for a turn, which the caller folds into `message`.

        Before its first event a turn is tried again: without what the model refuses, and once more
        if a process died.
        """
        deaths, learned = 0, []
        while True:
            plan = self.apply(turn, full_id(), learned)
            kept = features(plan)           # of what the caller said, and of what it sent back
            lost = [name for name, feature in features(turn).items() if kept.get(name) != feature
                    and name in {"thinking_blocks", *turn.said}]
            receipt.ignored = sorted({*turn.ignored, *(turn.said.get(name, name) for name in lost)})
            stream = play(plan)
            try:
                async for burst in stream:
                    if learned and not message.start:       # the model takes it now
                        self.learn(full_id(), learned)
                    yield burst
                return
            except Died:
                deaths += 1
                if message.start or deaths > 1:
                    raise
            except ApiError as error:
                rule = refusal_rule(plan, error.message) if error.status == 400 else None
                if message.start or not rule or len(learned) == REFUSAL_TRIES:
                    raise
                learned.append(rule)
            finally:
                await stream.aclose()


# == 6. CLI protocol ===============================================================================
# The words of the claude binary (stream-json and its control protocol): a launch as argv and
# environment, a Turn as lines, its lines as events.  Pure: no process, no clock.  What it must not
# do: change identity, billing or system fields of the CLI's requests.
# To follow a new CLI: record what it says, replay it in the tests, change Reply.

SERVER = "client"                       # the MCP server under which the client's tools are listed
ANSWER_HELP = ("Use this tool to return your final response in the requested structured format. "
               "You MUST call this tool exactly once at the end of your response.")
NO_TOOL_NAMES = {ANSWER, "__proto__", "constructor"}    # 2.1.110 trips over the last two
TELLING = ("command", "file_path", "path", "notebook_path", "pattern", "query", "url", "skill",
           "description", "prompt")     # arguments of Claude Code's tools, the first tells most
GIST = 120              # characters of them that are shown
ANSWER_TRIES = 5        # messages until the model has answered to a schema; 2.1.110 has no end
RESULT_LIMIT = 400_000  # characters; the CLI cuts a result over 500,000 that is no history
PATIENCE_S = 30         # an API that asks to wait longer fails the turn: the caller may decide
IDENTITY = re.compile("You are (Claude Code|a Claude agent).*")     # alone it replaces the CLI's
OUTER_ENV = re.compile(r"CLAUDECODE$|CLAUDE_AGENT_|CCPROXY_|CLAUDE_CODE_(?!OAUTH_TOKEN$|USE_\w+$|"
                       r"SKIP_\w+_AUTH$|CLIENT_\w+$)")  # of an outer session, or ours
CLI_ENV = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1", "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "ENABLE_TOOL_SEARCH": "false", "MAX_MCP_OUTPUT_TOKENS": str(10**8)}
CHAT_ENV = {**CLI_ENV, "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1", "DISABLE_COMPACT": "1",
            "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": str(10**8),      # tokens; the API knows its own
            "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1"}
AGENT_ENV = {**CLI_ENV, "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",    # a turn has an end
             "CLAUDE_CODE_DISABLE_CRON": "1"}
NO_MENTIONS = (2, 1, 197)   # older ones read "@file" unless all attachments are switched off
MARK = "CCPROXY_CHILD"      # variable by which a CLI's tools and their children are found
PREFIX = f"mcp__{SERVER}__"             # of the client's tools in agent mode
UNUSABLE = ("AskUserQuestion", "ScheduleWakeup", "Monitor", "CronCreate", "CronDelete",
            "CronList")     # tools of Claude Code that ask a terminal, or outlive their turn
# Words of JSON schema that the CLI's validator (Ajv, draft 7) knows, or that narrow what is valid:
# it must see those, and refuses a schema that it cannot check.  Others only annotate, but it
# refuses a whole schema for one unknown word ("format": "date-time", "x-order"): left out.
SCHEMA_WORDS = frozenset(
    "type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength "
    "minLength pattern items additionalItems maxItems minItems uniqueItems contains maxProperties "
    "minProperties required additionalProperties propertyNames if then else allOf anyOf oneOf not "
    "$ref definitions $defs properties patternProperties dependencies title description default "
    "prefixItems unevaluatedProperties unevaluatedItems dependentRequired dependentSchemas "
    "minContains maxContains $dynamicRef $recursiveRef".split())
SCHEMA_MAPS = ("properties", "patternProperties", "definitions", "$defs", "dependentSchemas")
SCHEMA_DATA = ("enum", "const", "default", "required", "dependentRequired", "dependencies")


def claude_argv(command: list[str], model: str, agent: Iterable[str] = ()) -> list[str]:
    """The command line of a process, for an agent with agent_options; everything else is said over
    stdin."""
    fixed = ("-p --input-format stream-json --output-format stream-json --verbose "
             "--include-partial-messages --permission-prompt-tool stdio")
    chat = ("--strict-mcp-config --disable-slash-commands --no-session-persistence --tools= "
            "--setting-sources=")
    return [*command, *fixed.split(), *(agent or chat.split()),
            *([f"--model={model}"] if model != "default" else [])]


def agent_options(launch: Launch, settings: Settings) -> list[str]:
    """What of an agent's command line the operator has said."""
    told = {"max-turns": settings.max_turns or "", "resume": launch.resume,
            "allowedTools": ",".join(settings.allowed_tools),
            "disallowedTools": ",".join([*UNUSABLE, *settings.disallowed_tools])}
    return [f"--permission-mode={launch.permission_mode}",
            *([] if launch.kept else ["--no-session-persistence"]),
            *(f"--{name}={value}" for name, value in told.items() if value),
            *(f"--add-dir={path}" for path in settings.add_dir),
            *(f"--mcp-config={path}" for path in settings.mcp_config), *settings.claude_arg]


def claude_env(environ: Mapping[str, str], retries: int, patience_s: float,
               more: Mapping[str, str] = CHAT_ENV) -> dict[str, str]:
    """The inherited environment without an outer session's, plus what makes the CLI an API."""
    kept = {name: value for name, value in environ.items() if not OUTER_ENV.match(name)}
    patience = str(int(patience_s * 1000))
    return {**kept, **more, "CLAUDE_CODE_MAX_RETRIES": str(retries), "MCP_TOOL_TIMEOUT": patience,
            "CLAUDE_CODE_MCP_TOOL_IDLE_TIMEOUT": patience}


def agent_env(version: tuple[int, ...], sandboxed: bool) -> dict[str, str]:
    """The variables for an agent of this version of the CLI."""
    return {**AGENT_ENV, **({"IS_SANDBOX": "1"} if sandboxed else {}),
            **({"CLAUDE_CODE_DISABLE_ATTACHMENTS": "1"} if () < version < NO_MENTIONS else {})}


def parse_version(text: str) -> tuple[int, ...]:
    """"2.1.330 (Claude Code)" -> (2, 1, 330);  () when there is no version in it."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def wire_name(name: str, prefix: str = "") -> str:
    """A tool name that the API and every CLI take, also behind a prefix; most are kept."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) and name not in NO_TOOL_NAMES and (
            len(prefix + name) <= 128):
        return prefix + name
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{prefix}{re.sub('[^A-Za-z0-9_-]', '_', name)[:100].strip('_')}_{digest}"


def call_prefix(launch: Launch) -> str:
    """What the CLI puts before the names of the client's tools."""
    return PREFIX if launch.agent else ""


def gist(value: Any) -> str:
    """The beginning of a text or of a tool's most telling argument, on one line.

    {"command": "npm test", "timeout": 9} -> "npm test",  {"a": [1]} -> '{"a": [1]}'
    """
    if isinstance(value, dict):
        telling = [value[name] for name in TELLING if isinstance(value.get(name), str)]
        value = telling[0] if telling else json.dumps(value) if value else ""
    line = " ".join(str(value)[:4 * GIST].split())
    return line if len(line) <= GIST else line[:GIST - 3] + "..."


def result_text(block: dict) -> str:
    """What a tool of the agent's gave, as text."""
    return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]"
                   for part in block["content"])


def narration(block: dict, name: str = "") -> str:
    """A line about a tool that the agent ran, or about what came of it."""
    if block["type"] == OWN_CALL:
        said = gist(block["input"])
        return f"[{block['name']}: {said}]" if said else f"[{block['name']}]"
    verb, said = "failed" if block.get("is_error") else "gave", result_text(block)
    lines = said.count("\n") + 1
    more = f" ({lines} lines)" if lines > 1 else ""
    return f"[{name or 'it'} {verb}: {gist(said) or 'nothing'}{more}]"


def wire_blocks(blocks: list[dict], prefix: str = "") -> list[dict]:
    """Blocks of a history as the CLI and the API take them; of what the agent ran in an earlier
    turn remains a line."""
    return [{**block, "name": wire_name(block["name"], prefix)} if block["type"] == "tool_use" else
            {"type": "text", "text": narration(block)} if block["type"] in (OWN_CALL, OWN_RESULT)
            else block for block in blocks]


def wire_tools(turn: Turn) -> list[dict]:
    """The client's tools with names that hold behind the prefix that they may get."""
    prefix = call_prefix(turn.launch)
    return [{**tool, "name": wire_name(tool["name"], prefix)[len(prefix):]} for tool in turn.tools]


def wire_schema(schema: Any) -> Any:
    """A JSON schema in the words that the CLI's validator knows (see SCHEMA_WORDS)."""
    if isinstance(schema, list):
        return [wire_schema(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {word: value if word in SCHEMA_DATA else
            {name: wire_schema(inner) for name, inner in value.items()}
            if word in SCHEMA_MAPS and isinstance(value, dict) else wire_schema(value)
            for word, value in schema.items() if word in SCHEMA_WORDS}


def initialize_request(turn: Turn) -> dict:
    """The first control request: what the process will be.  It cannot be changed later.

    The hook's answer ends the turn behind a valid answer, where 2.1.110 would ask the model on.
    """
    schema = {"hooks": None} if turn.schema is None else {
        "jsonSchema": wire_schema(turn.schema),
        "hooks": {"PostToolUse": [{"matcher": ANSWER, "hookCallbackIds": [ANSWER]}]}}
    system = turn.system + "\n" * bool(IDENTITY.fullmatch(turn.system))
    prompt = {"systemPrompt": [system]} if not turn.launch.agent else (
        {"appendSystemPrompt": turn.system} if turn.system.strip() else {})
    return {"subtype": "initialize", **prompt, **schema,
            **({"sdkMcpServers": [SERVER]} if turn.tools else {})}


def settings_request(turn: Turn, model: str | None) -> dict:
    """The control request that sets what may change from turn to turn; `model` if it has to."""
    body = {name: value for name, value in turn.fields.items() if name != "effort"}
    silent = body.get("thinking", {}).get("type") == "disabled"
    # Either takes clear_thinking out, which the API refuses without thinking; the switch makes
    # old CLIs add temperature 1, which the API refuses beside top_p.
    by_switch = silent and ("top_p" not in body or "temperature" in body)
    if silent and not by_switch:
        body["context_management"] = {"edits": []}
    if turn.tools and not turn.launch.agent:    # the exact definitions, which the CLI alters
        body["tools"] = wire_tools(turn) + [{"name": ANSWER, "description": ANSWER_HELP,
            "input_schema": wire_schema(turn.schema)}] * (turn.schema is not None)
    choice = body.get("tool_choice", {})
    if "name" in choice:
        name = wire_name(choice["name"], call_prefix(turn.launch))
        body["tool_choice"] = {**choice, "name": name}
    return {"subtype": "apply_flag_settings", "settings": {
        "effortLevel": turn.fields.get("effort"), **({"model": model} if model else {}),
        **({"permissions": {"allow": [PREFIX + "*"]}} if turn.tools else {}),
        "env": {"CLAUDE_CODE_EXTRA_BODY": json.dumps(body),
                "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(body.get("max_tokens") or ""),
                "CLAUDE_CODE_DISABLE_THINKING": "1" if by_switch else ""}}}


def user_line(message: dict, uid: str, starts_turn: bool = True) -> dict:
    """A user message for stdin.  A leading "/" of its last text would be taken for a command: it
    is sent as a text block of its own, which the model reads the same.  "//" is taken for none."""
    content = list(message["content"])
    at = max((n for n, b in enumerate(content) if b["type"] == "text"), default=-1)
    slash = re.match(r"(/)(?!/)(.*)", content[at]["text"], re.S) if at >= 0 else None
    if slash:                               # a lone one is taken for a command, too
        texts = slash.groups() if slash.group(2).strip() else (" " + slash.group(0),)
        content[at:at + 1] = [{**content[at], "text": text} for text in texts]
    return {"type": "user", "message": {"role": "user", "content": content}, "uuid": uid,
            "parent_tool_use_id": None, "session_id": "",
            **({} if starts_turn else {"shouldQuery": False})}


def assistant_line(message: dict, uid: str, model: str, prefix: str = "") -> dict:
    """An assistant message of the history.  Under another model's id its thinking is dropped."""
    content = wire_blocks(message["content"], prefix)
    return {"type": "assistant", "parent_tool_use_id": None, "session_id": "", "uuid": uid,
            "message": {"id": "msg_" + uid.replace("-", ""), "type": "message", "role": "assistant",
                        "model": model, "content": content, "stop_reason": None,
                        "usage": {"input_tokens": 0, "output_tokens": 0}}}


def listed_schema(schema: dict) -> dict:
    """A tool's schema as an MCP list may hold it; without the parts that would lose the list."""
    kinds = {"properties": dict, "required": list, "$defs": dict, "definitions": dict}
    return {"type": "object", **{word: value for word, value in schema.items() if word != "type"
                                 and isinstance(value, kinds.get(word, object))}}


def mcp_answer(message: dict, tools: list[dict], result: dict | None = None, whole: bool = False
               ) -> dict:
    """JSON-RPC answer to an MCP message; `result` is the client's tool_result for tools/call.
    `whole`: the model learns of the tools by this list alone."""
    answer: dict = {}
    if result is not None:
        content = [{"type": "image", "data": part["source"]["data"], "mimeType":
                    part["source"]["media_type"]} if part["type"] == "image" else
                   {"type": "text", "text": part["text"]} for part in result["content"]]
        answer = {"content": content, **({"isError": True} if result.get("is_error") else {})}
    elif message.get("method") == "initialize":
        answer = {"protocolVersion": message["params"]["protocolVersion"],
                  "capabilities": {"tools": {}}, "serverInfo": {"name": SERVER, "version": "1"}}
    elif message.get("method") == "tools/list":
        # One odd schema would lose them all.  Without the size a result over 50,000 characters is
        # replaced by its beginning.
        answer = {"tools": [{
            "name": tool["name"], "inputSchema": {"type": "object"}, "_meta": {
                "anthropic/maxResultSizeChars": 10**9},
            **({"description": tool.get("description", ""), "inputSchema": listed_schema(
                tool.get("input_schema", {}))} if whole else {})} for tool in tools]}
    return {"mcp_response": {"jsonrpc": "2.0", "id": message.get("id", 0), "result": answer}}


def fits_mcp(block: dict) -> bool:
    """Whether MCP can carry a block of the user's unharmed: a result of texts and images."""
    return block["type"] == "tool_result" and all(
        part["type"] == "text" or (part["type"] == "image" and part["source"]["type"] == "base64")
        for part in block["content"]) and RESULT_LIMIT > sum(
            len(part["text"]) for part in block["content"] if part["type"] == "text")


def vendor_message(text: str) -> str:
    """The API's own message in the CLI's sentence about it.

    'API Error: 400 {"error":{"message":"no"}} - see ...' -> 'no',  'API Error: 400 no' -> 'no'
    """
    text = re.sub(r"^.{0,40}?API Error:\s*(\d{3}\b\s*)?(Request rejected \(\d{3}\) . )?", "", text)
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        return json.JSONDecoder().raw_decode(text)[0]["error"]["message"]
    return re.sub(r"\.? (This is a server-side issue, usually|Run --model to).*", "", text)


SHAPES: dict[str, str] = {      # type of an event of the API's -> the object that it has to hold
    "message_start": "message", "content_block_start": "content_block", "error": "error",
    "content_block_delta": "delta", "message_delta": "delta"}
TEXTS = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("id", "name"),
         **{kind: (source,) for kind, (source, _) in DELTAS.items()}}   # type of it -> texts in it


def check_event(event: dict) -> None:
    """TypeError if an event has not the shape that the fold and the dialects read."""
    kind = event["type"]
    inner = event[SHAPES[kind]] if kind in SHAPES else {}
    usage = inner.get("usage", event.get("usage")) or {}
    texts = TEXTS.get(str(inner.get("type")), ())
    texts += ("type",) * (kind in ("content_block_start", "content_block_delta"))
    told = [inner.get(name) for name in texts] + [value for name, value in inner.items()
            if name in ("signature", "stop_reason", "model", "data") and value is not None]
    if not all(isinstance(value, str) for value in told) or not isinstance(
            usage.get("output_tokens_details") or {}, dict):
        raise TypeError(f"an event of type {kind} is malformed")


class Reply:
    """One turn's stdout lines folded into the events of exactly one message.

    feed(line) -> events to send on.  Afterwards `done` tells that the message is whole, `reusable`
    that the process stands clean behind it, `failed` what to raise as nothing more will come.
    With a schema, text is left out but beside a client's call, and the answer tool's input becomes
    the text; a streamed one is sent as it comes, a whole one once the CLI has found it valid.
    """
    done = reusable = working = False       # it is whole; a clean end; tools run meanwhile
    failed: ApiError | None = None
    model = ""                              # as system/init names it
    retry_after = 0                         # seconds, as the CLI says what it was told
    _visible = _called = False              # something to see, a client's call
    _valid = False                          # the CLI took the answer, maybe before its end
    _aside: list | None = None              # where a block goes that is not told, at least not yet
    _blocks = _starts = 0                   # blocks sent on, messages begun
    _answer = ""                            # id of the answer tool's call
    _answer_at = -1                         # and our index of its block

    def __init__(self, turn: Turn, clock: Callable[[], float] = time.time,
                 who: str = "claude") -> None:
        self.turn, self._who, self._clock = turn, who, clock
        self._strict = turn.schema is not None
        self._names = {wire_name(tool["name"], call_prefix(turn.launch)): tool["name"]
                       for tool in turn.tools}
        self._index: dict[int, int] = {}    # the CLI's index of a block -> ours
        self._held: list[dict] = []         # the answer's events, until the CLI validated them
        self._texts: list[dict] = []        # events of text, until a client's call follows
        self._closing: dict = {}            # message_delta with the stop reason
        self._problem: dict = {}            # the line with the CLI's word for an error

    def feed(self, line: dict) -> list[dict]:
        """The events of a line.  Died if it has a shape that nobody has seen yet."""
        try:
            over = self.done or self.failed or line.get("parent_tool_use_id")
            return [] if over else self._feed(line) or []
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as exc:
            raise Died(f"{self._who} speaks another protocol: {exc!r}") from exc

    def told(self, event: dict) -> list[dict]:
        """The events of an upstream's own event, where no CLI is in between: what it would say of
        an error or an answer is said here."""
        try:
            check_event(event)
            if event["type"] == "error":
                kind = KIND_OF_TYPE.get(event["error"].get("type"), "backend_error")
                self.failed = ApiError(kind, str(event["error"].get("message")))
            events = self.feed({"type": "stream_event", "event": event})
            if event["type"] == "message_stop" and not self.done:
                verdict = {"content": [{"tool_use_id": self._answer}]}
                events += self.feed({"type": "user", "message": verdict} if self._answer else
                                    {"type": "result"})
            return events
        except (Died, KeyError, TypeError, AttributeError) as exc:
            raise ApiError("backend_error", f"{self._who} speaks another protocol: {exc}"[:300]
                           ) from None

    def _feed(self, line: dict) -> list[dict] | None:
        kind, word = line.get("type"), line.get("subtype")
        if kind == "stream_event":
            return self._event(line["event"])
        if kind == "user" and self._answer and isinstance(line["message"]["content"], list):
            return self._verdict(line["message"]["content"])
        if kind == "assistant" and (line.get("error") or line["message"]["model"] == "<synthetic>"):
            self._problem = line
            if self._called and not self._closing:      # the CLI waits for the call's result
                self.failed = self._failure(line)
        elif kind == "system" and word == "init":
            self.model = line.get("model") or ""
            if self._strict and ANSWER not in (line.get("tools") or []):
                self.failed = ApiError("invalid_request", "the CLI cannot use this JSON schema: it "
                                       "is invalid, or newer than draft 7", param="schema")
        elif kind == "system" and line.get("status") == "requesting":
            if self._blocks and not self._closing:      # 2.1.330 asks the model to go on
                self.failed = ApiError("backend_error", "the API's answer broke off")
        elif kind == "system" and word == "api_retry":
            self.retry_after = math.ceil((line.get("retry_delay_ms") or 0) / 1000)
            if self.retry_after > PATIENCE_S:
                self.failed = status_error(line.get("error_status") or 502, "the API asks to wait "
                                           f"{self.retry_after} s", self.retry_after)
        elif kind == "rate_limit_event" and (line.get("rate_limit_info") or {}).get("resetsAt"):
            left_s = line["rate_limit_info"]["resetsAt"] - self._clock()
            self.retry_after = max(1, math.ceil(left_s))
        elif kind == "result":
            self.failed = self._failure(line)
        return None

    def _event(self, event: dict) -> list[dict] | None:
        kind, reason = event["type"], (event.get("delta") or {}).get("stop_reason")
        if kind.startswith("content_block_"):
            return self._block(event)
        if kind == "message_start":
            self._starts += 1
            if self._blocks and not (self._strict and self._closing):
                self.failed = Died(f"{self._who} began its answer again after an error")
            elif self._strict and self._starts > ANSWER_TRIES:
                self.failed = ApiError("backend_error", "the model gives no JSON for the schema")
            self._closing, self._index, self._texts = {}, {}, []
            return [event] if self._starts == 1 else None
        if kind == "message_delta":             # without a reason the CLI broke off
            self._closing = event if reason else {}
            spent = reason and reason not in ("end_turn", "stop_sequence", "tool_use")
            return self._finish() if spent else None    # at once: the CLI would ask for more
        if kind != "message_stop":
            return [event]
        if self._valid and self._closing:
            return self._finish_answer()
        waits = self._strict and (self._answer or not self._called)
        if waits or not self._closing:          # the CLI validates the answer, or asks for it
            return None
        self.reusable = self._visible and (
            self._closing["delta"]["stop_reason"] != "tool_use" or self._called)
        return [*map(self._placed, self._texts), *self._finish()]

    def _placed(self, event: dict) -> dict:
        """An event of a block with our index of it."""
        if "content_block" in event:
            self._index[event["index"]], self._blocks = self._blocks, self._blocks + 1
        return {**event, "index": self._index[event["index"]]}

    def _block(self, event: dict) -> list[dict] | None:
        """An event of a content block; kept back while it may have to be left out."""
        block, spoken = event.get("content_block") or {}, []
        kind = block.get("type")
        answers = self._strict and kind == "tool_use" and block["name"] == ANSWER
        if kind:                            # a second answer is one too many
            self._aside = self._texts if self._strict and kind == "text" else \
                [] if answers and self._answer else None
        if self._aside is not None:
            self._aside.append(event)
            return None
        self._visible |= kind not in (None, *THOUGHTS)
        if answers:
            self._answer, self._answer_at = block["id"], self._blocks
            event = {**event, "content_block": {"type": "text", "text": ""}}
        elif kind == "tool_use":
            event = {**event, "content_block": self._call(block)}
            if event["content_block"]["type"] == kind:
                spoken, self._texts = self._texts, []
        *spoken, event = map(self._placed, [*spoken, event])
        if event["index"] != self._answer_at:
            return [*spoken, event]
        events = [event]
        if "delta" in event:
            text = event["delta"].get("partial_json") or ""
            events = [{**event, "delta": {"type": "text_delta", "text": text}}]
        if event["type"] == "content_block_stop" and not any("delta" in e and e["delta"]["text"]
                                                             for e in self._held):
            events.insert(0, {"type": "content_block_delta", "index": self._answer_at,
                              "delta": {"type": "text_delta", "text": "{}"}})
        self._held += events
        return events if self.turn.stream else None

    def _call(self, block: dict) -> dict:
        """The caller's block for a call."""
        self._called = True
        return {**block, "name": self._names.get(block["name"], block["name"])}

    def _finish(self, reason: str = "") -> list[dict]:
        """The end of the message, for this reason instead of the API's own."""
        self.done = True
        held = [] if self.turn.stream else self._held
        ours = {"delta": {"stop_reason": reason, "stop_sequence": None}} if reason else {}
        return [*held, {**self._closing, **ours}, {"type": "message_stop"}]

    def _finish_answer(self) -> list[dict]:
        return self._finish("tool_use" if self._called else "end_turn")

    def _verdict(self, content: list[dict]) -> list[dict] | None:
        """The CLI's word on the answer tool's call: valid, or what is wrong with it."""
        told = next((b for b in content if b.get("tool_use_id") == self._answer), None)
        if told is None:
            return None
        if not told.get("is_error"):
            self._valid = True
            return self._finish_answer() if self._closing else None     # usage is still to come
        if self.turn.stream:
            self.failed = ApiError("backend_error", "the model's JSON does not match the schema: "
                                   f"{str(told.get('content'))[:300]}; try again")
        self._held.clear()                      # the CLI has told the model to try again
        self._blocks, self._answer, self._answer_at = self._answer_at, "", -1
        return None

    def _failure(self, line: dict) -> ApiError:
        """Why the turn ended without a whole message, in the API's own words."""
        if not line.get("is_error") and not self._problem:
            return ApiError("backend_error", f"{self._who} ended the turn without an answer"
                            + " that matches the schema" * self._strict)
        content = (self._problem.get("message") or {}).get("content") or [{}]
        text = content[0].get("text") or line.get("result") or "; ".join(line.get("errors") or [])
        status = line.get("api_error_status") or self._problem.get("api_error_status") or {
            "rate_limit": 429, "authentication_failed": 401, "billing_error": 402,
            "invalid_request": 400}.get(self._problem.get("error") or "", 502)
        return status_error(status, vendor_message(str(text)) or "the API request failed",
                            self.retry_after or None if status in (429, 529) else None)


class AgentReply(Reply):
    """The same for Claude Code with its own tools: a turn of several API messages as one.

    What it runs itself becomes blocks of their own, OWN_CALL and OWN_RESULT.  The message ends with
    the turn, or when the client has to run a tool of its own; `working` tells that tools run.
    """
    _due = False                            # the CLI waits for the result of a client's tool
    _whole = False                          # the API's message is

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._used: dict[str, Any] = {}     # usage of the messages so far
        self._using: dict[str, Any] = {}    # and of this one
        self._given: list[dict] = []        # blocks that wait for the first message
        self.owed: dict[str, dict] = {}     # calls that run behind a client's: told with their
        self._owing: list[dict] | None = None       # results.  Events of such a call
        self._told = {b.get("tool_use_id") for b in turn.messages[-1]["content"]}   # results

    @property
    def working(self) -> bool:
        return bool(self._closing)

    def _feed(self, line: dict) -> list[dict] | None:
        kind = line.get("type")
        if kind == "tools_call":            # Claude's word
            self._due = True
            return self._part()
        if kind == "result":
            return self._end(line)
        if kind != "user" or self._strict or not isinstance(line["message"]["content"], list):
            return super()._feed(line)
        return self._results(line["message"]["content"])

    def _results(self, content: list[dict]) -> list[dict]:
        """What came of the agent's own calls."""
        for block in content:
            if block.get("type") == "tool_result" and block["tool_use_id"] not in self._told:
                owed = self.owed.pop(block["tool_use_id"], None)
                self._given += [owed] if owed else []
                parts = block.get("content") or []
                parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else [
                    part if part.get("type") == "text" else
                    {"type": "text", "text": f"[{part.get('type')}]"} for part in parts]
                self._given.append({
                    "type": OWN_RESULT, "tool_use_id": block["tool_use_id"],
                    "is_error": bool(block.get("is_error")), "content": parts})
        return self._give() if self._starts else []

    def _give(self) -> list[dict]:
        events = []
        for block in self._given:
            at = {"index": self._blocks}
            said = [{"type": "content_block_delta", **at, "delta": {
                "type": "input_json_delta", "partial_json": json.dumps(block["input"])}}
                ] if "input" in block else []
            events += [{"type": "content_block_start", **at, "content_block": block}, *said,
                       {"type": "content_block_stop", **at}]
            self._blocks += 1
        self._given = []
        return events

    def _block(self, event: dict) -> list[dict] | None:
        """An event of a content block; a call that has to wait for the client is told later."""
        block = event.get("content_block") or {}
        if block:
            own = block.get("type") == "tool_use" and block["name"] not in self._names
            self._owing = [] if own and self._called and not self._strict else None
        if self._owing is None:
            return super()._block(event)
        self._owing.append(event)
        if event["type"] == "content_block_stop":
            call = self._call(self._owing[0]["content_block"])
            said = parse_input("".join((each.get("delta") or {}).get("partial_json") or ""
                                       for each in self._owing))
            self.owed[call["id"]] = {**call, "input": said if isinstance(said, dict) else {}}
        return None

    def _call(self, block: dict) -> dict:
        if block["name"] in self._names:
            return super()._call(block)
        return {"type": OWN_CALL, "id": block["id"], "name": block["name"],
                "server_name": "claude_code", "input": block.get("input") or {}}

    def _event(self, event: dict) -> list[dict] | None:
        kind = event["type"]
        if kind == "message_start":
            if self._starts and not self._closing:
                self.failed = Died(f"{self._who} began its answer again after an error")
            self._starts += 1
            self._closing, self._index, self._texts, self._whole = {}, {}, [], False
            self._using = {}
            self._use(event["message"])
            return [event, *self._give()] if self._starts == 1 else None
        if kind == "message_delta":
            self._use(event)
            event = {**event, "usage": self._sum()}
        if kind == "message_stop":
            self._used, self._using, self._whole = self._sum(), {}, True
            if not (self._valid and self._closing):
                return self._part()
        return super()._event(event)

    def _use(self, told: dict) -> None:
        """Note the usage of this message; a null says nothing, also not of what was told before."""
        usage = told.get("usage") or {}
        self._using.update({k: v for k, v in usage.items() if v is not None})

    def _sum(self) -> dict[str, Any]:
        """Usage of all messages of the turn: numbers add up, of others the last one counts."""
        counts = {k: v + self._used.get(k, 0) for k, v in self._using.items()
                  if isinstance(v, int) and isinstance(self._used.get(k, 0), int)}
        return {**self._used, **self._using, **counts}

    def _part(self) -> list[dict] | None:
        """The end of the message, if the client has to run a tool now."""
        if not (self._due and self._whole and self._called and self._closing):
            return None
        self.reusable = True
        return [*map(self._placed, self._texts), *self._finish()]

    def _end(self, line: dict) -> list[dict] | None:
        """The end of the turn: why, and whether the process stands clean behind it."""
        limit = line.get("subtype") in ("error_max_turns", "error_max_budget_usd")
        if limit and self._closing:
            return self._finish(PAUSED)
        if line.get("is_error") or self._problem or self._strict or not self._closing:
            self.failed = self._failure(line)
            return None
        self.reusable = self._visible
        return self._finish()


# == 7. Store ======================================================================================
# What outlives the process: stored responses, in sqlite, in the state directory.  One thread does
# all the work, so the loop never waits for a disk.  Knows rows and items, not what they say.
# To change a table: one more entry in MIGRATIONS.

MIGRATIONS = (      # what a walk along a conversation reads and writes is apart from the long texts
    # bytes of items and of the response; that is 0 once it was deleted
    "CREATE TABLE responses (id TEXT PRIMARY KEY, caller TEXT NOT NULL, previous TEXT, "
    "used REAL NOT NULL, size INTEGER NOT NULL, echoed INTEGER NOT NULL)",
    # items: what the request added, and the output
    "CREATE TABLE bodies (id TEXT PRIMARY KEY REFERENCES responses ON DELETE CASCADE, "
    "items TEXT NOT NULL, response TEXT NOT NULL)",
    "CREATE INDEX responses_previous ON responses (previous)",
    "CREATE INDEX responses_used ON responses (used)",
    # of the CLI's: its id, its workspace's name or "", its directory
    "CREATE TABLE sessions (caller TEXT NOT NULL, id TEXT NOT NULL, workspace TEXT NOT NULL, "
    "cwd TEXT NOT NULL, cli TEXT NOT NULL, created_at REAL NOT NULL, used_at REAL NOT NULL, "
    "PRIMARY KEY (caller, id))")
SESSION = ("caller", "id", "workspace", "cwd", "cli", "created_at", "used_at")
CHAIN = """WITH RECURSIVE chain(id, previous, depth) AS (
    SELECT id, previous, 0 FROM responses WHERE id = ? AND caller = ? UNION ALL
    SELECT r.id, r.previous, depth + 1 FROM responses r JOIN chain ON r.id = chain.previous) """


def listed_items(response: dict, items: Any) -> list[dict]:
    """A request's input as a list of items, each with an id that names its response."""
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    ticket, listed = response["id"].partition("_")[2], []
    for at, item in enumerate(items):
        listed.append({"status": "completed", **item, "id": f"item_{ticket}i{at:03x}",
                       "type": item.get("type") or "message"})
        if isinstance(item.get("content"), str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            listed[-1]["content"] = [{"type": kind, "text": item["content"]}]
    return listed


def page_of(items: list[dict], query: Mapping[str, str]) -> dict:
    """A page of items, the newest first unless the query says order=asc; with limit and after."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not re.fullmatch(r"[1-9]\d?|100", limit, re.ASCII):
        raise refusal("limit", "expected 1 to 100")
    items = items[::1 if need(order, "order", str, among=("asc", "desc")) == "asc" else -1]
    names = [item["id"] for item in items]
    if query.get("after", "") not in ("", *names):
        raise refusal("after", "no such item")
    first = names.index(query["after"]) + 1 if query.get("after") else 0
    page = slice(first, first + int(limit))
    return {"object": "list", "data": items[page], "has_more": page.stop < len(items),
            "first_id": next(iter(names[page]), None), "last_id": (names[page] or [None])[-1]}


class Store:
    """Responses by id, for their caller alone.  A row holds what its request added; the rest of the
    conversation is in the rows before it.  Each method without `async` is a job for `run`."""

    def __init__(self, folder: str, days: float, size: int, limit: int) -> None:
        self._folder, self._days, self._size, self._limit = folder, days, size, limit
        self._thread, self._db = ThreadPoolExecutor(1, "store"), None

    async def run(self, job: Callable, *args: Any) -> Any:
        """Do one of the jobs below.  ApiError internal_error if the file cannot be used."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, job, args)

    def _do(self, job: Callable, args: tuple) -> Any:
        import sqlite3                      # 5 ms that a start without stored responses saves
        try:
            self._db = self._db or self._open(sqlite3)
            with self._db:
                return job(*args)
        except (sqlite3.Error, OSError, ValueError) as exc:
            raise ApiError("internal_error", f"the store fails: {exc}") from None

    def _open(self, sqlite3: Any) -> Any:
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        path = os.path.join(self._folder, "store.db")
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(path, timeout=5)
        try:
            for setting in ("journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON",
                            "foreign_keys = ON", "journal_size_limit = 16777216"):
                db.execute("PRAGMA " + setting)
            db.execute("BEGIN IMMEDIATE")   # another proxy may be here for the first time, too
            done = db.execute("PRAGMA user_version").fetchone()[0]
            if done > len(MIGRATIONS):
                raise ValueError(f"{path} was made by a newer ccproxy")
            for statement in MIGRATIONS[done:]:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            db.commit()
            return db
        except BaseException:
            db.close()
            raise

    def read(self, name: str, caller: str, column: str = "response") -> Any:
        """A response, or with "items" what its request added and its output; None if not stored."""
        row = self._db.execute(f"SELECT {column} FROM responses JOIN bodies USING (id) "
                               "WHERE id = ? AND caller = ? AND echoed > 0",
                               (name, caller)).fetchone()
        return json.loads(row[0]) if row else None

    def context(self, name: str, caller: str) -> list[dict]:
        """All items of a conversation up to the end of a response; [] if not all are stored."""
        whole, size, _ = self._measure(name, caller)
        if not whole:
            return []
        if size > self._limit:
            raise ApiError("request_too_large", f"the stored conversation: larger than "
                           f"{self._limit} bytes")
        rows = self._db.execute(CHAIN + "SELECT items FROM chain JOIN bodies USING (id) "
                                "ORDER BY depth DESC", (name, caller))
        return [item for row in rows for item in json.loads(row[0])]

    def _measure(self, name: str, caller: str) -> tuple[int, int, int]:
        """Whether a conversation is there from its beginning to a response; bytes of its items, and
        of all that is stored of it."""
        return self._db.execute(
            CHAIN + "SELECT SUM(chain.previous IS NULL) - SUM(depth = 0 AND echoed = 0), "
            "SUM(size), SUM(size + echoed) FROM chain JOIN responses USING (id)",
            (name, caller)).fetchone()

    async def recall(self, body: dict, caller: str) -> list[dict]:
        """The items before those of a request; its references are replaced by what they name."""
        items = body["input"] if isinstance(body.get("input"), list) else []
        places = [at for at, item in enumerate(items)
                  if isinstance(item, dict) and item.get("type") == "item_reference"]
        name = body.get("previous_response_id")
        if name is None and not places:
            return []
        return await self.run(self._recall, name, items, places, caller)

    def _recall(self, name: Any, items: list, places: list[int], caller: str) -> list[dict]:
        found, left = {}, self._limit
        for at in places:
            wanted = str(items[at].get("id")).encode("ascii", "replace").decode()
            if wanted not in found:         # an item's id names its response
                owner = "resp_" + wanted.partition("_")[2][:TICKET]
                told = self.read(owner, caller, "items") or []
                found.update((each["id"], (each, len(json.dumps(each)))) for each in told)
            if wanted not in found:
                raise refusal(f"input[{at}].id", f"no item {wanted[:100]!r} is stored")
            items[at], size = found[wanted]
            left -= size
            if left < 0:
                raise ApiError("request_too_large", "input: what it refers to is larger than "
                               f"{self._limit} bytes", f"input[{at}].id")
        if name is None:
            return []
        name = need(name, "previous_response_id", str).encode("ascii", "replace").decode()
        earlier = self.context(name, caller)
        if not earlier:
            raise ApiError("invalid_request", f"previous_response_id: no response {name[:100]!r} "
                           "is stored", "previous_response_id",
                           details={"code": "previous_response_not_found"})
        return earlier

    def keep(self, response: dict, items: Any, caller: str) -> None:
        """Store a response; what was unused for too long goes, and the conversations that were
        unused for the longest time if all is too big.  ApiError if this one is."""
        now, db, name, before = time.time(), self._db, response["id"], response.get(
            "previous_response_id")
        texts = json.dumps(listed_items(response, items) + response["output"]), json.dumps(response)
        sizes = tuple(map(len, texts))
        if sum(sizes) + (self._measure(before or "", caller)[2] or 0) > self._size:
            raise ApiError("request_too_large", "a conversation larger than --store-size is not "
                           "stored")
        db.execute("DELETE FROM responses WHERE used < ?", (now - self._days * 86400,))
        db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                   (name, caller, before, now, *sizes))
        db.execute("INSERT INTO bodies VALUES (?, ?, ?)", (name, *texts))
        db.execute(CHAIN + "UPDATE responses SET used = ? WHERE id IN (SELECT id FROM chain)",
                   (name, caller, now))
        over = db.execute("SELECT SUM(size + echoed) FROM responses").fetchone()[0] - self._size
        oldest, until = db.execute("SELECT used, SUM(size + echoed) FROM responses GROUP BY used "
                                   "ORDER BY used"), 0.0
        while over > 0:                     # one walk: a big one may push thousands out
            until, freed = next(oldest)
            over -= freed
        db.execute("DELETE FROM responses WHERE used <= ?", (until,))

    def delete(self, name: str, caller: str) -> bool:
        """Whether there was one; what it held stays for as long as a response continues it."""
        db = self._db
        found = db.execute("UPDATE responses SET echoed = 0 WHERE id = ? AND caller = ? AND "
                           "echoed > 0", (name, caller)).rowcount
        db.execute("UPDATE bodies SET response = '' WHERE id = ?", (name if found else "",))
        while name:
            row = db.execute("SELECT previous FROM responses WHERE id = ? AND echoed = 0 AND NOT "
                             "EXISTS (SELECT 1 FROM responses WHERE previous = ?)",
                             (name, name)).fetchone()
            db.execute("DELETE FROM responses WHERE id = ?", (name if row else "",))
            name = row[0] if row else None
        return bool(found)

    def sessions(self, caller: str | None, name: str | None) -> list[dict]:
        """A caller's sessions, or the one of that name, or all; the last used first."""
        rows = self._db.execute(
            f"SELECT {', '.join(SESSION)} FROM sessions WHERE (? IS NULL OR caller = ?) AND "
            "(? IS NULL OR id = ?) ORDER BY used_at DESC", (caller, caller, name, name))
        return [dict(zip(SESSION, row)) for row in rows]

    def keep_session(self, caller: str, name: str, workspace: str, cwd: str, cli: str) -> float:
        """Note where a session stands; when that was."""
        now = time.time()
        self._db.execute(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (caller, id) DO UPDATE "
            "SET cwd = excluded.cwd, cli = excluded.cli, used_at = excluded.used_at",
            (caller, name, workspace, cwd, cli, now, now))
        return now

    def delete_session(self, caller: str, name: str) -> list[dict]:
        found = self.sessions(caller, name)
        self._db.execute("DELETE FROM sessions WHERE caller = ? AND id = ?", (caller, name))
        return found

    async def close(self) -> None:
        if self._db:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()


# == 8. Access =====================================================================================
# Who may call, from where.  Pure.  A web page must not reach the CLI: neither by a name that it
# rebinds to loopback (Host) nor from another origin (Origin), and its forms are no JSON.

def host_name(host: str) -> str:
    """The name of a Host field:  "LocalHost:8082" -> "localhost",  "[::1]:80" -> "::1"."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/\s]*))(?::\d{0,5})?", host)
    return ((found.group(1) or found.group(2)) if found else "").lower().rstrip(".")


def is_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def check_host(host: str, local_address: str, allowed: list[str]) -> None:
    """Loopback names, the address that the connection came in on, and configured names."""
    name, known = host_name(host), {local_address, *map(host_name, allowed)} - {""}
    if not name or not (is_loopback(name) or name in known or "*" in allowed):
        raise ApiError("forbidden", f"Host {host[:100]!r} is not answered; see --allow-hosts")


def check_origin(origin: str, host: str, allowed: list[str]) -> bool:
    """True if the browser origin is configured (CORS applies); False if it is our own page's."""
    if origin.lower() in [entry.lower().rstrip("/") for entry in allowed] or "*" in allowed:
        return True
    if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise ApiError("forbidden", f"origin {origin[:100]!r} may not call; see --allow-origins")
    return False


def check_key(headers: Mapping[str, str], digest: str, needed: bool) -> str:
    """The caller's name: a part of the key's digest (SHA-256, hex) if it sent that key, else ""."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    sent = [headers.get("x-api-key", ""), bearer.strip(" \t") if scheme.lower() == "bearer" else ""]
    known = any([hmac.compare_digest(hashlib.sha256(s.encode("latin-1")).hexdigest(), digest)
                 for s in sent])
    if needed and not known:
        raise ApiError("invalid_api_key", "a valid key is needed: Authorization: Bearer KEY, or "
                       "x-api-key: KEY")
    return digest[:16] if known else ""


def key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def agent_key(folder: str) -> tuple[str, str]:
    """The digest of the key for agents where the operator sets none, and the key itself when it
    has just been made: only its digest is kept.  OSError if it cannot be."""
    path, key = os.path.join(folder, "agent-key.sha256"), ""
    try:
        os.stat(path)
    except FileNotFoundError:
        key = "ccp-" + secrets.token_urlsafe(32)
        with drafted(path, key_digest(key)) as draft:
            try:
                os.link(draft, path)        # not over another's
            except OSError:                 # it is there, or the file system knows no links
                if not os.path.exists(path):
                    shutil.copy(draft, path)
    with open(path, encoding="ascii", errors="replace") as file:
        digest = file.read().strip()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise OSError(f"{path} holds no digest; remove it to have a new key made")
    return digest, key if key_digest(key) == digest else ""


# == 9. Claude =====================================================================================
# One process's life: spawn, control exchange, pump, one turn at a time, death.  Knows lines, not
# conversations: who may talk to it and when it has to go is decided in the next room.

READ_SIZE = 256 * 1024          # bytes a read of stdout may bring
LINE_LIMIT = 64 * 2**20         # bytes; images come back twice on one line
INBOX_LIMIT = 512               # lines a slow reader may lie behind before the pump waits for it
SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
FIXED_ANSWERS: dict[str, dict] = {      # subtype of a control request of the CLI's -> our answer
    "can_use_tool": {"behavior": "deny",            # where nobody can be asked
                     "message": "Only the client's own tools are available."},
    "hook_callback": {"continue": False}}           # the model's answer is valid: enough


def signal_group(pid: int, number: int) -> None:
    """Signal the group that a process leads: tools of the CLI may have children."""
    with contextlib.suppress(OSError):
        if POSIX:
            os.killpg(pid, number)
        else:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True,
                           check=False)


async def ended(process: asyncio.subprocess.Process, wait_s: float) -> None:
    """Wait for a process, at most so long; wait() would wait for who holds its pipes, too."""
    for _ in range(int(wait_s / 0.02)):
        if process.returncode is None:
            await asyncio.sleep(0.02)


def family(pid: int, mark: str) -> set[int]:
    """A process's descendants, and on Linux all that have the mark in their environment: a shell
    that the CLI starts is in a session of its own, and what it leaves behind has no parent."""
    parents: dict[int, int] = {}
    found = {pid}
    names: list[str] = []
    with contextlib.suppress(OSError):      # too many open files
        names = [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir(
            "/proc/self") else []
    for name in names:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{name}/environ", "rb") as file:
                found |= {int(name)} if mark and mark.encode() in file.read().split(
                    b"\0") else set()
    if POSIX and not names:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            told = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True,
                                  text=True, timeout=2, check=False).stdout
            parents = {int(one): int(two) for one, two in map(str.split, told.splitlines())}
    more = found
    while more:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
    return found - {pid}


class Claude:
    """A running CLI.  `ended` is called with it once, when its output has ended for any reason;
    `permit` is asked whether a tool may run."""

    def __init__(self, process: asyncio.subprocess.Process, ended: Callable,
                 launch: Launch = Launch(), permit: Callable | None = None, mark: str = "") -> None:
        loop = asyncio.get_running_loop()
        self.process, self._ended = process, ended
        self.launch, self._permit, self._mark = launch, permit, mark
        self.home = ""                          # a directory that goes with it
        self.receipt: Receipt | None = None     # of the turn that it plays
        self.allowed: set[str] = set()          # calls that may always run: [tool, input] in JSON
        self.owed: dict[str, dict] = {}         # own calls behind a client's, see AgentReply
        self._permits: dict[str, asyncio.Task] = {}     # request id -> the question about a tool
        self.last_used = loop.time()
        self.model = ""                         # that it was started with
        self.profile: bytes | None = None       # digest of what it was initialised for
        self.told: dict[str, dict] = {}         # subtype of a control request -> the last answer
        self.init: dict = {}                    # the last system/init line
        self.awaited: set[str] = set()          # tool calls whose results it waits for (parked)
        self.cost = 0.0                         # total_cost_usd so far
        self.failure: ApiError | None = None
        self._due = self._seen = 0              # `result` lines still to come, and seen
        self._tools: list[dict] = []
        self._settings: dict = {}               # the last settings request
        self._asked: dict[str, str] = {}        # open control requests: id -> subtype
        self._calls: dict[str, tuple[str, dict]] = {}   # tool_use id -> its open tools/call
        self._results: dict[str, dict] = {}             # tool_use id -> result not asked for yet
        self._inbox: list | None = None         # lines of the running turn, not taken yet
        self._shown: set[str | None] = set()    # ids of calls that it has told
        self.stored = bool(launch.resume)       # somebody knows the session that it keeps
        self._wake: asyncio.Future | None = None        # done when something has come
        self._stderr: deque = deque(maxlen=20)
        self._tasks = [loop.create_task(self._pump()), loop.create_task(self._listen())]

    @classmethod
    async def spawn(cls, argv: list[str], env: dict[str, str], cwd: str, *more: Any) -> Claude:
        """A new process in a group of its own.  ApiError unavailable if it cannot be started."""
        group: dict[str, Any] = {"start_new_session": True} if POSIX else {
            "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        pipe = subprocess.PIPE
        try:
            return cls(await asyncio.create_subprocess_exec(
                *argv, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=cwd, **group), *more)
        except (OSError, ValueError) as exc:
            raise ApiError("unavailable", f"cannot start {argv[0]}: {exc}") from None

    @property
    def alive(self) -> bool:
        return self.failure is None and self.process.returncode is None

    # -- what it says

    async def _pump(self) -> None:
        """Read stdout to its end, always: a CLI that nobody reads stops, and loses last words."""
        pieces, held = [], 0                # of the unfinished line, and their bytes
        try:
            while True:
                data = await self.process.stdout.read(READ_SIZE)
                first, *more = data.split(b"\n")
                pieces.append(first)
                held += len(first)
                for rest in more:
                    self._line(b"".join(pieces))
                    pieces, held = [rest], len(rest)
                if held > LINE_LIMIT:
                    raise Died(f"claude sent a line over {LINE_LIMIT} bytes")
                while self._inbox and len(self._inbox) > INBOX_LIMIT:
                    await asyncio.sleep(0.01)
                if not data:
                    break
        except Died as error:
            self._fail(error)
        except Exception as exc:            # a line of a shape that nobody has seen yet
            self._fail(Died(f"claude speaks another protocol: {exc!r}"))
        for _ in range(25):                 # its exit code and last words follow its output
            if self.process.returncode is None or not self._tasks[1].done():
                await asyncio.sleep(0.02)
        self._fail(Died(f"claude ended (exit code {self.process.returncode}) {self.last_words()}"))
        self._ended(self)

    async def _listen(self) -> None:
        """Keep the last lines of stderr."""
        data, rest = b"-", b""
        while data:
            data = await self.process.stderr.read(READ_SIZE)
            *lines, rest = (rest + (data or b"\n"))[-65536:].split(b"\n")
            self._stderr.extend(line.decode("utf-8", "replace")[:500] for line in lines if line)

    def last_words(self) -> str:
        return " | ".join(self._stderr)[-600:]

    def _line(self, data: bytes) -> None:
        if not data.strip():
            return
        try:
            line = json.loads(data)
            kind = line["type"]
        except (ValueError, TypeError, KeyError, RecursionError):
            shown = data[:200].decode("utf-8", "replace")
            raise Died(f"claude sent an unreadable line: {shown}") from None
        if kind == "control_response":
            asked = self._asked.pop(line["response"]["request_id"], "")
            self.told[asked] = line["response"].get("response") or {}
            if line["response"].get("subtype") != "success":
                raise Died(f"claude refused {asked}: {line['response'].get('error')}")
        elif kind == "control_request":
            return self._control_request(line["request_id"], line["request"])
        elif kind == "control_cancel_request" and line["request_id"] in self._permits:
            return self._permits.pop(line["request_id"]).cancel()
        elif kind == "result":
            self._due, self._seen = max(0, self._due - 1), self._seen + 1
            self.cost = line.get("total_cost_usd") or self.cost
        elif kind == "system" and line.get("subtype") == "init":
            self.init = line
        elif kind == "stream_event" and not line.get("parent_tool_use_id"):
            if self._inbox is None:
                raise Died("claude went on without being asked")
            self._shown.add((line["event"].get("content_block") or {}).get("id"))
        if self._inbox is not None:
            self._inbox.append(line)
        self._wake_up()

    def _control_request(self, request_id: str, request: dict) -> None:
        subtype, message = request["subtype"], request.get("message") or {}
        if message.get("method") == "tools/call":
            self._tool_call(request_id, message)
        elif subtype == "mcp_message":
            self._respond(request_id, mcp_answer(message, self._tools, whole=self.launch.agent))
        elif subtype == "can_use_tool" and self._permit:
            asking = asyncio.get_running_loop().create_task(self._ask_permit(request_id, request))
            self._permits[request_id] = asking
        else:
            self._respond(request_id, FIXED_ANSWERS.get(subtype))

    def _respond(self, request_id: str, answer: dict | None) -> None:
        """Answer a control request; with None it is told that its kind is not known."""
        verdict = {"subtype": "success", "response": answer} if answer else {
            "subtype": "error", "error": "unknown"}
        self.send({"type": "control_response", "response": {**verdict, "request_id": request_id}})

    async def _ask_permit(self, request_id: str, request: dict) -> None:
        verdict = await self._permit(self, request)
        self._permits.pop(request_id, None)
        self._respond(request_id, verdict)

    def _tool_call(self, request_id: str, message: dict) -> None:
        """The CLI asks for the result of a client's tool: now or when the client brings it."""
        call = message["params"]["_meta"]["claudecode/toolUseId"]
        self._calls[call] = (request_id, message)
        if self.launch.agent and call not in self._shown:       # no client hears of it
            self._results[call] = {"is_error": True, "content": [
                {"type": "text", "text": "Only the main agent can call this tool."}]}
        self._answer_calls()
        if call in self._calls and self._inbox is not None:
            self._inbox.append({"type": "tools_call", "id": call})
            self._wake_up()

    def _answer_calls(self) -> None:
        for call in [c for c in self._calls if c in self._results]:
            request_id, message = self._calls.pop(call)
            self._respond(request_id, mcp_answer(message, [], self._results.pop(call)))

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _fail(self, error: ApiError) -> None:
        self.failure = self.failure or error
        self._wake_up()

    # -- what it is told

    def send(self, line: dict) -> None:
        if self.failure is None and not self.process.stdin.is_closing():
            self.process.stdin.write(encode_json(line) + b"\n")

    def control(self, request: dict) -> None:
        """Send a control request, whose answer `told` will hold."""
        name = secrets.token_hex(6)
        self._asked[name] = request["subtype"]
        self.send({"type": "control_request", "request_id": name, "request": request})

    def initialize(self, turn: Turn, profile: bytes) -> None:
        """Make a blank process one for this prompt, these tools and this schema."""
        if self.profile is None:
            self.profile, self._tools = profile, wire_tools(turn)
            self.control(initialize_request(turn))

    def configure(self, turn: Turn, model: str) -> None:
        """Set a turn's parameters, if they do not stand already; the model only if the process was
        started with another, or an earlier turn has set one."""
        told = model != self.model or "model" in self._settings.get("settings", {})
        request, before = settings_request(turn, model if told else None), self._settings
        if request != before:
            self._settings = request
            self.control(request)

    async def remember(self, messages: tuple[dict, ...], model: str, wait_s: float) -> None:
        """Put messages into its history without starting a turn.

        An empty message leaves nothing there, but makes the first turn faster.
        """
        for message in messages:
            name = str(uuid.uuid4())
            if message["role"] == "assistant":
                self.send(assistant_line(message, name, self.init.get("model") or model,
                                         call_prefix(self.launch)))
                continue
            self._due += 1
            self.send(user_line(message, name, False))
            await self.settle(wait_s)       # before its result the order would be lost

    def begin(self, message: dict) -> None:
        """Start a turn with the user's message, or go on with a parked one by its tool results."""
        self._inbox, self._shown = [], set(self.awaited)
        if self.awaited:
            self._results.update({block["tool_use_id"]: block for block in message["content"]})
            self._answer_calls()
        else:
            self._due += 1
            self.send(user_line(message, str(uuid.uuid4())))
        self.awaited = set()

    def rest(self, awaited: set[str]) -> None:
        """The turn's message is whole; wait for the next turn, or for results of these calls."""
        self._inbox, self.awaited = None, awaited
        self.last_used = asyncio.get_running_loop().time()

    async def lines(self, stall_s: float) -> list[dict]:
        """The lines that have come since; waits for one.  ApiError when it dies or is silent."""
        await self._until(lambda: self._inbox, stall_s)
        lines, self._inbox = self._inbox, []
        return lines

    async def _until(self, done: Callable[[], Any], wait_s: float) -> None:
        """Wait until something is so.  ApiError when it is dead, or silent for so long."""
        slices = left = math.ceil(2 * wait_s)
        while not done():
            if self.failure or not left:
                words = self.last_words() or "try `ccproxy.py doctor`"
                raise self.failure or ApiError("timeout", f"claude was silent for {wait_s:g} s; "
                                               f"{words}")
            if self._wake is None or self._wake.done():
                self._wake = asyncio.get_running_loop().create_future()
            woken, _ = await asyncio.wait({self._wake}, timeout=wait_s / slices)
            left = slices if woken else left - 1
            if not woken and self.process.returncode is not None:   # a grandchild holds its pipes
                self._fail(Died(f"claude ended (exit code {self.process.returncode})"))

    async def settle(self, wait_s: float) -> None:
        """Wait until the `result` of everything sent so far has come."""
        goal = self._seen + self._due
        await self._until(lambda: self._seen >= goal, wait_s)

    async def ask(self, subtype: str, wait_s: float) -> dict:
        """The answer to a control request without arguments."""
        self.told.pop(subtype, None)
        self.control({"subtype": subtype})
        await self._until(lambda: subtype in self.told, wait_s)
        return self.told[subtype]

    # -- its death

    def signal(self, number: int) -> None:
        signal_group(self.process.pid, number)

    async def close(self) -> None:
        """End it for sure, within 1.5 s: interrupt, end of input, SIGTERM, SIGKILL; and all that an
        agent has started."""
        self._permit = None                 # what it asks from now on is denied
        for asking in self._permits.values():
            asking.cancel()
        look = functools.partial(asyncio.to_thread, family, self.process.pid, self._mark)
        kin = await look() if self.launch.agent else set()      # while they have their parent
        if self._inbox is not None:
            self.control({"subtype": "interrupt"})
        with contextlib.suppress(OSError, RuntimeError):
            self.process.stdin.close()
        for number, wait_s in ((0, 0.3), (signal.SIGTERM, 0.5), (SIGKILL, 0.7)):
            if number:
                self.signal(number)
            await ended(self.process, wait_s)
        self.signal(SIGKILL)                # what it may have left behind
        for _ in range(5 * self.launch.agent):      # they may have had children meanwhile
            kin |= await look()
            if not kin:
                break
            while kin:
                with contextlib.suppress(OSError):
                    os.kill(kin.pop(), SIGKILL)
        self._fail(Died("claude was closed"))
        with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError):
            await asyncio.wait_for(self.process.stdin.wait_closed(), 0.1)   # its error is looked at
        # Process.wait() would also wait for pipes that a grandchild keeps open (3.11 and later).
        with contextlib.suppress(AttributeError):
            self.process._transport.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=1)


# == 10. Conversations =============================================================================
# Owner of every process: spares, live and parked conversations, matching, rebuilding, caps and
# eviction.  A live process only saves time: what is gone is rebuilt from the caller's history.

# A busy process plays its turn out when its input ends.  If the proxy is killed, this reads the end
# of its own input, in the background of a shell that is gone, and ends the groups that are left,
# then all that they had started: their descendants, and who has the mark in its environment.
WATCHDOG = """exec 3<&0; awk -v mark="$0" '/^-/ {delete left[substr($0, 2)]; next} {left[$0]}
END {
    for (pid in left) some = 1
    if (!some) exit
    listed = "ps -A -o pid= -o ppid= 2>/dev/null"
    while ((listed | getline) > 0) parent[$1] = $2
    for (pid in parent) for (up = pid; up in parent; up = parent[up]) if (up in left) kin[pid]
    marked = "grep -sl " mark " /proc/[0-9]*/environ"
    while ((marked | getline) > 0) { split($0, part, "/"); kin[part[3]] }
    for (pid in left) system("kill -15 -" pid " 2>/dev/null")
    for (pid in kin) if (!(pid in left)) system("kill -9 " pid " 2>/dev/null")
    system("sleep 1")
    for (pid in left) system("kill -9 -" pid " 2>/dev/null")
}' <&3 3<&- &"""
LAUNCHES = 3                # launches that have spares at once, at most
CLAUDE_PLACES = ("~/.claude/local", "~/.local/bin", "~/.npm-global/bin", "~/.bun/bin",
                 "~/.volta/bin", "/opt/homebrew/bin", "/usr/local/bin")


async def hear(argv: list[str], wait_s: float, stderr: int = subprocess.DEVNULL) -> str:
    """What a command of the CLI says that ends soon.  OSError, asyncio.TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        env=claude_env(os.environ, 0, 0), start_new_session=True)
    try:
        told, _ = await asyncio.wait_for(process.communicate(), wait_s)
        return told.decode("utf-8", "replace")
    finally:                                # also when nobody waits for it any more
        if process.returncode is None:
            signal_group(process.pid, SIGKILL)
            await ended(process, 1)
        process._transport.close()          # its pipes


async def find_claude(wanted: str) -> tuple[list[str], str]:
    """The command that starts the CLI, or the stand-in, and its version.

    ApiError unavailable, with the command to run, if it is missing, too old or does not start.
    """
    if wanted == "echo":                    # compiled, where it is imported: that saves 0.1 s
        compiled = getattr(__spec__, "cached", None) or ""
        path = compiled if os.path.isfile(compiled) else os.path.abspath(__file__)
        return [sys.executable, "-IS", path, "stand-in"], "stand-in"
    name = os.path.expanduser(wanted) or ("claude" if POSIX else "claude.exe")
    paths = [None] if wanted else [None, os.pathsep.join(map(os.path.expanduser, CLAUDE_PLACES))]
    found = next(filter(None, [shutil.which(name, path=path) for path in paths]), "")
    found = found or ("" if POSIX or wanted else shutil.which("claude") or "")
    if found.lower().endswith((".cmd", ".bat", ".ps1")):
        raise ApiError("unavailable", f"{found} is a shell shim, whose arguments cmd.exe would "
                       "rewrite; point --claude at claude.exe")
    if not found:
        where = f" at {wanted}" if wanted else ""
        raise ApiError("unavailable", f"Claude Code is not installed{where}; install it: {INSTALL}")
    try:
        told = await hear([found, "--version"], 10, subprocess.STDOUT)
    except (OSError, asyncio.TimeoutError) as exc:
        raise ApiError("unavailable", f"{found} fails ({exc!r}); install it: {INSTALL}") from exc
    if parse_version(told) < CLI_FLOOR:
        raise ApiError("unavailable", f"Claude Code {told.strip()[:40]!r} is older than "
                       f"{'.'.join(map(str, CLI_FLOOR))}; upgrade it: {INSTALL}@latest")
    return [found], ".".join(map(str, parse_version(told)))


def tool_defaults(turn: Turn) -> dict[str, dict]:
    """Tool name -> the defaults that its schema gives its properties."""
    found = {}
    for tool in turn.tools:
        properties = tool.get("input_schema", {}).get("properties")
        for key, schema in properties.items() if isinstance(properties, dict) else ():
            if isinstance(schema, dict) and "default" in schema:
                found.setdefault(tool["name"], {})[key] = schema["default"]
    return found


def canonical_message(message: dict, defaults: Mapping[str, dict]) -> bytes:
    """What of a message makes two conversations the same: trimmed text, calls, results, media.

    Clients write a tool's defaults into the calls that they send back: those are left out.
    """
    content, user = message["content"], message["role"] == "user"
    text = "".join(b["text"] for b in content if b["type"] == "text").strip()
    rest = []
    for block in content:
        if block["type"] == "tool_use":
            known, said = defaults.get(block["name"], {}), block["input"]
            if known and isinstance(said, dict):
                said = {k: v for k, v in said.items() if k not in known or known[k] != v}
            rest.append([block["id"], block["name"], said])
        elif user and block["type"] != "text":
            rest.append(block)
    return json.dumps([message["role"], text, rest], sort_keys=True).encode("ascii")


def profile_digest(turn: Turn) -> bytes:
    """What a process is initialised for: prompt, tools, schema."""
    said = json.dumps([turn.system, turn.tools, turn.schema], sort_keys=True)
    return hashlib.sha256(said.encode("ascii")).digest()


def digest_chain(turn: Turn, caller: str, model: str) -> list[bytes]:
    """A key for each prefix of the conversation: [nothing said, first message, ..., all]."""
    place = json.dumps([caller, model, astuple(turn.launch)]).encode()
    chain = [hashlib.sha256(place + profile_digest(turn)).digest()]
    defaults = tool_defaults(turn)
    for message in turn.messages:
        said = canonical_message(message, defaults)
        chain.append(hashlib.sha256(chain[-1] + said).digest())
    return chain


def session_place(settings: Settings) -> str:
    """Where the directories of sessions are that have no workspace."""
    return os.path.join(os.path.realpath(state_dir(settings)), "sessions")


def remove(path: str) -> None:
    """Remove a file, a link or a directory with all in it, as far as that goes."""
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)


def claude_dir() -> str:
    """Where the CLI keeps its login and what it writes down of sessions."""
    return os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")


def remove_transcripts(session_id: str) -> None:
    """Remove what the CLI has written down of one of its sessions."""
    if re.fullmatch(r"[0-9a-f-]{36}", session_id):
        place = os.path.join(glob.escape(claude_dir()), "projects", "*")
        for path in glob.glob(os.path.join(place, session_id + "*")):
            remove(path)


def results_alone(message: dict) -> dict:
    """A user's message with tool results and texts, the texts in the last of the results."""
    results = [dict(b) for b in message["content"] if b["type"] == "tool_result"]
    texts = [b for b in message["content"] if b["type"] == "text"]
    if not results or len(results) + len(texts) < len(message["content"]):
        return message
    results[-1]["content"] = [*results[-1]["content"], *texts]
    return {**message, "content": results}


def results_as_texts(message: dict) -> dict:
    """A user's message whose tool results are told as text: nobody waits for them any more."""
    blocks: list[dict] = []
    for block in message["content"]:
        if block["type"] == "tool_result":
            head = f"[The result of the tool call {block['tool_use_id']}]"
            blocks += [{"type": "text", "text": head}, *block["content"]]
        else:
            blocks.append(block)
    return {**message, "content": blocks}


def session_key(name: str, caller: str) -> bytes:
    """The key of a caller's session; b"" without a name."""
    said = json.dumps(["session", caller, name]).encode("ascii")
    return hashlib.sha256(said).digest() if name else b""


class Conversations:
    """The backends chat and agent: events(turn) from a process that stands at the turn's history.

    `permit(claude, request)` answers what an agent's CLI asks: whether a tool may run.
    """

    def __init__(self, settings: Settings, permit: Callable | None = None) -> None:
        self.settings, self._permit = settings, permit
        self.refusals = Refusals(os.path.join(state_dir(settings), "refusals.json"))
        self.fleet: set[Claude] = set()             # all that are not being closed
        self.spares: list[Claude] = []
        self.idle: dict[bytes, Claude] = {}         # key of the whole conversation -> process
        self.models: list[dict] = []                # as the CLI reports them
        self._asking: asyncio.Task | None = None    # of a process for them
        self.account: dict = {}                     # and whose login it is
        self.version, self.trouble = "", "no process is up yet"     # why nothing could be served
        self._command: list[str] = []
        self._looked = -math.inf                    # when the binary was looked for last
        self._full_ids: dict[str, str] = {}         # model value -> full id
        launch = self.launch() if settings.backend == "agent" else Launch()
        self._wanted = {launch: Turn(settings.model, launch=launch)}    # what was asked for last by
                                                    # each launch, without messages
        self._undecided: set[Reply] = set()         # turns before their first delta
        self._asleep = settings.backend == "api"    # no spares until somebody asks for the CLI
        self._mark = secrets.token_hex(8)           # in the environment of all agents
        self._lost: set[str] = set()                # sessions that the CLI does not know any more
        self._waiting = self._failures = 0          # requests in line; spares that died early
        self._closers: set[asyncio.Task] = set()
        self._watchdog: subprocess.Popen | None = None

    async def start(self) -> None:
        self._changed = asyncio.Event()             # 3.9 binds the loop here
        self._check, self._places = asyncio.Lock(), asyncio.Semaphore(self.settings.max_processes)
        self._cwd = tempfile.mkdtemp(prefix="ccproxy-")
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        if POSIX:                           # elsewhere a busy process ends with its turn
            with contextlib.suppress(OSError):
                self._watchdog = subprocess.Popen(
                    ["sh", "-c", WATCHDOG, f"{MARK}={self._mark}"], stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
                self._watchdog.wait()

    def _watch(self, word: str) -> None:
        """Tell the watchdog of a process, or with a minus that it is gone."""
        with contextlib.suppress(OSError, AttributeError):
            self._watchdog.stdin.write(word.encode() + b"\n")
            self._watchdog.stdin.flush()

    async def stop(self) -> None:
        """No child process is left when this returns."""
        tasks = {self._keeper, self._asking} - {None}
        while tasks:                        # until 3.12 wait_for may swallow a cancellation
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.1)
        while self.fleet or self._closers:
            for claude in list(self.fleet):
                self._close(claude)
            await asyncio.wait(self._closers)
        if self._watchdog:
            self._watchdog.stdin.close()
        shutil.rmtree(self._cwd, ignore_errors=True)

    async def command(self) -> list[str]:
        """The checked command of the CLI; while missing it is looked for every 2 s at most."""
        async with self._check:
            now = asyncio.get_running_loop().time()
            try:
                if not self._command and now - self._looked > 2:
                    self._looked = now
                    self._command, self.version = await find_claude(self.settings.claude)
            except ApiError as error:
                self.trouble = error.message
            if not self._command:
                raise ApiError("unavailable", self.trouble)
            return self._command

    async def known_models(self) -> list[dict]:
        """The models that the CLI reports; if none has told them yet, a process is asked, once for
        all that want to know."""
        await self.command()
        told = next((claude for claude in self.fleet if claude.told.get("initialize")), None)
        if told and not self.models:
            self._learn(told)
        if not self.models:
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask_models())
                self._asking.add_done_callback(     # who waited may be gone by then
                    lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._asking)
        return self.models

    async def _ask_models(self) -> None:
        try:
            launch = next(iter(self._wanted), Launch())
            claude = await self._fresh(b"", self.settings.model, launch)
            await self._rehearse(claude, Turn("", launch=launch), self.settings.warm > 0)
        finally:
            self._asking = None

    def launch(self, workspace: str = "", permission_mode: str = "") -> Launch:
        """How an agent has to be started, for a workspace of the settings or none."""
        return Launch(True, workspace, self.settings.workspaces.get(workspace, self.settings.cwd),
                      permission_mode or self.settings.permission_mode)

    def resolve(self, asked: str) -> str:
        """The CLI's name for a model that a caller asked for.

        What --models maps comes first (names, then patterns); "anthropic/claude-x" -> "claude-x";
        what the CLI knows and full Claude ids as they are; anything else is the default model.
        """
        name = asked.rpartition("/")[2]
        pattern = rf"({'|'.join(FAMILIES)}|{FULL_ID})(\[1m\])?"
        known = name in {m.get("value") for m in self.models} - {"default"}
        own = name if known or re.fullmatch(pattern, name) else self.settings.model
        return alias_of(self.settings.models, asked).get("model") or own

    def _full_id(self, model: str) -> str:
        return self._full_ids.get(model) or model

    # -- a turn

    def events(self, turn: Turn, message: Message, receipt: Receipt) -> AsyncIterator[list[dict]]:
        """Bursts of events of exactly one message, which the caller folds into `message`."""
        model = self.resolve(turn.model)
        return self.refusals.insist(turn, lambda: self._full_id(model), message, receipt,
                                    lambda plan: self._play(plan, model, message, receipt))

    async def _play(self, turn, model, message, receipt) -> AsyncIterator[list[dict]]:
        """One try of a turn on one process, which is kept if it stands clean behind it."""
        agent, claude, kept = turn.launch.agent, None, False
        reply = AgentReply(turn) if agent else Reply(turn)
        self._undecided.add(reply)          # no spare is started before its first delta
        try:
            chain = digest_chain(turn, receipt.caller, model)
            claude = await self._claude_for(turn, model, chain, receipt)
            claude.receipt, spent = receipt, claude.cost
            if agent:
                reply.owed = claude.owed    # from turn to turn
            while not reply.done:
                events = await self._burst(claude, reply, model)
                if events:
                    self._failures, self.trouble = 0, ""
                    self._undecided.discard(reply)
                    yield events
                if reply.failed and turn.launch.resume and "No conversation" in str(reply.failed):
                    self._lost.add(turn.launch.resume)
                    raise Died(reply.failed.message)
                if reply.failed:
                    raise reply.failed
            if turn.session:                # which keeps them
                receipt.session = claude.init.get("session_id", "")
                receipt.home, claude.home, claude.stored = claude.home, "", True
            kept = reply.reusable and self._rest(claude, turn, chain, message)
            if not kept:
                self._close(claude)
            yield [{"type": "message_stop"}]
            if kept and not claude.awaited:
                with contextlib.suppress(ApiError):
                    await claude.settle(1)
                receipt.cost = max(0.0, claude.cost - spent)
        finally:
            self._undecided.discard(reply)
            if claude is not None and not kept:
                self._close(claude)

    async def _burst(self, claude: Claude, reply: Reply, model: str) -> list[dict]:
        """What a turn's next lines tell, but for its end: the caller folds before that is told."""
        settings = self.settings
        lines = await claude.lines(settings.request_timeout if reply.working else
                                   settings.stall_timeout)
        events = [event for line in lines for event in reply.feed(line)]
        if reply.model:
            self._full_ids.setdefault(model, reply.model)
        if reply.done:
            events.pop()
        if reply.done and not reply.reusable:   # at once: the CLI would ask the model to go on
            if claude.launch.agent:             # its tools end in its own way
                claude.control({"subtype": "interrupt"})
            else:
                claude.signal(SIGKILL)
        return events

    async def _claude_for(self, turn, model, chain, receipt) -> Claude:
        """A process that has been given the turn: a live one, or one that was brought there."""
        stall_s, last = self.settings.stall_timeout, turn.messages[-1]
        profile, session = profile_digest(turn), session_key(turn.session, receipt.caller)
        last = results_alone(last) if session else last
        claude = self._live(session or chain[-2], last, profile, turn.launch.permission_mode)
        resume = turn.launch.resume if turn.launch.resume not in self._lost else ""
        receipt.conversation = "continued" if claude else "resumed" if resume else (
            "rebuilt" if len(chain) > 2 else "new")
        if resume and not claude and self._closers:     # one may still write that session down
            await asyncio.wait(set(self._closers), timeout=3)
        if claude is None and not resume and any(
                block["type"] == "tool_result" for block in turn.messages[0]["content"]):
            raise ApiError("conflict", f"session {turn.session!r} waits for no such tool result "
                           "(any more); send the conversation from its beginning", "session_id")
        if claude is None:
            last = results_as_texts(last) if resume else last
            launch = replace(turn.launch, resume=resume)
            if not turn.launch.resume:      # else its directory may be a session's
                self._want(replace(turn, model=model, messages=(), fields={}, launch=launch))
            claude = await self._fresh(profile, model, launch)
        try:
            if receipt.conversation == "continued" and not claude.awaited:
                await claude.settle(stall_s)
            claude.initialize(turn, profile)
            claude.configure(turn, model)
            if receipt.conversation == "rebuilt":
                await claude.remember(turn.messages[:-1], self._full_id(model), stall_s)
            claude.begin(last)
            return claude
        except BaseException:
            self._close(claude)
            raise

    def _want(self, turn: Turn) -> None:
        """Note what spares have to be made for; of several launches those that were asked for
        last, as far as all of their spares fit into half of the places."""
        self._wanted.pop(turn.launch, None)
        self._wanted[turn.launch] = turn
        self._changed.set()
        most = max(1, self.settings.max_processes // max(1, 2 * self.settings.warm))
        for launch in list(self._wanted)[:-min(most, LAUNCHES)]:
            del self._wanted[launch]

    def _suits(self, claude: Claude, profile: bytes, model: str, launch: Launch) -> bool:
        """Whether a spare can become a conversation of this profile with this model."""
        loud = () < parse_version(self.version) < CLI_QUIET
        return claude.profile in (profile, None) and claude.launch == launch and (
            claude.model == model or not loud)

    def _live(self, key: bytes, last: dict, profile: bytes, mode: str) -> Claude | None:
        """The live process at this point of the conversation, if the last message suits it."""
        claude = self.idle.get(key)
        if claude is None:
            return None
        same = (claude.profile, claude.launch.permission_mode) == (profile, mode)
        told = any(block["type"] == "tool_result" for block in last["content"])
        if claude.alive and same and (not (claude.awaited or told) or (
                claude.awaited == {b.get("tool_use_id") for b in last["content"]}
                and all(map(fits_mcp, last["content"])))):
            return self.idle.pop(key)
        if claude.launch.kept and claude.alive and same and told:
            raise ApiError("conflict", "the session waits for no such tool results, but for "
                           f"{', '.join(sorted(claude.awaited)) or 'none'}", "session_id")
        if claude.launch.kept:              # a session has one process
            self._close(claude)
        return None

    def _rest(self, claude: Claude, turn: Turn, chain: list[bytes], message: Message) -> bool:
        """Keep the process for the conversation's next turn."""
        answer = {"role": "assistant", "content": message.content}
        said = canonical_message(answer, tool_defaults(turn))
        key = session_key(turn.session, claude.receipt.caller) or hashlib.sha256(
            chain[-1] + said).digest()
        calls = {b["id"] for b in message.content if b["type"] == "tool_use"}
        claude.rest(calls if message.stop_reason == "tool_use" else set())
        if claude.failure or claude not in self.fleet or self._waiting:
            return False
        if key in self.idle:
            self._close(self.idle[key])
        self.idle[key] = claude
        return True

    async def end_session(self, caller: str, name: str) -> None:
        """End the process of a session, if it has one."""
        claude = self.idle.get(session_key(name, caller))
        if claude is not None:
            self._close(claude)
            await asyncio.wait(set(self._closers), timeout=3)   # it writes the session down

    async def count(self, turn: Turn) -> int:
        """Input tokens of a turn, asked of the CLI without spending any: its own notes left out."""
        profile, stall_s = profile_digest(turn), self.settings.stall_timeout
        model = self.resolve(turn.model)
        claude = await self._fresh(profile, model, turn.launch)
        try:
            claude.initialize(turn, profile)
            claude.configure(turn, model)
            await claude.remember(turn.messages, model, stall_s)
            usage = await claude.ask("get_context_usage", stall_s)
            notes = (usage.get("messageBreakdown") or {}).get("attachmentTokens") or 0
            if not isinstance(usage.get("totalTokens"), int):
                raise Died("claude tells no number of tokens")
            return max(1, usage["totalTokens"] - notes)
        finally:
            self._close(claude)

    # -- processes

    async def _fresh(self, profile: bytes, model: str, launch: Launch) -> Claude:
        """A process without a history: a spare, or a new one; waits in line at the cap."""
        self._asleep = False
        await self.command()
        for spare in [s for s in self.spares if s.home and not os.path.isdir(s.home)]:
            self._close(spare)
        ready = [s for s in self.spares if s.alive and self._suits(s, profile, model, launch)]
        if ready:                           # of equal ones the first, which waits longest
            spare = min(ready, key=lambda s: (s.profile is None, s.model != model))
            self.spares.remove(spare)
            self._changed.set()
            return spare
        self._waiting += 1                  # from now on nobody keeps an idle process
        try:
            self._evict()
            await asyncio.wait_for(self._places.acquire(), self.settings.queue_timeout)
        except asyncio.TimeoutError:
            raise ApiError("rate_limit_exceeded", f"all {self.settings.max_processes} CLI "
                           "processes are busy; try again, or raise --max-processes",
                           retry_after=5) from None
        finally:
            self._waiting -= 1
        return await self._spawn(model, launch)

    def _evict(self) -> None:
        """At the cap, close the least recently used idle process, else a spare for another use."""
        for claude in [*self.idle.values(), *self.spares][:self._places.locked()]:
            self._close(claude)

    async def _spawn(self, model: str, launch: Launch) -> Claude:
        """A new process in a place that has been taken."""
        settings, claude, home = self.settings, None, ""
        patience_s = 2 * settings.park_ttl + settings.request_timeout
        try:
            command, mark = await self.command(), f"{self._mark}.{secrets.token_hex(4)}"
            variables, cwd, options, more = CHAT_ENV, self._cwd, (), ()
            if launch.agent:
                if launch.cwd and not os.path.isdir(launch.cwd):
                    raise ApiError("unavailable", "the agent's directory is gone"
                                   + f" (workspace {launch.workspace})" * bool(launch.workspace))
                home = "" if launch.cwd else self._make_home(launch)
                cwd, options = launch.cwd or home, agent_options(launch, settings)
                variables = agent_env(parse_version(self.version), settings.i_am_sandboxed)
                more = launch, self._permit, f"{MARK}={mark}"
            env = {**claude_env(os.environ, settings.retries, patience_s, variables), MARK: mark}
            argv = claude_argv(command, model, options)
            claude = await Claude.spawn(argv, env, cwd, self._ended, *more)
            claude.model, claude.home = model, home
            self.fleet.add(claude)
            self._watch(str(claude.process.pid))
            return claude
        finally:
            if claude is None:
                self._places.release()
                shutil.rmtree(home, ignore_errors=True)

    def _make_home(self, launch: Launch) -> str:
        """A new private directory for an agent; a session keeps it."""
        place = session_place(self.settings) if launch.kept else self._cwd
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
            return tempfile.mkdtemp(prefix="agent-", dir=place)
        except OSError as exc:
            raise ApiError("unavailable", "no directory for the agent can be made: "
                           f"{exc.strerror}") from None

    def _ended(self, claude: Claude) -> None:
        """A process has ended, by itself if nobody closed it."""
        if claude in self.fleet:
            self._failures += claude in self.spares
            self.trouble = str(claude.failure)
            say(f"process {claude.process.pid}: {claude.failure}")
            self._close(claude)

    def _close(self, claude: Claude) -> None:
        """Forget a process and end it; then its place is free."""
        if claude not in self.fleet:
            return
        waits = claude in self.spares or claude in self.idle.values()
        if waits and not claude.launch.agent:
            claude.signal(SIGKILL)          # it does nothing, and its place is wanted
        self.fleet.discard(claude)
        self.spares = [spare for spare in self.spares if spare is not claude]
        self.idle = {key: idle for key, idle in self.idle.items() if idle is not claude}
        closer = asyncio.get_running_loop().create_task(self._end(claude))
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    async def _end(self, claude: Claude) -> None:
        try:
            await claude.close()
            self._watch(f"-{claude.process.pid}")
            if claude.home:
                await asyncio.to_thread(remove, claude.home)
            if claude.launch.kept and not claude.stored:
                await asyncio.to_thread(remove_transcripts, claude.init.get("session_id", ""))
        except BaseException:               # no thread could be started, or the like
            claude.signal(SIGKILL)
            raise
        finally:
            self._places.release()
            self._changed.set()

    async def _keep(self) -> None:
        """Refill spares when no turn waits for its first delta, or after a second; end the idle."""
        ttl_s = (self.settings.idle_ttl, self.settings.park_ttl)
        clock = asyncio.get_running_loop().time
        while True:
            self._changed.clear()
            try:
                await self._refill()
            except Exception as error:      # the keeper must not die: no spares would come
                self.trouble = getattr(error, "message", "") or repr(error)
                self._failures += 1
            for claude in list(self.idle.values()):
                if clock() - claude.last_used > ttl_s[bool(claude.awaited)]:
                    self._close(claude)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(5, *(ttl / 4 for ttl in ttl_s)))
            await asyncio.sleep(2.0 ** min(self._failures, 7) / 4 if self._failures else 0)
            patience = clock() + 1
            while self._undecided and clock() < patience:
                await asyncio.sleep(0.01)

    async def _refill(self) -> None:
        """For each launch in use one blank spare, the others initialised ahead for what was asked
        for last."""
        if self._asleep:
            return
        profiles = {launch: profile_digest(wanted) for launch, wanted in self._wanted.items()}
        for spare in list(self.spares):     # made for what is asked no more
            launch, wanted = spare.launch, self._wanted.get(spare.launch)
            if wanted is None or not self._suits(spare, profiles[launch], wanted.model, launch):
                self._close(spare)
        for wanted in reversed(list(self._wanted.values())):    # the last one asked for first
            try:
                await self._refill_for(wanted)
            except ApiError:
                if not wanted.launch.agent:
                    raise
                self._wanted.pop(wanted.launch, None)   # its workspace may be gone

    async def _refill_for(self, wanted: Turn) -> None:
        most, launch = self.settings.max_processes, wanted.launch
        while True:
            own = [spare for spare in self.spares if spare.launch == launch]
            if len(own) >= self.settings.warm or len(self.spares) >= most - bool(self.fleet):
                return
            if self.idle:
                self._evict()
            if self._places.locked() or self._waiting:
                return
            await self._places.acquire()
            ahead = any(spare.profile is None for spare in own)
            claude = await self._spawn(wanted.model, launch)
            if ahead:
                await self._rehearse(claude, wanted)
            else:
                self.spares.append(claude)
            if self._waiting:               # who came meanwhile waits for a place, not for a spare
                self._evict()

    async def _rehearse(self, claude: Claude, turn: Turn, keep: bool = True) -> None:
        """Make a spare for a turn's prompt, tools and schema, ahead of it; learn the models."""
        try:
            empty = ({"role": "user", "content": []},)
            claude.initialize(turn, profile_digest(turn))
            await claude.remember(empty, "", 30)
            self._learn(claude)
            self._full_ids.setdefault(claude.model, claude.init.get("model") or "")
            self._failures, self.trouble = 0, ""
            self.spares += [claude] * keep
        finally:
            if claude not in self.spares:
                self._close(claude)

    def _learn(self, claude: Claude) -> None:
        """What a process has told, as it was initialised, of the models and the account."""
        hello = claude.told.get("initialize") or {}
        self.models, self.account = hello.get("models") or [], hello.get("account") or {}
        self._full_ids.update({m["value"]: m["resolvedModel"] for m in self.models
                               if m.get("value") and m.get("resolvedModel")})


# == 11. Agent =====================================================================================
# What Claude Code with its own tools needs beside a process: how its tools show in an answer, which
# workspace is meant, who is asked whether a tool may run, which session of the CLI's is whose.
# Knows no socket.  What to show of a tool: Rendering.  What is asked of people: Permissions.

WHICH = "Which workspace shall I work in?"      # our own first reply, by which it is known again
CHECK_TOOL = {"name": "check", "description": "Ask the operator of ccproxy whether a tool may run.",
              "inputSchema": {"type": "object", "required": ["tool_name", "input"], "properties": {
                  "tool_name": {"type": "string"}, "input": {"type": "object"},
                  "tool_use_id": {"type": "string"}}}}
ANSWERED = 200              # answered questions that are remembered
KEPT_INPUT = 16_384         # characters of their input; a longer one is not
NAME_LIMIT = 256            # characters of a tool's name, and of a call's, where a client says them
LISTENERS = 32              # who may listen to questions at once
NEWS_LIMIT = 1000           # events that a listener may lie behind
ENDINGS = {"allow": "allowed", "deny": "denied", "expire": "expired", "cancel": "cancelled"}
VERDICT: dict[str, tuple[type, Any]] = {    # field of an answer -> its kind, what it can be
    "behavior": (str, ("allow", "deny")), "message": (str, None), "updatedInput": (dict, None),
    "scope": (str, ("once", "conversation"))}


def fenced(text: str, language: str = "") -> str:
    """A text in a Markdown fence that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def markdown(block: dict, name: str) -> str:
    if block["type"] == OWN_CALL:
        return f"**{block['name']}**\n\n" + fenced(json.dumps(block["input"], indent=2), "json")
    return ("failed:\n\n" if block["is_error"] else "") + fenced(result_text(block))


def tagged(block: dict, name: str) -> str:
    from xml.sax.saxutils import escape, quoteattr
    if block["type"] == OWN_CALL:
        return (f"<tool_use id={quoteattr(block['id'])} name={quoteattr(block['name'])}>"
                f"{escape(json.dumps(block['input']))}</tool_use>")
    failed = ' is_error="true"' * block["is_error"]
    return (f"<tool_result tool_use_id={quoteattr(block['tool_use_id'])}{failed}>"
            f"{escape(result_text(block))}</tool_result>")


WORDS: dict[str, Callable[[dict, str], str]] = {    # verbosity -> a block of a tool as text
    "text": lambda block, name: "", "narrated": narration, "verbose": markdown, "formatted": tagged}


class Rendering:
    """An agent's events as its caller wants to see what Claude Code ran by itself:

    text        not at all              narrated    a line each, among the text
    verbose     blocks (OWN_CALL, OWN_RESULT), in Chat, which has none, Markdown
    formatted   XML tags, among the text
    """

    def __init__(self, verbosity: str, native: bool) -> None:
        self._how, self._native = verbosity, native and verbosity == "verbose"
        self._block: dict = {}              # that is being told, its arguments' pieces
        self._pieces: list[str] = []
        self._names: dict[str, str] = {}    # id of a call -> name of the tool
        self._sent = 0                      # blocks sent on
        self._spoken = self._apart = False  # a text was told; the next one is another

    def events(self, events: list[dict]) -> list[dict]:
        return [told for event in events for told in self._event(event)]

    def _event(self, event: dict) -> list[dict]:
        kind, first = event["type"], event["type"] == "content_block_start"
        if not kind.startswith("content_block_"):
            return [event]
        if first:
            self._block, self._pieces = event["content_block"], []
            if self._block["type"] == OWN_CALL:
                self._names[self._block["id"]] = self._block["name"]
        if self._block["type"] in (OWN_CALL, OWN_RESULT):
            self._pieces.append((event.get("delta") or {}).get("partial_json") or "")
            return self._own() if kind == "content_block_stop" else []
        self._sent += first
        told = [{**event, "index": self._sent - 1}]
        return told + (self._gap() if first and self._block["type"] == "text" else [])

    def _gap(self) -> list[dict]:
        """What keeps a text apart from the one before it."""
        gap = [{"type": "content_block_delta", "index": self._sent - 1, "delta": {
            "type": "text_delta", "text": "\n\n"}}] * (self._spoken and self._apart)
        self._spoken, self._apart = True, False
        return gap

    def _own(self) -> list[dict]:
        """The block that ends here: as it is, or as a text of its own, if it is to be seen.  A call
        has its input at its start, too: not all clients put it together from its pieces."""
        block, whole, self._apart = self._block, "".join(self._pieces), True
        if block["type"] == OWN_CALL:
            said = parse_input(whole) or block["input"]
            block = {**block, "input": said if isinstance(said, dict) else {"input": said}}
        call = block.get("tool_use_id", "")     # "" if it is the call itself
        native = self._native and (not call or call in self._names)
        text = "" if native else WORDS[self._how](block, self._names.get(call, ""))
        if not native and not text:
            return []
        self._sent += 1
        at, delta = {"index": self._sent - 1}, {"type": "input_json_delta", "partial_json": whole}
        if text:
            block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
        told = [{"type": "content_block_start", **at, "content_block": block},
                *(self._gap() if text else []),
                *[{"type": "content_block_delta", **at, "delta": delta}] * bool(text or whole),
                {"type": "content_block_stop", **at}]
        self._apart = True
        return told


def chosen_workspace(messages: tuple[dict, ...], names: Iterable[str]
                     ) -> tuple[str, tuple[dict, ...]]:
    """The workspace that a caller has named in answer to our question, and the conversation without
    question and answer;  "" if he is still to be asked.

    [task, WHICH..., "2", ...] -> the second name, [task, ...]
    """
    texts = ["".join(b["text"] for b in m["content"] if b["type"] == "text").strip()
             for m in messages]
    for at in range(1, len(messages) - 1, 2):
        if not texts[at].startswith(WHICH):
            return "", messages
        said, known = texts[at + 1].strip(" .`'\"").lower(), list(names)
        hits = [name for n, name in enumerate(known, 1) if said in (str(n), name.lower())] or [
            name for name in known if re.search(rf"(?<![\w.-]){re.escape(name.lower())}(?![\w-])",
                                                said)]
        if len(hits) == 1:
            return hits[0], (messages[0], *messages[at + 2:])
    return "", messages


async def which_workspace(names: Iterable[str], model: str) -> AsyncIterator[list[dict]]:
    """Our own reply, as events: the question which workspace is meant."""
    lines = [f"{at}. {name}" for at, name in enumerate(names, 1)]
    text = f"{WHICH} Answer with its name or number:\n\n" + "\n".join(lines)
    usage = {"input_tokens": 0, "output_tokens": 0}
    yield [{"type": "message_start", "message": {
        "id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant",
        "model": model, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
         "usage": usage}]
    yield [{"type": "message_stop"}]


def what_always_means(hints: list[dict]) -> str:
    """What "for the rest of the conversation" would let run, as the CLI suggests it."""
    told = [f"permission mode {hint.get('mode')}" if hint.get("type") == "setMode" else ", ".join(
        f"{rule.get('toolName')}({rule.get('ruleContent')})" if rule.get("ruleContent") else
        f"{rule.get('toolName')} in any way" for rule in hint.get("rules") or []
        if isinstance(rule, dict)) or json.dumps(hint) for hint in hints]
    return "; ".join(told) or "this very call"


class Permissions:
    """Questions whether a tool may run, put to whoever listens; the first answer counts."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.asked: dict[str, dict] = {}                # id -> question, the pending ones and some
        self.listeners: set[asyncio.Queue] = set()      # each is given (event, question)
        self._answers: dict[str, asyncio.Future] = {}   # of the pending ones

    def pending(self) -> list[dict]:
        return [question for question in self.asked.values() if question["status"] == "pending"]

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Queue]:
        """A queue of (event, question), None at its end; first what is pending.  ApiError if too
        many listen."""
        if len(self.listeners) >= LISTENERS:
            raise ApiError("rate_limit_exceeded", f"{LISTENERS} listen to questions already")
        news: asyncio.Queue = asyncio.Queue()
        for question in self.pending():
            news.put_nowait(("request", dict(question)))
        self.listeners.add(news)
        try:
            yield news
        finally:
            self.listeners.discard(news)

    def close(self) -> None:
        for listener in self.listeners:
            listener.put_nowait(None)

    async def permit(self, claude: Claude, request: dict) -> dict:
        """The answer to a CLI's can_use_tool."""
        receipt = claude.receipt or Receipt()
        told = {name: request.get(name) for name in ("tool_use_id", "description",
                                                     "decision_reason")}
        tool, said = str(request.get("tool_name")), request.get("input") or {}
        hints = [hint for hint in request.get("permission_suggestions") or []
                 if isinstance(hint, dict)]
        call = json.dumps([tool, said], sort_keys=True)
        if call in claude.allowed:
            return {"behavior": "allow", "updatedInput": said}
        verdict = await self.ask(tool, said, **told, always=what_always_means(hints),
                                 workspace=claude.launch.workspace, request_id=receipt.request)
        always = verdict.pop("scope", "once") == "conversation"
        if always and hints:
            verdict["updatedPermissions"] = [{**hint, "destination": "session"} for hint in hints]
        elif always:
            claude.allowed.add(call)
        return verdict

    async def ask(self, tool: str, said: dict, **more: Any) -> dict:
        """{"behavior": "allow", "updatedInput", maybe "scope"} or {"behavior": "deny", "message"}.
        """
        if not self.listeners:
            return {"behavior": "deny", "message": f"{tool} may not run: nobody is there to "
                    "approve it. The operator can listen with `ccproxy.py approve`, or allow it "
                    "ahead with --allowed-tools or --permission-mode."}
        name, now = "perm_" + secrets.token_hex(12), time.time()
        question = self.asked[name] = {
            "id": name, "object": "permission", "status": "pending", "tool_name": tool,
            "input": said, **more, "created_at": now, "expires_at": now + self.timeout_s}
        answer = self._answers[name] = asyncio.get_running_loop().create_future()
        self._tell("request", question)
        ending: dict = {"behavior": "cancel"}
        try:
            ending = await asyncio.wait_for(answer, self.timeout_s)
        except asyncio.TimeoutError:
            ending = {"behavior": "expire", "message": f"{tool} may not run: nobody approved it "
                      f"within {self.timeout_s:g} s. The operator can be asked again."}
        finally:
            question["status"] = ENDINGS[ending["behavior"]]
            if len(json.dumps(said)) > KEPT_INPUT:
                question["input"] = {"cut": gist(said)}
            del self._answers[name]
            self._tell("expired" if question["status"] == "expired" else "resolved", question)
            for old in [k for k, q in self.asked.items() if q["status"] != "pending"][:-ANSWERED]:
                del self.asked[old]
        allowed = ending["behavior"] == "allow"
        return {"updatedInput": said, **ending} if allowed else {
            "message": f"The operator has denied {tool}.", **ending, "behavior": "deny"}

    def _tell(self, event: str, question: dict) -> None:
        for listener in list(self.listeners):
            if listener.qsize() > NEWS_LIMIT:           # it does not read
                self.listeners.discard(listener)
                listener.put_nowait(None)
            else:
                listener.put_nowait((event, dict(question)))

    def answer(self, name: str, body: dict) -> dict:
        """Take somebody's answer: the question as it stands then.  ApiError not_found, conflict if
        it was answered before, or with the field at fault."""
        question = self.asked.get(name)
        if question is None:
            raise ApiError("not_found", f"no question {name[:100]!r} about a permission")
        for key in set(body) - set(VERDICT):
            raise refusal(key[:100], "unknown; expected behavior, message, updatedInput or scope")
        ending = {key: need(body.get(key), key, kind, among=among)
                  for key, (kind, among) in VERDICT.items()
                  if key == "behavior" or body.get(key) is not None}
        for key in {"updatedInput", "scope"} & set(ending) if ending["behavior"] == "deny" else ():
            raise refusal(key, "goes with allow only")
        if "updatedInput" in ending and ending.get("scope") == "conversation":
            raise refusal("scope", "an input that was changed is allowed once")
        future = self._answers.get(name)
        if future is None or future.done():
            raise ApiError("conflict", f"already {question['status']}", "id")
        future.set_result(ending)
        question["status"] = ENDINGS[ending["behavior"]]
        return question

    async def check(self, message: dict) -> dict | None:
        """The answer to a JSON-RPC message of MCP (2025-06-18), whose one tool asks as a CLI does;
        None for a notification."""
        method, params = need(message.get("method"), "method", str), optional(
            message, "params", dict)
        told: dict = {"error": {"code": -32601, "message": f"no method {method[:60]!r} here"}}
        known = {"ping": {}, "tools/list": {"tools": [CHECK_TOOL]}, "initialize": {
            "protocolVersion": params.get("protocolVersion", "2025-06-18"),
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "ccproxy", "version": __version__}}}
        if "id" not in message:
            return None
        if method in known:
            told = {"result": known[method]}
        elif method == "tools/call":
            try:
                told = {"result": await self._checked(params)}
            except ApiError as error:
                told = {"error": {"code": -32602, "message": error.message}}
        return {"jsonrpc": "2.0", "id": message["id"], **told}

    async def _checked(self, params: dict) -> dict:
        """The result of the tool.  ApiError names what its arguments lack."""
        need(params.get("name"), "params.name", str, among=(CHECK_TOOL["name"],))
        said, where = optional(params, "arguments", dict, "params."), "params.arguments."
        for name in ("tool_name", "tool_use_id"):       # answered questions are remembered
            if len(optional(said, name, str, where)) > NAME_LIMIT:
                raise refusal(where + name, f"longer than {NAME_LIMIT} characters")
        verdict = await self.ask(
            need(said.get("tool_name"), where + "tool_name", str),
            need(said.get("input"), where + "input", dict),
            tool_use_id=said.get("tool_use_id"), description=None, decision_reason=None,
            always=None, workspace="", request_id="")
        verdict.pop("scope", None)
        return {"content": [{"type": "text", "text": json.dumps(verdict)}]}


class Sessions:
    """Sessions of the CLI's by their callers' names: one turn at a time, kept in the store.

    `place` is where the directories are that belong to sessions; no others are ever removed.
    """

    def __init__(self, store: Store, ttl_days: float, place: str,
                 homes: Callable[[], Iterable[str]] = tuple) -> None:
        self._store, self._ttl_s, self._place = store, ttl_days * 86400, place
        self._homes = homes                 # directories that processes have
        self._busy: dict[tuple[str, str], asyncio.Future] = {}  # done when its turn has ended
        self._kept: dict[tuple[str, str], float] = {}       # when this proxy kept it last
        self._tasks: dict[tuple[str, str], tuple[dict, ...]] = {}   # that wait for a workspace
        self._swept = -math.inf

    @contextlib.asynccontextmanager
    async def alone(self, caller: str, name: str, wait_s: float) -> AsyncIterator[None]:
        """Hold a session for a turn.  ApiError conflict if another turn does, after so long."""
        if not name:
            yield
            return
        loop, key = asyncio.get_running_loop(), (caller, name)
        until = loop.time() + (wait_s or 0.1)   # the turn before may be about to end
        while key in self._busy:            # no lock: wait_for may lose one that it was given
            if loop.time() >= until:
                raise ApiError("conflict", f"session {name!r} is busy with another turn",
                               "session_id", retry_after=1)
            await asyncio.wait({self._busy[key]}, timeout=until - loop.time())
        ended = self._busy[key] = loop.create_future()
        try:
            yield
        finally:
            del self._busy[key]
            ended.set_result(None)

    async def find(self, caller: str, name: str, held: bool = False) -> dict | None:
        """A session as a dict of SESSION, if it is kept; times in Unix seconds.  `held`: alone()
        is ours, so an old one can go."""
        await self._sweep()
        found = next(iter(await self._store.run(self._store.sessions, caller, name)), None)
        if found and self._over(found):
            if held or (caller, name) not in self._busy:
                await self.delete(caller, name)
            return None
        return found

    def _over(self, session: dict) -> bool:
        """Whether a session was not used for too long."""
        return session["used_at"] < time.time() - self._ttl_s

    async def _sweep(self) -> None:
        """Once an hour, let go what was not used for too long, and directories of nobody's."""
        now = time.time()
        if now - self._swept < 3600:
            return
        self._swept = now
        for old in await self._store.run(self._store.sessions, None, None):
            key = old["caller"], old["id"]
            if self._over(old) and key not in self._busy:
                await self.delete(*key)
        kept = [old["cwd"] for old in await self._store.run(self._store.sessions, None, None)]
        used = set(map(os.path.basename, [*kept, *self._homes()]))
        await asyncio.to_thread(self._remove_unused, used)

    def _remove_unused(self, used: set[str]) -> None:
        """Remove what proxies that were killed have left behind."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._place):
                with contextlib.suppress(FileNotFoundError):    # another proxy was faster
                    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > 2 * 86400
                    if old and self.own(entry.path) and entry.name not in used and (
                            entry.is_dir(follow_symlinks=False)):
                        remove(entry.path)

    def own(self, path: str) -> bool:
        """Whether a directory was made for a session."""
        return os.path.dirname(path) == self._place and os.path.basename(path).startswith("agent-")

    def latest(self, caller: str, session: dict | None) -> bool:
        """Whether this proxy was the last one to play a turn of a session."""
        return session is not None and self._kept.get((caller, session["id"])) == session["used_at"]

    async def list(self, caller: str) -> list[dict]:
        kept = await self._store.run(self._store.sessions, caller, None)
        return [session for session in kept if not self._over(session)]

    async def keep(self, caller: str, name: str, workspace: str, cwd: str, cli: str) -> None:
        """Note where a session stands.  What it was before, if it began anew, is forgotten."""
        before = await self._store.run(self._store.sessions, caller, name)
        used = await self._store.run(self._store.keep_session, caller, name, workspace, cwd, cli)
        self._kept[caller, name] = used
        for key in list(self._kept)[:-1000]:
            del self._kept[key]
        for old in before:
            if old["cli"] != cli:
                await self._forget({**old, "cwd": "" if old["cwd"] == cwd else old["cwd"]})

    async def delete(self, caller: str, name: str) -> bool:
        """Whether there was one; what the CLI has written down of it goes, too."""
        self.settled(caller, name)
        gone = await self._store.run(self._store.delete_session, caller, name)
        for session in gone:
            await self._forget(session)
        return bool(gone)

    async def _forget(self, session: dict) -> None:
        await asyncio.to_thread(self._wipe, session)

    def _wipe(self, session: dict) -> None:
        """Remove the CLI's transcripts of a session, and its directory if that is its own."""
        remove_transcripts(session["cli"])
        if self.own(session["cwd"]):
            remove(session["cwd"])

    def settled(self, caller: str, name: str) -> None:
        """It is known where a session works: nothing waits for that."""
        self._tasks.pop((caller, name), None)

    def choose(self, caller: str, name: str, messages: tuple[dict, ...], names: Iterable[str]
               ) -> tuple[str, tuple[dict, ...]]:
        """As chosen_workspace, for a caller who sends only what is new: his task was kept."""
        task = self._tasks.pop((caller, name), ())
        asked = {"role": "assistant", "content": [{"type": "text", "text": WHICH}]}
        workspace = task and chosen_workspace((task[-1], asked, messages[-1]), names)[0]
        if workspace:
            return workspace, task
        self._tasks[caller, name] = task or messages
        for key in list(self._tasks)[:-20]:
            del self._tasks[key]
        return "", messages


def session_object(session: dict) -> dict:
    """What a caller is told of a session; never a path."""
    return {"id": session["id"], "object": "session", "workspace": session["workspace"] or None,
            "created_at": int(session["created_at"]), "used_at": int(session["used_at"])}


# == 12. Upstream ==================================================================================
# The upstream HTTP API: credentials, connections that are kept, exchanges in threads of their own
# (urllib), and the api backend, which gives a Turn's events as the CLI would.  Knows no client's
# socket.  Only the configured host is ever connected to; redirects are passed on, not followed.

ANTHROPIC = "https://api.anthropic.com"
API_VERSION = "2023-06-01"      # header anthropic-version
OAUTH_BETA = "oauth-2025-04-20"             # header anthropic-beta of requests with a login's token
OAUTH_NOTE = ("--oauth: the CLI's own login is sent upstream for every caller; the vendor's terms "
              "may forbid that, see README")
MAX_OUTPUT = 32_000             # max_tokens where a caller says none; the API needs one
PIECE = 64 * 1024               # bytes read at once
AHEAD = 256 * 1024              # bytes read before the client has taken them
FRAME_LIMIT = 64 * 2**20        # bytes of one event
FRAME_END = re.compile(rb"\n\r?\n")      # a literal first byte: long events are searched fast
ERROR_LIMIT = 256 * 1024        # bytes of an error's body that are looked at
PACKED = ("gzip", "deflate")    # codings that the standard library can undo
LINK_TTL = 60.0                 # seconds an idle connection is kept
NO_LIST = (404, 405, 501)       # statuses of an upstream that lists no models
MODELS_TTL = 3600.0             # seconds that the upstream's list of models is believed
HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te",
              "proxy-connection", "trailer", "transfer-encoding", "upgrade"}    # RFC 9110, 7.6.1
NOT_UPSTREAM = {*HOP_BY_HOP, "host", "content-length", "expect", "x-api-key", "authorization",
                "cookie", "origin", "referer"}
FAULTS = {      # class of an exception -> kind of error, what happened
    "timeout": ("timeout", "it was silent for too long"),               # Python 3.9
    "TimeoutError": ("timeout", "it was silent for too long"),
    "gaierror": ("backend_error", "its name cannot be resolved"),
    "ConnectionRefusedError": ("backend_error", "it refuses connections"),
    "SSLCertVerificationError": ("backend_error", "its certificate is not trusted (see "
                                 "--upstream-ca)"),
    "SSLError": ("backend_error", "TLS fails"),
    "IncompleteRead": ("backend_error", "its answer broke off"),
    "BadStatusLine": ("backend_error", "it speaks no HTTP"),
    "RemoteDisconnected": ("backend_error", "it ended the connection without an answer"),
    "ConnectionError": ("backend_error", "the connection broke"),
    "Exception": ("backend_error", "it fails")}


class Credential(NamedTuple):
    """What is sent upstream for a caller."""
    headers: dict[str, str]
    kind: str                   # "API key", "login", ...
    source: str                 # where it was found
    expires: float | None = None            # Unix seconds, if it says so


def own_credential(headers: Mapping[str, str]) -> Credential | None:
    """A caller's own credential for Anthropic: keys and tokens of theirs begin with sk-ant-."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = headers.get("x-api-key", "")
    if key.startswith("sk-ant-"):
        return Credential({"x-api-key": key}, "API key", "the caller")
    if scheme.lower() != "bearer" or not token.strip().startswith("sk-ant-"):
        return None
    if token.strip().startswith("sk-ant-oat"):
        return Credential({"authorization": headers["authorization"]}, "login", "the caller")
    return Credential({"x-api-key": token.strip()}, "API key", "the caller")


class Credentials:
    """What to send upstream.  The CLI alone logs in, refreshes and writes; we read, if --oauth."""

    def __init__(self, settings: Settings, base: str) -> None:
        self.settings = settings
        self._strange = base != ANTHROPIC       # a gateway knows its own callers' keys

    def find(self, sent: Mapping[str, str]) -> Credential | None:
        """The first that is there.  ApiError invalid_api_key if the CLI's login has expired."""
        if self.settings.api_key:           # what callers send is for us
            return self.configured()
        passed = {name: sent[name] for name in ("x-api-key", "authorization") if name in sent}
        return own_credential(sent) or self.configured() or (Credential(
            passed, "credential", "the caller") if passed and self._strange else None)

    def configured(self) -> Credential | None:
        """The proxy's own credential, from the environment or the CLI's file."""
        names = {"ANTHROPIC_API_KEY": "API key", "ANTHROPIC_AUTH_TOKEN": "token"}
        names.update({"CLAUDE_CODE_OAUTH_TOKEN": "login"} if self.settings.oauth else {})
        for name, kind in names.items():
            value = os.environ.get(name, "").strip()
            if re.fullmatch(r"[\x21-\x7e]+", value):
                return Credential({"x-api-key": value} if kind == "API key" else
                                  {"authorization": f"Bearer {value}"}, kind, name)
        login = self.login() if self.settings.oauth else None
        if login and login.expires is not None and login.expires < time.time():
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(login.expires))
            raise ApiError("invalid_api_key", f"the CLI's login expired at {when}; run `claude "
                           "auth login`, or `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN")
        return login

    @staticmethod
    def login() -> Credential | None:
        """The login in the CLI's credentials file; read each time (15 us), as the CLI renews it."""
        path = os.path.join(claude_dir(), ".credentials.json")
        try:
            with open(path, encoding="utf-8") as file:
                login = json.load(file)["claudeAiOauth"]
            token, until = str(login["accessToken"]), login.get("expiresAt")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None                     # not there, or half written
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            return None
        expires = until / 1000 if isinstance(until, (int, float)) and abs(until) < 1e14 else None
        return Credential({"authorization": f"Bearer {token}"}, "login", path, expires)


def upstream_headers(sent: Mapping[str, str], credential: Credential | None) -> dict[str, str]:
    """A caller's end-to-end headers, with the credential in place of what it sent itself."""
    dropped = NOT_UPSTREAM | {name.strip().lower() for name in sent.get(
        "connection", "").split(",")}
    kept = {name: value for name, value in sent.items()
            if name not in dropped and not name.startswith(("x-cc-", "sec-"))}
    kept.update(credential.headers if credential else {})
    if credential and credential.kind == "login":
        betas = kept.get("anthropic-beta", "")
        if OAUTH_BETA not in betas:
            kept["anthropic-beta"] = ",".join(filter(None, (betas, OAUTH_BETA)))
    return kept


def end_to_end(own: Mapping[str, str], told: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers of a relayed answer: the upstream's, and ours that it does not have."""
    dropped = {*HOP_BY_HOP, "content-length"}
    for name, value in told:
        dropped |= {word.strip().lower() for word in value.split(",")
                    } if name.lower() == "connection" else set()
    if "Access-Control-Allow-Origin" in own:
        dropped |= {name.lower() for name in own if name.startswith("Access-Control-")}
    ids = {"x-request-id": "X-CC-Upstream-Request-Id"}      # ours cancels it, and is in the log
    kept = [(ids.get(name.lower(), name), value) for name, value in told
            if name.lower() not in dropped]
    theirs = {name.lower() for name, _ in kept} - {"vary"}
    return [(name, value) for name, value in own.items() if name.lower() not in theirs] + kept


def safe_path(raw: str) -> str:
    """A raw path if it can only mean what it says, however often it is decoded; else ApiError."""
    said = urllib.parse.unquote(urllib.parse.unquote(raw))
    if not raw.startswith("/") or "\\" in said or re.search(r"//|/\.{1,2}(/|\Z)|[\x00-\x1f\x7f]",
                                                            said):
        raise ApiError("invalid_request", "path: empty, dot and odd segments are not passed on")
    return raw


def upstream_fault(exc: BaseException, host: str) -> ApiError:
    """Why an exchange failed, by FAULTS; statuses 502 and 504."""
    if isinstance(exc, ApiError):
        return exc
    kind, what = next(FAULTS[base.__name__] for base in type(exc).__mro__
                      if base.__name__ in FAULTS)
    said = "" if what.endswith("HTTP") else str(exc)    # that would quote what came
    return ApiError(kind, f"upstream {host}: {what}" + f": {said}"[:300] * bool(said))


class Frames:
    """The events of an SSE stream (HTML standard, 9.2), whatever pieces it comes in."""

    def __init__(self) -> None:
        self._held = bytearray()            # of the unfinished frame

    def feed(self, data: bytes) -> list[dict]:
        """The events that end in this piece.  ApiError if one is no JSON object."""
        edge = max(0, len(self._held) - 3)  # an end may have begun in what came before
        self._held += data
        if len(self._held) > FRAME_LIMIT:
            raise ApiError("backend_error", "upstream: an event is too large")
        if not FRAME_END.search(self._held, edge):
            return []
        *frames, rest = re.split(rb"\r?\n\r?\n", self._held)
        self._held = bytearray(rest)
        return list(filter(None, map(self._event, frames)))

    @staticmethod
    def _event(frame: bytes) -> dict | None:
        data = b"\n".join(line[5:].strip() for line in frame.split(b"\n")
                          if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            return None
        try:
            event = json.loads(data)
            return event if event["type"] else None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ApiError("backend_error", "upstream: an event is no JSON object: "
                           + data[:100].decode("utf-8", "replace")) from None


def unpacked(data: bytes, coding: str) -> bytes:
    """The beginning of a body without its compression, for a look at it."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(47).decompress(data, ERROR_LIMIT) if coding in PACKED else data
    return data


class Tap:
    """What the log wants of a relayed answer (model, usage, stop reason), read from its two ends
    alone; its middle is neither decoded nor kept."""
    KEPT = 16 * 1024            # bytes of each end

    def __init__(self, coding: str) -> None:
        self._head = self._tail = b""
        # of either kind, by its first bytes
        self._plain = zlib.decompressobj(47) if coding in PACKED else None
        self._blind = coding not in ("", "identity", *PACKED)

    def feed(self, data: bytes) -> None:
        if self._blind:
            return
        if self._plain:
            try:
                data = self._plain.decompress(data, 16 * PIECE)
                self._blind = bool(self._plain.unconsumed_tail)
            except zlib.error:              # it is the client's to complain
                self._blind = True
        if len(self._head) < self.KEPT:
            self._head += data[:self.KEPT - len(self._head)]
        self._tail = (self._tail + data[-self.KEPT:])[-self.KEPT:]

    def message(self) -> Message:
        """A message without content, as far as it was told."""
        message = Message("", "", 0)
        model = re.search(rb'"model"\s*:\s*"([^"\\]{1,200})"', self._head)
        message.start = {"model": model.group(1).decode("utf-8", "replace")} if model else {}
        for text, at in ((self._head, self._head.find(b'"usage"')),
                         (self._tail, self._tail.rfind(b'"usage"'))):
            found = re.compile(rb'"usage"\s*:\s*').match(text, max(at, 0))
            with contextlib.suppress(ValueError, RecursionError):
                told = text[found.end() if found else len(text):].decode("utf-8", "replace")
                usage, _ = json.JSONDecoder().raw_decode(told)
                message.usage.update(usage if isinstance(usage, dict) else {})
        reason = re.findall(rb'"stop_reason"\s*:\s*"(\w{1,40})"', self._tail)
        message.stop_reason = reason[-1].decode() if reason else None
        return message


class Exchange:
    """One request upstream and its answer, in a thread of its own while it lasts.

    On the loop: open(), then read() until b"", and close() in any case, which ends the connection
    unless the answer was read to its end.
    """

    def __init__(self, upstream: Upstream, method: str, target: str, headers: Mapping[str, str],
                 body: bytes, wait_s: float) -> None:
        self.upstream, self.method, self.target, self.body = upstream, method, target, body
        self.request_headers, self.wait_s = headers, wait_s
        self.status, self.headers = 0, []       # of the answer: pairs, in order
        self.length: int | None = None          # of its body, if it said one
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock, self._room = threading.Lock(), threading.Event()
        self._pieces: list[bytes] = []          # read, and not taken yet
        self._held, self._told = 0, False
        self._over = self.closed = self.connected = False
        self._error: ApiError | None = None
        self.link: Any = None                   # the connection, until it is given back
        self._sock: Any = None

    # -- in its thread

    def run(self) -> None:
        error = None
        try:
            self._receive(self.upstream.links.send(self, self.upstream.base + self.target))
        except Exception as exc:
            slow = isinstance(exc, socket.timeout) and not self.connected
            error = self._too_late() if slow else upstream_fault(exc, self.upstream.host)
        with self._lock:
            self._over, self._error, self._sock = True, self._error or error, None
        self.upstream.exchanges.discard(self)
        self._tell()
        if self.link:
            self.link.close()

    def own(self, sock: Any) -> None:
        """From now on close() ends this socket.  ConnectionError if it has been called already."""
        with self._lock:
            if self.closed:
                raise ConnectionAbortedError("nobody waits for it")
            self._sock = sock

    def disown(self) -> None:
        """The socket is about to be closed."""
        with self._lock:
            self._sock = None

    def _receive(self, response: Any) -> None:
        import http.client
        left = response.length              # None: until its last chunk, or the connection's end
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        whole = left is not None and left <= PIECE and not events   # its head can wait for it
        said = response.headers.get("content-length", "")
        bare = self.method == "HEAD" or response.status in (204, 304)
        self.length = left if not bare else int(said) if re.fullmatch("[0-9]{1,18}", said) else None
        self.headers = response.headers.items()
        if left is None and not response.chunked:       # or half a head would pass for an answer
            self._put(response.read1(PIECE))
            if not self._pieces:
                raise http.client.RemoteDisconnected("no body, and no length of it")
        if events:
            self._sock.settimeout(self.upstream.settings.stall_timeout)
        if not whole:
            self.status = response.status   # with it the head is told
            self._tell()
        while left != 0:
            data = response.read1(PIECE if left is None else min(left, PIECE))
            if not data:
                break
            left = None if left is None else left - len(data)
            self._put(data)
        if left:
            raise http.client.IncompleteRead(b"", left)
        response.close()
        with self._lock:
            if response.clean and not (response.will_close or bare or self.closed):
                self.upstream.links.put(self.link)
                self._sock = self.link = None
        self.status = response.status

    def _put(self, data: bytes) -> None:
        """Hand on a piece; wait if too much of what came before was not taken yet."""
        self._room.clear()
        with self._lock:
            self._pieces += [data] if data else []
            self._held += len(data)
        if self.status:
            self._tell()
        while self._held > AHEAD and not self.closed:
            self._room.wait(1)
        if self.closed:
            raise ConnectionAbortedError("nobody waits for it")

    def _tell(self) -> None:
        """Wake the loop, once for all that it has not looked at."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            with contextlib.suppress(RuntimeError):     # the loop is closed
                self._loop.call_soon_threadsafe(self._news.set)

    # -- on the loop

    async def _wait(self) -> None:
        """Until something has come that was not looked at."""
        while not self._told:
            self._news.clear()
            await self._news.wait()

    async def open(self) -> None:
        """Wait for the answer's head.  ApiError if there is none, or no connection in time."""
        timer = self._loop.call_later(self.upstream.settings.connect_timeout, self._late)
        try:
            await self._wait()
        finally:
            timer.cancel()
        if self._error and not self.status:
            raise self._error

    async def read(self) -> bytes:
        """What has come since, in one piece; b"" at its end.  ApiError if it broke off."""
        while True:
            await self._wait()
            with self._lock:                # the end, too, as it stands beside these pieces
                self._told = over = self._over
                pieces, self._pieces, self._held = self._pieces, [], 0
            self._room.set()
            if pieces:
                return b"".join(pieces)
            if over and self._error:
                raise self._error
            if over:
                return b""

    def header(self, name: str) -> str:
        """A field of the answer's head, "" if it is not there; of several the last."""
        return dict((known.lower(), value) for known, value in self.headers).get(name, "")

    @property
    def ready(self) -> bool:
        """Whether read() has something to give at once."""
        return bool(self._pieces) or self._over

    async def read_all(self, limit: int) -> bytes:
        """The answer's body, as far as the limit."""
        body, data = bytearray(), b"-"
        while data and len(body) < limit:
            data = await self.read()
            body += data
        return bytes(body)

    def _too_late(self) -> ApiError:
        return ApiError("timeout", f"upstream {self.upstream.host}: connecting took too long "
                        "(--connect-timeout)")

    def _late(self) -> None:
        """The time to connect is up."""
        if not (self.connected or self._over):
            self._error = self._too_late()
            self._over = self._told = True      # its thread may still ask for the address
            self.close()
            self._news.set()

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # its thread closes nothing meanwhile, or
            self.closed = True                          # another's socket could have the number
            if self._sock is not None:      # wakes the thread that waits for it
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self._room.set()


def with_port(host: str, port: int) -> str:
    return host if re.search(r":\d+\Z", host) else f"{host}:{port}"


class Links:
    """Connections that are kept for the next exchange: a handler of urllib's, which leaves the
    proxies of the environment to urllib's own.  All of it runs in the threads of exchanges."""
    handler_order = 500         # behind ProxyHandler

    def __init__(self, settings: Settings, base: str) -> None:
        self.settings, self._lock = settings, threading.Lock()
        self._base, self._idle = urllib.parse.urlsplit(base), deque()       # (since, link)
        self._director: Any = None
        self.context: Any = None            # of TLS
        self.answer_class: Any = None

    def prepare(self) -> Any:
        """What opens requests, made at the first.  OSError if --upstream-ca cannot be used."""
        with self._lock:
            if self._director:
                return self._director
            import http.client
            import urllib.request       # 35 ms and 5 MB that others save

            class Answer(http.client.HTTPResponse):
                """A response that knows whether something stands behind its end."""
                clean = False

                def _close_conn(self) -> None:
                    with contextlib.suppress(OSError, ValueError, AttributeError):
                        self.fp.raw._sock.settimeout(0)
                        self.clean = True
                        self.clean = not self.fp.peek(1)    # OSError: there is nothing
                    super()._close_conn()

            self.answer_class = Answer
            if self._base.scheme == "https":
                import ssl
                self.context = ssl.create_default_context()
                if self.settings.upstream_ca:
                    self.context.load_verify_locations(self.settings.upstream_ca)
                self.context.set_alpn_protocols(["http/1.1"])
            director = urllib.request.OpenerDirector()
            director.add_handler(urllib.request.ProxyHandler())
            director.add_handler(self)
            self._director = director
            return director

    def send(self, exchange: Exchange, url: str) -> Any:
        """Send an exchange's request: the response, whose head has come."""
        director = self.prepare()
        import urllib.request
        request = urllib.request.Request(url, method=exchange.method)
        request.exchange = exchange
        return director.open(request)

    def add_parent(self, _: Any) -> None:
        """urllib's word to a handler."""

    def __lt__(self, other: Any) -> bool:
        return self.handler_order < other.handler_order

    def http_open(self, request: Any) -> Any:
        """Send a request by a connection that is kept, or a new one.

        Tried again once: if a kept one turns out to be dead before it has taken anything.
        """
        exchange, kept = request.exchange, self._take()
        added = {} if request._tunnel_host else request.headers     # a proxy's own, of urllib
        headers = {**exchange.request_headers, **added, "host": self._base.netloc}
        while True:
            link = exchange.link = kept or self._connect(request, exchange)
            try:
                exchange.own(link.sock)
                link.sock.settimeout(exchange.wait_s)
                link.putrequest(exchange.method, request.selector, skip_host=True,
                                skip_accept_encoding=True)
                for name, value in headers.items():
                    link.putheader(name, value)
                if exchange.body or exchange.method in ("POST", "PUT", "PATCH"):
                    link.putheader("content-length", str(len(exchange.body)))
                link.endheaders()
                break
            except ConnectionError:
                link.close()
                if not kept or exchange.closed:
                    raise
                kept = None
        exchange.connected, broken = True, False
        try:
            link.send(exchange.body)
        except ConnectionError:             # it may have answered early, and say why
            broken = True
        exchange.body = b""
        response = link.getresponse()
        while 101 < response.status < 200:  # http.client steps over 100 alone
            response.headers = None
            response.begin()
        response.will_close |= broken
        return self._checked(response)

    https_open = http_open

    @staticmethod
    def _checked(response: Any) -> Any:
        """The response, if it leaves no doubt where its body ends."""
        told = response.headers
        codings = [value.strip().lower() for value in told.get_all("transfer-encoding", [])]
        if response.status < 200 or told.defects or codings not in ([], ["chunked"]) or len(
                set(told.get_all("content-length", []))) > 1:
            raise ApiError("backend_error", "upstream: the head of its answer is malformed")
        return response

    def _connect(self, request: Any, exchange: Exchange) -> Any:
        import http.client
        secure, far = request.type == "https", request._tunnel_host
        link = http.client.HTTPConnection(
            with_port(request.host, 443 if secure and not far else 80),
            timeout=self.settings.connect_timeout)
        link._create_connection = functools.partial(self._dial, exchange)
        if far:
            link.set_tunnel(with_port(far, 443), headers=request.headers)
        link.connect()
        link.response_class = self.answer_class         # of answers, not of a proxy's
        if secure:
            sock = self.context.wrap_socket(
                link.sock, server_hostname=host_name(far or request.host),
                do_handshake_on_connect=False)
            link.sock = sock
            exchange.own(sock)
            sock.do_handshake()
        return link

    @staticmethod
    def _dial(exchange: Exchange, address: tuple, timeout_s: float, *_: Any) -> socket.socket:
        """A connected socket, which the exchange can end before it is connected."""
        trouble, until = OSError("it has no address"), time.monotonic() + timeout_s
        places = socket.getaddrinfo(*address, 0, socket.SOCK_STREAM)
        for n, (family, kind, proto, _, place) in enumerate(places):
            sock = socket.socket(family, kind, proto)
            try:                            # a silent one leaves time for those behind it
                left_s = (until - time.monotonic()) / (len(places) - n)
                sock.settimeout(max(0.01, left_s))
                exchange.own(sock)
                sock.connect(place)
                sock.settimeout(timeout_s)
                return sock
            except OSError as exc:
                trouble = exc
                exchange.disown()
                sock.close()
        raise trouble

    def _take(self) -> Any:
        """A kept connection that is still good: none that has ended, or says something unasked."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                since, link = self._idle.pop()
            with contextlib.suppress(OSError):
                link.sock.settimeout(0)
                try:
                    socket.socket.recv(link.sock, 1, socket.MSG_PEEK)
                except BlockingIOError:
                    if time.monotonic() - since < LINK_TTL:
                        return link
            link.close()

    def put(self, link: Any) -> None:
        with self._lock:
            self._idle.append((time.monotonic(), link))

    def expire(self, ttl_s: float) -> int:
        """Close those that were not used for so long; how many are left."""
        with self._lock:
            while self._idle and time.monotonic() - self._idle[0][0] >= ttl_s:
                self._idle.popleft()[1].close()
            return len(self._idle)


def upstream_refusal(status: int, headers: list[tuple[str, str]], body: bytes) -> ApiError:
    """The ApiError for an answer that is none; its own words, be they JSON or a gateway's page."""
    told = {name.lower(): value for name, value in headers}
    wait = told.get("retry-after", "")
    try:
        message = json.loads(body)["error"]["message"] + ""
    except (ValueError, TypeError, KeyError, RecursionError):
        page = re.sub(r"<[^>]*>|[^\x21-\x7e]+", " ", body[:4096].decode("utf-8", "replace"))
        message = f"the upstream answers {status} without JSON: {' '.join(page.split())[:200]}"
    if status < 400:
        message = (f"the upstream answers {status} {told.get('location', '')}, which is not "
                   "followed here; see --upstream-url")
        status = 502
    retry_after = int(wait) if re.fullmatch(r"\d{1,6}", wait, re.ASCII) else None
    return status_error(status, message, retry_after)


def upstream_turn(turn: Turn) -> Turn:
    """A turn as the API needs it said, so that all of it can be refused and learned: thinking for
    effort; JSON for a schema by the API's own format, or by a tool if that was refused."""
    fields = dict(turn.fields)
    if "effort" in fields:
        fields.setdefault("thinking", {"type": "adaptive"})
    if turn.schema is not None:
        fields["format"] = hashlib.sha256(encode_json(turn.schema)).hexdigest()[:16]
    return replace(turn, fields=fields)


def cached(blocks: list[dict]) -> list[dict]:
    """Blocks with a mark for the API's cache on the last one that takes it."""
    at = max((n for n, block in enumerate(blocks) if block["type"] not in THOUGHTS), default=-1)
    return [{**block, "cache_control": {"type": "ephemeral"}} if n == at else block
            for n, block in enumerate(blocks)]


def messages_request(turn: Turn, model: str, most: float = math.inf) -> dict:
    """The body of a streamed Messages request for a turn of upstream_turn, to a model that gives
    at most so many tokens.

    What is likely to be asked again (tools, a conversation) is marked for the API's cache.
    """
    fields = {k: v for k, v in turn.fields.items() if k not in ("effort", "format")}
    output = {"effort": turn.fields["effort"]} if "effort" in turn.fields else {}
    tools, choice = wire_tools(turn), fields.pop("tool_choice", {})
    ours = choice.get("name") == ANSWER and not any(t["name"] == ANSWER for t in turn.tools)
    if "name" in choice and not ours:
        choice = {**choice, "name": wire_name(choice["name"])}
    if turn.schema is not None and "format" in turn.fields:
        output["format"] = {"type": "json_schema", "schema": turn.schema}
    elif turn.schema is not None:
        tools.append({"name": ANSWER, "description": ANSWER_HELP,
                      "input_schema": {"type": "object", **turn.schema}})
    messages = [{**message, "content": wire_blocks(message["content"])}
                for message in turn.messages]
    called = {block["name"] for message in messages for block in message["content"]
              if block["type"] == "tool_use"}
    if called and not tools:                # the API wants to know the tools of a history
        tools, choice = [{"name": name, "input_schema": {"type": "object"}}
                         for name in sorted(called)], {"type": "none"}
    system = [{"type": "text", "text": turn.system}] if turn.system.strip() else []
    if tools or len(messages) > 1:
        system = cached(system)
        messages[-1] = {**messages[-1], "content": cached(messages[-1]["content"])}
    budget = fields.get("thinking", {}).get("budget_tokens", 0)
    more = {"system": system, "tools": tools, "output_config": output,
            "tool_choice": tools and choice}
    return {"model": model, "max_tokens": min(most, budget + MAX_OUTPUT), "stream": True, **fields,
            "messages": messages, **{name: said for name, said in more.items() if said}}


class Upstream:
    """The api backend: exchanges, and the events of a Turn from the upstream's Messages API."""

    def __init__(self, settings: Settings, refusals: Refusals) -> None:
        self.settings, self.refusals = settings, refusals
        try:
            self.base = settings.upstream_url or base_url(
                os.environ.get("ANTHROPIC_BASE_URL", "")) or ANTHROPIC
        except ValueError as exc:
            raise ConfigError(f"ANTHROPIC_BASE_URL: {exc}") from None
        self.host = urllib.parse.urlsplit(self.base).netloc
        self.credentials = Credentials(settings, self.base)
        self.links = Links(settings, self.base)
        self.exchanges: set[Exchange] = set()       # whose thread is busy
        self.models: list[dict] = []                # as the upstream lists them
        self._listed = -math.inf                    # when it was asked for them
        self._most: dict[str, int] = {}             # tokens that a model gives, if it said so
        self._unlisted: ApiError | None = None      # that it lists none
        self._listing: asyncio.Lock | None = None
        self._threads = ThreadPoolExecutor(settings.max_streams, "upstream")
        self._sweep: asyncio.TimerHandle | None = None

    def exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes,
                 wait_s: float) -> Exchange:
        """Begin a request; its owner closes it.  ApiError if there are --max-streams already."""
        if len(self.exchanges) >= self.settings.max_streams:
            raise ApiError("rate_limit_exceeded", f"{self.settings.max_streams} requests are "
                           "upstream already; try again, or raise --max-streams", retry_after=1)
        exchange = Exchange(self, method, target, headers, body, wait_s)
        self.exchanges.add(exchange)
        try:
            self._threads.submit(exchange.run)
        except RuntimeError as exc:         # no thread can be started; it is in line all the same
            exchange.close()
            raise ApiError("unavailable", f"no thread for the request: {exc}", retry_after=5
                           ) from None
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(LINK_TTL, self._expire)
        return exchange

    def _expire(self) -> None:
        left = self.links.expire(LINK_TTL) or self.exchanges
        loop = asyncio.get_running_loop()
        self._sweep = loop.call_later(LINK_TTL, self._expire) if left else None

    def start(self) -> None:
        """Say what an operator has to know.  ConfigError if --upstream-ca cannot be used."""
        if self.settings.oauth:
            say(OAUTH_NOTE)
        if self.base.startswith("http:") and not is_loopback(host_name(self.host)):
            say(f"warning: no TLS: credentials can be read on the way to {self.base}")
        if self.settings.upstream_ca:
            try:
                self.links.prepare()
            except OSError as exc:
                raise ConfigError(f"upstream_ca: {self.settings.upstream_ca}: {exc}") from None
        elif self.settings.backend == "api":
            self._threads.submit(self.links.prepare)    # so the first request need not

    async def stop(self) -> None:
        for exchange in list(self.exchanges):
            exchange.close()
        if self._sweep:
            self._sweep.cancel()
        self.links.expire(0)
        self._threads.shutdown(wait=False)

    def headers(self, sent: Mapping[str, str]) -> dict[str, str]:
        """What goes upstream of a caller's headers.  ApiError if no credential is there."""
        credential = self.credentials.find(sent)
        if credential is None and self.base == ANTHROPIC:
            raise ApiError("invalid_api_key", "no credential for the upstream API: set "
                           "ANTHROPIC_API_KEY, or send a key of your own; `ccproxy.py auth status` "
                           "shows what is there")
        return upstream_headers(sent, credential)

    def own(self, sent: Mapping[str, str]) -> dict[str, str]:
        """The headers of a request that is made here for a caller: of what he sent, his credential
        and what he says to the API."""
        kept = {name: value for name, value in sent.items()
                if name in ("x-api-key", "authorization") or name.startswith("anthropic-")}
        return self.headers({"anthropic-version": API_VERSION, **kept, "content-type":
                             "application/json", "user-agent": f"ccproxy/{__version__}"})

    async def _ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> dict:
        """A whole JSON answer.  ApiError if it is none."""
        exchange = self.exchange(method, target, headers, body, self.settings.stall_timeout)
        try:
            await exchange.open()
            data = await exchange.read_all(self.settings.max_body)
            if exchange.status != 200:
                raise upstream_refusal(exchange.status, exchange.headers, data)
            answer = json.loads(data)
            return answer if isinstance(answer, dict) else {}
        except (ValueError, RecursionError):
            raise ApiError("backend_error", f"upstream {self.host}: no JSON came") from None
        finally:
            exchange.close()

    async def known_models(self, headers: Mapping[str, str]) -> list[dict]:
        """The models that the upstream lists, the newest first.  ApiError if it lists none."""
        clock = asyncio.get_running_loop().time
        self._listing = self._listing or asyncio.Lock()     # 3.9 binds the loop here
        async with self._listing:
            if clock() - self._listed > (30 if self._unlisted else MODELS_TTL):
                self._unlisted = None
                try:
                    told = await self._ask("GET", "/v1/models?limit=1000", headers, b"")
                except ApiError as error:   # a caller's bad key says nothing for the others
                    if error.status not in NO_LIST:
                        raise
                    self._unlisted = error
                else:
                    listed = told.get("data") if isinstance(told.get("data"), list) else []
                    models = [m for m in listed
                              if isinstance(m, dict) and isinstance(m.get("id"), str)]
                    self.models = sorted(models, key=lambda m: str(m.get("created_at")),
                                         reverse=True)
                self._listed = clock()
            if self._unlisted:
                raise self._unlisted
            return self.models

    async def model_ids(self, headers: Mapping[str, str]) -> list[str] | None:
        """The ids of the models that the upstream lists; None if it lists none."""
        try:
            return [model["id"] for model in await self.known_models(headers)]
        except ApiError as error:
            if error.status in NO_LIST:
                return None
            raise

    async def resolve(self, asked: str, headers: Mapping[str, str]) -> str:
        """The upstream's name for a model: what --models maps, ids as they are, of a family the
        newest; anything else means the default model."""
        default = self.settings.model if self.settings.model != "default" else "sonnet"
        target = alias_of(self.settings.models, asked).get("model") or asked.rpartition("/")[2]
        for name in (re.sub(r"\[1m\]\Z", "", target), default):
            if re.fullmatch(FULL_ID, name):
                return name
            ids = await self.model_ids(headers)
            if ids is None:                 # a gateway without a list knows its names
                return target
            found = [known for known in ids if known == name] or [
                known for known in ids if name in FAMILIES and name in known]
            if found:
                return found[0]
        return target

    # -- a turn

    async def events(self, turn: Turn, message: Message, receipt: Receipt,
                     sent: Mapping[str, str]) -> AsyncIterator[list[dict]]:
        """Bursts of events of exactly one message, for a caller whose headers are `sent`."""
        headers = self.own(sent)
        model = await self.resolve(turn.model, headers)
        if turn.model.endswith("[1m]"):     # the CLI's word for a long context
            turn = replace(turn, ignored=(*turn.ignored, "model[1m]"))
        bursts = self.refusals.insist(
            upstream_turn(turn), lambda: f"{model} upstream", message, receipt,
            lambda plan: self._play(plan, model, headers, receipt))
        try:
            async for events in bursts:
                yield events
        finally:
            await bursts.aclose()

    async def _begin(self, turn: Turn, model: str, headers: Mapping[str, str], receipt: Receipt
                     ) -> Exchange:
        """The exchange of a turn, whose answer has begun; its owner closes it.

        How many tokens a model gives at most is learned from its refusal.
        """
        while True:
            exchange = self.exchange("POST", "/v1/messages", headers, encode_json(messages_request(
                turn, model, self._most.get(model, math.inf))), self.settings.stall_timeout)
            try:
                await exchange.open()
                receipt.upstream = exchange.header("request-id")
                if exchange.status == 200:
                    return exchange
                error = upstream_refusal(exchange.status, exchange.headers,
                                         await exchange.read_all(ERROR_LIMIT))
            finally:
                if exchange.status != 200:
                    exchange.close()
            most = re.search(r"max_tokens: \d+ > (\d+)", error.message)
            if not most or "max_tokens" in turn.fields or model in self._most:
                raise error
            self._most[model] = int(most.group(1))

    async def _play(self, turn: Turn, model: str, headers: Mapping[str, str], receipt: Receipt
                    ) -> AsyncIterator[list[dict]]:
        """One try of a turn; the upstream's events go through the same fold as the CLI's."""
        reply, frames = Reply(replace(turn, schema=None) if "format" in turn.fields else turn,
                              who="the upstream"), Frames()
        exchange = await self._begin(turn, model, headers, receipt)
        try:
            while not reply.done:
                data = await exchange.read()
                if not data:
                    raise ApiError("backend_error", "the upstream's answer broke off")
                events = [event for told in frames.feed(data) for event in reply.told(told)]
                if reply.done:              # the caller folds before the end is told
                    events.pop()
                if events:
                    yield events
                if reply.failed:
                    raise reply.failed
            yield [{"type": "message_stop"}]
            with contextlib.suppress(ApiError, asyncio.TimeoutError):     # to keep the connection
                await asyncio.wait_for(exchange.read_all(PIECE), 0.5)
        finally:
            exchange.close()

    async def count(self, turn: Turn, sent: Mapping[str, str]) -> int:
        """Input tokens of a turn, as the upstream counts them."""
        headers = self.own(sent)
        model = await self.resolve(turn.model, headers)
        turn = replace(turn, fields={name: value for name, value in turn.fields.items()
                                     if name == "tool_choice"}, schema=None)
        body = {name: value for name, value in messages_request(turn, model).items()
                if name in ("model", "messages", "system", "tools", "tool_choice")}
        told = await self._ask("POST", "/v1/messages/count_tokens", headers, encode_json(body))
        return need(told.get("input_tokens"), "upstream input_tokens", int)


# == 13. Server ====================================================================================
# Owner of every socket: connection loop, limits and deadlines, keep-alive, the client's end.
# Knows bytes and requests, nothing of routes or models.

IDLE_TIMEOUT = 75.0         # seconds a connection may be silent between requests
HEAD_TIMEOUT = 15.0         # seconds for a request head, from its first byte
BODY_TIMEOUT = 30.0         # seconds for a request body, plus one for each 64 KiB
WRITE_TIMEOUT = 60.0        # seconds a client may refuse to take bytes
BUFFER_LIMIT = 256 * 1024   # bytes unsent before writing waits
LINGER = 1.0                # seconds a refused request's rest is read over, so the answer arrives


class Wire(asyncio.StreamReaderProtocol):
    """asyncio's streams, which tell of a client's end only to who reads; a turn does not read."""
    connection: Connection

    def __init__(self, server: Server) -> None:
        self.server = server
        super().__init__(asyncio.StreamReader(MAX_HEAD), self.opened)

    def opened(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        full = len(self.server.connections) >= self.server.limit
        self.connection = Connection(self.server, reader, writer, full)
        self.server.connections.add(self.connection)

    def eof_received(self) -> bool | None:
        self.connection.half_closed()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server.connections.discard(self.connection)
        self.connection.task.cancel()


def check_size(size: int, limit: int) -> None:
    """ApiError if a body is larger than it may be."""
    if size > limit:
        raise ApiError("request_too_large", f"body: larger than {limit} bytes")


class Connection:
    """One client's connection: requests one after the other, an answer each."""
    request: Request | None = None          # the one that is being answered
    heartbeat: Callable[[], None] | None = None     # writes something harmless
    head_sent = _keep = _chunked = _body_read = _half_closed = False
    _head = b""                             # begun, and not sent yet

    def __init__(self, server: Server, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter, full: bool) -> None:
        self.server, self.reader, self.writer, self._full = server, reader, writer, full
        writer.transport.set_write_buffer_limits(high=BUFFER_LIMIT)
        self.task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        try:
            if self._full:
                raise ApiError("unavailable", "too many connections", retry_after=1)
            head = await self._read_head()
            while head:
                self.request, self.head_sent = parse_head(head), False
                self._body_read = self.request.length == 0
                self._keep = self.request.keep_alive and not self.server.stopping
                if self._half_closed:       # before its request was looked at
                    self.half_closed()
                await self.server.handle(self, self.request)
                self.request = self.heartbeat = None
                head = await self._read_head() if self._keep and self._body_read else b""
        except ApiError as error:
            self.head_sent = self._keep = self._body_read = False
            await self.server.refuse(self, error)
        except (asyncio.CancelledError, ConnectionError):
            pass                            # the client is gone, or the server stops
        except Exception:
            traceback.print_exc()
        finally:
            if self.head_sent and not self._body_read and not self.writer.is_closing():
                await self._linger()
            self.writer.close()             # what the client does not take is dropped at last
            asyncio.get_running_loop().call_later(WRITE_TIMEOUT, self.writer.transport.abort)

    async def _read_head(self) -> bytes:
        """The next request's head; empty when the client has ended, is idle or too slow."""
        try:
            for _ in range(8):              # RFC 9112, 2.2: a blank line may be left over
                first = await asyncio.wait_for(self.reader.read(1), IDLE_TIMEOUT)
                if first not in (b"\r", b"\n"):
                    break
            rest = self.reader.readuntil(b"\r\n\r\n")
            return first + await asyncio.wait_for(rest, HEAD_TIMEOUT)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError):
            return b""
        except asyncio.LimitOverrunError:
            long_line = b"\r\n" not in await self.reader.read(MAX_LINE)
            raise ApiError("uri_too_long" if long_line else "headers_too_large",
                           f"request head: longer than {MAX_HEAD} bytes") from None

    async def read_body(self, limit: int) -> bytes:
        """The request's body.  ApiError if it is too large (before all is read), late or odd."""
        length, expected = self.request.length, self.request.headers.get("expect", "").lower()
        check_size(length or 0, limit)
        if expected == "100-continue" and self.request.minor:
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        allowed_s = BODY_TIMEOUT + (limit if length is None else length) / 65536
        reading = self._read_chunks(limit) if length is None else self.reader.readexactly(length)
        try:
            body = await asyncio.wait_for(reading, allowed_s)
        except asyncio.TimeoutError:
            raise ApiError("request_timeout", "the body came too slowly") from None
        except asyncio.LimitOverrunError:
            raise ApiError("invalid_request", "chunked body: line too long") from None
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("the client ended inside its body") from None
        self._body_read = True
        return body

    async def _read_chunks(self, limit: int) -> bytes:
        """A body in chunks (RFC 9112, 7.1); trailer fields are read over."""
        body, end, size = bytearray(), b"\r\n", -1
        while size != 0:
            head = CHUNK.fullmatch(await self.reader.readuntil(end))
            if not head:
                raise ApiError("invalid_request", "chunked body: malformed chunk size")
            size = int(head.group(1), 16)
            check_size(len(body) + size, limit)
            body += await self.reader.readexactly(size)
            if size and await self.reader.readexactly(2) != end:
                raise ApiError("invalid_request", "chunked body: chunk longer than its size")
        for _ in range(MAX_FIELDS):
            if await self.reader.readuntil(end) == end:
                return bytes(body)
        raise ApiError("headers_too_large", "chunked body: too many trailer fields")

    # -- answers

    def start(self, status: int, headers: Iterable[tuple[str, str]], length: int | None = None
              ) -> None:
        """Begin an answer; without a length its body follows by write() and end()."""
        bare = status in (204, 304)
        self._chunked = length is None and self.request.minor > 0 and not bare
        self._keep = self._keep and self._body_read and (
            self._chunked or length is not None or bare)
        framing = [("Transfer-Encoding", "chunked")] if self._chunked else (
            [("Content-Length", str(length))] if length is not None and status != 204 else [])
        headers, self.head_sent = list(headers), True
        if not any(name.lower() == "date" for name, _ in headers):
            now = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            headers.insert(0, ("Date", now))
        self._head = response_head(status, [
            *headers, *framing, ("Connection", "keep-alive" if self._keep else "close")])

    def take_back(self) -> bool:
        """Forget the beginning of an answer; False if some of it has been sent."""
        unsent, self._head = bool(self._head), b""
        self.head_sent = self.head_sent and not unsent
        return unsent

    async def send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """A whole answer; HEAD gets its head alone."""
        self.start(status, headers.items(), len(body))
        silent = self.request is not None and self.request.method == "HEAD"
        self.writer.write(self._head if silent else self._head + body)
        self._head = b""
        await self.drain()

    def write(self, data: bytes) -> None:
        """A piece of the body; the head goes with the first, which may be empty."""
        framed = b"%x\r\n%s\r\n" % (len(data), data) if self._chunked and data else data
        self.writer.write(self._head + framed)
        self._head = b""

    def abort(self) -> None:
        """End the connection at once: what was sent must not be taken for a whole answer."""
        self._keep = False
        with contextlib.suppress(OSError, AttributeError):      # a reset: an end would look whole
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii" if POSIX else "hh", 1, 0))
        self.writer.transport.abort()

    def end(self) -> None:
        self.writer.write(self._head + (b"0\r\n\r\n" if self._chunked else b""))
        self._head = b""

    async def drain(self) -> None:
        """Wait until the client has taken enough.  ConnectionError if it takes nothing for long."""
        if self.writer.transport.get_write_buffer_size() > BUFFER_LIMIT:
            late = asyncio.get_running_loop().call_later(WRITE_TIMEOUT, self.abort)
            try:
                await self.writer.drain()
            finally:
                late.cancel()

    # -- the client's end

    def half_closed(self) -> None:
        self._half_closed = True
        if self.request is not None:
            asyncio.get_running_loop().create_task(self._probe(self.request))

    async def _probe(self, request: Request) -> None:
        """The client ended its side: does it still read, or is it gone?

        From one that is gone, anything written brings a reset; a reader of HTTP/1.1 steps over
        interim responses, a reader of events over heartbeats.
        """
        sock = self.writer.get_extra_info("socket")
        for _ in range(3):
            await asyncio.sleep(0.3)
            if self.request is not request or self.writer.is_closing():
                return
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.abort()
            elif self.head_sent and self.heartbeat:
                self.heartbeat()
            elif request.minor and not self.head_sent:
                self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _linger(self) -> None:
        """Read over the rest of a refused request: closing at once would reset what was sent."""
        with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError, OSError):
            deadline = time.monotonic() + LINGER
            if self.writer.can_write_eof():
                self.writer.write_eof()
            while await asyncio.wait_for(self.reader.read(65536), deadline - time.monotonic()):
                pass


class Server:
    """The listening sockets and their connections.  `handle` answers a request, `refuse` an error
    that came before there was one."""

    def __init__(self, settings: Settings, handle: Callable, refuse: Callable) -> None:
        self.settings, self.handle, self.refuse = settings, handle, refuse
        self.connections: set[Connection] = set()
        self.stopping, self.limit = False, settings.max_connections

    async def start(self) -> int:
        """Listen; the port.  OSError if that cannot be."""
        context = None
        if self.settings.tls_cert:
            import ssl
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(self.settings.tls_cert, self.settings.tls_key)
            except OSError as exc:          # ssl.SSLError is one
                files = f"{self.settings.tls_cert}, {self.settings.tls_key}"
                raise ConfigError(f"{files}: {exc}") from None
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource                 # at the end of descriptors asyncio's accept loop spins
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            left = max(8, hard - 128 - self.settings.max_streams)
            self.limit = min(self.limit, left) if hard > 0 else self.limit
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Wire(self), self.settings.host, self.settings.port, backlog=512, ssl=context)
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """No new connections; running answers get drain_timeout."""
        self.stopping, started = True, time.monotonic()
        self._server.close()
        while self.connections:
            late = max(0.0, time.monotonic() - started - self.settings.drain_timeout)
            for connection in list(self.connections):
                if late or connection.request is None:
                    connection.task.cancel()
                if late > LINGER:           # it has been told, and takes nothing
                    connection.writer.transport.abort()
            await asyncio.sleep(0.02)


# == 14. App =======================================================================================
# The only room that sees a dialect, a backend and a socket at once: authenticate, parse, open
# events, fold and send, record; or pass on what is only relayed.  Owner of a turn's deadline and
# the caller's identity.
# To add a route: one row in ROUTES and a method of that name, which gives the JSON to be sent, or
# None where it has answered itself.

ROUTES: dict[str, tuple[str, str, str]] = {     # path without /v1 -> methods, work, dialect
    "/": ("GET", "about", ""), "/health": ("GET", "health", ""), "/healthz": ("GET", "health", ""),
    "/readyz": ("GET", "ready", ""), "/status": ("GET", "status", ""),
    "/api/hello": ("GET", "health", ""),
    "/models": ("GET", "models", ""), "/models/": ("GET", "models", ""),
    "/chat/completions": ("POST", "answer", "chat"),
    "/messages": ("POST", "answer", "messages"),
    "/messages/count_tokens": ("POST", "count", "messages"),
    "/responses": ("POST", "answer", "responses"),
    "/responses/input_tokens": ("POST", "count", "responses"),
    "/responses/": ("GET, DELETE", "stored", "responses"),
    "/requests/": ("DELETE", "cancel", ""),
    "/permissions": ("GET", "permission", ""), "/permissions/": ("GET, POST", "permission", ""),
    "/permissions/stream": ("GET", "permission_news", ""),
    "/mcp/permission/check": ("POST", "permission_check", ""),
    "/sessions": ("GET", "session", ""), "/sessions/": ("GET, DELETE", "session", ""),
}
# Work that needs no key, and work that always needs one, as agents do.
PUBLIC = ("about", "health", "ready")
KEYED = ("permission", "permission_news", "permission_check", "session")
PREFIXES = {"chat": "chat", "sdk": "agent", "api": "api"}   # of a path:  /sdk/v1/messages
AGENT_HEADERS = ("X-CC-Workspace", "X-CC-Verbosity", "X-CC-Session", "X-CC-Session-Busy")
SESSION_NAME = r"\w[\w.:@-]{0,127}"
RELAY_METHODS = "GET, POST, PUT, PATCH, DELETE"
PING = sse_frame({"type": "ping"}, "ping")


def route_path(path: str) -> tuple[str, str, str]:
    """The backend that a path names, the path as ROUTES knows it, and the name in it.  All of the
    ways to write a base URL work.

    /v1/messages, /messages, /v1/v1/messages, /v1/messages/ -> "", "/messages", ""
    /chat/v1/messages -> "chat", "/messages", ""
    /v1/chat/completions/models (the endpoint taken for a base) -> "", "/models", ""
    /v1/models/a/b -> "", "/models/", "a/b"
    """
    found = re.fullmatch(r"(.*?/(?:models|responses|requests|permissions|sessions))/(.+)",
                         "/" + path.strip("/"), re.S)
    path, name = found.groups() if found else (path, "")
    parts, backend = [part for part in path.split("/") if part], ""
    own = parts[:2] == ["chat", "completions"] or parts in (["chat"], ["api", "hello"])
    if parts and parts[0] in PREFIXES and not own:      # the last one is Claude Code's probe
        backend = PREFIXES[parts.pop(0)]
    known = "/" + "/".join(part for part in parts if part != "v1")
    inner = f"{known}/{name}" if name else known
    for base in ("", "/chat/completions", "/messages", "/responses"):
        if inner.startswith(base) and inner[len(base):] in ROUTES:
            return backend, inner[len(base):], ""
    return backend, known + "/" * bool(name), name


def relay_target(target: str, prefix: str, known: str, name: str) -> str:
    """What is asked of the upstream, for a request's target and what route_path says of it: a known
    path in its plain form, others as they came.

    /api/v1/v1/messages/?beta=true -> /v1/messages?beta=true,  /api/v1/files/a%20b -> the same
    without /api.  ApiError if the path could mean another one.
    """
    raw, mark, query = target.partition("?")
    if known in ROUTES and ROUTES[known][1] in ("answer", "count", "models"):
        raw = "/v1" + known + raw.partition(known)[2].strip("/") * bool(name)
    elif prefix:
        raw = (raw[len(prefix) + 1:] or "/") if f"{raw}/".startswith(f"/{prefix}/") else ""
    return safe_path(raw) + mark + query


@dataclass(eq=False)
class Call:
    """One request on its way through the app: what came, what is known, how it is answered."""
    connection: Connection
    request: Request
    now: Callable[[], float]
    name: str = ""                          # request id
    route: tuple[str, str, str] = ("", "", "")      # as route_path says
    backend: str = ""
    asked: str = ""                         # the model as the body names it
    task: asyncio.Future | None = None      # its work, while that may be cancelled
    cancelled: bool = False
    headers: dict[str, str] = field(default_factory=dict)       # of the answer
    dialect: Dialect | None = None
    turn: Turn = Turn("")
    message: Message = field(default_factory=lambda: Message("", "", 0))
    receipt: Receipt = field(default_factory=Receipt)
    status: int = 0
    failure: str = ""
    started: float = field(init=False)
    first_at: float = 0.0                   # time of the first delta
    written_at: float = field(init=False)   # time of the last frame, at first of the request
    rendering: Rendering | None = None      # how an agent's tools show
    asks: bool = False                      # which workspace is still to be asked
    ended: bool = False                     # the stream has been told its end
    passed: bytes | None = None             # the end of what was relayed, if events are

    def __post_init__(self) -> None:
        self.started = self.written_at = self.now()

    def told(self) -> dict[str, str]:
        """The headers of the answer, with how the turn was served."""
        told = {"X-CC-Conversation": self.receipt.conversation,
                "X-CC-Session": self.turn.session, "X-CC-Workspace": self.turn.launch.workspace,
                "X-CC-Upstream-Request-Id": self.receipt.upstream, "X-CC-Ignored-Params":
                ", ".join(self.receipt.ignored)[:2000],
                "X-CC-Model": str(self.message.start.get("model", ""))}
        return {**self.headers, **{name: value for name, value in told.items() if value}}

    async def send(self, status: int, value: dict) -> None:
        self.status = status
        await self.connection.send(status, {**self.told(), "Content-Type": "application/json"},
                                   encode_json(value))

    async def give(self, events: list[dict]) -> None:
        """Fold events; send them if streamed, the whole message once it is done."""
        frames: list[bytes] = []
        for event in events:
            self.message.add(event)
            if not self.first_at and event["type"] == "content_block_delta":
                self.first_at = self.now()
            frames += self.frames(event) if self.turn.stream else []
        if frames:
            self.write(frames)
            await self.connection.drain()
        if self.message.done and self.turn.stream:
            self.end()
        elif self.message.done:
            self.ended = True
            await self.send(200, self.dialect.body(self.message))

    def end(self) -> None:
        """The stream is whole: nothing more is written into it."""
        self.connection.heartbeat, self.ended = None, True
        self.connection.end()

    def frames(self, event: dict) -> list[bytes]:
        frames = self.dialect.frames(self.message, event)
        self.message.sent += len(frames)
        return frames

    def write(self, frames: list[bytes]) -> None:
        """Send frames; the head goes with the first: by then it is known how the turn is served."""
        if not self.connection.head_sent:
            self.status = 200
            self.connection.start(200, {
                "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no", **self.told()}.items())
        self.connection.write(b"".join(frames))
        self.written_at = self.now()

    def ping(self) -> None:
        """A heartbeat that the dialect's clients read over."""
        self.message.add({"type": "ping"})
        self.write(self.frames({"type": "ping"}))

    def relay(self, data: bytes) -> None:
        """Pass on a piece of an upstream's answer."""
        self.written_at = self.now()
        self.first_at = self.first_at or self.written_at * bool(data)
        if self.passed is not None:
            self.passed = (self.passed + data[-2:])[-2:]
        self.connection.write(data)

    @property
    def between_events(self) -> bool:
        """Whether an event of ours would fit into those that are relayed."""
        return self.passed in (b"", b"\n\n")

    def probe(self) -> None:
        """The client of a relayed answer has ended its side: is it gone?"""
        if self.between_events:
            self.connection.write(PING)
        elif self.now() - self.written_at > 0.25:
            self.connection.abort()         # nothing can be said that it would read over

    async def fail(self, error: ApiError) -> None:
        """Tell of a failure: a status before the first event, the dialect's own error after it."""
        self.status, self.failure = error.status, error.message
        envelope = self.dialect.error(error) if self.dialect else {     # else for any reader
            "type": "error",
            "error": {**chat_error(error)["error"], **messages_error(error)["error"]}}
        if not self.connection.head_sent or self.connection.take_back():
            if error.retry_after:
                self.headers["Retry-After"] = str(error.retry_after)
            if error.status == 401:
                self.headers["WWW-Authenticate"] = "Bearer"
            await self.send(error.status, {**envelope, "request_id": self.name})
        elif self.turn.stream and not self.ended:
            self.write(self.frames({**envelope, "type": "error"}))
            self.connection.end()
        elif self.passed is not None:       # events are relayed; the last one may be half there
            self.connection.write(b"\n\n" * (not self.between_events)
                                  + sse_frame({**envelope, "type": "error"}, "error"))
            self.connection.end()
        elif not self.ended:
            self.connection.abort()

    def log_line(self) -> str:
        """POST /v1/messages sonnet 200 first 84 ms total 312 ms in 18 out 7 end_turn $0.0002 new
        req_..."""
        message, used = self.message, self.message.tokens()
        return " ".join(filter(None, (
            time.strftime("%H:%M:%S"), self.request.method, self.request.path[:200],
            (message.model or str(message.start.get("model", "")))[:80], str(self.status),
            f"first {1000 * (self.first_at - self.started):.0f} ms" if self.first_at else "",
            f"total {1000 * (self.now() - self.started):.0f} ms",
            f"in {used[0]} out {used[2]}" if any(used) else "", message.stop_reason or "",
            "" if self.receipt.cost is None else f"${self.receipt.cost:.4f}",
            self.receipt.conversation, self.name, self.failure and f"| {self.failure[:300]}")))


def base_of(settings: Settings, port: int) -> str:
    """The base URL by which this machine reaches a proxy."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"http{'s' if settings.tls_cert else ''}://{host}:{port}"


class App:
    """The proxy: a server in front, conversations behind."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.port, self._started = settings, 0, int(time.time())
        self.calls: set[Call] = set()               # that are being answered
        self.permissions = Permissions(settings.permission_timeout)
        self.conversations = Conversations(settings, self.permissions.permit)
        self.upstream = Upstream(settings, self.conversations.refusals)
        self.store = Store(state_dir(settings), settings.store_days, settings.store_size,
                           settings.max_body)
        self.sessions = Sessions(self.store, settings.session_ttl, session_place(settings),
                                 lambda: [claude.home for claude in self.conversations.fleet])
        self.key = key_digest(settings.api_key) if settings.api_key else ""
        self.server = Server(settings, self.handle, self.refuse)
        if not is_loopback(settings.host) and not settings.api_key:
            raise ConfigError(f"refusing to listen on {settings.host} without a key: anybody there "
                              "could use your CLI; set --api-key or CCPROXY_API_KEY")

    @property
    def url(self) -> str:
        return base_of(self.settings, self.port)

    async def serve(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Serve until `stop` is set, then drain; no child process is left."""
        self.port = await self.server.start()
        await self.conversations.start()
        try:
            if is_loopback(host_name(self.upstream.host)) and (
                    urllib.parse.urlsplit(self.upstream.base).port == self.port):
                raise ConfigError(f"the upstream {self.upstream.base} is this proxy itself; unset "
                                  "ANTHROPIC_BASE_URL, or set --upstream-url")
            self.upstream.start()
            self._make_key()
            ready()
            await stop.wait()
        finally:
            self.permissions.close()
            await self.server.stop()
            await self.upstream.stop()
            await self.conversations.stop()
            await self.store.close()

    def _make_key(self) -> None:
        """Agents need a key, also on loopback: if the operator sets none, one is made once."""
        try:
            if not self.key:
                self.key, made = agent_key(state_dir(self.settings))
                if made:
                    say(f"the key for agents (/sdk/v1), shown this once: {made}")
        except OSError as exc:
            say(f"no key for agents (/sdk/v1) can be kept, set --api-key to use them: {exc}")

    # -- a request

    async def handle(self, connection: Connection, request: Request) -> None:
        """Answer one request, whatever happens; one line of log."""
        call = Call(connection, request, asyncio.get_running_loop().time)
        wished, error = request.headers.get("x-request-id", ""), None
        call.name = wished if re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", wished) else (
            "req_" + secrets.token_hex(12))
        call.headers = {"request-id": call.name, "X-Request-Id": call.name}
        call.receipt.request = call.name
        self.calls.add(call)
        try:
            work = await self._admit(call)
            answer = await getattr(self, "_" + work)(call) if work else None
            if answer is not None:
                await call.send(200, answer)
        except ApiError as exc:
            error = exc
        except RecursionError:
            error = ApiError("invalid_request", "body: nested too deeply")
        except (asyncio.CancelledError, ConnectionError):
            call.status, call.failure = 499, "the client is gone"
            if not self.server.stopping or connection.writer.is_closing():
                raise
            error = ApiError("unavailable", "the proxy is being stopped")
        except Exception:
            traceback.print_exc()
            error = ApiError("internal_error", "a bug in ccproxy; its log says more")
        finally:
            self.calls.discard(call)
            await self._finish(call, error)

    async def refuse(self, connection: Connection, error: ApiError) -> None:
        """Answer what was no request."""
        nothing = Request("-", "", {})
        await self._finish(Call(connection, nothing, asyncio.get_running_loop().time), error)

    async def _finish(self, call: Call, error: ApiError | None) -> None:
        """Tell of the failure, if there was one; one line of log."""
        if error is not None:
            await call.fail(error)
        if not self.settings.quiet:
            say(call.log_line())

    async def _admit(self, call: Call) -> str:
        """The work that the caller may ask for; none if the request is answered already."""
        method, headers, connection = call.request.method, call.request.headers, call.connection
        host, origin = headers.get("host", ""), headers.get("origin")
        if host or call.request.minor:
            local = connection.writer.get_extra_info("sockname") or ("",)
            check_host(host, local[0], self.settings.allow_hosts)
        if origin is not None and check_origin(origin, host, self.settings.allow_origins):
            call.headers.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin",
                                 "Access-Control-Expose-Headers": "*"})
        prefix, known, _ = call.route = route_path(call.request.path)
        call.backend = prefix or self.settings.backend
        served, work, dialect = ROUTES.get(known, ("", "", ""))
        foreign = (not work or work in KEYED) and call.request.path.startswith("/v1/")
        if call.backend == "api" and (dialect == "messages" or foreign or (
                prefix and dialect not in ("chat", "responses"))):
            served, work = RELAY_METHODS, "relay"
        methods = f"{served}, OPTIONS" if served == "DELETE" else f"{served}, HEAD, OPTIONS"
        call.dialect = DIALECTS.get(dialect)
        if not work:
            raise ApiError("not_found", f"no such route: {call.request.path[:200]}")
        if method == "OPTIONS":
            wished, call.status = headers.get("access-control-request-headers", "*"), 204
            await connection.send(204, {
                **call.headers, "Allow": methods, **({"Access-Control-Allow-Methods": methods,
                "Access-Control-Allow-Headers": wished, "Access-Control-Max-Age": "600"}
                if origin else {})})
            return ""
        if headers.get("upgrade", "").lower() == "websocket":      # Codex falls back at once
            raise ApiError("upgrade_required", "no WebSocket here; use POST")
        if method not in methods.split(", "):
            call.headers["Allow"] = methods
            raise ApiError("method_not_allowed", f"{method} is not served here; use {methods}")
        if work not in PUBLIC:
            if origin is None and headers.get("sec-fetch-site") == "cross-site":    # image, link
                raise ApiError("forbidden", "another site's page may not call")
            self._identify(call, work in KEYED or call.backend == "agent" and work in (
                "answer", "count"))
        if method == "HEAD" and (served == "POST" or work == "permission_news"):    # a probe
            await call.send(200, {})
            return ""
        return work

    def _identify(self, call: Call, needed: bool) -> None:
        """Who calls.  ApiError if no key was sent, and one is needed."""
        call.receipt.caller = check_key(call.request.headers, self.key,
                                        needed or bool(self.settings.api_key))

    @staticmethod
    def _need_json(call: Call) -> None:
        kind = call.request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("unsupported_media_type", "Content-Type: expected application/json")

    async def _read_json(self, call: Call) -> dict:
        self._need_json(call)
        return parse_json(await call.connection.read_body(self.settings.max_body))

    async def _parse(self, call: Call, body: dict | None = None) -> Turn:
        body, earlier = await self._read_json(call) if body is None else body, []
        headers, asked, unused = call.request.headers, body.get("model"), []
        body.update({"model": headers["x-cc-model"]} if "x-cc-model" in headers else {})
        alias = alias_of(self.settings.models, str(body.get("model")))
        call.backend = call.route[0] or alias.get("backend") or self.settings.backend
        if call.backend == "agent":
            self._identify(call, True)
            session = headers.get("x-cc-session", "")
            body.update({"session_id": session} if session else {})
        else:
            unused = [name for name in AGENT_HEADERS if name.lower() in headers]
            unused += ["session_id"] * (body.pop("session_id", None) is not None)
        if call.dialect is DIALECTS["responses"]:
            earlier = await self.store.recall(body, call.receipt.caller)
        turn = call.dialect.parse(body, earlier)
        known = isinstance(asked, str) and 0 < len(asked) <= 256
        call.asked = asked if known else turn.model     # the reply repeats the body's
        effort = alias.get("effort") or self.settings.effort
        if "x-cc-effort" in headers:
            turn = with_effort(turn, headers["x-cc-effort"], "X-CC-Effort")
        elif effort and not {"effort", "thinking"} & set(turn.fields):
            turn = with_effort(turn, effort, "")
        system = alias.get("system", ""), turn.system
        if call.backend == "agent":
            turn = self._for_agent(call, turn, alias)
            system = self.settings.append_system_prompt, *system
        turn = replace(turn, ignored=(*turn.ignored, *unused),
                       system="\n\n".join(filter(None, system)))
        call.receipt.ignored = list(turn.ignored)
        return turn

    def _for_agent(self, call: Call, turn: Turn, alias: Mapping[str, str]) -> Turn:
        """A turn that Claude Code is to play, in the workspace that is meant."""
        headers, settings = call.request.headers, self.settings
        names, messages = list(settings.workspaces), turn.messages
        workspace = headers.get("x-cc-workspace") or alias.get("workspace", "")
        if workspace not in ("", *names):
            raise refusal("X-CC-Workspace", "expected one of " + ", ".join(names) if names else
                          "no workspaces are configured here")
        if "permission_mode" in alias and workspace != alias.get("workspace", workspace):
            raise refusal("X-CC-Workspace", f"the model {turn.model!r} works in "
                          f"{alias['workspace']!r} only, since its permission mode is for that")
        if turn.session and not re.fullmatch(SESSION_NAME, turn.session, re.ASCII):
            raise refusal("X-CC-Session" if "x-cc-session" in headers else "session_id",
                          "expected 1 to 128 letters, digits and, behind the first, . _ : @ -")
        busy = need(headers.get("x-cc-session-busy", "wait"), "X-CC-Session-Busy", str,
                    among=("wait", "reject"))
        verbosity = need(headers.get("x-cc-verbosity") or alias.get("verbosity")
                         or settings.verbosity, "X-CC-Verbosity", str, among=VERBOSITIES)
        call.rendering = Rendering("text" if turn.schema is not None else verbosity,
                                   call.dialect is not DIALECTS["chat"])
        if settings.ask_workspace and not workspace:
            workspace, messages = chosen_workspace(messages, names)
            call.asks = not workspace
        fields, ignored = dict(turn.fields), turn.ignored
        if fields.get("tool_choice", {}).get("type") in ("any", "none"):    # it would have no end,
            del fields["tool_choice"]                                       # or no tools at all
            ignored += (turn.said.get("tool_choice", "tool_choice"),)
        kept = [{**m, "content": [b for b in m["content"] if b["type"] not in THOUGHTS]}
                for m in messages]          # what they were thought about is not all there
        return replace(turn, messages=tuple(m for m in kept if m["content"]), fields=fields,
                       ignored=ignored, wants={**turn.wants, "busy": busy},
                       launch=self.conversations.launch(
                           workspace, alias.get("permission_mode", "")))

    async def _bind(self, call: Call) -> None:
        """Bring a turn of a session to the session's own place."""
        turn, (caller, name) = call.turn, (call.receipt.caller, call.turn.session)
        session = await self.sessions.find(caller, name, held=True)
        if not self.sessions.latest(caller, session):   # it went on elsewhere, or was deleted
            await self.conversations.end_session(caller, name)
        launch, messages = turn.launch, turn.messages
        if session is None and call.asks:
            workspace, messages = self.sessions.choose(caller, name, messages,
                                                       self.settings.workspaces)
            call.asks = not workspace
            launch = self.conversations.launch(workspace, launch.permission_mode)
        else:
            self.sessions.settled(caller, name)
        if session is None:
            call.turn = replace(turn, messages=messages, launch=replace(launch, kept=True))
            return
        workspace, own = session["workspace"], self.sessions.own(session["cwd"])
        if turn.launch.workspace not in ("", workspace) or workspace not in (
                "", *self.settings.workspaces):
            raise ApiError("conflict", f"session {name!r} belongs to another workspace, "
                           f"{workspace or 'none with a name'!r}", "X-CC-Workspace")
        launch = self.conversations.launch(workspace, turn.launch.permission_mode)
        if own:
            with contextlib.suppress(OSError):      # spawning says so
                os.makedirs(session["cwd"], mode=0o700, exist_ok=True)
        call.asks = False
        call.turn = replace(turn, launch=replace(
            launch, kept=True, resume=session["cli"], cwd=session["cwd"] if own else launch.cwd))

    async def _in_time(self, call: Call, work: Any) -> Any:
        """Do a call's work within its deadline, and unless it is cancelled."""
        call.task = asyncio.ensure_future(work)
        try:
            return await asyncio.wait_for(call.task, self.settings.request_timeout)
        except asyncio.CancelledError:
            if not call.cancelled:
                raise
            raise ApiError("cancelled", "the request was cancelled") from None
        except asyncio.TimeoutError:
            raise ApiError("timeout", "the request took longer than "
                           f"{self.settings.request_timeout:g} s (--request-timeout)") from None

    # -- routes

    async def _answer(self, call: Call, body: dict | None = None) -> None:
        """A model's answer, whole or streamed."""
        turn = call.turn = await self._parse(call, body)
        ticket = secrets.token_hex(TICKET // 2)
        call.message = Message(ticket, call.asked, int(time.time()), turn.wants)
        beating = asyncio.ensure_future(self._beat(call)) if turn.stream else None
        try:
            await self._in_time(call, self._play(call))
        finally:
            call.connection.heartbeat = None
            if beating:
                beating.cancel()

    async def _play(self, call: Call) -> None:
        name, wait_s = call.turn.session, self.settings.queue_timeout
        async with self.sessions.alone(call.receipt.caller, name, wait_s * (
                call.turn.wants.get("busy") == "wait")):
            if name:
                await self._bind(call)
            bursts = self._bursts(call)
            try:
                async for events in bursts:
                    await self._give(call, events)
            finally:
                await bursts.aclose()

    async def _give(self, call: Call, events: list[dict]) -> None:
        if call.cancelled:                  # until 3.11 wait_for may swallow a cancellation
            raise asyncio.CancelledError
        events = call.rendering.events(events) if call.rendering else events
        if events and events[-1]["type"] == "message_stop":
            await self._keep(call)
        if events:
            await call.give(events)

    def _bursts(self, call: Call) -> AsyncIterator[list[dict]]:
        """The events of a call's answer, from who has to give it."""
        turn = call.turn, call.message, call.receipt
        if call.backend == "api":
            return self.upstream.events(*turn, call.request.headers)
        return which_workspace(self.settings.workspaces, call.asked) if call.asks else (
            self.conversations.events(*turn))

    async def _keep(self, call: Call) -> None:
        """Store a response, and where its session is, before its end is told: either may be
        continued at once."""
        turn, receipt, items = call.turn, call.receipt, call.turn.wants.get("items")
        try:
            if receipt.session:
                await self.sessions.keep(receipt.caller, turn.session, turn.launch.workspace,
                                         receipt.home or turn.launch.cwd, receipt.session)
            if items is not None:
                response = call.dialect.body(call.message)
                await self.store.run(self.store.keep, response, items, receipt.caller)
        except ApiError as error:           # the answer is good without it
            say(f"{call.name}: {error.message}")

    async def _beat(self, call: Call) -> None:
        """A heartbeat whenever a stream has been silent for long, also before its first event."""
        call.connection.heartbeat = call.ping
        while call.connection.heartbeat:
            left = call.written_at + self.settings.heartbeat - call.now()
            await asyncio.sleep(max(0.001, left))
            if left <= 0 and call.connection.heartbeat:
                call.ping()

    async def _count(self, call: Call, body: dict | None = None) -> dict:
        turn = await self._parse(call, body)
        kind = {"object": "response.input_tokens"} if call.dialect is DIALECTS["responses"] else {}
        tokens = await self._in_time(
            call, self.upstream.count(turn, call.request.headers) if call.backend == "api" else
            self.conversations.count(turn))
        return {**kind, "input_tokens": tokens}

    async def _relay(self, call: Call) -> dict | None:
        """A request passed on upstream, and its answer passed back as it comes."""
        request, target = call.request, relay_target(call.request.target, *call.route)
        posted = call.dialect and request.method == "POST"
        if posted:
            self._need_json(call)
        body = await call.connection.read_body(self.settings.max_body)
        if posted and not call.route[0] and any(
                "backend" in alias for alias in self.settings.models.values()):
            asked = parse_json(body)
            alias = alias_of(self.settings.models, str(asked.get("model")))
            if alias.get("backend", "api") != "api":    # a name of another backend's
                return await getattr(self, "_" + ROUTES[call.route[1]][1])(call, asked)
        unused = [name for name in ("X-CC-Model", "X-CC-Effort", *AGENT_HEADERS)
                  if name.lower() in request.headers]
        call.headers.update({"X-CC-Ignored-Params": ", ".join(unused)} if unused else {})
        exchange = self.upstream.exchange(      # which alone holds the body, until it is sent
            request.method, target, self.upstream.headers(request.headers), body,
            self.settings.request_timeout)
        del body
        try:
            await self._in_time(call, self._pass_on(call, exchange))
        finally:
            exchange.close()
            call.connection.heartbeat = None
        return None

    async def _pass_on(self, call: Call, exchange: Exchange) -> None:
        await exchange.open()
        connection = call.connection
        call.status, first = exchange.status, b""
        coding = exchange.header("content-encoding")
        if exchange.status >= 400 and call.dialect and coding in ("", *PACKED):
            first = await exchange.read_all(ERROR_LIMIT)
            plain = unpacked(first, coding)
            try:
                json.loads(plain)
            except (ValueError, RecursionError):        # a gateway's page is no answer
                raise upstream_refusal(exchange.status, exchange.headers, plain) from None
        if exchange.header("content-type").startswith("text/event-stream") and (
                exchange.length is None and coding in ("", "identity")):
            call.passed = b""
        tap = Tap(coding)
        connection.start(exchange.status, end_to_end(call.headers, exchange.headers),
                         exchange.length)
        bare = call.request.method == "HEAD" or exchange.status in (204, 304)
        connection.heartbeat = call.probe
        if first or bare or not exchange.ready:
            call.relay(first)
        try:
            while not bare:
                data = await exchange.read()
                if not data:
                    break
                call.relay(data)
                tap.feed(data)
                await connection.drain()
        finally:
            call.message = tap.message()
        connection.heartbeat, call.ended = None, True
        if not bare:
            connection.end()

    async def _cancel(self, call: Call) -> dict:
        """End running requests of this caller by their id; their work ends as if he had gone."""
        name = call.route[2]
        hits = [each for each in self.calls if each.name == name and each.task and not (
            each.ended or each.task.done() or each.receipt.caller != call.receipt.caller)]
        if not hits:
            raise ApiError("not_found", f"no request {name[:128]!r} of yours is running")
        for each in hits:
            each.cancelled = True
            each.task.cancel()
        return {"id": name, "object": "request", "cancelled": True}

    async def _permission(self, call: Call) -> dict:
        """GET of a question or of all that are pending, or POST of an answer to one."""
        name, _, part = call.route[2].partition("/")
        if not call.route[2]:
            return {"object": "list", "data": self.permissions.pending()}
        if (part, call.request.method) == ("respond", "POST"):
            return self.permissions.answer(name, await self._read_json(call))
        question = self.permissions.asked.get(name)
        if question is None or part or call.request.method == "POST":
            raise ApiError("not_found", f"no question {call.route[2][:100]!r} about a permission")
        return question

    async def _permission_news(self, call: Call) -> None:
        """Questions as events, as they come and are answered; first those that are pending."""
        connection, beat_s = call.connection, min(15.0, self.settings.heartbeat)
        with self.permissions.listening() as news:
            connection.heartbeat, frame = lambda: connection.write(b":\n\n"), b": listening\n\n"
            while frame and not connection.writer.is_closing():
                call.write([frame])
                await connection.drain()
                try:                        # until 3.11 wait_for may swallow a cancellation
                    told = await asyncio.wait_for(news.get(), beat_s)
                    frame = sse_frame(told[1], told[0]) if told else b""
                except asyncio.TimeoutError:
                    frame = b":\n\n"
        call.end()

    async def _permission_check(self, call: Call) -> dict | None:
        """The same question as a tool of an MCP server over HTTP, for a CLI that runs elsewhere."""
        answer = await self._in_time(call, self.permissions.check(await self._read_json(call)))
        if answer is None:
            call.status = 202
            await call.connection.send(202, call.told())
        return answer

    async def _session(self, call: Call) -> dict:
        """GET of a session or of all; or DELETE: its process ends, and what is written down of it
        goes."""
        caller, name = call.receipt.caller, call.route[2]
        if not name:
            listed = await self.sessions.list(caller)
            return {"object": "list", "data": list(map(session_object, listed))}
        found = await self.sessions.find(caller, name)
        if found is None:
            raise ApiError("not_found", f"no session {name[:128]!r} of yours", "session_id")
        if call.request.method != "DELETE":
            return session_object(found)
        async with self.sessions.alone(caller, name, 0):
            await self.conversations.end_session(caller, name)
            await self.sessions.delete(caller, name)
        return {"id": name, "object": "session", "deleted": True}

    async def _stored(self, call: Call) -> dict:
        """GET or DELETE of a stored response; GET of its input, a page of it, newest first."""
        name, _, part = call.route[2].partition("/")
        who, query = (name, call.receipt.caller), call.request.query
        missing = ApiError("not_found", f"no response {name[:100]!r} is stored", "response_id")
        if call.request.method == "DELETE" and not part:
            if not await self.store.run(self.store.delete, *who):
                raise missing
            return {"id": name, "object": "response", "deleted": True}
        response = await self.store.run(self.store.read, *who)
        if not response or part not in ("", "input_items") or call.request.method == "DELETE":
            raise missing
        if query.get("stream", "false").lower() == "true":
            raise refusal("stream", "a stored response is read whole")
        if not part:
            return response
        items = await self.store.run(self.store.context, *who)
        return page_of(items[:len(items) - len(response["output"])], query)

    async def _models(self, call: Call) -> dict:
        """What the backend reports, by name and full id, and what --models names: for both SDKs."""
        named: dict[str, str] = {}
        made: dict[str, Any] = {}
        models = await (self.upstream.known_models(self.upstream.own(
            call.request.headers)) if call.backend == "api" else self.conversations.known_models())
        for model in models:
            for name in filter(None, map(model.get, ("value", "resolvedModel", "id"))):
                named.setdefault(name, model.get("displayName") or model.get("display_name")
                                 or name)
                made[name] = model.get("created_at")
        for name, alias in self.settings.models.items():
            if not set("*?[") & set(name):
                target = alias.get("model") or name
                named[name] = named.get(target, target)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started))
        entries = {name: {"id": name, "object": "model", "type": "model", "display_name": shown,
                          "owned_by": "anthropic", "created": self._started,
                          "created_at": made.get(name) or since}
                   for name, shown in named.items()}
        wanted = call.route[2]
        if wanted and wanted not in entries:
            raise ApiError("not_found", f"no model is named {wanted[:100]!r}; GET /v1/models lists "
                           "them", param="model")
        return entries[wanted] if wanted else {
            "object": "list", "data": list(entries.values()), "has_more": False,
            "first_id": next(iter(named), None), "last_id": next(reversed(named), None)}

    async def _about(self, _: Call) -> dict:
        return {"name": "ccproxy", "openai_base_url": f"{self.url}/v1",
                "anthropic_base_url": self.url}

    async def _health(self, _: Call) -> dict:
        return {"status": "ok"}

    async def _ready(self, _: Call) -> dict:
        """Whether a request could be served now: CLI found, new enough, a process up."""
        if self.settings.backend == "api":
            return {"status": "ready", "upstream": self.upstream.base}
        await self.conversations.command()
        if not self.conversations.fleet and self.settings.warm:
            raise ApiError("unavailable", self.conversations.trouble, retry_after=1)
        return {"status": "ready", "claude": self.conversations.version}

    async def _status(self, _: Call) -> dict:
        talk = self.conversations
        parked = sum(bool(claude.awaited) for claude in talk.idle.values())
        return {
            "version": __version__, "claude": talk.version, "trouble": talk.trouble or None,
            "backend": self.settings.backend, "upstream": {
                "url": self.upstream.base, "streams": len(self.upstream.exchanges)},
            "uptime_s": int(time.time()) - self._started, "processes": {
                "all": len(talk.fleet), "spare": len(talk.spares), "parked": parked,
                "idle": len(talk.idle) - parked}, "connections": len(self.server.connections),
            "permissions": {"pending": len(self.permissions.pending()),
                            "listeners": len(self.permissions.listeners)}}


# == 15. Commands ==================================================================================
# The command line: serve, doctor, version, the stand-in; and the two ways in for importers.

def serve(settings: Settings | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM.  OSError if the port is taken, ConfigError if one is off."""
    settings = settings or Settings()
    app = App(settings)

    def announce() -> None:
        key = "your key" if settings.api_key else "the key made at the first start" if (
            settings.backend == "agent") else "any key"
        print(f"ccproxy {__version__}  OPENAI_BASE_URL={app.url}/v1  ANTHROPIC_BASE_URL={app.url}  "
              f"({key})", flush=True)
        if not is_loopback(settings.host) and not settings.tls_cert:
            say("warning: no TLS: keys and conversations can be read on the way; see --tls-cert")

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def on_signal(*_: Any) -> None:
            if stop.is_set():               # asked twice: the operator does not want to wait
                settings.drain_timeout = 0
            loop.call_soon_threadsafe(stop.set)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        await app.serve(stop, announce)
    asyncio.run(main())


@contextlib.contextmanager
def running(**values: Any) -> Iterator[str]:
    """Serve in a thread, on a free port unless told otherwise; gives the base URL.

        with ccproxy.running(claude="echo") as url: ...
    """
    app, up = App(Settings(**{"port": 0, "quiet": True, **values})), threading.Event()
    state: dict[str, Any] = {}

    async def main() -> None:
        state["loop"], state["stop"] = asyncio.get_running_loop(), asyncio.Event()
        try:
            await app.serve(state["stop"], up.set)
        except BaseException as exc:        # raised again below, in the caller's thread
            state["error"] = exc
        finally:
            up.set()
    thread = threading.Thread(target=lambda: asyncio.run(main()), name="ccproxy", daemon=True)
    thread.start()
    up.wait()
    if "error" in state:
        raise state["error"]
    try:
        yield app.url
    finally:
        state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join()


async def ask_once(settings: Settings, events: Callable) -> bool:
    """Ask a backend's model a question, and print what it says."""
    hello = {"role": "user", "content": [{"type": "text", "text": "Answer: yes"}]}
    message, started = Message("", settings.model, 0), time.perf_counter()
    async for burst in events(Turn(settings.model, (hello,)), message, Receipt()):
        for event in burst:
            message.add(event)
    took = time.perf_counter() - started
    print(f"ok    a turn in {took:.2f} s: {message.said('text')!r}")
    return True


async def examine(settings: Settings, deep: bool) -> bool:
    """Print what a request depends on; False if one would fail, with the next command to run."""
    talk, started = Conversations(settings), time.perf_counter()
    upstream = Upstream(settings, talk.refusals)
    await talk.start()
    try:
        print(f"ok    Python {sys.version.split()[0]}")
        if settings.backend == "api":
            ids = await upstream.model_ids(upstream.own({})) or ["not listed"]
            print(f"ok    upstream {upstream.base}, models: {', '.join(ids)}")
            return not deep or await ask_once(settings, functools.partial(upstream.events, sent={}))
        print("ok    claude at", *await talk.command(), f"is version {talk.version}")
        models = [[m.get("value"), m.get("resolvedModel")] for m in await talk.known_models()]
        print(f"ok    handshake after {time.perf_counter() - started:.2f} s")
        print("ok    models: " + ", ".join(" = ".join(filter(None, names)) for names in models))
        login = {talk.account.get(name) for name in ("email", "tokenSource", "apiKeySource",
                                                     "apiProvider")} - {None, "none", "firstParty"}
        if not login:
            raise ApiError("invalid_api_key", "nobody is logged in")
        print(f"ok    login: {', '.join(sorted(login))}")
        return not deep or await ask_once(settings, talk.events)
    except ApiError as error:
        remedy = re.search(r": (npm .*)", error.message)
        print(f"FAIL  {error.message}\n      next: " + (
            remedy.group(1) if remedy else "ccproxy.py auth status"
            if settings.backend == "api" else "claude auth login, or set ANTHROPIC_API_KEY"
            if error.status == 401 else "claude -p hello"))
        return False
    finally:
        await upstream.stop()
        await talk.stop()


LOGIN_WORDS = ("authMethod", "apiKeySource", "subscriptionType", "email", "orgName",
               "loginExpiresAt")            # what `claude auth status` says of a login


async def show_credentials(settings: Settings) -> bool:
    """Print which credential each backend would use, never its value; False if the one that serves
    /v1 has none."""
    found = {}
    try:
        command, version = await find_claude(settings.claude)
        told = {"loggedIn": True, "authMethod": "none needed"}
        if version != "stand-in":
            told = json.loads(await hear([*command, "auth", "status"], 30))
        words = [f"{word} {told[word]}" for word in LOGIN_WORDS if told.get(word)]
        found["chat"] = told.get("loggedIn"), f"claude {version}: " + (
            ", ".join(words) if told.get("loggedIn") else "nobody is logged in; run `claude auth "
            "login`, or set ANTHROPIC_API_KEY")
    except (ApiError, OSError, ValueError, asyncio.TimeoutError) as exc:
        found["chat"] = False, str(exc) or repr(exc)
    upstream = Upstream(settings, Refusals(""))
    try:
        own = upstream.credentials.configured()
        until = time.strftime(", until %Y-%m-%d %H:%M UTC", time.gmtime(own.expires)) if (
            own and own.expires) else ""
        found["api"] = own is not None, f"{upstream.base}: " + (
            f"{own.kind} from {own.source}{until}" if own else "none of its own, only what callers "
            "send; set ANTHROPIC_API_KEY" + " (a login of the CLI is there, see --oauth)" * bool(
                upstream.credentials.login() and not settings.oauth))
    except ApiError as error:
        found["api"] = False, f"{upstream.base}: {error.message}"
    for backend, (there, text) in found.items():
        print(f"{'ok' if there else 'none':6}{backend:6}{text}")
    return bool(found["api" if settings.backend == "api" else "chat"][0])


def hand_over(settings: Settings, words: list[str]) -> int:
    """Run one of the CLI's own commands in this terminal; its exit code."""
    command, version = asyncio.run(find_claude(settings.claude))
    if version == "stand-in":
        raise ApiError("unavailable", "the stand-in needs no login")
    environ = {name: value for name, value in os.environ.items() if not OUTER_ENV.match(name)}
    return subprocess.call([*command, *words], env=environ)


# -- approve: a terminal that answers what agents ask

SHOWN_LINES = 2000          # of a tool's input; of a longer one the middle is left out
DEAF_S = 0.7                # seconds in which what is typed was not meant for a new question
ANSWERS: dict[str, dict] = {
    **dict.fromkeys(("y", "yes"), {"behavior": "allow"}),
    **dict.fromkeys(("a", "always"), {"behavior": "allow", "scope": "conversation"}),
    **dict.fromkeys(("n", "no"), {"behavior": "deny"})}


def printable(text: str) -> str:
    """A text that can do a terminal no harm, on one line: control and formatting characters are
    escaped."""
    return "".join(c if c.isprintable() else {"\t": "    ", "\n": "\\n"}.get(
        c, f"\\x{ord(c):02x}") for c in text)


def changes(said: dict) -> list[str]:
    """An edit or a new file as lines of a diff."""
    import difflib
    old, new = said.pop("old_string", ""), said.pop("new_string", "") or said.pop("content", "")
    lines = difflib.unified_diff(str(old).splitlines(), str(new).splitlines(), lineterm="")
    return list(lines)[2:] or [             # behind the names of the files; or only line ends
        "-" + json.dumps(old, ensure_ascii=False), "+" + json.dumps(new, ensure_ascii=False)]


def shown_question(question: dict) -> str:
    """A question about a permission, for a terminal: all of it, what it is about indented."""
    left = dict(question["input"])
    where = question.get("workspace") or "its own directory"
    path, lines = left.pop("file_path", None), []
    edits = left.pop("edits") if isinstance(left.get("edits"), list) and all(
        isinstance(edit, dict) for edit in left["edits"]) else []
    lines += [str(path)] if path is not None else []
    for edit in (left, *map(dict, edits)):
        if {"new_string", "content"} & set(edit):
            lines += changes(edit)
        if edit is not left and edit:
            lines.append(json.dumps(edit, ensure_ascii=False))
    if isinstance(left.get("command"), str):
        lines += left.pop("command").splitlines()
    lines += json.dumps(left, indent=2, ensure_ascii=False).splitlines() if left else []
    half, left_out = SHOWN_LINES // 2, len(lines) - SHOWN_LINES
    if left_out > 0:
        lines[half:-half] = [f"... {left_out} MORE LINES ARE NOT SHOWN ..."]
    why = [f"{label}: {' '.join(str(question[name]).split())}" for label, name in (
        ("about", "description"), ("asked because", "decision_reason"), ("always means", "always"))
        if question.get(name)]
    return "\n".join(map(printable, [f"{question['tool_name']} in {where}", *(
        "    " + line for line in lines), *why]))


def told_error(exc: Any) -> str:
    """What an HTTP error of ours says."""
    import http.client
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return json.loads(exc.read())["error"]["message"]
    return str(exc)


class Approver:
    """Reads questions from a proxy and answers from a terminal.  Both are read by threads that put
    (kind, value) into one queue, so an answer that somebody else gave is seen at once."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key, self.queue = url.rstrip("/"), key, queue.Queue()
        self.open: dict[str, dict] = {}         # questions without an answer, in order

    def request(self, path: str, body: dict | None = None) -> Any:
        import urllib.request
        near = is_loopback(urllib.parse.urlsplit(self.url).hostname or "")     # past all proxies
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * near)
        request = urllib.request.Request(
            self.url + path, data=encode_json(body) if body is not None else None, headers={
                "Authorization": "Bearer " + self.key, "Content-Type": "application/json"})
        return opener.open(request, timeout=60)

    def listen(self) -> None:
        """Put every event into the queue; come back if the proxy was away."""
        import http.client
        import urllib.error
        while True:
            try:
                with self.request("/permissions/stream") as stream:
                    self.queue.put(("online", ""))
                    event = ""
                    for line in stream:
                        name, _, value = line.decode("utf-8").rstrip("\n").partition(": ")
                        event = value if name == "event" else event
                        if name == "data":
                            self.queue.put((event, json.loads(value)))
            except urllib.error.HTTPError as exc:
                final = exc.code in (401, 403, 404)
                self.queue.put(("refused" if final else "offline", told_error(exc)))
                if final:
                    return
            except (OSError, ValueError, EOFError, http.client.HTTPException) as exc:
                self.queue.put(("offline", str(exc)))
            time.sleep(2)

    def read(self) -> None:
        for line in sys.stdin:
            self.queue.put(("line", line.strip()))
        self.queue.put(("line", None))

    def run(self) -> int:
        """Until the input ends, or the proxy refuses; the exit code."""
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="backslashreplace")
        for work in (self.listen, self.read):
            threading.Thread(target=work, daemon=True).start()
        online, ended, deaf_until = None, False, 0.0    # None until it was tried
        while not ended or online is None:
            kind, value = self.queue.get()
            first = next(iter(self.open), "")
            if kind in ("online", "offline"):
                if kind == "online":
                    print(f"listening at {self.url}", flush=True)
                elif online is not False:   # else it was said
                    say(f"cannot reach {self.url}: {value}; trying again")
                online = kind == "online"
                self.open.clear()           # what is pending is told again
            elif kind == "refused":
                say(f"ccproxy: {value}")
                return 1
            elif value is None:
                ended = True
            elif kind == "line" and first and time.monotonic() < deaf_until:
                print("(that came too early) y, n or a? ", end="", flush=True)
            elif kind == "line" and first:
                self.answer(first, value)
            elif kind == "request":
                self.open[value["id"]] = value
            elif kind in ("resolved", "expired") and self.open.pop(value["id"], None):
                print(f"\n({printable(value['tool_name'])}: {value['status']})", flush=True)
            now = next(iter(self.open), "")
            if now and now != first:
                deaf_until = time.monotonic() + DEAF_S
                print(f"\n{shown_question(self.open[now])}\n[y]es, [n]o (or n and why), [a]lways "
                      "in this conversation? ", end="", flush=True)
        return 0 if online else 1

    def answer(self, name: str, line: str) -> None:
        """What the line says of a question; another line if it says nothing that is known."""
        word, _, why = line.partition(" ")
        body = ANSWERS.get(word.lower())
        if body is None or why.strip() and body["behavior"] == "allow":
            return print("y, n or a? ", end="", flush=True)
        question = self.open.pop(name)
        tool = printable(question["tool_name"])
        import http.client
        import urllib.error
        try:
            more = {"message": why.strip()} if why.strip() else {}
            self.request(f"/permissions/{name}/respond", {**body, **more}).close()
            print(f"({tool}: {ENDINGS[body['behavior']]})", flush=True)
        except urllib.error.HTTPError as exc:
            print(f"({told_error(exc)})", flush=True)
        except (OSError, http.client.HTTPException) as exc:     # it is asked again
            self.open = {name: question, **self.open}
            print(f"(not told: {exc}) y, n or a? ", end="", flush=True)


# -- the stand-in: a CLI of a few words, for a first try and for tests of clients without a token

def sample(schema: Any, root: dict, depth: int = 0) -> Any:
    """A small value for a JSON schema: what the stand-in answers when one is set."""
    if not isinstance(schema, dict) or depth > 12:      # true: anything
        return {}
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:                             # further in it has to end
        ends = [choice for choice in choices if depth > 4 and "$ref" not in str(choice)]
        return sample((ends or choices)[0], root, depth + 1)
    if "$ref" in schema:
        target: Any = root
        for name in schema["$ref"].split("/")[1:]:
            target = target[int(name) if isinstance(target, list) else name]
        return sample(target, root, depth + 1)
    kind, items = schema.get("type", "object"), schema.get("items", {"type": "string"})
    inner = {name: sample(part, root, depth + 1)
             for name, part in schema.get("properties", {}).items()
             if depth < 3 or name in schema.get("required", ())}
    values = {"string": "text", "boolean": True, "null": None, "object": inner,
              "array": [sample(items, root, depth + 1)] if kind == "array" and depth < 5 else []}
    kind = kind[0] if isinstance(kind, list) else kind
    some = schema.get("enum") or [values.get(kind, schema.get("minimum", 1))]
    return schema.get("const", some[0])


def tool_use(name: str, given: Any) -> dict:
    return {"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": name,
            "input": given}


class StandIn:
    """The stand-in answers with the user's last words, and obeys these:

    /call NAME {json}   call a tool of the client (several lines: several calls)
    /think              think first, with a signature
    /error STATUS       fail as the API would (429, 529, ...)
    /slow               answer a word every 0.1 s
    /long N             answer with N words
    /run COMMAND        as an agent: seem to run it, if that is permitted, and tell what came of it
    """

    def __init__(self, argv: list[str]) -> None:
        self.agent = any(word.startswith("--permission-mode") for word in argv)
        self.free = "--permission-mode=bypassPermissions" in argv
        self.session = next((word.partition("=")[2] for word in argv
                             if word.startswith("--resume=")), str(uuid.uuid4()))
        self.schema: dict | None = None
        self.history: list[dict] = []
        self.calls: list[dict] = []         # tool_use blocks whose results are due
        self.blocks = 0                     # of its message so far

    def obey(self) -> None:
        """Obey the lines of stdin, to its end."""
        for line in map(json.loads, iter(sys.stdin.readline, "")):
            if line["type"] == "control_request":
                self.schema = line["request"].get("jsonSchema", self.schema)
                models = [{"value": value, "resolvedModel": "echo-1"}
                          for value in ("default", "echo")]
                self.put("control_response", response={
                    "subtype": "success", "request_id": line["request_id"], "response": {
                        "models": models, "account": {"tokenSource": "stand-in"},
                        "totalTokens": len(json.dumps(self.history)) // 4}})
            elif line["type"] == "control_response":
                self.go_on(line["response"]["response"])
            elif line["message"]["content"]:
                self.history.append(line["message"])
            if line["type"] == "user":
                self.put("system", subtype="init", model="echo-1", session_id=self.session,
                         tools=[ANSWER] * (self.schema is not None))
                self.answer() if line.get("shouldQuery", True) else self.result()

    # -- lines

    @staticmethod
    def put(kind: str, **line: Any) -> None:
        print(json.dumps({"type": kind, **line}), flush=True)

    def event(self, kind: str, **fields: Any) -> None:
        self.put("stream_event", event={"type": kind, **fields})

    def ask(self, call: dict, **request: Any) -> None:
        self.put("control_request", request_id=call["id"], request=request)

    def result(self, **fields: Any) -> None:
        self.put("result", **{"is_error": False, "total_cost_usd": 0, **fields})

    def block(self, start: dict, pieces: list[str], pause_s: float = 0) -> None:
        """A content block, from how it starts to its end."""
        kind = "input_json_delta" if start["type"] == "tool_use" else f"{start['type']}_delta"
        deltas = [{"type": kind, DELTAS[kind][0]: piece} for piece in pieces]
        if start["type"] == "thinking":
            deltas.append({"type": "signature_delta", "signature": "c3RhbmQtaW4="})
        self.event("content_block_start", index=self.blocks, content_block=start)
        for delta in deltas:
            time.sleep(pause_s)
            self.event("content_block_delta", index=self.blocks, delta=delta)
        self.event("content_block_stop", index=self.blocks)
        self.blocks += 1

    def finish(self, content: list[dict], reason: str, made: int) -> None:
        self.history.append({"role": "assistant", "content": content})
        self.event("message_delta", delta={"stop_reason": reason, "stop_sequence": None},
                   usage={"output_tokens": made})
        self.event("message_stop")

    # -- what it does

    def answer(self) -> None:
        """Do what the last message says."""
        parts = [part for b in self.history[-1]["content"] for part in (
            b["content"] if b["type"] == "tool_result" else [b])]
        said = " ".join(p["text"] if p["type"] == "text" else f"[{p['type']}]"
                        for p in parts).replace("/ ", "/", 1)
        failure = re.search(r"/error (\d{3})", said)
        if failure:
            return self.result(
                is_error=True, api_error_status=int(failure.group(1)),
                result=f"API Error: {failure.group(1)} the stand-in was told to fail")
        self.blocks = 0
        self.event("message_start", message={
            "id": "msg_" + secrets.token_hex(12), "type": "message", "role": "assistant",
            "model": "echo-1", "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": len(json.dumps(self.history)) // 4, "output_tokens": 1}})
        task = re.search(r"(?s)/run (.+)", said)
        if task and self.agent:
            return self.propose(task.group(1))
        if "/think" in said:
            self.block({"type": "thinking", "thinking": "", "signature": ""},
                       ["They want ", "me to think."])
        if self.schema is not None:
            given: Any = {}
            with contextlib.suppress(AttributeError, TypeError, LookupError, ValueError):
                given = sample(self.schema, self.schema)        # else it is no schema at all
            return self.call([tool_use(ANSWER, given)])
        calls = [tool_use(PREFIX * self.agent + name, parse_input(text))
                 for name, text in re.findall(r"/call (\S+) (\{.*\})", said)]
        return self.call(calls) if calls else self.speak(said)

    def speak(self, said: str) -> None:
        long = re.search(r"/long (\d{1,6})", said)
        spoken = [f"word{n}" for n in range(int(long.group(1)))] if long else said.split(" ")
        self.block({"type": "text", "text": ""}, [
            " " * bool(n) + word for n, word in enumerate(spoken)], 0.1 * ("/slow" in said))
        self.finish([{"type": "text", "text": " ".join(spoken)}], "end_turn", len(spoken))
        self.result()

    def call(self, calls: list[dict]) -> None:
        """Call tools of the client; the one for answers that match a schema is the CLI's own."""
        self.calls = calls
        for call in calls:
            pieces = re.findall("(?s).{1,12}", json.dumps(call["input"]))
            self.block({**call, "input": {}}, pieces)
        self.finish(calls, "tool_use", 8 * len(calls))
        self.history.append({"role": "user", "content": []})
        if self.schema is None:
            return self.ask_next()
        self.put("user", message={"content": [{"tool_use_id": calls[0]["id"], "content": "ok"}]})
        self.result()

    def ask_next(self) -> None:
        call = self.calls[len(self.history[-1]["content"])]
        params = {"name": call["name"], "_meta": {"claudecode/toolUseId": call["id"]}}
        self.ask(call, subtype="mcp_message", message={"id": 1, "method": "tools/call",
                                                       "params": params})

    def propose(self, command: str) -> None:
        """Call its own tool, and ask whether that may run."""
        call = tool_use("Bash", {"command": command})
        self.calls = [call]
        self.block({"type": "text", "text": ""}, ["I will run it."])
        self.block({**call, "input": {}}, [json.dumps(call["input"])])
        self.finish([call], "tool_use", 8)
        if self.free:
            return self.run(call)
        self.ask(call, subtype="can_use_tool", tool_name="Bash", tool_use_id=call["id"],
                 input=call["input"], permission_suggestions=[])

    def go_on(self, told: dict) -> None:
        """Go on with the result of a client's tool, or as it is known whether its own may run."""
        if "mcp_response" not in told:
            return self.run({**self.calls[0], "input": told.get("updatedInput", {})},
                            told.get("message", ""))
        results = self.history[-1]["content"]
        results.append({**told["mcp_response"]["result"], "type": "tool_result",
                        "tool_use_id": self.calls[len(results)]["id"]})
        self.ask_next() if len(results) < len(self.calls) else self.answer()

    def run(self, call: dict, denied: str = "") -> None:
        told = denied or f"ran: {call['input']['command']}"
        self.put("user", parent_tool_use_id=None, message={"role": "user", "content": [{
            "type": "tool_result", "tool_use_id": call["id"], "content": told,
            "is_error": bool(denied)}]})
        self.history.append({"role": "user", "content": [{"type": "text", "text": told}]})
        self.answer()


def argument_parser() -> argparse.ArgumentParser:
    """Help that teaches: this module's docstring, the options, the stand-in's words.

    Each option may also stand in the environment (CCPROXY_PORT=9000), in .env, or in ccproxy.toml
    or ccproxy.json (port = 9000); flags win, then in this order.  To paste:

    python ccproxy.py --claude echo
    curl localhost:8082/v1/chat/completions -H content-type:application/json \\
         -d '{"model": "sonnet", "messages": [{"role": "user", "content": "hi"}]}'
    ANTHROPIC_BASE_URL=http://127.0.0.1:8082 ANTHROPIC_API_KEY=any python my_script.py
    """
    own = argument_parser.__doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        prog="ccproxy.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n\nEvery name")[0], epilog=inspect.cleandoc(own) + "\n\n"
        + inspect.getdoc(StandIn))
    parser.add_argument("verb", nargs="?", default="serve", choices=(
        "serve", "doctor", "auth", "approve", "version"), help="serve requests (default); check "
        "CLI, login and models; show credentials or log in; answer what agents may do; print "
        "version")
    parser.add_argument("what", nargs="?", choices=("status", "login", "setup-token"),
                        help="auth: which credential each backend uses (default), or the CLI's own "
                        "`claude auth login` or `claude setup-token`")
    parser.add_argument("--config", metavar="FILE", help="configuration file, TOML or JSON "
                        "(default: ccproxy.toml, ccproxy.json)")
    parser.add_argument("--deep", action="store_true", help="doctor: ask the model once, too")
    parser.add_argument("--url", help="approve: where the proxy is (default: from host and port)")
    parser.add_argument("--key", help="approve: its key (default: api_key, or CCPROXY_API_KEY)")
    for name, (default, check, text) in OPTIONS.items():
        shown = f"default {default}, " if default not in ("", [], {}) else ""
        kind = {"nargs": "?", "const": "true"} if check is flag else {"action": "append"} if (
            check in (rules, arguments)) else {}
        parser.add_argument("--" + name.replace("_", "-"), metavar=name.rpartition("_")[2].upper(),
                            help=f"{text} ({shown}CCPROXY_{name.upper()})", **kind)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["stand-in"]:            # followed by the CLI's own arguments
        StandIn(argv[1:]).obey()
        return 0
    parser, settings = argument_parser(), None
    flags = vars(parser.parse_args(argv))
    if flags["what"] and flags["verb"] != "auth":
        parser.error(f"{flags['what']} belongs to: auth {flags['what']}")
    if flags["verb"] == "version":
        print(__version__)
        return 0
    try:
        settings = load_settings(flags, os.environ)
        if flags["verb"] == "doctor":
            return 0 if asyncio.run(examine(settings, flags["deep"])) else 1
        if flags["verb"] == "auth" and flags["what"] in (None, "status"):
            return 0 if asyncio.run(show_credentials(settings)) else 1
        if flags["verb"] == "auth":
            return hand_over(settings, ["auth"] * (flags["what"] == "login") + [flags["what"]])
        if flags["verb"] == "approve":
            return Approver(flags["url"] or base_of(settings, settings.port),
                            flags["key"] or settings.api_key).run()
        serve(settings)
        return 0
    except (ConfigError, ApiError) as error:
        say(f"ccproxy: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        say(f"ccproxy: cannot listen on {settings.host}:{settings.port}: "
            f"{error.strerror or error}; choose another with --port")
        return 1


if __name__ == "__main__":
    sys.exit(main())
