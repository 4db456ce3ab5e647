"""`qklens dict show`: harmless on a terminal, marked with and without colour, and whole when no label can be had."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest
from rich.text import Text

from qklens.analyses.feature_card import CardToken, Density, Example, FeatureCard
from qklens.cli import show_card
from qklens.cli.feature_label import KEY_VARIABLE, LONGEST, LabelEndpoint, NoLabelError, ask_label, label_endpoint
from qklens.errors import QklensError
from terminal import HOSTILE, lines_of


def example(text: str = " steal") -> Example:
    tokens = [
        CardToken(text="I", activation=0.1),
        CardToken(text=text, activation=4.0),
        CardToken(text=" [b]", activation=0),
    ]
    return Example(
        group="text", where=f"window {HOSTILE}", item=None, place=None, position=1, activation=4.0, at=1, tokens=tokens
    )


def card(text: str = " steal", label: str | None = None) -> FeatureCard:
    density = Density(
        group="text",
        tokens=9,
        active=2,
        share=2 / 9,
        mean=2.0,
        largest=4.0,
        least=0,
        edges=[-1.0, 0.0, 1.0],
        counts=[1, 1],
    )
    return FeatureCard(
        feature=HOSTILE, layer=1, dictionary="d", model="m", norm=1.0, roles=[], label=label, density=[density],
        top=[example(text)], bottom=[], deciles=[], prompts=[], places=[], promoted=[], suppressed=[], logit_scale=1.0,
        nearest=[], opposite=[],
    )  # fmt: skip


class Endpoint(BaseHTTPRequestHandler):
    status: ClassVar[int] = 200
    answer: ClassVar[bytes] = b""
    seen: ClassVar[list[tuple[str, dict[str, str], Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append((self.path, dict(self.headers), body))
        self.send_response(Endpoint.status)
        if Endpoint.status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(Endpoint.answer)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Endpoint.seen, Endpoint.status = [], 200
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def says(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_label_is_one_bounded_line_and_only_the_examples_are_sent(url: str) -> None:
    Endpoint.answer = says(f'"theft{HOSTILE}\nand more" ' + "x" * 500)
    label = ask_label(card(), LabelEndpoint(url, "judge", "secret-key"))
    assert label.startswith("theft")
    assert len(label) <= LONGEST
    lines_of(label)
    ((path, headers, body),) = Endpoint.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-key"
    assert body["model"] == "judge"
    assert "<< steal>> 4.0" in body["messages"][1]["content"]
    assert "secret-key" not in json.dumps(body) + repr(LabelEndpoint(url, "judge", "secret-key"))


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (500, b"", "status 500"),
        (302, b"", "status 302"),
        (200, b"no json", "not a chat completion"),
        (200, b'{"choices": []}', "not a chat completion"),
        (200, says(3), "holds no text"),
        (200, says(" \n "), "answered with no text"),
        (200, b"x" * ((1 << 20) + 9), "more than"),
    ],
)
def test_an_endpoint_that_fails_gives_one_line_without_the_key(
    url: str, status: int, answer: bytes, expected: str
) -> None:
    Endpoint.status, Endpoint.answer = status, answer
    with pytest.raises(NoLabelError, match=expected) as caught:
        ask_label(card(), LabelEndpoint(url, "judge", "secret-key"))
    assert "secret-key" not in str(caught.value)
    assert len(Endpoint.seen) == 1, "a redirect was followed"


def test_nobody_there_is_told() -> None:
    with pytest.raises(NoLabelError, match="cannot be reached"):
        ask_label(card(), LabelEndpoint("http://127.0.0.1:9", "m", seconds=2))


@pytest.mark.parametrize(
    ("url", "model", "key", "expected"),
    [
        ("http://x", None, "", "belong together"),
        ("file:///etc/passwd", "m", "", "expected http"),
        ("http://user:pass@x/v1", "m", "", "user name"),
        ("http://x:99999", "m", "", "expected http"),
        ("http://x", "m", "two words", "no header can carry|blanks"),
    ],
)
def test_a_wrong_endpoint_is_refused_before_any_work(url: str, model: str | None, key: str, expected: str) -> None:
    with pytest.raises(QklensError, match=expected) as caught:
        label_endpoint(url, model, {KEY_VARIABLE: key})
    assert "pass@" not in str(caught.value)
    assert "two words" not in str(caught.value)


def test_no_endpoint_is_asked_unless_named() -> None:
    assert label_endpoint(None, None, {KEY_VARIABLE: "k"}) is None


def test_tokens_are_marked_with_and_without_colour_and_move_no_cursor() -> None:
    plain = show_card.marked(example(), card(), colour=False)
    assert "I [[steal]] [b]" in plain.plain
    coloured = show_card.marked(example(), card(), colour=True)
    assert "[[" not in coloured.plain
    styles = {coloured.plain[s.start : s.end]: str(s.style) for s in coloured.spans}
    assert styles == {"I": show_card.SHADES[0], "steal": show_card.SHADES[-1]}
    for text in (plain, show_card.marked(example(HOSTILE), card(HOSTILE), colour=True)):
        assert isinstance(text, Text)
        lines_of(text.plain)
