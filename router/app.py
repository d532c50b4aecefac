"""The HTTP application: OpenAI's paths, and those that say how the deployment is.

POST /v1/chat/completions, /v1/completions     GET /v1/models, /v1/models/{id}
POST /tokenize, /detokenize
GET /health     200 while the process lives
GET /ready      200 when requests can be served, else 503 and why not
GET /cluster    the policy, and every worker with its state and blocks
GET /           the live page; it polls /live
GET /openapi.json   all this, for programs
GET /live       objectives, requests by stage, workers, transfers, events, at this moment
GET /metrics    for Prometheus
GET /requests/{id}   the timelines of a recent call, by the id in its X-Request-Id header
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from aiohttp import web

from ..core.errors import RequestError
from ..core.logs import fields
from .answer import Answer, ClientGone, Trace
from .api.bodies import ChatBodies, CompletionBodies
from .api.calls import Call, Chat, parse_chat, parse_completion
from .api.openapi import describe
from .api.tokens import parse_detokenize, parse_tokenize
from .callers import Callers
from .connections import Connection
from .errors import error_response, internal_error, of_http
from .front import Front
from .metrics import Metrics
from .page import PAGE

log = logging.getLogger(__name__)

_MAX_IGNORED_SHOWN = 32  # names of fields
_MAX_PROMPT_LOGGED = 2000  # characters

GONE = "499"  # the status of a call whose client went first

_TRACE = web.RequestKey("trace", Trace)
_METRICS = web.AppKey("metrics", Metrics)
_CALLERS = web.AppKey("callers", Callers)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(front: Front, callers: Callers) -> web.Application:
    app = web.Application(client_max_size=front.max_body, middlewares=[_traced])
    app[_METRICS] = front.service.metrics
    app[_CALLERS] = callers
    app.on_response_prepare.append(_name)
    handlers = _Handlers(front)
    app.add_routes(
        [
            web.post("/v1/chat/completions", handlers.chat),
            web.post("/v1/completions", handlers.completions),
            web.post("/tokenize", handlers.tokenize),
            web.post("/detokenize", handlers.detokenize),
            web.get("/v1/models", handlers.models),
            web.get("/v1/models/{name:.+}", handlers.model),
            web.get("/health", handlers.health),
            web.get("/ready", handlers.ready),
            web.get("/", handlers.page),
            web.get("/openapi.json", handlers.openapi),
            web.get("/live", handlers.live),
            web.get("/cluster", handlers.cluster),
            web.get("/metrics", handlers.metrics),
            web.get("/requests/{call_id}", handlers.timelines),
        ]
    )
    return app


class _Handlers:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._created = int(time.time())
        self._description = describe(front.names)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_chat)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_completion)

    async def _answer(
        self, request: web.Request, parse: Callable[[bytes], Call]
    ) -> web.StreamResponse:
        front, trace = self._front, request[_TRACE]
        caller = trace.caller
        assert caller is not None
        call = parse(await self._body(request))
        trace.ignored = call.ignored
        if front.log_prompts:
            _log_prompts(call, trace)
        front.check(call)
        caller.pay(call.num_choices - 1, of=call.num_choices)
        with caller.running(call.num_choices), front.service.admitted(call.num_choices):
            generations = await front.generate(
                call, trace.call_id, trace.started, request.headers.get("traceparent")
            )
            trace.placed = time.monotonic()
            trace.num_prompt_tokens = sum(one.num_prompt_tokens for one in generations)
            make = ChatBodies if call.chat else CompletionBodies
            bodies = make(trace.call_id, call.fields.model, front.tokenizer, call.include_usage)
            try:
                return await Answer(
                    request, call, bodies, generations, trace, front.router.write_timeout_s
                ).respond()
            finally:
                for generation in generations:
                    generation.close()

    async def models(self, request: web.Request) -> web.Response:
        data = [self._model(name) for name in self._front.names]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._front.check_model(name)
        return web.json_response(self._model(name))

    async def tokenize(self, request: web.Request) -> web.Response:
        fields = parse_tokenize(await self._body(request))
        self._front.check_model(fields.model)
        token_ids = await self._front.token_ids(fields.asked, special=fields.add_special_tokens)
        return web.json_response(
            {
                "count": len(token_ids),
                "max_model_len": self._front.max_context,
                "tokens": token_ids,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        fields = parse_detokenize(await self._body(request))
        self._front.check_model(fields.model)
        return web.json_response({"prompt": self._front.text(fields.tokens)})

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        reason = self._front.service.not_ready
        if reason is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    async def cluster(self, request: web.Request) -> web.Response:
        workers = self._front.service.workers()
        return web.json_response({"policy": self._front.policy, "workers": workers})

    async def live(self, request: web.Request) -> web.Response:
        front = self._front
        about = {
            "pid": os.getpid(),
            "model": front.card.name,
            "chat": front.tokenizer.chats,
            "policy": front.policy,
        }
        return web.json_response(about | front.service.live())

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response(self._description)

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text=PAGE.text, content_type="text/html", headers=PAGE.headers)

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._front.service.metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def timelines(self, request: web.Request) -> web.Response:
        call_id = request.match_info["call_id"]
        timelines = self._front.service.recent.of(call_id)
        if not timelines:
            text = "no recent call of this id has ended"
            raise RequestError(text, status=404, code="not_found")
        return web.json_response(
            {"id": call_id, "timelines": [timeline.shown() for timeline in timelines]}
        )

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._front.router.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise RequestError("the body did not come", status=408, code="body_timeout") from None
        except web.RequestPayloadError:
            raise RequestError("the body can't be decoded", code="invalid_body") from None
        except ConnectionError:
            raise ClientGone("it sent half a body") from None

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "pdserve",
            "root": self._front.card.name,
            "max_model_len": self._front.max_context,
        }


@web.middleware
async def _traced(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A name for each request, one envelope for each error, one line of log for each call."""
    trace = request[_TRACE] = Trace(secrets.token_hex(12))
    status = GONE  # where nobody waits for another
    connection = request.protocol
    assert isinstance(connection, Connection)
    connection.begin()
    try:
        try:
            authorization = request.headers.get("Authorization")
            trace.caller = request.app[_CALLERS].of(request.path, authorization)
            if trace.caller is not None and request.method == "POST":
                trace.caller.pay(1)
            response = await handler(request)
        except ClientGone as gone:
            trace.outcome = f"client gone: {gone}"
            return web.Response(status=int(GONE))  # which nobody reads
        except web.HTTPException as error:
            response = error_response(of_http(error))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            trace.outcome = "refused"
        except RequestError as error:
            response = error_response(error)
            trace.outcome = " ".join(filter(None, (error.code or "failed", error.param)))
            trace.refusal = error.code
        except Exception:
            log.exception("a bug of ours, in request %s", trace.call_id)
            response = error_response(internal_error())
            trace.outcome = "internal_error"
        status = str(response.status)
        return response
    except asyncio.CancelledError:
        trace.outcome = "client gone"
        raise
    finally:
        connection.end()
        _count(request, trace, status)
        if request.path.startswith("/v1/") and (request.method == "POST" or status != "200"):
            _log(request, trace, status)


