"""The metrics of held KV."""

from dataclasses import dataclass, field

from specprefill.kv.leases import LeaseGauges
from specprefill.prefill.kv_gauges import KvGauges
from tests.instruments import Instruments


@dataclass
class TwoWorkers:
    carrier: str = "grpc"
    waiting_for_room: int = 1
    max_held_bytes: int = 200
    kv_addresses: tuple = field(default=("a:1", "b:2"))


def worker(**totals):
    counts = {"opened": 0, "pulled": 0, "released": 0, "expired": 0, "dropped": 0, **totals}
    named = {f"{name}_total": count for name, count in counts.items()}
    return LeaseGauges(leases=1, bytes_held=10, stranded_bytes_total=0, **named)


def test_totals_are_summed_over_workers():
    made = Instruments()
    gauges = KvGauges(TwoWorkers(), made)
    gauges.update([worker(expired=2), worker(expired=1)])
    gauges.update([worker(expired=2), worker(expired=3)])
    assert made.total("specprefill_kv_lease_expired_total") == 5
    assert made.total("specprefill_kv_bytes_held") == 20
    assert made.total("specprefill_kv_limit_bytes") == 200
    assert made.total("specprefill_kv_carrier", "grpc") == 1


def test_a_worker_that_does_not_answer_makes_no_total_go_back():
    made = Instruments()
    gauges = KvGauges(TwoWorkers(), made)
    for ranks in ([4, 3], [4], [5, 3], [], [5, 4]):
        gauges.update([worker(released=count) for count in ranks])
    assert made.total("specprefill_kv_leases_released_total") == 9
