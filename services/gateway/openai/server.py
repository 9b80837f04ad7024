"""Assembles vLLM's own OpenAI server on the pipeline."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.config import ReasoningConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    resolve_default_chat_template_kwargs,
    validate_parsed_serve_args,
)
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import load_chat_template
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ...config import AppConfig, local_path
from ...control.from_config import kv_block_tokens, selection_policy
from ...core.plan import Planner
from ...core.ports import Answerer
from ...core.request_spans import NoTracer, Tracer
from ...core.types import KeepRange
from ..observe.scrape import MetricsText, metrics_route
from ..playground.page_routes import open_paths_of, playground_routes
from ..pools.health import PoolCounts, health_route, not_tested
from .access import AccessMiddleware, LimitMiddleware, RequestLimit
from .bodies import BodyReader
from .client import CountTokens, PipelineClient
from .correlation import CorrelationMiddleware
from .explaining import SelectionExplainer
from .input_items import check_input_items
from .keys import KeyRing
from .messages_log import log_messages_refused_in_one_line
from .middleware import CheckFields, RequestMiddleware
from .request_json import JsonLimits
from .routes import GENERATING, RESPONSES, serve_only_known
from .selections import add_selections_route
from .surface import TASKS
from .text_lengths import UNTRUNCATED, TextLengths


@dataclass(slots=True)
class _NoServer:
    """Stands for the server that vLLM's handlers stop when an engine dies; ours never does."""

    should_exit: bool = False


def build_client(
    config: AppConfig,
    pipeline: Answerer,
    planner: Planner,
    count_tokens: CountTokens | None = None,
    loaded: VllmConfig | None = None,
) -> PipelineClient:
    """Build the engine client: load the model's config and tokenizer, no weights.

    `loaded` is the result of `front_config`, where it was asked for already.
    """
    args = server_args(config)
    return PipelineClient(
        front_config(config) if loaded is None else loaded,
        pipeline,
        planner,
        chat=_chat_defaults(args),
        timeout_s=config.gateway.request_timeout_s,
        max_samples=config.gateway.max_samples,
        prompts_at_once=config.gateway.prompts_at_once,
        tail_tokens=config.selection.tail_tokens,
        protect_fences=config.selection.protect_fences,
        count_tokens=count_tokens,
        max_text_mode_len=config.selection.max_text_mode_len,
    )


def build_explainer(config: AppConfig, client: PipelineClient) -> SelectionExplainer:
    """Build the explainer of selections, with the speculators' own policy."""
    policy = selection_policy(config.selection, kv_block_tokens(config.prefill))
    selection = config.selection
    bounds = KeepRange(selection.floor, selection.ceiling)
    return SelectionExplainer(client, policy, bounds, protect_fences=selection.protect_fences)


def _checks(lengths: TextLengths) -> dict[str, tuple[CheckFields, ...]]:
    """Return what is checked of a request's fields before vLLM's handlers see them, by path."""

    async def check_truncated(fields: Mapping[str, Any]) -> None:
        lengths.check_truncated(fields)

    async def check_any(fields: Mapping[str, Any]) -> None:
        lengths.check_any(fields)

    checks: dict[str, tuple[CheckFields, ...]] = dict.fromkeys(GENERATING, (check_truncated,))
    checks |= dict.fromkeys(UNTRUNCATED, (check_any,))
    checks[RESPONSES] = check_truncated, check_input_items
    return checks


