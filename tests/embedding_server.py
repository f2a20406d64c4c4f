"""A server of embeddings, on loopback, by OpenAI's /v1/embeddings or TEI's /embed: a model's vectors of texts as they
come.

Like vLLM it puts no prompt before a text, and refuses one of more tokens than ``server.longest``; like TEI it refuses
more than 32 texts. ``server.change`` maps the answer's rows to what a server with a fault would answer.
``server.route`` is the only one that it has; ``server.names`` are the models that it lists.
``server.busy`` is how many requests are answered 503 first. ``server.received`` has the texts and keys of all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sentence_transformers import SentenceTransformer


class EmbeddingHandler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path != "/v1/models" or self.server.names is None:
            return self.answer(404, {"error": {"message": "Not Found"}})
        self.answer(200, {"object": "list", "data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != server.route:
            return self.answer(404, {"error": {"message": "Not Found"}})
        texts = request["inputs" if self.path == "/embed" else "input"]
        with server.lock:
            server.received.append((texts, self.headers.get("Authorization")))
            if server.busy:
                server.busy -= 1
                return self.answer(503, {"error": {"message": "Model is overloaded"}})
            if request.get("model", "served") != "served":
                return self.answer(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
            if len(texts) > 32:
                return self.answer(422, {"error": {"message": "batch size > maximum allowed batch size 32"}})
            lengths = [len(ids) for ids in server.model.tokenizer(texts, truncation=False)["input_ids"]]
            if max(lengths) > server.longest:
                message = f"This model's maximum context length is {server.longest} tokens, and not {max(lengths)}."
                return self.answer(400, {"error": {"message": message}})
            vectors = server.model.encode(texts, prompt="").tolist()
        if self.path == "/embed":
            return self.answer(200, server.change(vectors))
        rows = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        self.answer(200, {"object": "list", "model": "served", "data": server.change(rows)})

    def answer(self, status: int, content: object) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@contextmanager
def embedding_server(
    model: SentenceTransformer, change: Callable[[list[dict]], object] = lambda rows: rows
) -> Iterator[ThreadingHTTPServer]:
    """A running server; ``server.url`` is what ``/embeddings`` follows."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), EmbeddingHandler)
    server.model, server.change, server.lock = model, change, threading.Lock()
    server.longest, server.busy, server.received = model.max_seq_length, 0, []
    server.route, server.names = "/v1/embeddings", ["served"]
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
