"""An OpenAI/vLLM-like model server for tests: deterministic answers, and every way of being unwell on demand.

`FakeModel` answers requests as a pure function of their bodies (a toy language model whose tokens are words and whose
log-probabilities are hashes). `MemoryServer` is an httpx transport over it that runs on any event loop, real or
virtual; `SocketServer` is a real HTTP server on loopback.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

VOCABULARY = 997


def _hash(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def token_id(word: str) -> int:
    return _hash("token", word) % VOCABULARY


def log_prob(prefix: list[int], token: int) -> float:
    """log p(token | prefix) of the toy model: a softmax over hashed logits, exact."""
    logits = [_hash("logit", tuple(prefix[-6:]), len(prefix), candidate) % 1000 / 100.0 for candidate in range(16)]
    # Every token shares its logit with token % 16; the mass of a bucket is split evenly among its tokens.
    top = max(logits)
    bucket = logits[token % 16] - top - math.log(math.fsum(math.exp(value - top) for value in logits))
    size = len(range(token % 16, VOCABULARY, 16))
    return bucket - math.log(size)


class FakeModel:
    """Answers (status, body) to (path, body). Switches turn features off, or make it ignore what it is asked."""

    def __init__(
        self,
        name: str = "toy",
        *,
        tokenizes: bool = True,
        next_token: bool = True,
        prompt_log_probs: bool = True,
        echo: bool = True,
        obeys_schema: bool = True,
        adapters: tuple[str, ...] = (),
        version: str = "0.0.1",
    ) -> None:
        self.name = name
        self.tokenizes = tokenizes
        self.next_token = next_token
        self.prompt_log_probs = prompt_log_probs
        self.echo = echo
        self.obeys_schema = obeys_schema
        self.adapters = adapters
        self.version = version

    def tokens_of(self, text: str) -> list[str]:
        return re.findall(r"\s+|[^\s]+", text)

    def chat_tokens(self, messages) -> list[str]:
        words: list[str] = []
        for message in messages:
            words += ["<|im_start|>", message["role"], *self.tokens_of(message["content"]), "<|im_end|>"]
        return [*words, "<|im_start|>", "assistant"]

    def answer(self, path: str, body: dict | None) -> tuple[int, dict]:
        if path == "/v1/models":
            cards = [
                {"id": self.name, "owned_by": "toyworks", "root": "toy/root", "parent": None, "max_model_len": 512}
            ]
            cards += [{"id": adapter, "owned_by": "toyworks", "parent": self.name} for adapter in self.adapters]
            return 200, {"object": "list", "data": cards}
        if path == "/version":
            return 200, {"version": self.version}
        if body is not None and body.get("model") not in (self.name, *self.adapters):
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}}
        if path == "/tokenize" and self.tokenizes:
            words = self.chat_tokens(body["messages"]) if "messages" in body else self.tokens_of(body["prompt"])
            answer = {"tokens": [token_id(word) for word in words], "count": len(words), "max_model_len": 512}
            return 200, answer | ({"token_strs": words} if body.get("return_token_strs") else {})
        if path == "/v1/chat/completions":
            return self._chat(body)
        if path == "/v1/completions":
            return self._completions(body)
        if path == "/v1/embeddings":
            rows = [[_hash(text, i) % 200 - 100.0 for i in range(8)] for text in body["input"]]
            data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
            return 200, {"model": body["model"], "data": data[::-1]}
        return 404, {"detail": "Not Found"}

    def _chat(self, body: dict) -> tuple[int, dict]:
        words = self.chat_tokens(body["messages"])
        if len(words) > 512:
            return 400, {"error": {"message": f"This model's maximum context length is 512, got {len(words)}"}}
        number = _hash(words, body.get("seed"), body.get("temperature"))
        text = f"answer {number % 100000} to {words[-4]}"
        if "response_format" in body and self.obeys_schema:
            required = body["response_format"]["json_schema"]["schema"].get("required", [])
            text = json.dumps(dict.fromkeys(required, number % 10))
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        reason = "stop" if len(self.tokens_of(text)) <= body["max_tokens"] else "length"
        text = "".join(self.tokens_of(text)[: body["max_tokens"]])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if body.get("logprobs"):
            prefix = [token_id(word) for word in words]
            top = [{"token": word, "logprob": log_prob(prefix, token_id(word))} for word in ("A", "B", "C")]
            choice["logprobs"] = {"content": [{"token": "A", "top_logprobs": top}]}
        usage = {"prompt_tokens": len(words), "completion_tokens": len(self.tokens_of(text))}
        return 200, {"model": body["model"], "choices": [choice], "usage": usage}

    def _completions(self, body: dict) -> tuple[int, dict]:
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            choice: dict = {"index": index, "text": "x", "finish_reason": "length"}
            wanted = body.get("logprob_token_ids")
            if wanted and self.next_token:
                row = {f"token_id:{token}": log_prob(prompt, token) for token in wanted}
                choice["logprobs"] = {"top_logprobs": [row]}
            steps = [None] + [log_prob(prompt[:at], prompt[at]) for at in range(1, len(prompt))]
            if "prompt_logprobs" in body and self.prompt_log_probs:
                choice["prompt_logprobs"] = [
                    None if step is None else {str(token): {"logprob": step}}
                    for step, token in zip(steps, prompt, strict=True)
                ]
            if body.get("echo") and self.echo:
                choice["logprobs"] = {"token_logprobs": steps}
            choices.append(choice)
        return 200, {"model": body["model"], "choices": choices[::-1], "usage": {"prompt_tokens": 1}}


class MemoryServer(httpx.AsyncBaseTransport):
    """A transport that answers from `model` after `delay` seconds of the loop's time.

    `fault(request number, path)` names what goes wrong with a request, or None: "refuse", "reset", "429", "500", "502",
    "503", "hang", "half-json", "html", "no-choices", "wrong-model", "wrong-count", "400", "401". `down` is a host that
    refuses everything, `frozen` one that accepts and never answers (its health page excepted).
    """

    def __init__(self, model: FakeModel, *, delay: float = 0.05, fault=lambda number, path: None) -> None:
        self.model = model
        self.delay = delay
        self.fault = fault
        self.retry_after = "2"
        self.down: set[str] = set()
        self.frozen: set[str] = set()
        self.log: list[tuple[float, str, str]] = []
        self.faults: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        loop = asyncio.get_running_loop()
        host, path = request.url.host, request.url.path
        number = len(self.log)
        self.log.append((loop.time(), host, path))
        if host in self.down:
            raise httpx.ConnectError("connection refused", request=request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._reply(request, host, path, self.fault(number, path))
        finally:
            self.in_flight -= 1

    async def _reply(self, request: httpx.Request, host: str, path: str, fault: str | None) -> httpx.Response:
        if fault:
            self.faults[fault] += 1
        body = json.loads(await request.aread()) if request.content else None
        if host in self.frozen and path != "/health":
            await asyncio.sleep(3600 * 24)
        if fault == "refuse":
            raise httpx.ConnectError("connection refused", request=request)
        await asyncio.sleep(90 if fault == "hang" else self.delay)
        if fault == "reset" or host in self.down:
            raise httpx.ReadError("connection reset by peer", request=request)
        if fault == "hang":
            raise httpx.RemoteProtocolError("server disconnected without sending a response", request=request)
        status, value = self.model.answer(path, body)
        if fault is not None and fault.isdigit():
            headers = {"retry-after": self.retry_after} if fault == "429" else {}
            return httpx.Response(int(fault), headers=headers, json={"error": {"message": "unwell"}})
        text = json.dumps(value)
        if fault == "half-json":
            text = text[: len(text) // 2]
        if fault == "html":
            text = "<html>proxy says hello</html>"
        if fault == "no-choices":
            text = json.dumps({key: [] if isinstance(entry, list) else entry for key, entry in value.items()})
        if fault == "wrong-model":
            text = json.dumps(value | {"model": "someone-else", "tokens": None, "data": None})
        return httpx.Response(status, content=text.encode())


class SocketServer:
    """`FakeModel` on a loopback port; `before(path, body)` runs in the handler and may sleep, or return a raw reply.

    A raw reply is bytes put on the wire as they are before the connection is cut (b"" resets it).
    """

    def __init__(self, model: FakeModel, before=lambda path, body: None, port: int = 0) -> None:
        outer = self
        self.model = model
        self.in_flight = 0
        self.most_in_flight = 0
        self.served: list[str] = []
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def _serve(self, body):
                with outer._lock:
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                    outer.served.append(self.path)
                try:
                    raw = before(self.path, body)
                    if raw is not None:
                        self.close_connection = True
                        with contextlib.suppress(OSError):
                            self.wfile.write(raw)
                            self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    status, value = outer.model.answer(self.path, body)
                    content = json.dumps(value).encode()
                finally:
                    with outer._lock:
                        outer.in_flight -= 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                self._serve(None)

            def do_POST(self):
                self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_):
                pass  # a client that was cancelled hangs up; that is the point of some tests

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "SocketServer":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
