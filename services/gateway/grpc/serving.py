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
    """Replaces a message whose bytes cannot be parsed."""

    error: str


def add_SpecPrefillServicer_to_server(servicer: Any, server: Any) -> None:  # gRPC's
    """Register `servicer`, as the generated function does; deployment files name this one."""
    add_generated(servicer, _TolerantServer(server))


class _TolerantServer:
    """A server whose handlers get `Unparsable` where their bytes cannot be parsed."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Do nothing: the registered handlers below replace these."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        tolerant = {
            name: handler._replace(
                request_deserializer=_tolerate_unparsable(handler.request_deserializer)
            )
            for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, tolerant)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, tolerant)


def _tolerate_unparsable(parse: Any) -> Callable[[bytes], Message | Unparsable]:
    def parse_or_report(payload: bytes) -> Message | Unparsable:
        try:
            message: Message = parse(payload)
        except (DecodeError, ValueError) as error:  # ValueError: a string that is not UTF-8
            return Unparsable(str(error))
        return message

    return parse_or_report
