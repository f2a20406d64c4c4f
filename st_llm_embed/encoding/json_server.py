"""A server that is asked by HTTP and answers JSON, as OpenAI's does; one that is busy is asked again.

Its key, if it wants one, is in the environment, ``OPENAI_API_KEY``, so that it stands in no command line.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

TIMEOUT = 600.0  # seconds
BUSY = (429, 502, 503, 504)  # too many requests; a gateway whose server is full, or being started
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a busy server is asked again
KEY = "OPENAI_API_KEY"  # as for OpenAI's own client


class AnsweredError(OSError):
    """A server refused a request.

    Args:
        url: what was asked.
        code: the status of its answer.
        said: what it said.
    """

    def __init__(self, url: str, code: int, said: str) -> None:
        super().__init__(f"{url} answered {code}: {said}")
        self.code = code


class JsonServer:
    """A server, by its address.

    Args:
        url: the address that a route follows, such as ``http://localhost:8000/v1``.

    Raises:
        ValueError: for an address of another kind.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://, such as http://localhost:8000/v1.")
        self.url = url.rstrip("/")

    def ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, as JSON.

        Raises:
            AnsweredError: if it refuses.
            OSError: if it does not answer.
            ValueError: if it answers something else than JSON.
        """
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{route}", payload, {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for wait in (*WAITS, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = error.read(1_000).decode(errors="replace")
                if error.code not in BUSY or wait is None:
                    raise AnsweredError(self.url, error.code, said) from error
                time.sleep(wait)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or repr(error)
                raise OSError(
                    f"{self.url} does not answer: {reason}. Is it the right address, and started?"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.url} answered something else than JSON: {error}.") from error
        raise AssertionError

    def models(self) -> list[str]:
        """The names of its models, by OpenAI's ``/models``; none where it does not tell.

        Raises:
            OSError: if it does not answer.
        """
        try:
            return [entry["id"] for entry in self.ask("/models")["data"]]
        except (AnsweredError, ValueError, KeyError, TypeError):
            return []
