"""A headless Chromium, driven through its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One tab. ``password`` answers the browser's question for one, as a user would.

    Attributes:
        problems: exceptions of the page's scripts, and what the browser refused to run or load.
    """

    def __init__(self, commands: BinaryIO, answers: BinaryIO, password: str | None = None) -> None:
        self._commands, self._answers, self._password = commands, answers, password
        self._last_id = 0
        self._session: str | None = None
        self.problems: list[Any] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", handleAuthRequests=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = self._send(method, **params)
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._handle(message)

    def open(self, url: str) -> None:
        """Go to ``url``."""
        self.call("Page.navigate", url=url)

    def until(self, condition: str) -> Any:
        """Wait until the expression ``condition`` is true on the page; its value."""
        look = f"new Promise(done => {{ const look = () => {{ const it = {condition}; it ? done(it) : setTimeout(look, 10); }}; look(); }})"
        return self.value(look)

    def value(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        self.value(f"(document.querySelector({selector!r}).focus(), document.querySelector({selector!r}).select())")
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Save what the tab shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _send(self, method: str, **params: Any) -> int:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        return self._last_id

    def _receive(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            data += byte
        return dict(json.loads(data))

    def _handle(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", requestId=params["requestId"])
        elif method == "Fetch.authRequired":
            answer = {"response": "CancelAuth"}
            if self._password is not None:
                answer = {"response": "ProvideCredentials", "username": "any", "password": self._password}
            self._send("Fetch.continueWithAuth", requestId=params["requestId"], authChallengeResponse=answer)
        elif method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and params["entry"]["source"] == "security"
        ):
            self.problems.append(params)


@contextlib.contextmanager
def browser(directory: Path, password: str | None = None) -> Iterator[Browser]:
    """A browser with its profile in ``directory``; the test is skipped where none is installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)}")
    their_commands, our_commands = os.pipe()
    our_answers, their_answers = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--window-size=1200,900", f"--user-data-dir={directory}", "--remote-debugging-pipe", "about:blank"]
    script = f'exec "$@" 3<&{their_commands} 4>&{their_answers}'
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", found, *flags],
        pass_fds=(their_commands, their_answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_commands)
    os.close(their_answers)
    with os.fdopen(our_commands, "wb") as commands, os.fdopen(our_answers, "rb") as answers:
        try:
            tab = Browser(commands, answers, password)
            yield tab
            tab._session = None
            tab.call("Browser.close")
            process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
