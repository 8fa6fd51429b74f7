"""HTTPS with a certificate made here: clients that trust its issuer are answered, others hang up."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from myserve.errors import RequestError
from myserve.server.app import create_app
from myserve.server.edge.graceful import GracefulServer
from myserve.server.settings import Settings

Open = Callable[[Settings], AbstractContextManager[Any]]
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Identity:
    """A certificate that signs itself, and its key."""

    cert: Path
    key: Path


def identity(folder: Path, name: str, password: bytes | None = None) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    made = Identity(folder / f"{name}.crt", folder / f"{name}.key")
    made.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(private)
    return made


def echo(**changes: Any) -> Settings:
    return Settings(models={"tiny": "no/such/folder"}, force_echo=True, **changes)


def trusting(server: Identity, client: Identity | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(server.cert))
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    return context


def test_https_is_answered_and_http_is_not(open_server: Open, tmp_path: Path) -> None:
    own = identity(tmp_path, "server", password=b"secret")
    settings = echo(ssl_certfile=str(own.cert), ssl_keyfile=str(own.key), ssl_keyfile_password="secret")
    assert "secret" not in repr(settings)
    with open_server(settings) as server:
        url = server.url.replace("http://", "https://")
        answer = httpx.post(url + "/v1/chat/completions", json=ASKED, verify=trusting(own))
        assert answer.json()["choices"][0]["message"]["content"] == "hi"
        stream = httpx.post(url + "/v1/chat/completions", json=ASKED | {"stream": True}, verify=trusting(own))
        assert stream.content.endswith(b"data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url + "/health")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(server.url + "/health")


def test_a_client_without_a_wanted_certificate_is_not_let_in(open_server: Open, tmp_path: Path) -> None:
    own, friend, stranger = (identity(tmp_path, name) for name in ("server", "friend", "stranger"))
    settings = echo(ssl_certfile=str(own.cert), ssl_keyfile=str(own.key), ssl_ca_certs=str(friend.cert))
    with open_server(settings) as server:
        url = server.url.replace("http://", "https://") + "/health"
        assert httpx.get(url, verify=trusting(own, friend)).status_code == 200
        for refused in (None, stranger):
            with pytest.raises(httpx.TransportError):
                httpx.get(url, verify=trusting(own, refused))


def test_files_that_cannot_be_used_are_said_at_start(tmp_path: Path) -> None:
    own, other, locked = (identity(tmp_path, *of) for of in [("own",), ("other",), ("locked", b"secret")])
    for files in (
        {"ssl_certfile": str(tmp_path / "absent")},
        {"ssl_certfile": str(own.cert), "ssl_keyfile": str(other.key)},
        {"ssl_certfile": str(own.cert)},
        {
            "ssl_certfile": str(locked.cert),
            "ssl_keyfile": str(locked.key),
            "ssl_keyfile_password": "wrong",
        },
    ):
        with pytest.raises(RequestError, match="TLS cannot start with"):
            GracefulServer(create_app(echo(**files)))
    with pytest.raises(RequestError, match="needs a certificate"):
        echo(ssl_keyfile=str(own.key))
