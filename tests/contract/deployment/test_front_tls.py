"""The front under TLS and mutual TLS, over HTTP and gRPC."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import httpx
import pytest

from tests.certificates import Authority
from tests.contract.fronts import HOST, Gateway, fronted, running, serve_config

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def files(tmp_path):
    return Authority(tmp_path / "own").files(name="localhost")


def tls(files, *, mutual):
    authority = {"client_authority": files.authority} if mutual else {}
    return {"front": {"tls": {"certificate": files.certificate, "key": files.key, **authority}}}


async def ask(front, context):
    async with httpx.AsyncClient(verify=context) as client:
        return await client.post(f"https://localhost:{front.http_port}/answer")


async def test_http_over_tls(tmp_path, files):
    context = ssl.create_default_context(cafile=files.authority)
    async with fronted(tmp_path, Gateway(), tls(files, mutual=False)) as front:
        assert (await ask(front, context)).text == "ok"
        async with httpx.AsyncClient() as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.post(f"{front.url}/answer")


async def test_http_over_mutual_tls(tmp_path, files):
    stranger = Authority(tmp_path / "stranger").files(name="localhost")
    async with fronted(tmp_path, Gateway(), tls(files, mutual=True)) as front:
        known = ssl.create_default_context(cafile=files.authority)
        known.load_cert_chain(files.certificate, files.key)
        assert (await ask(front, known)).text == "ok"
        for shown in (None, stranger):
            unknown = ssl.create_default_context(cafile=files.authority)
            if shown is not None:
                unknown.load_cert_chain(shown.certificate, shown.key)
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                await ask(front, unknown)


def credentials(files):
    """Of a client that shows the certificate, and of one that shows none."""
    chain, key = Path(files.certificate).read_bytes(), Path(files.key).read_bytes()
    root = Path(files.authority).read_bytes()
    return grpc.ssl_channel_credentials(root, key, chain), grpc.ssl_channel_credentials(root)


@pytest.mark.parametrize("mutual", [False, True])
async def test_grpc_over_tls(tmp_path, files, mutual):
    async def echo(message, _context):
        return message

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),)
    )
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    known, anonymous = credentials(files)
    with running(serve_config(tmp_path, [1], [port]), tls(files, mutual=mutual)) as front:
        address = f"localhost:{front.grpc_port}"
        async with grpc.aio.secure_channel(address, known) as channel:
            assert await channel.unary_unary("/test.Echo/Echo")(b"hello", timeout=10) == b"hello"
        async with grpc.aio.secure_channel(address, anonymous) as channel:
            call = channel.unary_unary("/test.Echo/Echo")(b"hello", timeout=30)
            if mutual:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
            else:
                assert await call == b"hello"
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/test.Echo/Echo")(b"hello", timeout=3)
    await server.stop(0)


def spoil(files):
    Path(files.key).write_text("half of it")
    Path(files.authority).unlink()


async def test_a_restart_while_the_files_are_unusable_keeps_the_certificates(tmp_path, files):
    """Serve starts HAProxy again at every change of its gateways: it must not stop then."""
    config, known = tls(files, mutual=True), ssl.create_default_context(cafile=files.authority)
    known.load_cert_chain(files.certificate, files.key)
    with running(serve_config(tmp_path, [1]), config):
        spoil(files)
    async with fronted(tmp_path, Gateway(), config) as front:
        assert (await ask(front, known)).text == "ok"


def test_files_that_do_not_fit_stop_the_start_and_name_the_field(tmp_path, files):
    stranger = Authority(tmp_path / "stranger").files(name="localhost")
    config = {"front": {"tls": {"certificate": files.certificate, "key": stranger.key}}}
    with (
        pytest.raises(AssertionError, match=r"gateway\.front\.tls\.key"),
        running(serve_config(tmp_path, [1]), config),
    ):
        pass
