"""A server of an LLM, on loopback, by OpenAI's /v1/chat/completions: it says yes the more, the more of the query's
words the document has.

``server.tokens`` maps that share of words to the tokens and log-probabilities that are answered; ``server.names`` are
the models that it lists; ``server.asked`` has all requests.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log


def say(share: float) -> list[tuple[str, float]]:
    """Two spellings of yes, two of no, and what a tenth of the probability goes to."""
    return [
        ("Yes", log(0.6 * share + 1e-9)),
        (" yes", log(0.3 * share + 1e-9)),
        ("No", log(0.9 * (1 - share) + 1e-9)),
        ("Hello", log(0.1)),
    ]


def share_of(query: str, document: str) -> float:
    words = query.split()
    return sum(word in document.split() for word in words) / len(words)


class ChatHandler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(request)
        content = request["messages"][-1]["content"]
        query, document = re.search(r"Query: (.*)\n\nDocument: (.*)\n\nAnswer", content, re.DOTALL).groups()
        listed = self.server.tokens(share_of(query, document))
        logprobs = None
        if listed is not None:
            top = [{"token": token, "logprob": value} for token, value in listed]
            logprobs = {"content": [{**max(top, key=lambda token: token["logprob"]), "top_logprobs": top}]}
        message = {"role": "assistant", "content": "yes"}
        self.answer({"choices": [{"index": 0, "message": message, "logprobs": logprobs}]})

    def answer(self, content: object) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@contextmanager
def chat_server() -> Iterator[ThreadingHTTPServer]:
    """A running server; ``server.url`` is what ``/chat/completions`` follows."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    server.tokens, server.names, server.asked, server.lock = say, ["judge"], [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
