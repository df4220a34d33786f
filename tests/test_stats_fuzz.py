"""Statistics beside VIG and beside the loss against float64, on drawn problems of every kind."""

import pytest
import test_linear_cross_entropy
import test_vig_stats
from cases import DTYPES, Case, runners
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = ({}, {"logit_scale": 0.3}, {"logit_softcap": 20.0}, {"logit_scale": 1.7, "logit_softcap": 30.0})


def drawn_cases(least_rows: int):
    """Problems of any shape, stride, size of logits, share of ignored rows, and options."""
    return st.builds(
        Case,
        name=st.just("drawn"),
        N=st.integers(least_rows, 40),
        D=st.integers(1, 200),
        V=st.integers(1, 400),
        scale=st.sampled_from([0.1, 1.0, 30.0]),
        ignored=st.sampled_from(["none", "some", "all"]),
        options=st.sampled_from(OPTIONS),
        bias=st.booleans(),
        strided=st.booleans(),
    )


def fuzzed(run, backend: str):
    """`run` as a test of drawn arguments; few of them in Triton's interpreter, which takes long."""
    settings(max_examples=12 if backend == "triton" else 60, deadline=None, derandomize=True)(run)()


@pytest.mark.parametrize(("backend", "device"), runners("linear_vig"))
def test_statistics_of_drawn_pairs(backend, device):
    @given(drawn_cases(least_rows=0), st.sampled_from(DTYPES))
    def run(case, dtype):
        test_vig_stats.test_values(case, dtype, backend, device)

    fuzzed(run, backend)


@pytest.mark.parametrize(("backend", "device"), runners("linear_cross_entropy"))
def test_statistics_of_drawn_losses(backend, device):
    @given(drawn_cases(least_rows=1), st.sampled_from(DTYPES), st.sampled_from(["fast", "low"]))
    def run(case, dtype, memory):
        test_linear_cross_entropy.test_statistics_beside_the_loss(case, dtype, memory, backend, device)

    fuzzed(run, backend)
