"""The arithmetic of a prefill, beside sums over every query and key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.flops import AttentionLayers, PrefillFlops, expected_gain

SIZES = st.integers(1, 300)


@given(tokens=SIZES, window=st.none() | SIZES, layers=st.integers(1, 4))
def test_attention_counts_each_pair_of_a_query_and_a_key_it_sees(tokens, window, layers):
    pairs = sum(
        1 for query in range(tokens) for key in range(query + 1)
        if window is None or query - key < window
    )  # fmt: skip
    assert AttentionLayers(layers, 10, window).flops(tokens) == 4 * layers * 10 * pairs


def test_weights_count_twice_a_token():
    assert PrefillFlops(1000, ()).flops(7) == 14_000


def test_without_attention_the_gain_is_the_papers():
    gain = expected_gain(PrefillFlops(8000, ()), PrefillFlops(1000, ()), 0.25, 4096)
    assert gain.kept_tokens == 1024
    assert gain.scoring == pytest.approx(0.125)
    assert gain.main == pytest.approx(0.25)
    assert gain.speedup == pytest.approx(1 / (0.25 + 0.125))


@given(keep=st.floats(0.01, 1.0), tokens=st.integers(100, 100_000))
def test_attention_makes_kept_tokens_cheaper_than_their_share(keep, tokens):
    main = PrefillFlops(10**6, (AttentionLayers(4, 512),))
    gain = expected_gain(main, PrefillFlops(10**5, ()), keep, tokens)
    assert gain.main <= gain.kept_tokens / tokens + 1e-9


def test_a_windowed_draft_scores_long_prompts_at_less():
    main = PrefillFlops(10**6, (AttentionLayers(4, 512),))
    plain = PrefillFlops(10**5, (AttentionLayers(2, 256),))
    windowed = PrefillFlops(10**5, (AttentionLayers(2, 256, window=128),))
    assert expected_gain(main, windowed, 0.3, 1 << 17).scoring < (
        expected_gain(main, plain, 0.3, 1 << 17).scoring
    )
