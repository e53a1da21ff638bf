"""HTTPS and gRPC over TLS, from the moment the port is open; half a pair of files, or a wrong one, ends the server in one line."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import tritonclient.grpc
import trustme
from cryptography.hazmat.primitives import serialization

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.web.tls import server_context

from .servers import Server, stub_server

Files = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Paths of a certificate for this machine, its key, and the authority that signed it."""
    directory, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(directory / "chain.pem", append=True)
    authority.cert_pem.write_to_path(directory / "authority.pem")
    return {name: str(directory / f"{name}.pem") for name in ("key", "chain", "authority")}


def settings(files: Files) -> dict[str, object]:
    return {"model_names": ["stub"], "ssl_certfile": files["chain"], "ssl_keyfile": files["key"], "grpc_port": 0}


@pytest.fixture(scope="module")
def secure(files: Files, model_directory: Path) -> Iterator[Server]:
    with stub_server(model_directory, settings(files), step_seconds=0.01) as running:
        yield running


def get(url: str, files: Files, path: str) -> int:
    address = urlsplit(url)
    context = ssl.create_default_context(cafile=files["authority"])
    connection = http.client.HTTPSConnection(address.hostname or "", address.port, context=context, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_https_answers_and_plain_http_does_not(secure: Server, files: Files) -> None:
    assert secure.url.startswith("https://")
    assert get(secure.url, files, "/health") == 200
    address = urlsplit(secure.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.request("GET", "/health")
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        connection.getresponse()
    connection.close()


def test_a_client_that_trusts_another_authority_does_not_connect(secure: Server) -> None:
    client = openai.OpenAI(base_url=f"{secure.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_answers_and_streams_over_tls(secure: Server, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", files["authority"])
    with openai.OpenAI(base_url=f"{secure.url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(model="stub", prompt="ab", max_tokens=4).choices[0].text == "abab"
        chunks = list(client.completions.create(model="stub", prompt="ab", max_tokens=100, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "ab" * 50
        with client.completions.create(model="stub", prompt="ab", max_tokens=250, stream=True) as stream:
            next(iter(stream))
    secure.wait_for("CANCELLED")


def test_grpc_over_tls(secure: Server, files: Files) -> None:
    port = secure.wait_for("GRPC").split()[1]
    with tritonclient.grpc.InferenceServerClient(
        f"127.0.0.1:{port}", ssl=True, root_certificates=files["authority"]
    ) as client:
        assert client.is_server_ready()


def test_the_port_answers_503_over_tls_before_the_http_process_does(files: Files, model_directory: Path) -> None:
    with stub_server(model_directory, settings(files), wait_for="BOUND", start_seconds=60) as server:
        assert get(server.url, files, "/health") == 503


def test_half_a_pair_is_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="--ssl-certfile is given without --ssl-keyfile"):
        FrontendSettings(ssl_certfile=files["chain"])
    with pytest.raises(ConfigError, match="--ssl-keyfile is given without --ssl-certfile"):
        FrontendSettings(ssl_keyfile=files["key"])


def test_files_that_do_not_belong_together_are_refused(files: Files, tmp_path: Path) -> None:
    other, locked, empty = tmp_path / "other.pem", tmp_path / "locked.pem", tmp_path / "empty.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    key = serialization.load_pem_private_key(Path(files["key"]).read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, secret)
    )
    empty.touch()
    for certificate, key, reason in (
        (files["chain"], str(other), "KEY_VALUES_MISMATCH"),
        (files["key"], files["key"], "a certificate or a key is missing"),
        (str(empty), files["key"], "a certificate or a key is missing"),
        (files["chain"], str(empty), "a certificate or a key is missing"),
        (files["chain"], str(locked), "the key has a password"),
        (files["chain"], str(tmp_path / "none.pem"), "--ssl-keyfile .*none.pem cannot be read"),
    ):
        with pytest.raises(ConfigError, match=reason):
            server_context(certificate, key)


def test_a_wrong_file_ends_the_server_in_one_line(files: Files, model_directory: Path) -> None:
    wrong = {"ssl_certfile": files["key"], "ssl_keyfile": files["key"]}
    with stub_server(model_directory, wrong, wait_for="") as server:
        status, output = server.wait()
    assert (status, len(output.splitlines())) == (2, 1)
