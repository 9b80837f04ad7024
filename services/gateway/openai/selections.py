"""`POST /v1/selections`: the part of a prompt that would be kept, and why, without an answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated, Any

import msgspec
from fastapi import Body, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.inputs import EngineInput
from vllm.sampling_params import SamplingParams

from ...core.errors import SpecPrefillError
from .client import PipelineClient, record_failure
from .context import CURRENT, RequestContext, function_names
from .correlation import REQUEST_ID_HEADER
from .explaining import SelectionExplainer
from .routes import SELECTIONS
from .selection_fields import SelectionFields, read_selection_fields
from .selection_json import REQUEST_SCHEMA, RESPONSE_SCHEMA, selection_json


def add_selections_route(
    app: FastAPI, client: PipelineClient, explainer: SelectionExplainer, model_name: str
) -> None:
    """Add the route to vLLM's app: its renderers read the prompt, as they do for an answer."""

    @with_cancellation  # type: ignore[untyped-decorator]
    async def create_selection(
        body: Annotated[dict[str, Any], Body()], raw_request: HttpRequest
    ) -> Response:
        context = CURRENT.get() or RequestContext()
        try:
            fields = read_selection_fields(body)
            context.controls, context.messages = fields.controls, fields.messages
            context.tool_names = function_names(fields.tools)
            context.controls_prefix = ""
            started_s = time.perf_counter()
            rendered = await _render(app, fields, model_name)
            if isinstance(rendered, ErrorResponse):
                return JSONResponse(rendered.model_dump(), status_code=rendered.error.code)
            tokenize_s = time.perf_counter() - started_s
            model = fields.model or model_name
            context.adapter = None if model == model_name else model
            request = await client.prepare(
                rendered, SamplingParams(max_tokens=1), _request_id(raw_request), context
            )
            explained = await explainer.select(request, rendered, context)
        except SpecPrefillError as error:
            raise record_failure(context, error) from error
        content = selection_json(explained, model, tokenize_s)
        encoded = await asyncio.to_thread(msgspec.json.encode, content)
        return Response(encoded, media_type="application/json")

    app.add_api_route(
        SELECTIONS,
        create_selection,
        methods=["POST"],
        dependencies=[Depends(validate_json_request)],
        summary="Select",
        description=(__doc__ or "").split(": ", 1)[-1].capitalize(),
        response_model=None,
        responses={
            200: {"content": {"application/json": {"schema": RESPONSE_SCHEMA}}},
            400: {"model": ErrorResponse},
            404: {"model": ErrorResponse},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": REQUEST_SCHEMA}},
            }
        },
    )


async def _render(
    app: FastAPI, fields: SelectionFields, model_name: str
) -> EngineInput | ErrorResponse:
    """Tokenise the prompt as the route that would answer it does."""
    common: dict[str, Any] = {"model": fields.model or model_name}
    if fields.cache_salt is not None:
        common["cache_salt"] = fields.cache_salt
    if fields.messages is None:
        completion = _parse(CompletionRequest, {**common, "prompt": fields.prompt, "max_tokens": 1})
        rendered = await app.state.openai_serving_completion.render_completion_request(completion)
        return rendered if isinstance(rendered, ErrorResponse) else rendered[0]
    body = {**common, "messages": fields.messages, "max_completion_tokens": 1}
    if fields.tools is not None:
        body["tools"] = fields.tools
    chat = _parse(ChatCompletionRequest, body)
    rendered = await app.state.openai_serving_chat.render_chat_request(chat)
    return rendered if isinstance(rendered, ErrorResponse) else rendered[1][0]


def _parse(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    """Parse a body as vLLM's own routes do, with their errors."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _request_id(raw_request: HttpRequest) -> str:
    given = raw_request.headers.get(REQUEST_ID_HEADER)
    return f"select-{given or uuid.uuid4().hex[:16]}"
