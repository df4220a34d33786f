"""A tensor-parallel model (transformers' tp_plan, 2 gloo ranks) against the whole model in one process."""

from __future__ import annotations

import copy
import socket

import numpy as np
import pytest
import tensor_parallel
import torch
from ranks import launch
from tiny import llava_model, save_llava

RANKS = 2


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    found = tensor_parallel.results(copy.deepcopy(llava_model()).eval())
    trained = tensor_parallel.trained(copy.deepcopy(llava_model()), tmp_path_factory.mktemp("one"))
    return found | {"trainer": trained}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    save_llava(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return launch(tensor_parallel.__file__, RANKS, folder, str(port))


def assert_near(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of each norm; a key bias has no gradient but rounding."""
    assert mine.keys() == theirs.keys()
    least = 1e-3 * max(value.norm() for value in theirs.values())
    for name, value in theirs.items():
        assert (mine[name] - value).norm() <= 1e-5 * value.norm().clamp(min=least), name


def test_loss_and_gradients(one, found):
    for rank in found:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(rank["rows"], one["rows"], rtol=1e-6, atol=0)
        assert_near(rank["gradients"], one["gradients"])


def test_scores(one, found):
    for rank in found:
        for (status, image, null), (kind, *others) in zip(rank["scores"], one["scores"], strict=True):
            assert status == kind and status in ("ok", "text_only")
            np.testing.assert_allclose(image, others[0], atol=2e-5)
            assert (null is None) == (others[1] is None)
            if null is not None:
                np.testing.assert_allclose(null, others[1], atol=2e-5)


def test_steps_of_training(one, found):
    assert one["losses"][2] < one["losses"][0]
    for rank in found:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert_near(rank["weights"], one["weights"])


def test_trainer(one, found):
    """Losses, evaluation (each sample once), counts and weights of one process."""
    wanted = one["trainer"]
    assert wanted["logs"][-1]["eval_loss"] < wanted["logs"][0]["eval_loss"]
    for rank in found:
        logs = rank["trainer"]["logs"]
        assert [line.keys() for line in logs] == [line.keys() for line in wanted["logs"]]
        for line, expected in zip(logs, wanted["logs"], strict=True):
            assert line == pytest.approx(expected, rel=1e-5)
        assert_near(rank["trainer"]["weights"], wanted["weights"])
