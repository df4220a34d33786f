"""End-of-turn tokens: supervised by default, kept by selections, left out of the mean where asked."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import tiny
from typer.testing import CliRunner

from vig.cli import app
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.selection.select import select
from vig.store.rows import METADATA_KEY, SCORE_SCHEMA
from vig.store.scores import StoreError, read_scores, score_metadata

EOS = 2
ROWS = [  # (token ids, positions, VIG of each)
    ([7, 8, EOS, 9, EOS], [0, 1, 2, 0, 1], [3.0, 0.5, 0.0, 2.0, 0.0]),
    ([7, EOS, 8, EOS], [0, 1, 2, 3], [1.0, 4.0, 0.25, 0.0]),  # an EOS within the answer is a token like any
    ([8, EOS], [0, 1], [0.1, 0.0]),
    ([7, 9], [0, 1], [2.0, 0.2]),  # cut off before its end
]
VIG = [np.mean(vig) for _, _, vig in ROWS]


def scores(given=ROWS, **metadata) -> pa.Table:
    rows = [
        {
            "key": f"d.json#{n}", "id": str(n), "source": "d.json", "status": "ok", "n_tokens": len(ids),
            "vig": float(np.mean(vig)), "nll_image": 1.0, "nll_null": 1.0 + float(np.mean(vig)),
            "token_ids": ids, "positions": positions,
            "token_nll_image": [1.0] * len(ids), "token_nll_null": [1.0 + value for value in vig],
        }
        for n, (ids, positions, vig) in enumerate(given)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, SCORE_SCHEMA)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({"model": "m", **metadata})})


def kept(selection) -> list[list[bool] | None]:
    rows = [row for batch in selection.batches() for row in batch.to_pylist()]
    return [row["token_keep"] if row["keep"] else None for row in rows]


def test_kept_samples_keep_the_tokens_that_end_their_turns():
    chosen = select(scores(stop_ids=[EOS, 5]), p=75)
    assert chosen.tau == pytest.approx(np.percentile(VIG, 25))
    assert kept(chosen) == [
        [True, False, True, True, True],
        [True, True, False, True],
        None,
        [True, False],
    ]
    assert chosen.metadata["selection"]["stop_tokens"] == "keep"
    assert chosen.counts["tokens_kept"] == 8 and chosen.counts["samples_kept"] == 3


@pytest.mark.parametrize("old", [{}, {"stop_ids": [EOS]}])
def test_the_papers_rule_and_old_scores(old):
    """Scores that do not say which tokens end turns are selected from as before."""
    chosen = select(scores(**old), p=75, stop_tokens="select" if old else "keep")
    assert kept(chosen) == [
        [True, False, False, True, False],
        [True, True, False, False],
        None,
        [True, False],
    ]
    assert "stop_tokens" not in chosen.metadata["selection"]


@pytest.mark.parametrize("seed", range(5))
def test_the_random_level_keeps_them_and_as_many_tokens_as_both(seed):
    assert kept(select(scores(stop_ids=[EOS]), p=75, level="token"))[2] is None
    chosen = select(scores(stop_ids=[EOS]), p=75, level="random", seed=seed)
    rows = kept(chosen)
    assert chosen.counts["samples_kept"] == 3 == sum(tokens is not None for tokens in rows)
    wanted = min(8, sum(len(tokens) for tokens in rows if tokens))
    assert sum(sum(tokens or ()) for tokens in rows) == wanted == chosen.counts["tokens_kept"]
    assert bool(chosen.warnings) == (wanted < 8)
    for tokens, (ids, positions, _) in zip(rows, ROWS, strict=True):
        ends = [n for n, id in enumerate(ids) if id == EOS and [*positions, 0][n + 1] == 0]
        assert tokens is None or all(tokens[n] for n in ends)


def many(count: int, turns: int) -> pa.Table:
    """Samples of `turns` answers, each of 0 to 5 words and an end-of-turn token."""
    rng = np.random.default_rng(count)
    rows = []
    for n in range(count):
        lengths = [rng.integers(0, 6) + 1 for _ in range(turns)]
        ids = [id for length in lengths for id in [*rng.integers(5, 99, length - 1).tolist(), EOS]]
        positions = [place for length in lengths for place in range(length)]
        vig = np.where(np.array(ids) == EOS, 0.0, rng.normal(0.5, 1, len(ids)))
        rows.append(
            {
                "key": f"d.json#{n}", "id": str(n), "source": "d.json", "n_tokens": len(ids), "token_ids": ids,
                "positions": positions, "token_nll_image": [1.0] * len(ids), "nll_image": 1.0,
                **({"status": "ok", "vig": float(vig.mean()), "nll_null": 1 + float(vig.mean()),
                    "token_nll_null": (1 + vig).tolist()} if n % 5 else {"status": "text_only"}),
            }
        )  # fmt: skip
    table = pa.Table.from_pylist(rows, SCORE_SCHEMA)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({"stop_ids": [EOS]})})


@pytest.mark.parametrize("count, turns", [(60, 3), (500, 1), (17_000, 2)])  # more than a chunk of draws
def test_the_random_level_draws_words_beside_them(count, turns):
    table = many(count, turns)
    both = select(table, p=40)
    for seed in range(2):
        chosen = select(table, p=40, level="random", seed=seed)
        assert chosen.counts == both.counts
    paper = select(table, p=40, level="random", stop_tokens="select")
    assert paper.counts == select(table, p=40, stop_tokens="select").counts


def test_a_random_level_of_more_ends_than_tokens_says_so():
    """VIG keeps an answer of one word; the sample drawn in its place may end more turns than that has tokens."""
    rows = [([7, EOS], [0, 1], [5.0, 0.0]), ([8, EOS] * 4, [0, 1] * 4, [0.1, 0.0] * 4)]
    drawn = [select(scores(rows, stop_ids=[EOS]), p=1, level="random", seed=seed) for seed in range(8)]
    said = [
        any("4 end-of-turn tokens, which are kept in any case" in line for line in one.warnings)
        for one in drawn
    ]
    assert [one.counts["tokens_kept"] for one in drawn] == [4 if more else 2 for more in said]
    assert len(set(said)) == 2


def test_the_mean_over_content_leaves_them_out():
    content = [(3.0 + 0.5 + 2.0) / 3, (1.0 + 4.0 + 0.25) / 3, 0.1, 1.1]
    for clip in (None, -30.0):
        chosen = select(scores(stop_ids=[EOS]), p=50, mean="content", clip=clip)
        assert chosen.tau == pytest.approx(np.percentile(content, 50))
        assert [tokens is not None for tokens in kept(chosen)] == [True, True, False, False]
        assert chosen.metadata["selection"]["mean"] == "content"
    with pytest.raises(StoreError, match="do not say which tokens end turns"):
        select(scores(), mean="content")
    for options, known in (({"mean": "best"}, "all, content"), ({"stop_tokens": "no"}, "keep, select")):
        with pytest.raises(ValueError, match=f"is not one of {known}"):
            select(scores(), **options)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A checkpoint whose template marks the answers alone, and two records."""
    folder = tmp_path_factory.mktemp("road")
    template = tiny.MARKED.replace(
        "+ eos_token }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}"
    )
    tiny.save_llava(folder / "model", template)
    records = []
    for number in range(4):
        tiny.save_picture(folder / f"{number}.png", number)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"red {number}"}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


