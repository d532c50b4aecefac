"""What stands between the REST interface and the dispatcher: prompts become requests."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..core.card import ModelCard
from ..core.config import Deployment, Policy, parse_size
from ..core.errors import RequestError
from ..core.ids import new_request_id
from .api.calls import Call, Chat, Prompt, TokenIds
from .generation import Generation
from .policy import can_split
from .requests import Ask
from .service import Service
from .snapshot import Objectives
from .tokenizer import Tokenizer

_SHORT_TEXT = 4096  # characters; a longer one is tokenized on another thread
_MIN_BODY = 4 << 20  # bytes
_BODY_PER_TOKEN = 32  # bytes of a body for each token that the context may have


class Front:
    def __init__(
        self, deployment: Deployment, card: ModelCard, tokenizer: Tokenizer, service: Service
    ) -> None:
        limit = deployment.model.max_context
        self.card = card
        self.router = deployment.router
        self.names = (card.name, *deployment.model.aliases)
        self._slo = deployment.slo
        self.service = service
        self.tokenizer = tokenizer
        self.policy = deployment.router.policy
        self.log_prompts = deployment.observability.log_prompts
        self._pools = deployment.pools
        self._max_context = card.max_context if limit == "auto" else min(limit, card.max_context)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.service.dispatch.max_context(self._max_context)

    @property
    def max_body(self) -> int:
        limit = self.router.max_body
        return (
            max(_MIN_BODY, _BODY_PER_TOKEN * self._max_context)
            if limit == "auto"
            else parse_size(limit)
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError for another model; None is the one that there is."""
        if name is not None and name not in self.names:
            raise RequestError(
                f"there is no model {name[:100]!r} here, but {self.card.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def check(self, call: Call) -> None:
        """Raises RequestError for another model, or a route that there is not."""
        self.check_model(call.fields.model)
        joinable = self.router.control is not None
        if call.route is Policy.DISAGGREGATED and not (joinable or can_split(self._pools)):
            raise RequestError(
                "route: this deployment has no two workers to split a request between",
                param="route",
                code="invalid_value",
            )

    async def generate(
        self, call: Call, call_id: str, arrived: float, traceparent: str | None = None
    ) -> list[Generation]:
        """Tokenizes the prompts, and opens a request for each choice.

        The call came under that id at that time, of the monotonic clock.
        """
        prompts = [await self.token_ids(prompt) for prompt in call.prompts]
        echoes = (
            [self._echo(*pair) for pair in zip(call.prompts, prompts, strict=True)]
            if call.echo
            else []
        )
        seed = secrets.randbits(63) if call.fields.seed is None else call.fields.seed % 2**63
        deadline = self.service.deadline()
        asks = [
            Ask(
                new_request_id(),
                prompt,
                call.params(
                    prompt,
                    choice=choice,
                    seed=seed,
                    max_context=self.max_context,
                    vocab_size=self.card.vocab_size,
                ),
                deadline,
                call.route,
                call_id,
                traceparent,
                call.chat,
                arrived,
                self._objectives(call),
                call.fields.priority,
            )
            for prompt in prompts
            for choice in range(call.fields.n)
        ]
        return [
            Generation(
                index,
                self.service.open(ask),
                self.tokenizer.decode,
                call.fields.stops,
                echoes[index // call.fields.n] if echoes else "",
                self.tokenizer.whole,
            )
            for index, ask in enumerate(asks)
        ]

    def text(self, token_ids: Sequence[int]) -> str:
        """Special tokens as they are written; raises RequestError for ids that there are not."""
        if not all(0 <= token_id < self.card.vocab_size for token_id in token_ids):
            raise RequestError(
                f"tokens must be ids in the vocabulary: 0 to {self.card.vocab_size - 1}",
                param="tokens",
                code="invalid_value",
            )
        return self.tokenizer.decode(token_ids, special=True)

    def _objectives(self, call: Call) -> Objectives | None:
        slo = call.fields.slo
        if slo.ttft_ms is None and slo.tpot_ms is None:
            return None
        return Objectives(slo.ttft_ms or self._slo.ttft_ms, slo.tpot_ms or self._slo.tpot_ms)

    def _echo(self, prompt: Prompt, token_ids: TokenIds) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(token_ids)

    async def token_ids(self, prompt: Prompt, *, special: bool = True) -> TokenIds:
        """``special``: with what the tokenizer puts before a plain text."""
        match prompt:
            case str(text):
                size = len(text)
            case Chat(messages):
                size = sum(len(message["content"]) for message in messages)
            case token_ids:
                return token_ids
        if size <= _SHORT_TEXT:
            return self._encode(prompt, special)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, prompt, special)

    def _encode(self, prompt: str | Chat, special: bool) -> TokenIds:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, special=special))
        return tuple(self.tokenizer.encode_chat(prompt.messages))
