"""KV held for a decode engine: under a lease, bounded in time and bytes, released once.

Pure and thread-safe: the engine's worker appends frames while gRPC threads stream them.
Time is handed in (`now`), so that expiry is testable without waiting.

A lease lasts while its holder (whoever got the ticket) renews it. Its time starts when its ticket
is issued, or when a pull or a renewal proves that somebody has it. Until then it is the
prefill's own; after the ticket was issued, and until somebody has claimed it, it lasts
`unclaimed_s` only: the ticket may have been lost.
"""

from __future__ import annotations

import hmac
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from ..core.errors import LeaseNotFound
from .frames import SealedFrame

UNCLAIMED_S = 5.0
_OVERTAKEN_S = 2.0  # from a pull to the opening of its lease, at most
_TOMBSTONES = 4096


@dataclass(slots=True)
class _Lease:
    secret: str
    changed: threading.Condition  # of the store's lock: a frame came, or the lease is gone
    frames_expected: int | None = None  # known once the last layer of the last chunk is in
    complete_s: float | None = None  # when that was
    readers: int = 0
    claimed: bool = False  # somebody has pulled or renewed it
    issued: bool = False  # its ticket is on its way to somebody
    expires_s: float | None = None  # the clock starts when the KV is complete
    frames: list[SealedFrame] = field(default_factory=list)
    bytes_held: int = 0

    @property
    def is_complete(self) -> bool:
        return self.frames_expected is not None


@dataclass(frozen=True, slots=True)
class LeaseGauges:
    """The store's content now, and its leases' ends so far."""

    leases: int
    bytes_held: int
    opened_total: int
    pulled_total: int  # streams read to their end
    released_total: int
    expired_total: int
    dropped_total: int  # over the byte cap
    stranded_bytes_total: int  # held by leases that expired, which nobody pulled
    staged_bytes_total: int = 0  # laid under leases so far


