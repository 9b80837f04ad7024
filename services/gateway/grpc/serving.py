"""The gRPC service, registered so that a message that cannot be parsed reaches it.

gRPC's own answer to such bytes is UNKNOWN, and a traceback in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from ...rpc.specprefill_pb2_grpc import add_SpecPrefillServicer_to_server as add_generated


@dataclass(frozen=True, slots=True)
class Unparsable:
    """Takes the place of a message whose bytes are none."""

    error: str


def add_SpecPrefillServicer_to_server(servicer: Any, server: Any) -> None:  # gRPC's
    """As the generated function of this name; a deployment file names this one."""
    add_generated(servicer, _Tolerant(server))


class _Tolerant:
    """A server whose handlers get `Unparsable` where their bytes cannot be parsed."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Replaced by the registered handlers below, under the same names."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        tolerant = {
            name: handler._replace(request_deserializer=_tolerant(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, tolerant)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, tolerant)


def _tolerant(parse: Any) -> Callable[[bytes], Message | Unparsable]:
    def parsed(payload: bytes) -> Message | Unparsable:
        try:
            message: Message = parse(payload)
        except (DecodeError, ValueError) as error:  # ValueError: a string that is not UTF-8
            return Unparsable(str(error))
        return message

    return parsed
