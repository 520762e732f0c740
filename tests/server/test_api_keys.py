"""Who may reach the server: API keys, origins of web pages, TLS."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.server.conftest import Serve
from tests.server.server_process import GUARD_S, started
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.access import Access
from tokenspeed.server.keys import ApiKeys

ORIGIN = "https://chat.example.org"


def new_key() -> str:
    return f"sk-{secrets.token_hex(8)}-é"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def header(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


def test_keys_of_flags_and_of_a_file(serve: Serve, tmp_path: Path) -> None:
    keys = [new_key() for _ in range(4)]
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{digest(keys[2])}\n\n  {digest(keys[3]).upper()}  # a guest\n")
    served = serve(access=Access(ApiKeys.load(keys[:2], str(file))))
    for key in keys:
        assert served.client.get("/v1/models", headers=header(key)).status_code == 200
        assert served.client.get("/v1/models", headers=header(key, "bearer")).status_code == 200
    for wrong in (new_key(), keys[0][:-1], keys[0] + "x", keys[0].upper(), digest(keys[0]), digest(keys[2])):
        assert served.client.get("/v1/models", headers=header(wrong)).status_code == 401, wrong
    for odd in (b"Bearer", b"Bearer" + keys[0].encode(), f"Basic {keys[0]}".encode(), keys[0].encode()):
        assert served.client.get("/v1/models", headers={b"authorization": odd}).status_code == 401


@pytest.mark.parametrize("end", ["à", "Å", "é", "\u2003x", "\U0001f511", "a b"])
def test_whatever_a_key_ends_with(serve: Serve, end: str) -> None:
    """Bytes of a character in UTF-8 may look like spaces of Latin-1."""
    served = serve(access=Access(ApiKeys.load([f"sk-1{end}"], None)))
    assert served.client.get("/v1/models", headers=header(f"sk-1{end}")).status_code == 200
    assert served.client.get("/v1/models", headers=header("sk-1")).status_code == 401


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1", "sk-1\t", "sk\r1", "sk\x7f1"])
def test_keys_that_no_request_could_bring(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key must have no space or line end around it") as caught:
        ApiKeys.load(["sk-0", key], None)
    assert "sk" not in str(caught.value)


def test_a_refusal_has_openais_shape(serve: Serve) -> None:
    key = f"sk-{secrets.token_hex(8)}"
    served = serve(access=Access(ApiKeys.load([key], None)))
    with pytest.raises(openai.AuthenticationError, match="needs an API key") as caught:
        served.openai.completions.create(model="fake", prompt="x")
    assert (caught.value.code, caught.value.type, caught.value.param) == (
        "invalid_api_key",
        "invalid_request_error",
        None,
    )
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="fake", prompt="ab").choices[0].text == "AB"
        with client.completions.create(model="fake", prompt="ab", stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == "AB"
    assert len(served.engine.requests) == 2


@pytest.mark.parametrize("metrics_need_key", [False, True])
def test_what_is_open(serve: Serve, metrics_need_key: bool) -> None:
    key = new_key()
    served = serve(access=Access(ApiKeys.load([key], None), metrics_need_key))
    expected = {"/health": 200, "/version": 200, "/metrics": 401 if metrics_need_key else 200}
    expected |= dict.fromkeys(["/v1/models", "/v1/nothing", "/", "/health/", "//health"], 401)
    assert {path: served.client.get(path).status_code for path in expected} == expected
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert served.client.post(path, json={"prompt": "x"}).status_code == 401
    assert served.client.get("/metrics", headers=header(key)).status_code == 200
    assert served.engine.requests == []


def test_an_api_key_opens_no_admin_route(serve: Serve) -> None:
    key = new_key()
    served = serve(access=Access(ApiKeys.load([key], None)))
    served.state.admin_key = "root"
    found = [served.client.get("/admin/state", headers=header(each)).status_code for each in ("root", key)]
    assert found == [200, 401]
    assert served.client.get("/v1/models", headers=header("root")).status_code == 401


def test_every_digest_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [new_key() for _ in range(5)]
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    checker = ApiKeys.load(keys, None)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key, right in [(keys[0], True), (keys[4], True), (new_key(), False)]:
        compared.clear()
        assert checker.accept(key.encode()) is right
        assert compared == [bytes.fromhex(digest(each)) for each in keys]
    assert not any(key in repr(vars(checker)) for key in keys)


@pytest.mark.parametrize(
    "text, complaint",
    [
        (f"{digest('a')}\nsecret\n", "line 2: not a SHA-256 digest"),
        (digest("a")[1:], "line 1: not a SHA-256 digest"),
        ("# nothing\n", "holds no digest"),
        (None, "No such file"),
    ],
)
def test_files_that_cannot_be_used(
    text: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    assert main(["serve", "--port", "0", "--api-key-file", str(file)]) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--api-key", ""), "--api-key must not be empty"),
        (("--cors-origin", "chat.example.org"), "--cors-origin must be * or like https://"),
        (("--cors-origin", f"{ORIGIN}/"), "--cors-origin must be"),
        (("--ssl-keyfile", "x"), "--ssl-keyfile needs --ssl-certfile"),
        (("--ssl-certfile", "/nowhere/x.pem"), "--ssl-certfile /nowhere/x.pem: No such file"),
        (("--ssl-certfile", __file__), f"--ssl-certfile {__file__}: "),
    ],
)
def test_flags_that_cannot_be_used(flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *flags]) == 1
    assert complaint in capsys.readouterr().err


def preflight(client: httpx2.Client, origin: str) -> httpx2.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return client.options("/v1/completions", headers={"origin": origin} | asked)


def test_pages_of_other_origins_are_kept_out_by_default(serve: Serve) -> None:
    served = serve()
    response = served.client.get("/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert preflight(served.client, ORIGIN).status_code == 405


@pytest.mark.parametrize("allowed", [ORIGIN, "*"])
def test_origins_that_are_let_in(serve: Serve, allowed: str) -> None:
    key = new_key()
    served = serve(access=Access(ApiKeys.load([key], None), cors_origins=["https://other.example.org", allowed]))
    asked = preflight(served.client, ORIGIN)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == allowed
    answer = served.client.get("/v1/models", headers={b"origin": ORIGIN.encode()} | header(key))
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, allowed)
    refused = served.client.get("/v1/models", headers={"origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, allowed)
    if allowed != "*":
        assert preflight(served.client, "https://evil.example.org").status_code == 400
        other = served.client.get("/health", headers={"origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other.headers


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one of 127.0.0.1, and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made.split(), *files], check=True, capture_output=True)
    return certificate, key


@pytest.mark.parametrize("one_file", [False, True])
def test_a_guarded_server(tmp_path: Path, one_file: bool) -> None:
    """Flags of access and limits reach the server."""
    certificate, key_file = make_certificate(tmp_path)
    flags = ["--ssl-certfile", str(certificate)]
    if one_file:
        certificate.write_text(certificate.read_text() + key_file.read_text())
    else:
        flags += ["--ssl-keyfile", str(key_file)]
    keys = [f"sk-{secrets.token_hex(8)}" for _ in range(3)]
    (tmp_path / "keys").write_text(digest(keys[2]))
    flags += [
        "--api-key",
        keys[0],
        "--api-key",
        keys[1],
        "--api-key-file",
        str(tmp_path / "keys"),
        "--metrics-need-key",
    ]
    flags += ["--cors-origin", "https://a.example.org", "--cors-origin", ORIGIN, "--max-n", "2"]
    with started("tests.server.serve_fake", ["ok", "0.001", *flags]) as server:
        assert server.url.startswith("https://")
        server.wait_until_ready()
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx2.Client(base_url=server.url, verify=trusted, timeout=GUARD_S) as client:
            for path in ("/metrics", "/v1/models"):
                assert client.get(path).status_code == 401
                assert [client.get(path, headers=header(key)).status_code for key in keys] == [200] * 3
            assert client.get("/health", headers={"origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
            body: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 3}
            for n, status in [(2, 200), (3, 400)]:
                response = client.post("/v1/completions", json=body | {"n": n}, headers=header(keys[2]))
                assert response.status_code == status, response.text
        assert server.terminate() == 0, server.log
        assert not any(key in line for key in keys for line in server.log)
