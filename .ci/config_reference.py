"""Writes docs/configuration.md from the configuration classes.

    python .ci/config_reference.py [--check]

A key's type, bounds and default come from the pydantic models, its description from the comments
beside the field, and a section's first line from the class's docstring. --check writes nothing and
exits 1 when the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from specprefill.config import AppConfig
from specprefill.deployment.file import DeploymentFile

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
ARGS = "args"  # the key of an application that AppConfig describes
SERVE_SCHEMA = "https://docs.ray.io/en/latest/serve/production-guide/config.html"
INTRODUCTION = """\
# Configuration

<!-- Written by `make docs-config`. Do not edit: change the classes and run it again. -->

A deployment is one YAML file in Ray Serve's own format. Its `applications[].args` configure this
service; the [second part](#the-file-around-args) lists the keys of the file around them. Every key
is checked: `specprefill check FILE` reports an unknown key, a value out of bounds, or two keys that
contradict each other, with its place in the file. An example for one machine is
`cluster/local.yaml`, for GPUs `cluster/gpu-8b-70b.yaml`. How to deploy a file:
[deployment.md](deployment.md).
"""
SERVE_PART = f"""\
## The file around `args`

These keys are Ray Serve's: see [its documentation]({SERVE_SCHEMA}).
Serve ignores keys that it does not know; `specprefill check`, `serve` and `deploy` refuse them.
"""
# Descriptions of fields that have no comment, most of them because the name is another project's.
MEANINGS = {
    "AppConfig.model": "The large model.",
    "AppConfig.speculator": "The small model.",
    "AppConfig.selection": "Which tokens are kept.",
    "AppConfig.prefill": "The engines of the prefill pool.",
    "AppConfig.decode": "The engines of the decode pool.",
    "AppConfig.kv": "The KV hand-off.",
    "AppConfig.gateway": "HTTP and gRPC.",
    "AppConfig.scaling": "Bounds of the autoscaler.",
    "AppConfig.quality": "Comparison with dense answers.",
    "MainModel.revision": "The hub's revision.",
    "MainModel.dtype": "As vLLM's argument.",
    "MainModel.max_model_len": "As vLLM's argument: the longest prompt and answer together.",
    "MainModel.trust_remote_code": "As vLLM's argument.",
    "SpeculatorConfig.path": "A folder or a hub name.",
    "SpeculatorConfig.revision": "The hub's revision.",
    "SpeculatorConfig.dtype": "Of weights and keys.",
    "SpeculatorConfig.device": "auto: a GPU where there is one.",
    "SpeculatorConfig.max_batch": "Prompts that are scored together, at most.",
    "SpeculatorConfig.timeout_token_s": "See `timeout_s`.",
    "SelectionConfig.ceiling": "Of the rates that the scores choose from.",
    "SelectionConfig.pool_tokens": "Width of the average that smooths the scores.",
    "EngineConfig.tensor_parallel_size": "As vLLM's argument.",
    "EngineConfig.pipeline_parallel_size": "As vLLM's argument.",
    "EngineConfig.executor": "How workers run: in the replica, as processes, or as Ray actors.",
    "EngineConfig.block_size": "As vLLM's argument.",
    "EngineConfig.kv_cache_memory_bytes": "As vLLM's argument.",
    "EngineConfig.max_num_seqs": "As vLLM's argument.",
    "EngineConfig.max_num_batched_tokens": "As vLLM's argument.",
    "EngineConfig.enforce_eager": "As vLLM's argument.",
    "EngineConfig.enable_prefix_caching": "As vLLM's argument.",
    "EngineConfig.cpu_threads": "Threads of each worker on a CPU.",
    "KvConfig.on_failure": "After a failed pull: recompute the kept prompt, or fail the request.",
    "GatewayConfig.request_timeout_s": "The default and the maximum of a request's time.",
    "GatewayConfig.front": "HAProxy.",
    "ApiKey.name": "Letters, digits, `.`, `_` and `-`; at most 64.",
    "SloConfig.ttft_s": "Seconds to the first token.",
    "SloConfig.percentile": "Share of the requests, in percent.",
    "ScalingConfig.speculator": "Bounds of the speculator pool.",
    "ScalingConfig.prefill": "Bounds of the prefill pool.",
    "ScalingConfig.decode": "Bounds of the decode pool.",
    "PoolScaling.max_replicas": "The pool never has more.",
    "PoolScaling.cold_start_s": "From the decision until a new replica answers.",
}
KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield `model` and every model below it, each with its dotted key."""
    yield path, model
    for name, field in model.model_fields.items():
        for child in models_in(field.annotation):
            many = "[]" if "tuple" in str(field.annotation) else ""
            yield from sections(child, f"{path}.{name}{many}" if path else f"{name}{many}")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in models_in(each)]


def comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the comments above and behind each field, as one text."""
    source = textwrap.dedent(inspect.getsource(model))
    lines = source.splitlines()
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            is_alone = lines[token.start[0] - 1].lstrip().startswith("#")
            (alone if is_alone else behind)[token.start[0]] = text
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, line = [], node.lineno - 1
            while line in alone:
                above.insert(0, alone[line])
                line -= 1
            inside = [
                behind[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in behind
            ]
            found[node.target.id] = sentence(" ".join(above)) + sentence(" ".join(inside))
    return found


def sentence(text: str) -> str:
    """Return `text` with a capital letter and a full stop, ready to be followed by another."""
    if not text:
        return ""
    text = re.sub(r"\bNone\b", "`null`", re.sub(r"\bFalse\b", "`false`", text))
    is_word = re.match(r"[a-z][a-z-]*[ ,;]", text) is not None
    text = text[0].upper() + text[1:] if is_word else text
    return text.rstrip(".;") + ". "


def kind(schema: dict[str, Any], section: str) -> str:
    """Return a field's JSON schema in words. `section` links to the models below it."""
    if "anyOf" in schema:
        return " or ".join(kind(each, section) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return section
    if schema.get("type") == "null":
        return "null"
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'], section)}" if schema.get("items") else "list"
    if schema.get("type") == "object":
        return "mapping"
    name = KINDS.get(schema.get("type", ""), "any")
    return f"{name}{bounds(schema)}"


def bounds(schema: dict[str, Any]) -> str:
    words = (
        ("exclusiveMinimum", ">"),
        ("minimum", "≥"),
        ("exclusiveMaximum", "<"),
        ("maximum", "≤"),
    )
    given = [f"{sign} {schema[key]:g}" for key, sign in words if key in schema]
    return f" {', '.join(given)}" if given else ""


def default(field: FieldInfo) -> str:
    """Return a field's default as it would stand in YAML."""
    if field.is_required():
        return "required"
    if models_in(field.annotation) and field.default is not None:
        return "" if field.default != () else "`[]`"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20:
        return f"`{value}` ({size(value)})"
    return f"`{json.dumps(value, default=list)}`"


def size(value: int) -> str:
    unit, name = next(u for u in ((1 << 30, "GiB"), (1 << 20, "MiB")) if value >= u[0])
    return f"{value / unit:g} {name}"


Section = tuple[list[str], type[BaseModel]]


def merged(found: Iterator[tuple[str, type[BaseModel]]]) -> list[Section]:
    """Put the dotted keys of equal models together: `prefill` and `decode`."""
    keys: dict[type[BaseModel], list[str]] = {}
    for path, model in found:
        keys.setdefault(model, []).append(path)
    return [(paths, model) for model, paths in keys.items()]


def heading(paths: list[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def anchor(paths: list[str]) -> str:
    """Return the heading's anchor as GitHub and mkdocs both make it."""
    return re.sub(r"[^\w\s-]", "", heading(paths)).lower().replace(" ", "-")


def links(all_sections: list[Section]) -> dict[type[BaseModel], str]:
    """Return a link to each section, by its model."""
    return {model: f"[section](#{anchor(paths)})" for paths, model in all_sections}


def own_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields that no section of a base class describes."""
    base = described_base(model)
    inherited = {} if base is None else base.model_fields
    return {name: field for name, field in model.model_fields.items() if name not in inherited}


def described_base(model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the base class with fields, which has a section of its own."""
    return next((each for each in model.__bases__ if getattr(each, "model_fields", None)), None)


def table(section: Section, link: dict[type[BaseModel], str], *, is_described: bool) -> str:
    """Format one section: heading, first line of the docstring, and a row per key."""
    paths, model = section
    properties, notes = model.model_json_schema()["properties"], comments(model)
    first = (inspect.getdoc(model) or "").split("\n\n")[0].replace("\n", " ")
    base = described_base(model)
    first += "" if base is None else f" Every key of this {link[base]}, and:"
    rows = ["| key | value | default |" + (" meaning |" if is_described else "")]
    rows.append("|---|---|---|" + ("---|" if is_described else ""))
    for name, field in own_fields(model).items():
        below = " or ".join(link.get(each, ARGS) for each in models_in(field.annotation))
        cells = [f"`{name}`", kind(properties[name], below), default(field)]
        meaning = notes.get(name) or MEANINGS.get(f"{model.__name__}.{name}", "")
        cells += [meaning.strip()] if is_described else []
        rows.append("| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |")
    return f"### {heading(paths)}\n\n{first}\n\n" + "\n".join(rows) + "\n"


def undescribed() -> tuple[set[str], set[str]]:
    """Return the keys of `args` without a comment, and those of them without a meaning."""
    bare = {
        f"{model.__name__}.{name}"
        for _, model in sections(AppConfig, "")
        for name in own_fields(model)
        if not comments(model).get(name)
    }
    return bare, bare - set(MEANINGS)


def page() -> str:
    """Return the whole page."""
    ours = merged((path or ARGS, model) for path, model in sections(AppConfig, ""))
    serves = merged(serve_sections())
    link = links(ours) | links(serves)
    parts = [INTRODUCTION, "## The service\n"]
    parts += [table(each, link, is_described=True) for each in ours]
    parts += [SERVE_PART]
    parts += [table(each, link, is_described=False) for each in serves]
    return "\n".join(parts)


def serve_sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the file's own models, without those of `args`."""
    for path, model in sections(DeploymentFile, ""):
        if ".args" not in path:
            yield path or "DEPLOYMENT.yaml", model


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it. Return 1 when --check finds it stale."""
    parser = argparse.ArgumentParser(description="Writes docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/configuration.md is stale: run `make docs-config`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
