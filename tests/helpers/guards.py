"""Guards that are taken out, one at a time, to see that some test misses each.

``source`` is the guard as it stands in the file, exactly once (``test_guards.py`` looks, so
that this list follows the code); ``without`` is what stands there when it is gone;
``missed_by`` are the tests that must fail then.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    name: str
    file: str
    source: str
    without: str
    missed_by: tuple[str, ...]

    def taken_out_of(self, text: str) -> str:
        """The file's text without it; AssertionError where it is not there once."""
        assert text.count(self.source) == 1, f"{self.file}: the guard has changed, or gone"
        changed = text.replace(self.source, self.without)
        ast.parse(changed)
        return changed


GUARDS = (
    Guard(
        "the lease of what a worker receives",
        "kvtransfer/receiver.py",
        "if transfer.over or transfer.lease_until is None or now < transfer.lease_until:",
        "if True:",
        ("tests/kvtransfer/test_receiver.py",),
    ),
    Guard(
        "the lease of what a worker sends",
        "kvtransfer/sender.py",
        "if now >= transfer.lease_until:",
        "if False:",
        ("tests/kvtransfer/test_sender.py",),
    ),
    Guard(
        "a copy by reference counts only where the generations still hold",
        "kvtransfer/media/puller.py",
        "if not mapping.pool.generations.are(pull.theirs, pull.generations):",
        "if False:",
        ("tests/kvtransfer/test_puller.py",),
    ),
    Guard(
        "a block that goes to a new owner has a new generation",
        "cache/pool.py",
        "self._generations.bump(blocks)",
        "pass",
        ("tests/cache/test_pool.py",),
    ),
    Guard(
        "a worker is its id and its epoch",
        "router/membership.py",
        "member.alive and member.ref == ref else None",
        "member.alive else None",
        ("tests/router/test_membership.py",),
    ),
    Guard(
        "an epoch that has ended never comes back",
        "router/membership.py",
        "if ref in self._ended:",
        "if False:",
        ("tests/router/test_membership.py",),
    ),
    Guard(
        "a router that was started again is another one",
        "worker/link.py",
        "replaced = self._router_epoch not in (None, router_epoch)",
        "replaced = False",
        ("tests/worker/test_link.py",),
    ),
    Guard(
        "a token is passed on once",
        "router/requests.py",
        "if item.index < len(self.output):",
        "if False:",
        ("tests/router/test_requests.py",),
    ),
    Guard(
        "a gap in the tokens is no answer",
        "router/requests.py",
        "if item.index > len(self.output):",
        "if False:",
        ("tests/router/test_requests.py",),
    ),
    Guard(
        "an older attempt is not taken up again",
        "worker/attempts.py",
        "if place is not None and place.key.number >= attempt.number:",
        "if False:",
        ("tests/worker/test_attempts.py",),
    ),
    Guard(
        "a block that is in is not written twice",
        "kvtransfer/receiver.py",
        "if num_missing == 0:",
        "if False:",
        ("tests/kvtransfer/test_receiver.py",),
    ),
    Guard(
        "a peer writes where it was granted, and nowhere else",
        "kvtransfer/receiver.py",
        "if not sound:",
        "if False:",
        ("tests/kvtransfer/test_receiver.py",),
    ),
    Guard(
        "the bound on a message's bytes",
        "core/codec.py",
        "if len(data) > MAX_MESSAGE_BYTES:",
        "if False:",
        ("tests/core/test_codec.py",),
    ),
    Guard(
        "the bound on requests in the house",
        "router/service.py",
        "if queueing and self._num_in_house + num_requests > self._router.max_queue:",
        "if False:",
        ("tests/router/test_rest.py",),
    ),
    Guard(
        "the checksum of what comes as frames",
        "kvtransfer/media/copier.py",
        "ok = not effect.checksums or effect.checksums == tuple(",
        "ok = True or effect.checksums == tuple(",
        ("tests/kvtransfer/test_media.py",),
    ),
    Guard(
        "the checksum of what is copied by reference",
        "kvtransfer/media/puller.py",
        "return found == pull.checksums",
        "return True",
        ("tests/kvtransfer/test_puller.py",),
    ),
    Guard(
        "a third death ends the request that may be its cause",
        "router/requests.py",
        "if strike and self.alone:",
        "if False:",
        ("tests/router/test_requests.py",),
    ),
    Guard(
        "the doubt of which a request has the benefit is bounded",
        "router/requests.py",
        " and self._num_doubts < MAX_DOUBTS",
        "",
        ("tests/router/test_requests.py",),
    ),
    Guard(
        "blocks that are still read for sending stay P's",
        "kvtransfer/sender.py",
        "if transfer.outcome is None or transfer.chunks:",
        "if transfer.outcome is None:",
        ("tests/kvtransfer/test_sender.py",),
    ),
    Guard(
        "blocks that are still written to stay D's",
        "kvtransfer/receiver.py",
        "if transfer.outcome is None or transfer.writing:",
        "if transfer.outcome is None:",
        ("tests/kvtransfer/test_receiver.py",),
    ),
    Guard(
        "blocks of a step in flight stay where they are",
        "cache/retired.py",
        "if seq.num_inflight == 0 and self._lent.get(seq.attempt) is not seq:",
        "if self._lent.get(seq.attempt) is not seq:",
        ("tests/cache/test_retired.py",),
    ),
    Guard(
        "only who shows our token may connect",
        "kvtransfer/handshake.py",
        "if not self.knows(connect):",
        "if False:",
        ("tests/kvtransfer/test_handshake.py",),
    ),
    Guard(
        "a worker unheard of is dead",
        "router/membership.py",
        "if now - member.heard > DEAD_AFTER_S]",
        "if False]",
        ("tests/router/test_membership.py",),
    ),
    Guard(
        "a worker whose step hangs falls silent",
        "worker/io.py",
        "hung = self._busy_since is not None and now - self._busy_since > self._hung_after_s",
        "hung = False",
        ("tests/worker/test_process.py",),
    ),
    Guard(
        "a run folder that is in use is not swept",
        "deploy/rundir.py",
        "            continue  # live",
        "            lock = None",
        ("tests/deploy/test_rundir.py",),
    ),
    Guard(
        "a crash loop is told once",
        "deploy/backoff.py",
        "return restart.short_lives == self.loop_lives",
        "return restart.short_lives >= self.loop_lives",
        ("tests/deploy/test_backoff.py",),
    ),
    Guard(
        "a file of the run folder is replaced whole",
        "core/files.py",
        'new = path.with_name(path.name + ".new")',
        "new = path",
        ("tests/core/test_files.py",),
    ),
)