async def build_http_app(
    config: AppConfig,
    client: PipelineClient,
    count: PoolCounts,
    keys: KeyRing,
    limit: RequestLimit,
    metrics: MetricsText,
    facts_kept: Callable[[], float | None] = not_tested,
    tracer: Tracer | None = None,
    *,
    under_serve: bool = False,
) -> FastAPI:
    """Build vLLM's OpenAI app on `client`.

    `count` returns each pool's healthy replicas, `metrics` those of the whole service,
    `facts_kept` the result of the draft's self-test. `tracer` None: no spans.
    `under_serve`: see `CorrelationMiddleware`.
    """
    args = server_args(config)
    log_messages_refused_in_one_line()
    app: FastAPI = build_app(args, TASKS, client.model_config)
    await init_app_state(client, app.state, args, TASKS)
    app.state.server = _NoServer()
    add_selections_route(app, client, build_explainer(config, client), config.model.served_name)
    serve_only_known(app)
    # Before vLLM's own.
    app.router.routes[:0] = [
        health_route(count, limit, facts_kept),
        metrics_route(metrics),
        *playground_routes(client.model_config.max_model_len, needs_key=len(keys) > 0),
    ]
    gateway = config.gateway
    # Outermost first: unauthenticated requests get no further; only complete ones hold a slot.
    app.user_middleware[:0] = [
        Middleware(CorrelationMiddleware, tracer=tracer or NoTracer(), under_serve=under_serve),
        Middleware(AccessMiddleware, keys=keys, open_paths=open_paths_of(gateway.open_paths)),
    ]
    bodies = BodyReader(
        gateway.max_body_bytes, gateway.body_timeout_s, gateway.max_buffered_bytes, limit.on_shed
    )
    app.user_middleware.append(
        Middleware(
            RequestMiddleware,
            bodies=bodies,
            limits=JsonLimits(gateway.max_request_items),
            checks=_checks(TextLengths(client.most_characters)),
        )
    )
    app.user_middleware.append(
        Middleware(LimitMiddleware, limit=limit, free_paths=gateway.open_paths)
    )
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already
    return app


def name_missing_device() -> None:
    """Make vLLM accept a node without a device of its build: the gateway needs none.

    vLLM's CUDA build finds no device type there, and refuses even to parse its arguments. Its CPU
    platform would be no help: it checks settings that are the engines', quantisation among them.
    """
    if not current_platform.device_type:
        current_platform.device_type = "cpu"


def server_args(config: AppConfig) -> Namespace:
    """Return the arguments of `vllm serve`; `gateway.vllm_args` come last and win."""
    name_missing_device()
    model = config.model
    argv = ["--model", local_path(model.path), "--served-model-name", model.served_name]
    argv += ["--dtype", model.dtype, "--enable-request-id-headers"]
    argv += ["--enable-prompt-tokens-details", "--disable-log-stats"]
    argv.append("--language-model-only")  # images of vision-language models are refused
    if model.revision is not None:
        argv += ["--revision", model.revision]
    if model.max_model_len is not None:
        argv += ["--max-model-len", str(model.max_model_len)]
    if model.trust_remote_code:
        argv.append("--trust-remote-code")
    if model.adapters:
        argv.append("--lora-modules")
        argv += [f"{name}={local_path(path)}" for name, path in model.adapters.items()]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [*argv, *config.gateway.vllm_args]
    )
    validate_parsed_serve_args(args)
    _set_parsers(args)
    return args


def _set_parsers(args: Namespace) -> None:
    """Load the files with the deployment's own parsers, and name the reasoning parser.

    `vllm serve` does both while it starts its engine; its handlers read the name as set here.
    """
    if args.reasoning_parser:
        args.structured_outputs_config.reasoning_parser = args.reasoning_parser
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def _chat_defaults(args: Namespace) -> ChatParams:
    """Return vLLM's defaults for chat templates, for conversations that come over gRPC."""
    return ChatParams(
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs=resolve_default_chat_template_kwargs(args),
    )


def front_config(config: AppConfig) -> VllmConfig:
    """Build vLLM's configuration without an engine, as its render server does.

    The gateway may run where no accelerator is: quantisation and cache checks are the
    engines' own.
    """
    engine_args = AsyncEngineArgs.from_cli_args(server_args(config))
    model_config = engine_args.create_model_config()
    model_config.quantization = None
    return VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        reasoning_config=_reasoning_config(engine_args),
    )


def _reasoning_config(engine_args: AsyncEngineArgs) -> ReasoningConfig | None:
    """Return what vLLM's engines make of the reasoning parser; thinking budgets need it."""
    config: ReasoningConfig | None = engine_args.reasoning_config
    if engine_args.reasoning_parser:
        config = config or ReasoningConfig()
        config.reasoning_parser = engine_args.reasoning_parser
    return config
