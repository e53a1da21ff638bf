"""The page at ``/``, in a real browser where one is installed."""

from __future__ import annotations

import base64
from pathlib import Path

from tests.server.browser import Browser, browser
from tests.server.servers import Server, stub_server

KEY = "schlüssel: ein"


def ask(tab: Browser, prompt: str, num_tokens: int) -> str:
    """Type a prompt, send it, and wait for the note after the answer."""
    tab.type("#max_tokens", str(num_tokens))
    tab.type("#prompt", prompt)
    tab.value("document.querySelector('#send').click()")
    tab.until("document.querySelector('article .note').textContent")
    return str(tab.value("document.querySelector('article .answer').textContent"))


def test_the_page_allows_its_own_script_only(server: Server) -> None:
    answer = server.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in answer.body
    assert b"https://" not in answer.body


def test_a_prompt_and_a_chat_are_answered_and_figures_follow(model_directory: Path, tmp_path: Path) -> None:
    with stub_server(model_directory, {"model_names": ["stub"]}) as server, browser(tmp_path) as tab:
        tab.open(server.url)
        tab.until("document.querySelector('#about')?.textContent.includes('256 tokens')")
        assert ask(tab, "abc", 7) == "abcabca"
        assert "first token after" in tab.value("document.querySelector('article .note').textContent")
        tab.value("document.querySelector('input[value=chat]').click()")
        assert ask(tab, "hello", 6) == "[user]"
        tab.until("[...document.querySelectorAll('figcaption output')].filter(it => /\\d/.test(it.value)).length >= 5")
        assert tab.problems == []


def test_text_streams_onto_the_page_and_stop_ends_it(model_directory: Path, tmp_path: Path) -> None:
    with stub_server(model_directory, {}, step_seconds=0.01) as server, browser(tmp_path) as tab:
        tab.open(server.url)
        tab.until("document.querySelector('#about')?.textContent.includes('tokens')")
        tab.type("#max_tokens", "200")
        tab.type("#prompt", "abc")
        tab.value("document.querySelector('#send').click()")
        shown = tab.until("document.querySelector('article .answer').textContent")
        assert ("abc" * 67).startswith(shown)
        tab.value("document.querySelector('#stop').click()")
        tab.until("document.querySelector('article .note').textContent === 'stopped'")
        server.wait_for("CANCELLED")


def test_errors_are_shown(model_directory: Path, tmp_path: Path) -> None:
    with stub_server(model_directory, {}) as server, browser(tmp_path) as tab:
        tab.open(server.url)
        tab.until("document.querySelector('#about')?.textContent.includes('tokens')")
        assert ask(tab, "abc", 10_000) == ""
        assert "maximum context length" in tab.value("document.querySelector('article .note.error').textContent")


def test_a_browser_gives_the_key_as_a_password(model_directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"other\n{KEY}\n")
    with stub_server(model_directory, {"api_key_file": str(keys)}) as server:
        refused = server.get("/")
        assert refused.status == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        assert server.get("/metrics").headers["www-authenticate"] == "Bearer"
        for text, status in ((f"any:{KEY}", 200), ("any:wrong", 401), (KEY, 401), ("any:", 401)):
            encoded = base64.b64encode(text.encode()).decode()
            assert server.get("/", Authorization=f"Basic {encoded}").status == status
        assert server.get("/", Authorization="Basic %%%").status == 401
        with browser(tmp_path / "profile", KEY) as tab:
            tab.open(server.url)
            tab.until("document.querySelector('#about')?.textContent.includes('tokens')")
            assert ask(tab, "abc", 4) == "abca"
            assert tab.problems == []
