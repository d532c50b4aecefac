"""What changes a running deployment. It is for those who can read the run folder: the token
lies there, in ``http.json``, and each request must bear it. So no web page and no other user
of the host can send one, wherever the port is open to.

POST /admin/roles {"prefill": 1, "decode": 3, "mixed": 0}     so many workers of each role
POST /admin/roles {"auto": true}                              the planner's choice again
"""

from __future__ import annotations

import hmac
from typing import Annotated

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import RequestError
from ..core.ids import Role
from .service import Service

_Number = Annotated[int, Field(ge=0, le=4096, strict=True)]


class _Roles(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: _Number = 0
    decode: _Number = 0
    mixed: _Number = 0
    auto: bool = False


def add_admin(app: web.Application, service: Service, token: str) -> None:
    async def roles(request: web.Request) -> web.Response:
        _check(request, token)
        try:
            wanted = _Roles.model_validate_json(await request.read())
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the body"
            raise RequestError(f"{where}: {fault['msg']}", code="invalid_value") from None
        counts = {role: getattr(wanted, role) for role in Role}
        if wanted.auto and any(counts.values()):
            raise RequestError("auto: either that, or numbers", code="invalid_value")
        moves = service.scale(None if wanted.auto else counts)
        return web.json_response(
            {"moves": [{"id": m.worker_id, "from": m.before, "to": m.after} for m in moves]}
        )

    app.add_routes([web.post("/admin/roles", roles)])


def _check(request: web.Request, token: str) -> None:
    given = request.headers.get("Authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise RequestError(
            "this needs the token that lies in the run folder",
            status=401,
            code="invalid_api_key",
        )