def _count(request: web.Request, trace: Trace, status: str) -> None:
    metrics = request.app[_METRICS]
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "other"
    metrics.response(path, status)
    metrics.own(trace.inward, trace.outward)
    asked = request.method == "POST" and path.startswith("/v1/")
    if asked and not trace.num_prompt_tokens and status != GONE and status.startswith(("4", "5")):
        metrics.refused(trace.refusal)


def _log(request: web.Request, trace: Trace, status: str) -> None:
    times = [f"total={time.monotonic() - trace.started:.3f}s"]
    if trace.first is not None:
        times.insert(0, f"first={trace.first - trace.started:.3f}s")
    caller = trace.caller.name if trace.caller is not None else ""
    log.info(
        "%s %s%s %s %s %s; prompt=%d output=%d %s",
        trace.call_id,
        f"{caller} " if caller else "",
        request.method,
        request.rel_url.raw_path,
        status,
        trace.outcome or "ok",
        trace.num_prompt_tokens,
        trace.num_output_tokens,
        " ".join(times),
        extra=fields(
            request_id=trace.call_id,
            method=request.method,
            path=request.rel_url.raw_path,
            status=status,
            caller=caller or None,
            outcome=trace.outcome or "ok",
            prompt_tokens=trace.num_prompt_tokens,
            output_tokens=trace.num_output_tokens,
            first_s=round(trace.first - trace.started, 4) if trace.first is not None else None,
            total_s=round(time.monotonic() - trace.started, 4),
        ),
    )


def _log_prompts(call: Call, trace: Trace) -> None:
    for prompt in call.prompts:
        found = list(prompt.messages) if isinstance(prompt, Chat) else prompt
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        text = text[:_MAX_PROMPT_LOGGED]
        log.info(
            "%s asks %r", trace.call_id, text, extra=fields(request_id=trace.call_id, prompt=text)
        )


async def _name(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """The headers that every response bears."""
    trace = request.get(_TRACE)
    if trace is None:  # refused before it was a request
        return
    response.headers["X-Request-Id"] = trace.call_id
    if trace.ignored:
        names = trace.ignored[:_MAX_IGNORED_SHOWN]
        response.headers["X-Ignored-Fields"] = ", ".join(quote(name[:64]) for name in names)
