"""Calls to a pool's Serve handle, each a request of its own to Serve.

A handle call inherits the internal id of the request in whose context it is made, and a custom
request router finds a waiting call by that id. The prompts of one HTTP request, or an attempt
and its repetition, would share it: one of them would wait forever. So every call is made in a
copy of the context that holds a fresh id. Serve then no longer cancels the call together with
the request: its caller must cancel it.
"""

from __future__ import annotations

import contextvars
import uuid
from typing import Any

# Private to Ray: nothing public sets the id. Missing, the gateway fails when it is imported.
from ray.serve.context import _set_request_context
from ray.serve.handle import DeploymentHandle


def call_alone(handle: DeploymentHandle, *messages: object) -> Any:
    """Call `handle.remote(*messages)` under an internal request id of its own."""
    context = contextvars.copy_context()
    context.run(_set_request_context, _internal_request_id=uuid.uuid4().hex)
    return context.run(handle.remote, *messages)