class LeaseStore:
    """Frames of finished and running prefills, waiting to be pulled."""

    def __init__(
        self,
        *,
        max_bytes: int,
        lease_s: float,
        now: Callable[[], float],
        unclaimed_s: float = UNCLAIMED_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._lease_s = lease_s
        self._unclaimed_s = min(unclaimed_s, lease_s)
        self._now = now
        self._lock = threading.RLock()
        self._emptied = threading.Condition(self._lock)
        self._opened = threading.Condition(self._lock)
        self._leases: dict[str, _Lease] = {}
        self._gone: OrderedDict[str, str] = OrderedDict()  # lease id -> why it is gone
        self._bytes_held = 0
        self._stranded_bytes = 0
        self._staged_bytes = 0
        self._totals = {"opened": 0, "pulled": 0, "released": 0, "expired": 0, "dropped": 0}

    def open(self, lease_id: str, secret: str) -> None:
        """Start to hold KV. Idempotent."""
        with self._lock:
            if lease_id not in self._leases and lease_id not in self._gone:
                self._leases[lease_id] = _Lease(secret, threading.Condition(self._lock))
                self._totals["opened"] += 1
                self._opened.notify_all()

    def append(self, lease_id: str, frame: SealedFrame, *, last: bool) -> None:
        """Hold one more frame; a lease that is gone swallows it.

        Over the byte cap the lease is dropped: the decode engine recomputes its prompt.
        """
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None:
                return
            size = len(frame.message)
            if self._bytes_held + size > self._max_bytes:
                self._drop(lease_id, "dropped")
                return
            lease.frames.append(frame)
            lease.bytes_held += size
            self._bytes_held += size
            self._staged_bytes += size
            if last:
                self._complete(lease)
            lease.changed.notify_all()

    def complete(self, lease_id: str) -> None:
        """Note that no frame follows: those that read the lease, if any, need not wait."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is not None:
                self._complete(lease)
                lease.changed.notify_all()

    def issue(self, lease_id: str) -> None:
        """Note that the lease's ticket was issued: from now on it expires unless claimed."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is not None:
                lease.issued = True
                self._restart_clock(lease)

    def stream(
        self, lease_id: str, secret: str, *, timeout_s: float
    ) -> Generator[SealedFrame, None, None]:
        """Yield every frame in order, waiting for those still being computed.

        An unknown lease is waited for a moment: its ticket may have overtaken the order to open it.

        Raises LeaseNotFound when the lease is unknown, gone, or `timeout_s` without a new frame,
        or when the secret is wrong.
        """
        lease = self._start_reading(lease_id, secret, min(timeout_s, _OVERTAKEN_S))
        sent, whole = 0, False
        try:
            while not whole:
                frames, last = self._next_frame(lease_id, lease, sent, self._now() + timeout_s)
                sent += len(frames)
                yield from frames
                whole = last
        finally:
            self._stop_reading(lease_id, lease, whole=whole)

    def renew(self, lease_id: str, secret: str) -> bool:
        """Restart the lease's time: the KV is still wanted. False if the lease is gone."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None or not hmac.compare_digest(lease.secret, secret):
                return False
            lease.claimed = True
            self._restart_clock(lease)
            return True

    def complete_for_s(self, lease_id: str) -> float | None:
        """Return seconds since the last frame came; None if it has not, or the lease is gone."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None or lease.complete_s is None:
                return None
            return self._now() - lease.complete_s

    def release(self, lease_id: str, secret: str) -> bool:
        """Drop the lease, whatever its state. False if it was gone before (idempotent)."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None:
                self._record_gone(lease_id, "released")
                return False
            if not hmac.compare_digest(lease.secret, secret):
                return False
            self._drop(lease_id, "released")
            return True

    def drop(self, lease_id: str) -> None:
        """End a lease that cannot become complete, and fail its readers at once. Idempotent."""
        with self._lock:
            if lease_id in self._leases:
                self._drop(lease_id, "dropped")
            else:
                self._record_gone(lease_id, "dropped")

    def sweep(self) -> int:
        """Drop complete leases past their time that nobody is reading. Returns their number."""
        with self._lock:
            now = self._now()
            late = [
                lease_id
                for lease_id, lease in self._leases.items()
                if lease.expires_s is not None and now >= lease.expires_s and not lease.readers
            ]
            for lease_id in late:
                self._stranded_bytes += self._leases[lease_id].bytes_held
                self._drop(lease_id, "expired")
            return len(late)

    def gauges(self) -> LeaseGauges:
        """Return a consistent snapshot."""
        with self._lock:
            totals = {f"{name}_total": count for name, count in self._totals.items()}
            return LeaseGauges(
                len(self._leases),
                self._bytes_held,
                **totals,
                stranded_bytes_total=self._stranded_bytes,
                staged_bytes_total=self._staged_bytes,
            )

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing is held. False if `timeout_s` passed first."""
        give_up_s = self._now() + timeout_s
        with self._lock:
            while self._leases:
                left_s = give_up_s - self._now()
                if left_s <= 0:
                    return False
                self._emptied.wait(left_s)
            return True

    def _start_reading(self, lease_id: str, secret: str, patience_s: float) -> _Lease:
        with self._lock:
            self._opened.wait_for(
                lambda: lease_id in self._leases or lease_id in self._gone, patience_s
            )
            lease = self._leases.get(lease_id)
            if lease is None or not hmac.compare_digest(lease.secret, secret):
                raise LeaseNotFound(f"lease {lease_id}: {self._gone.get(lease_id, 'unknown')}")
            lease.readers += 1
            lease.claimed = True
            return lease

    def _next_frame(
        self, lease_id: str, lease: _Lease, sent: int, give_up_s: float
    ) -> tuple[list[SealedFrame], bool]:
        with self._lock:
            while self._leases.get(lease_id) is lease:
                if len(lease.frames) > sent or lease.is_complete:
                    frames = lease.frames[sent:]
                    return frames, sent + len(frames) == lease.frames_expected
                left_s = give_up_s - self._now()
                if left_s <= 0:
                    raise LeaseNotFound(f"lease {lease_id}: no new frame in time")
                lease.changed.wait(left_s)
            raise LeaseNotFound(f"lease {lease_id}: {self._gone.get(lease_id, 'gone')}")

    def _stop_reading(self, lease_id: str, lease: _Lease, *, whole: bool) -> None:
        with self._lock:
            lease.readers -= 1
            self._totals["pulled"] += whole
            if self._leases.get(lease_id) is lease:
                self._restart_clock(lease)

    def _complete(self, lease: _Lease) -> None:
        lease.frames_expected = len(lease.frames)
        lease.complete_s = self._now()
        self._restart_clock(lease)

    def _restart_clock(self, lease: _Lease) -> None:
        """Restart the clock; a lease still being computed, or not issued yet, has none."""
        if lease.is_complete and (lease.claimed or lease.issued):
            lasts_s = self._lease_s if lease.claimed else self._unclaimed_s
            lease.expires_s = self._now() + lasts_s

    def _drop(self, lease_id: str, why: str) -> None:
        lease = self._leases.pop(lease_id)
        self._bytes_held -= lease.bytes_held
        self._totals[why] += 1
        self._record_gone(lease_id, why)
        lease.changed.notify_all()
        if not self._leases:
            self._emptied.notify_all()

    def _record_gone(self, lease_id: str, why: str) -> None:
        """Remember a gone lease, so that a late pull or frame fails at once."""
        self._gone[lease_id] = why
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
