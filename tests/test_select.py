"""Selection against a plain loop over Python lists."""

import math
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from vig.data.files import FolderInUse, StoreError, lock_folder
from vig.selection.rule import token_draws
from vig.selection.select import select
from vig.store import selections
from vig.store.rows import ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter, count_rows, read_scores, write_shard
from vig.store.selections import read_selection, selection_metadata

SETTINGS = {"model": "m", "null": {"kind": "blur", "params": {}}}


def block(rows: int, seed: int, prefix: str = "d.json") -> ScoreBlock:
    """Mixed rows: one in seven text-only, one in eleven failed; values on a coarse grid, so that ties happen."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, rows)
    total = lengths.sum()
    image = rng.integers(0, 40, total) / 8
    null = image + rng.integers(-8, 24, total) / 8
    status = ["text_only" if i % 7 == 3 else "error: lost" if i % 11 == 5 else "ok" for i in range(rows)]
    keys = [f"{prefix}#{seed}-{i}" for i in range(rows)]
    ids = rng.integers(0, 99, total)
    return ScoreBlock(keys, keys, ["s"] * rows, status, lengths, ids, np.arange(total), image, null)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    with ScoreWriter(folder, SETTINGS) as writer:
        for window, size in enumerate([700, 1, 300, 450]):
            writer.write(window, block(size, window))
        writer.mark_complete()
    return folder


def plain(folder, p, level, clip=None, tau_floor=None):
    """The definition, a sample at a time."""
    records = [record for batch in read_scores(folder) for record in batch.to_pylist()]

    def token_vig(record):
        low = math.inf if clip is None else -clip
        pairs = zip(record["token_nll_null"], record["token_nll_image"], strict=True)
        return [min(null, low) - min(image, low) for null, image in pairs]

    sample_vig = {r["key"]: sum(token_vig(r)) / r["n_tokens"] for r in records if r["status"] == "ok"}
    ordered = sorted(sample_vig.values())
    place = (100 - p) / 100 * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    tau = ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    tau = max(tau, tau_floor if tau_floor is not None else tau)
    chosen = {}
    for record in records:
        key, n = record["key"], record["n_tokens"]
        if record["status"] == "text_only":
            chosen[key] = (True, [True] * n)
        elif record["status"] != "ok":
            chosen[key] = (False, [])
        else:
            sample = sample_vig[key] >= tau
            token = [value >= tau for value in token_vig(record)]
            if level == "both":
                chosen[key] = (sample, [sample and passed for passed in token])
            elif level == "sample":
                chosen[key] = (sample, [sample] * n)
            else:
                chosen[key] = (any(token), token)
    return tau, chosen


def as_dict(batches) -> dict:
    rows = (row for batch in batches for row in batch.to_pylist())
    return {row["key"]: (row["keep"], row["token_keep"] or []) for row in rows}


@pytest.mark.parametrize("level", ["both", "sample", "token"])
@pytest.mark.parametrize(
    "p, clip, tau_floor",
    [(70, None, None), (30, None, None), (100, None, None), (70, -2.0, None), (90, None, 1.5)],
)
def test_equals_the_definition(scores, tmp_path, level, p, clip, tau_floor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selection = select(scores, p, level=level, clip=clip, tau_floor=tau_floor, out=tmp_path)
    tau, expected = plain(scores, p, level, clip, tau_floor)
    assert selection.tau == pytest.approx(tau, abs=1e-12)
    assert as_dict(selection.batches()) == expected
    table = read_selection(tmp_path)
    assert {key: (entry.keep, entry.token_keep.tolist()) for key, entry in table.items()} == expected
    counts = selection_metadata(tmp_path)["selection"]["counts"]
    assert counts == selection.counts
    ok = {r["key"] for b in read_scores(scores) for r in b.to_pylist() if r["status"] == "ok"}
    assert counts["samples_total"] == len(ok) and counts["samples_kept"] == sum(
        expected[key][0] for key in ok
    )
    assert counts["tokens_kept"] == sum(sum(expected[key][1]) for key in ok)
    assert counts["text_only"] + counts["errors"] + counts["samples_total"] == len(expected)
    if p == 70 and clip is None and level != "token":
        assert counts["samples_kept"] / counts["samples_total"] == pytest.approx(0.7, abs=0.02)


def test_metadata_holds_the_scores_own_and_the_choice(scores, tmp_path):
    selection = select(scores, 60, level="token", out=tmp_path, seed=4)
    kept = selection_metadata(tmp_path)
    assert kept["model"] == "m" and kept["null"]["kind"] == "blur"
    assert {name: kept["selection"][name] for name in ("p", "level", "tau", "seed")} == {
        "p": 60, "level": "token", "tau": selection.tau, "seed": 4,
    }  # fmt: skip
    assert pq.read_schema(tmp_path / "selection-00000.parquet").names == list(
        selection.table().table.column_names
    )
    assert any("tau =" in line for line in selection.summary())
    counts = selection.counts
    kept, every = (counts[name] + counts["text_only_tokens"] for name in ("tokens_kept", "tokens_total"))
    assert counts["text_only_tokens"] and any(
        f" {kept:,} of {every:,} (" in line for line in selection.summary()
    )


def test_random_keeps_the_same_counts_and_is_stable(scores):
    both = select(scores, 40)
    chosen = {seed: select(scores, 40, level="random", seed=seed) for seed in (0, 1)}
    for selection in chosen.values():
        assert selection.counts == both.counts and selection.tau == both.tau
    first, second = (as_dict(chosen[seed].batches()) for seed in (0, 1))
    assert first != second and first != as_dict(both.batches())
    kept = [key for key in first if first[key][0]]
    assert 0.2 < len(set(kept) & {key for key in second if second[key][0]}) / len(kept) < 0.6
    table = pa.Table.from_batches(read_scores(scores))  # the same samples in one table, in another order
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    assert as_dict(select(shuffled, 40, level="random").batches()) == first
    assert as_dict(select(shuffled, 40).batches()) == as_dict(both.batches())


def test_random_tokens_are_uniform_over_places():
    draws = np.arange(20_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    kept = (token_draws(draws, np.full(20_000, 10)) < 2**62).reshape(-1, 10)
    assert np.abs(kept.mean(0) - 0.25).max() < 0.015
    assert np.abs(np.corrcoef(kept.T) - np.eye(10)).max() < 0.04


def test_float32_rounding_of_tau_does_not_matter():
    """A token a hair under tau in float64, equal to it in float32, stays out."""
    value = np.float32(0.1)
    block = ScoreBlock(
        *(["a", "b"], ["a", "b"], ["s", "s"], ["ok", "ok"], np.array([2, 1])),
        *(np.arange(3), np.arange(3), [0, 0, 0], [value, 9.0, -1.0]),
    )
    selection = select(block.table(), 100, tau_floor=float(value) + 1e-9, level="token")
    assert selection.tau == float(value) + 1e-9 and selection.tau_p == -1
    assert as_dict(selection.batches())["a"][1] == [False, True]


def test_low_tau_unfinished_scores_and_noise_are_said(tmp_path):
    zeros = np.zeros(4)
    flat = ScoreBlock(
        list("abcd"), list("abcd"), ["s"] * 4, ["ok"] * 4, np.ones(4), zeros, zeros, zeros, zeros
    )
    passing = r"4 of 4 \(100.0 %\) of the answer tokens with an image are kept\. --tau-floor"
    with pytest.warns(UserWarning, match=passing):
        selection = select(flat.table())
    assert selection.counts["tokens_kept"] == 4 and any(
        "warning: tau" in line for line in selection.summary()
    )
    with pytest.warns(UserWarning, match=r"0 of 4 \(0.0 %\) of the answer tokens"):
        assert select(flat.table(), tau_floor=1e-3).counts["tokens_kept"] == 0
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, block(50, 0))
        writer.note("noise_floor", 40.0)
    with pytest.warns(UserWarning) as said:
        select(tmp_path)
    assert "unfinished" in str(said[0].message) and "noise floor, 40" in str(said[1].message)
    assert "this model barely uses the image" in str(said[2].message)
    with pytest.warns(UserWarning, match=r"p = 0.7 keeps 0.7 % .* Was --p 70 meant\?"):
        select(block(50, 0).table(), 0.7)


def test_a_score_that_is_no_number_counts_as_not_scored():
    table = block(40, 0).table()
    vig = table["vig"].to_pylist()
    lost = next(row for row, value in enumerate(vig) if value is not None)
    for value in (math.nan, math.inf, None):
        vig[lost] = value
        odd = table.set_column(table.column_names.index("vig"), "vig", pa.array(vig, pa.float64()))
        selection = select(odd, 50)
        assert selection.counts["errors"] == select(table, 50).counts["errors"] + 1
        assert as_dict(selection.batches())[table["key"][lost].as_py()] == (False, [])
        assert math.isfinite(selection.tau)


def test_text_only_data_has_no_tau():
    text = ScoreBlock(
        ["a"], ["a"], ["s"], ["text_only"], np.array([2]), np.ones(2), np.ones(2), np.ones(2), np.ones(2)
    )
    with pytest.warns(UserWarning, match="no scored sample has an image"):
        selection = select(text.table(), level="random")
    assert selection.tau is None and selection.table()["a"].token_keep.tolist() == [True, True]
    assert selection.summary()


def test_no_rows_at_all_is_still_a_selection(tmp_path):
    with pytest.warns(UserWarning, match="no scored sample"):
        select(ScoreBlock.from_rows([]).table(), out=tmp_path)
    assert len(read_selection(tmp_path)) == 0


def test_a_sample_given_twice_is_refused(scores):
    with pytest.raises(StoreError, match=r"'d.json#1-0' is twice"):
        select([scores, scores / "scores-00001.parquet"])


def test_progress_runs_to_one(scores):
    for level in ("both", "random"):
        shares = []
        select(scores, level=level, progress=shares.append)
        assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 2


def test_settings_without_sense_are_refused(scores):
    for arguments, message in (
        ({"p": 0}, "p is the percentage.*got 0"),
        ({"p": 101}, "got 101"),
        ({"level": "half"}, "level 'half' is not one of both, sample, token, random"),
        ({"clip": 0}, "log-probability in nats, below 0.*got 0"),
        ({"clip": 0.01}, "log-probability in nats, below 0.*got 0.01"),
        ({"tau_floor": math.nan}, "got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            select(scores, **arguments)


def test_an_interrupted_write_leaves_the_old_selection(scores, tmp_path):
    select(scores, 70, out=tmp_path)
    before = (tmp_path / "selection-00000.parquet").read_bytes()

    def stop(share):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(scores, 30, out=tmp_path, overwrite=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["selection-00000.parquet"]
    assert (tmp_path / "selection-00000.parquet").read_bytes() == before


def test_two_never_write_one_folder_and_what_a_killed_one_left_goes(scores, tmp_path):
    out = tmp_path / "selection"
    with lock_folder(out), pytest.raises(FolderInUse, match="already open for writing"):
        select(scores, 70, out=out)
    assert not out.exists()
    out.mkdir()
    (out / ".selection-00000.parquet.17.tmp").write_bytes(b"half")
    select(scores, 70, out=out)
    assert [path.name for path in out.iterdir()] == ["selection-00000.parquet"]


def test_a_selection_that_was_killed_between_its_files_is_refused(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(selections, "FILE_TOKENS", 500)
    select(scores, 70, out=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1 and len(read_selection(tmp_path)) == count_rows(scores)
    files[-1].unlink()
    with pytest.raises(
        StoreError, match=r"holds [0-9,]+ of [0-9,]+ rows: .*cut short. Run `vig select` again"
    ):
        read_selection(tmp_path)
    assert len(read_selection(files[0])) < count_rows(scores)  # one file, asked for by name
    select(scores, 70, out=tmp_path)
    assert len(read_selection(tmp_path)) == count_rows(scores)


def test_random_keeps_nothing_where_nothing_passes(scores):
    selection = select(scores, p=70, level="random", tau_floor=1e6)
    assert selection.counts["samples_kept"] == 0 == selection.counts["tokens_kept"]
    kept = as_dict(selection.batches())
    statuses = {r["key"]: r["status"] for b in read_scores(scores, ["key", "status"]) for r in b.to_pylist()}
    assert {key for key, (keep, _) in kept.items() if keep} == {
        k for k, s in statuses.items() if s == "text_only"
    }


def test_scores_of_two_data_sets_are_one_choice(tmp_path):
    for name in ("a", "b"):
        settings = SETTINGS | {"data_fingerprint": name, "limit": len(name), "window": 8}
        with ScoreWriter(tmp_path / name, settings) as writer:
            writer.write(0, block(50, ord(name), f"{name}.json"))
            writer.mark_complete()
    both = select([tmp_path / "a", tmp_path / "b"], p=50)
    assert both.counts["samples_total"] == sum(
        select(tmp_path / name, p=50).counts["samples_total"] for name in ("a", "b")
    )


def test_a_shard_that_went_missing_is_said(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        for window in range(8):
            writer.write(window, block(20, window))
        writer.mark_complete()
    assert not any("missing" in line for line in select(tmp_path, p=50).warnings)
    for window in range(1, 8):
        (tmp_path / f"scores-{window:05d}.parquet").unlink()
    (line,) = [line for line in select(tmp_path, p=50).warnings if "missing" in line]
    assert "scores-00001.parquet" in line and "and 2 more" in line and "vig score" in line


def test_a_folder_of_scores_takes_no_selection(tmp_path):
    write_shard(tmp_path, 0, [ScoreRow("a#0", "0", "a", "ok", [1], [0], [1.0], [2.0])], {})
    with pytest.raises(
        StoreError,
        match=r"is a folder of scores, which .* wrote\. Give another output folder",
    ):
        select(tmp_path, 50, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scores-00000.parquet"]


def of_sources(tmp_path, folder="scores"):
    """Three sources, the second with a VIG that no tau over all samples would keep; each in two windows."""
    with ScoreWriter(tmp_path / folder, SETTINGS) as writer:
        for window in range(6):
            part = block(150, window, f"{'abc'[window % 3]}.json")
            part.source = ["abc"[window % 3]] * 150
            if window % 3 == 1:
                part.token_nll_null = (
                    part.token_nll_image + (part.token_nll_null - part.token_nll_image) / 64 - 1
                )
            writer.write(window, part)
        writer.mark_complete()
    return tmp_path / folder


@pytest.mark.parametrize("level", ["both", "sample", "token"])
def test_by_source_is_select_within_each_source(tmp_path, level):
    """Against `select` of each source alone, a table of its rows."""
    scores = of_sources(tmp_path)
    table = pa.Table.from_batches(read_scores(scores))
    chosen = select(scores, 40, level=level, by="source")
    found, sources = chosen.table(), {row["source"]: row for row in chosen.sources}
    assert set(sources) == {"a", "b", "c"}
    for name, row in sources.items():
        alone = select(table.filter(pc.equal(table["source"], name)), 40, level=level)
        assert row["tau"] == alone.tau
        assert {
            count: row[count] for count in ("samples_total", "samples_kept", "tokens_total", "tokens_kept")
        } == {
            count: alone.counts[count]
            for count in ("samples_total", "samples_kept", "tokens_total", "tokens_kept")
        }
        for key, entry in alone.table().items():
            assert (
                found[key].keep == entry.keep and found[key].token_keep.tolist() == entry.token_keep.tolist()
            )
    assert chosen.counts["samples_kept"] == sum(row["samples_kept"] for row in sources.values())
    assert chosen.tau == min(row["tau"] for row in sources.values())
    whole = select(scores, 40, level=level)
    keys = table.filter(pc.and_(pc.equal(table["source"], "b"), pc.equal(table["status"], "ok")))[
        "key"
    ].to_pylist()
    taken = {
        name: sum(one.table()[key].keep for key in keys) for name, one in (("all", whole), ("by", chosen))
    }
    assert level == "token" or (taken["all"] == 0 and taken["by"] > 0.3 * len(keys))


def test_by_source_is_reported_and_recorded(tmp_path):
    scores = of_sources(tmp_path)
    with pytest.warns(UserWarning, match=r"source b: tau = -\d.\d+ is at or under 0.001"):
        chosen = select(scores, 40, by="source", out=tmp_path / "selection")
    line = next(line for line in chosen.figures() if line.startswith("  b "))
    row = chosen.sources[1]
    assert f"samples {row['samples_kept']} of {row['samples_total']}" in line
    assert "one a source, the lowest -" in chosen.figures()[0]
    stored = selection_metadata(tmp_path / "selection")["selection"]
    assert stored["by"] == "source" and stored["sources"] == chosen.sources
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        select(scores, 40, by="source", out=tmp_path / "selection")  # the same settings: replaced
        with pytest.raises(StoreError, match=r"selection\.by: the folder has 'source', this run has None"):
            select(scores, 40, out=tmp_path / "selection")
    floor = select(scores, 40, by="source", tau_floor=0.5)
    assert min(row["tau"] for row in floor.sources) == 0.5


def test_by_what_is_not_known_is_refused(scores):
    with pytest.raises(ValueError, match="by = 'size', expected"):
        select(scores, by="size")
    with pytest.raises(ValueError, match="level random draws from all samples alike"):
        select(scores, by="source", level="random")
