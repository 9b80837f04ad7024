"""`specprefill plan`: the decode pool is bound by slots, by memory or by the network."""

import pytest

from specprefill.cli.main import main
from specprefill.control.scaling.values import Pool, Slo
from specprefill.lab.simulation.hardware import ENGINES, KvLimits
from specprefill.lab.simulation.pools import Bound, plans
from specprefill.lab.simulation.trace import Lengths

LENGTHS = Lengths(8000.0, 0.1, 400.0, 0.1)
ROOMY = KvLimits(token_bytes=1e5, replica_bytes=1e13, link_bytes_s=1e12)
RATE = 20.0


def plan(kv, keep=0.5):
    (found,) = plans(RATE, LENGTHS, [keep], ENGINES, Slo(2.5), dict.fromkeys(Pool, 1.0), kv)
    return found


def test_with_memory_and_network_to_spare_slots_bind():
    assert plan(ROOMY).bound is Bound.SLOTS


def test_memory_binds_where_sequences_are_many():
    """By Little's law: as many sequences at once as arrive during one, half an answer each."""
    kv = KvLimits(ROOMY.token_bytes, 5e9, ROOMY.link_bytes_s)
    found = plan(kv)
    assert found.bound is Bound.MEMORY
    decode_s = ENGINES.output_token_s * 400
    held = RATE * decode_s * kv.token_bytes * (4000 + 200)
    assert found.sizes.decode == pytest.approx(held / (0.9 * kv.replica_bytes), rel=0.1)
    assert plan(kv, keep=0.05).sizes.decode < found.sizes.decode


def test_the_network_binds_where_it_is_slow():
    kv = KvLimits(ROOMY.token_bytes, ROOMY.replica_bytes, 5e8)
    found = plan(kv)
    assert found.bound is Bound.NETWORK
    moved = RATE * kv.token_bytes * 4000
    assert found.sizes.decode == pytest.approx(moved / (0.7 * kv.link_bytes_s), rel=0.1)


def test_a_prompt_that_no_replica_holds_does_not_fit():
    kv = KvLimits(1e5, 1e5 * 3000, 1e12)
    assert not plan(kv, keep=0.5).fits
    assert plan(kv, keep=0.1).fits


def test_the_default_machines_are_plausible():
    """No faster than the data sheets, and no carrier beyond what was measured."""
    curves, kv = ENGINES.curves, KvLimits()
    assert 2 * 8e9 / curves.speculate.token_s <= 989e12
    assert 2 * 70e9 / curves.prefill.token_s <= 4 * 989e12
    assert kv.token_bytes / curves.transfer.token_s <= 4 * 2.2e9
    assert kv.replica_bytes < 4 * 80e9


def test_the_command_refuses_what_no_replica_holds(capsys):
    code = main(
        ["plan", "--lengths", "64000:0.1,100", "--keep", "1", "0.5", "--kv", "320", "1", "5"]
    )
    assert code == 2
    assert "--kv" in capsys.readouterr().err


def test_the_command_says_what_binds(capsys):
    assert main(["plan", "--keep", "1", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "decode is bound by" in printed
    assert "network" in printed