def call(*words, code=0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def test_the_end_of_turn_is_an_answer_token_by_default(road, tmp_path):
    call("score", road / "model", road / "data.json", "-o", tmp_path / "scores")
    assert all(
        row["token_ids"][-1] == EOS and len(row["token_ids"]) == 6 for row in rows_of(tmp_path / "scores")
    )
    metadata = score_metadata(tmp_path / "scores")
    assert metadata["end_of_turn"] == "add" and EOS in metadata["stop_ids"]
    call("select", tmp_path / "scores", "--p", "50", "-o", tmp_path / "selection")
    call("select", tmp_path / "scores", "--p", "50", "-o", tmp_path / "paper", "--stop-tokens", "select")
    call("select", tmp_path / "scores", "--p", "50", "-o", tmp_path / "content", "--mean", "content")
    assert "mean 'most' is not one of" in " ".join(
        call("select", tmp_path / "scores", "-o", tmp_path / "x", "--mean", "most", code=2)
        .replace("│", " ")
        .split()
    )


def test_a_folder_goes_on_with_the_choice_that_it_recorded(road, tmp_path):
    """As folders were written whose manifest says "template", and nothing of stop tokens."""
    first = ("score", road / "model", road / "data.json", "--window", "2", "-o", tmp_path / "scores")
    call(*first, "--end-of-turn", "template")
    (tmp_path / "scores" / "scores-00001.parquet").unlink()
    manifest = json.loads((tmp_path / "scores" / "_manifest.json").read_text())
    del manifest["settings"]["stop_ids"], manifest["settings"]["data_format"]
    manifest["shards"].pop("1")
    (tmp_path / "scores" / "_manifest.json").write_text(json.dumps(manifest))
    call(*first)
    assert [len(row["token_ids"]) for row in rows_of(tmp_path / "scores")] == [5] * 4
    assert "end_of_turn: the folder has 'template', this run has 'drop'" in str(
        CliRunner().invoke(app, [str(word) for word in (*first, "--end-of-turn", "drop")]).exception
    )
    scorer = Scorer(str(road / "model"))
    score_dataset(scorer, road / "data.json", tmp_path / "scores", window=2)
    assert scorer.encoder.end_of_turn == "template"
