"""The HTTP interface: OpenAI's paths, a chat page, what is counted."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serving.interface.answers import ChatChoice, Choice, TextChoice, Writer
from serving.interface.fields import RequestError, read_body
from serving.interface.jobs import Asked, Served, read_chat, read_completions, read_tokenize
from serving.interface.responses import ResponseWriter, read_responses
from serving.worker import Worker

BODY_SECONDS = 60  # for a client to send a body
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
PAGE_POLICY += "; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Api:
    """The endpoints. max_body: bytes of a request."""

    def __init__(self, served: Served, worker: Worker, max_body: int):
        self.served, self.worker, self.max_body = served, worker, max_body

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_bytes(), headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        is_well = self.worker.is_alive()
        return JSONResponse({"status": "ok" if is_well else "the scheduler has ended"}, 200 if is_well else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.worker.read_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.described()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.served.name:
            raise RequestError(f"there is no model {name!r} here", "model", "model_not_found", 404)
        return JSONResponse(self.described())

    def described(self) -> dict:
        served = self.served
        facts = {"created": served.created, "owned_by": "gpt-faster", "max_model_len": served.context}
        return {"id": served.name, "object": "model", **facts}

    async def chat(self, request: Request) -> "Reply":
        return self.reply(ChatChoice, await self.read(request, read_chat))

    async def completions(self, request: Request) -> "Reply":
        return self.reply(TextChoice, await self.read(request, read_completions))

    async def responses(self, request: Request) -> "Reply":
        asked = await self.read(request, read_responses)
        return Reply(ResponseWriter(asked, self.served, self.worker.submit(asked.jobs)))

    async def tokenize(self, request: Request) -> Response:
        ids = await self.read(request, read_tokenize)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.served.context})

    def reply(self, kind: type[Choice], asked: Asked) -> "Reply":
        answers = self.worker.submit(asked.jobs)
        return Reply(Writer(kind, asked, self.served, answers))

    async def read(self, request: Request, reader: Callable[[dict, Served], Any]) -> Any:
        """What the reader makes of the body, away from the event loop: a template may take seconds."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self.body(request)
        except TimeoutError:
            raise RequestError(f"the body did not come within {BODY_SECONDS} seconds", status=408) from None
        try:
            return await run_in_threadpool(lambda: reader(read_body(body), self.served))
        except RequestError:
            raise
        except ValueError as error:  # of the template, the tokenizer or the sampling
            raise RequestError(str(error)) from None
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None

    async def body(self, request: Request) -> bytes:
        too_long = RequestError(f"the body is longer than {self.max_body} bytes (--max_body)", status=413)
        if int(request.headers.get("content-length", 0)) > self.max_body:
            raise too_long
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise too_long
        return bytes(body)


class Reply:
    """A response that is made while it is sent. A client that goes away frees its rows."""

    def __init__(self, writer: Writer | ResponseWriter):
        self.writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.respond(scope, receive, send))
        finally:
            self.writer.answers.close()

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.writer.asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy would hold events back
            response = StreamingResponse(self.writer.stream(), headers=headers, media_type="text/event-stream")
            await response.stream_response(send)
        else:
            await JSONResponse(await self.writer.whole())(scope, receive, send)


async def while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work until the client goes away."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
