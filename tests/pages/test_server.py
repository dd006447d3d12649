"""The local server: who gets an answer, and what is refused."""

import http.client
import threading
from collections.abc import Iterator

import pytest

from higgstune.errors import ConfigError, DataError
from higgstune.pages.server import PageServer, Reply, Request, static_route


def fails(request: Request) -> Reply:
    raise DataError("this row is wrong")


@pytest.fixture
def server() -> Iterator[PageServer]:
    routes = {
        "GET /": static_route("higgstune.pages", "review.html"),
        "GET /echo": lambda request: Reply.of_json(dict(request.query)),
        "POST /echo": lambda request: Reply.of_json(request.body),
        "GET /fails": fails,
    }
    made = PageServer(routes)
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.stop()
    thread.join()


def request(
    server: PageServer, path: str, body: str | None = None, token: str | None = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Status, content and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    known = server.url.split("/")[3]
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    kind = {"Content-Type": "application/json"} if body is not None and "Content-Type" not in named else {}
    method = "GET" if body is None else "POST"
    connection.request(method, f"/{known if token is None else token}/{path}", body, kind | named)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def test_a_page_is_served_with_a_policy_that_lets_nothing_else_in(server: PageServer) -> None:
    status, content, headers = request(server, "")
    assert status == 200
    assert content.startswith("<!doctype html>")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize("token", ["", "x", "state", "..", "%2e%2e"])
def test_without_the_token_nothing_is_there(server: PageServer, token: str) -> None:
    status, content, _ = request(server, "", token=token)
    assert status == 404
    assert "link" in content


@pytest.mark.parametrize(
    "path", ["../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "static/", "//etc/passwd", "review.js"]
)
def test_no_path_leads_to_a_file(server: PageServer, path: str) -> None:
    assert request(server, path)[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "cors"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),  # a link in a browser's terminal
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
    ],
)
def test_other_hosts_and_origins_are_refused(server: PageServer, headers: dict[str, str], status: int) -> None:
    assert request(server, "echo", **headers)[0] == status
    if "Sec_Fetch_Mode" not in headers:
        assert request(server, "echo", "{}", **headers)[0] == status


def test_the_names_of_this_machine_are_its_own(server: PageServer) -> None:
    for name in ("127.0.0.1", "localhost"):
        own = f"{name}:{server.port}"
        assert request(server, "echo", "[1]", Host=own, Origin=f"http://{own}")[:2] == (200, "[1]")


def test_it_is_bound_to_this_machine(server: PageServer) -> None:
    assert server._server.server_address[0] == "127.0.0.1"


def test_requests_are_json_and_small(server: PageServer) -> None:
    assert request(server, "echo", '{"a": 1}')[:2] == (200, '{"a":1}')
    assert request(server, "echo", "{")[0] == 400
    assert request(server, "echo", "{}", Content_Type="text/plain")[0] == 415  # which a form could send
    assert request(server, "echo", "{}", Content_Length=str(1 << 21))[0] == 413
    assert request(server, "echo?a=1&b=")[1] == '{"a":"1","b":""}'


def test_wrong_input_is_said(server: PageServer) -> None:
    assert request(server, "fails")[:2] == (400, '{"error":"this row is wrong"}')


def test_a_port_that_is_taken_is_an_error(server: PageServer) -> None:
    with pytest.raises(ConfigError, match=f"port {server.port} cannot be used"):
        PageServer({}, server.port)
