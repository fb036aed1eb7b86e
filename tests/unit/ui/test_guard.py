"""Who is answered: hosts, tokens, origins; and the headers of every answer."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from selftrans.ui.guard import COOKIE, Guard, is_loopback

TOKEN = "a-token-of-tests"
JSON = {"Content-Type": "application/json"}


def asked(host="127.0.0.1", token=None, base="http://localhost:8377"):
    routes = [Route("/", lambda request: PlainTextResponse("page"), methods=["GET", "POST"])]
    return TestClient(Guard(Starlette(routes=routes), host=host, token=token), base_url=base, follow_redirects=False)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("name", ["localhost", "localhost:1", "127.0.0.1:8377", "[::1]:8377", "LOCALHOST"])
def test_names_of_this_machine_are_answered(name):
    assert asked().get("/", headers={"Host": name}).text == "page"


def test_another_loopback_address_is_answered_where_the_server_listens_on_it():
    assert asked(host="127.0.0.2").get("/", headers={"Host": "127.0.0.2:8377"}).text == "page"
    assert asked(host="127.0.0.2").get("/", headers={"Host": "evil.example"}).status_code == 421
    assert asked().get("/", headers={"Host": "127.0.0.2:8377"}).status_code == 421


@pytest.mark.parametrize(
    "name",
    [
        "[::1",
        "[",
        "evil.example",
        "localhost.evil.example",
        "evil.example:8377",
        "192.168.0.7",
        "",
        "localhost@evil.example",
        "a/b",
    ],
)
def test_other_names_are_refused_on_loopback(name):
    """A name of another site may be made to resolve to 127.0.0.1 (DNS rebinding)."""
    answer = asked().get("/", headers={"Host": name})
    assert answer.status_code == 421 and "not one of the page" in answer.text


def test_elsewhere_numeric_addresses_and_the_given_name_are_answered():
    page = asked(host="box.lan", token=TOKEN)
    sent = {"Authorization": f"Bearer {TOKEN}"}
    assert page.get("/", headers=sent | {"Host": "192.168.0.7:8377"}).text == "page"
    assert page.get("/", headers=sent | {"Host": "Box.lan"}).text == "page"
    assert page.get("/", headers=sent | {"Host": "evil.example"}).status_code == 421


def test_the_token_is_asked_for_and_kept_in_a_cookie():
    page = asked(token=TOKEN)
    assert page.get("/").status_code == 401
    for wrong in ("", "wrong", TOKEN[:-1], TOKEN + "x", "ä"):
        assert page.get("/", params={"token": wrong}).status_code == 401
        assert page.get("/", headers={"Authorization": f"Bearer {wrong}".encode()}).status_code == 401
    answer = page.get("/", params={"token": TOKEN, "other": "1"})
    assert answer.status_code == 303 and answer.headers["location"] == "/?other=1"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}-8377=") and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert page.get("/").text == "page", "by the cookie"
    answer = page.get("http://localhost:8377//evil.example/", params={"token": TOKEN})
    assert answer.headers["location"] == "/evil.example/", "not another server"


@pytest.mark.parametrize("other", ['theme={"a":1}', "a b=c", "[x]=1", "flag", '=";', 'open="'])
def test_cookies_of_other_programs_do_not_hide_the_token(other):
    own = f"{COOKIE}-8377={TOKEN}"
    for cookies in (f"{other}; {own}", f"{own}; {other}"):
        assert asked(token=TOKEN).get("/", headers={"Cookie": cookies}).status_code == 200
    assert asked(token=TOKEN).get("/", headers={"Cookie": f"{other}; {own}x"}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        (JSON | {"Origin": "http://localhost:8377", "Sec-Fetch-Site": "same-origin"}, 200),
        (JSON | {"Origin": "http://evil.example"}, 403),
        (JSON | {"Origin": "http://localhost:9999"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Origin": "http://["}, 403),
        (JSON | {"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 403),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 403),
    ],
)
def test_changes_must_come_from_the_page(headers, status):
    assert asked().post("/", headers=headers).status_code == status


def test_every_answer_binds_the_browser():
    page = asked(token=TOKEN)
    for answer in (
        page.get("/"),
        page.get("/", headers={"Host": "evil.example"}),
        page.get("/none", headers={"Authorization": f"bearer {TOKEN}"}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
