"""Shards, manifest, lock, resume, retry, and the mapping that training reads."""

import errno
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from vig.data import files
from vig.data.files import FolderInUse, StoreError
from vig.store import selections
from vig.store.folder import SettingsDiffer
from vig.store.rows import CACHED_ROWS, SCORE_SCHEMA, ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter, read_scores, score_metadata, unfinished, write_shard
from vig.store.selections import SELECTION_SCHEMA, hash_keys, read_selection, write_selection

SETTINGS = {"model": "m", "null": {"kind": "blur", "params": {"sigma": 0.1}}, "dtype": "float32"}


def row(key: str, status: str = "ok", n: int = 3, seed: int = 0) -> ScoreRow:
    values = np.random.default_rng(seed).gamma(1, 1, (2, n)).astype(np.float32)
    if status == "text_only":
        return ScoreRow(key, "same id", "web", status, range(n), range(n), values[0])
    if status != "ok":
        return ScoreRow(key, "same id", "web", status)
    return ScoreRow(key, "same id", "web", status, range(n), range(n), *values)


def rows_of(folder) -> list[dict]:
    return [record for batch in read_scores(folder) for record in batch.to_pylist()]


def test_rows_come_back_and_sample_values_are_means_over_tokens(tmp_path):
    sent = [
        row("a#0", n=5, seed=1),
        row("a#1", "text_only", 2),
        row("a#2", "error: no such file"),
        row("a#3", n=1),
    ]
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        entry = writer.write(0, sent)
        writer.mark_complete()
    assert (entry["rows"], entry["errors"], entry["text_only"], entry["tokens"]) == (4, 1, 1, 8)
    got = rows_of(tmp_path)
    assert [record["key"] for record in got] == ["a#0", "a#1", "a#2", "a#3"]
    for original, record in zip(sent, got, strict=True):
        assert record["status"] == original.status and record["n_tokens"] == original.n_tokens
        assert (record["vig"] is None) == (original.status != "ok")
        if original.status == "ok":
            assert record["token_nll_null"] == list(original.token_nll_null)
            null, image = np.float64(original.token_nll_null), np.float64(original.token_nll_image)
            assert record["vig"] == pytest.approx((null - image).mean(), abs=1e-15) == original.vig
            assert record["nll_image"] == pytest.approx(image.mean(), abs=1e-15)
    assert got[1]["nll_image"] is not None and got[1]["nll_null"] is None and got[1]["token_nll_null"] is None
    assert got[2]["token_ids"] is None and got[2]["nll_image"] is None
    schema = pq.read_schema(tmp_path / "scores-00000.parquet")
    assert schema.remove_metadata() == SCORE_SCHEMA
    assert json.loads(schema.metadata[b"vig"])["null"]["params"]["sigma"] == 0.1
    assert score_metadata(tmp_path)["model"] == "m" and not unfinished(tmp_path)


def test_equal_passes_give_exactly_zero_and_columns_equal_rows():
    nll = np.float32([0.1, 0.7, 3.3])
    block = ScoreBlock(["k"], ["i"], ["s"], ["ok"], np.array([3]), np.arange(3), np.arange(3), nll, nll)
    assert block.table()["vig"].to_pylist() == [0.0]
    assert block.table().equals(
        ScoreBlock.from_rows([ScoreRow("k", "i", "s", "ok", range(3), range(3), nll, nll)]).table()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("status", ["ok", "text_only"])
def test_values_that_are_not_finite_become_an_error_row_alone(bad, status):
    rows = [row("a"), row("b", status), row("c")]
    rows[1].token_nll_image = [bad, 0.5, np.nan]  # the first token of its row, and a later one
    table = ScoreBlock.from_rows(rows).table()
    a, b, c = table.to_pylist()
    assert (
        b["status"].startswith(f"error: answer token 0: nll_image {bad}")
        and b["vig"] is None
        and b["n_tokens"] == 0
    )
    assert b["token_ids"] is None and a["status"] == c["status"] == "ok"
    assert c["token_nll_image"] == list(rows[2].token_nll_image)


def test_nothing_is_read_of_the_null_pass_that_a_text_only_row_lacks():
    rows = [row("a"), row("b", "text_only"), row("c")]
    block = ScoreBlock.from_rows(rows)
    expected = block.table()
    block.token_nll_null[3:6] = np.nan
    assert block.table().equals(expected) and expected["status"].to_pylist() == ["ok", "text_only", "ok"]


def test_a_row_has_the_same_bits_among_many_others_and_alone_as_arrays_and_as_lists():
    kinds = ("ok", "text_only", "ok", "error: x", "ok")
    rows = [row(str(place), kinds[place % 5], 1 + place % 40, place) for place in range(CACHED_ROWS + 44)]
    lists = [
        ScoreRow(one.key, one.id, one.source, one.status, *(np.asarray(values).tolist() for values in (
            one.token_ids, one.positions, one.token_nll_image, one.token_nll_null)))
        for one in rows
    ]  # fmt: skip
    table = ScoreBlock.from_rows(rows).table()
    assert table.equals(ScoreBlock.from_rows(lists).table())
    alone = [ScoreBlock.from_rows([one]).table() for one in rows]
    assert table.equals(pa.concat_tables(alone).combine_chunks())


def test_bad_blocks_are_refused_with_the_key():
    with pytest.raises(ValueError, match=r"a#7: status 'fine'"):
        ScoreBlock.from_rows([ScoreRow("a#7", "i", status="fine")]).table()
    with pytest.raises(ValueError, match=r"a#8 \(ok\): 2 token_ids"):
        ScoreBlock.from_rows([ScoreRow("a#8", "i", "", "ok", [1, 2], [0, 1], [0.5], [0.5, 1])])
    with pytest.raises(ValueError, match=r"expected positions \(3,\).*got \(2,\)"):
        ScoreBlock(
            ["k"], ["i"], ["s"], ["ok"], np.array([3]), np.arange(3), np.arange(2), np.ones(3), np.ones(3)
        ).table()
    nothing = ScoreBlock.from_rows([ScoreRow("k", "i"), ScoreRow("l", "i", status="text_only")])
    assert nothing.table()["status"].to_pylist() == ["error: no answer tokens"] * 2
    assert len(ScoreBlock.from_rows([]).table()) == 0


def test_resume_lists_finished_windows_and_drops_leftovers(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
        writer.write(2, [row("a#2"), row("a#3", "error: x")])
        with pytest.raises(StoreError, match="window 0 is already finished"):
            writer.write(0, [row("a#0")])
    assert "unfinished (2 windows" in unfinished(tmp_path)[0]
    (tmp_path / ".scores-00003.parquet.1.tmp").write_bytes(b"half")
    write_shard(tmp_path, 5, [row("a#5")], SETTINGS)  # renamed, then killed ahead of the manifest
    (tmp_path / "scores-00006.parquet").write_bytes(b"PAR1 torn")
    with ScoreWriter(tmp_path, {**SETTINGS, "library_version": "9.9"}) as writer:
        assert sorted(writer.finished) == [0, 2, 5]
        assert writer.counts() == {"rows": 4, "errors": 1, "text_only": 0, "tokens": 9}
        assert writer.failed() == {2: ["a#3"]}
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "scores-00000.parquet").unlink()
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        assert sorted(writer.finished) == [2, 5]


def test_a_complete_folder_that_lost_a_shard_is_unfinished_until_it_is_scored_again(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        for window in range(2):
            writer.write(window, [row(f"a#{window}")])
        writer.mark_complete()
    (tmp_path / "scores-00001.parquet").unlink()
    ScoreWriter(tmp_path, SETTINGS).close()  # killed before the window was there again
    assert "unfinished (1 windows" in unfinished(tmp_path)[0]
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(1, [row("a#1")])
        writer.mark_complete()
    assert not unfinished(tmp_path)
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(2, [row("a#2")])  # more than there was
    assert "unfinished (3 windows" in unfinished(tmp_path)[0]


def test_a_shard_shorter_than_the_manifest_says_is_redone(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
    path = tmp_path / "scores-00000.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        assert not writer.finished
        writer.write(0, [row("a#0")])
    assert len(rows_of(tmp_path)) == 1


def test_other_settings_are_refused_with_the_difference(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
    other = {**SETTINGS, "dtype": "bfloat16", "null": {"kind": "blur", "params": {"sigma": 0.2}}}
    with pytest.raises(SettingsDiffer) as refusal:
        ScoreWriter(tmp_path, other)
    assert sorted(refusal.value.differences) == [
        ("dtype", "float32", "bfloat16"),
        ("null.params.sigma", 0.1, 0.2),
    ]
    assert "null.params.sigma: the folder has 0.1, this run has 0.2" in str(refusal.value)
    with pytest.raises(SettingsDiffer, match="clip: the folder has None, this run has 1"):
        ScoreWriter(tmp_path, {**SETTINGS, "clip": 1})
    (tmp_path / "_manifest.json").unlink()  # the shards know too
    with pytest.raises(SettingsDiffer):
        ScoreWriter(tmp_path, other)
    ScoreWriter(tmp_path, SETTINGS).close()
    (tmp_path / "_manifest.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        ScoreWriter(tmp_path, SETTINGS)


def test_settings_bind_from_the_first_shard_on(tmp_path):
    ScoreWriter(tmp_path, {**SETTINGS, "dtype": "float16"}).close()  # stopped before anything was scored
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
    with pytest.raises(SettingsDiffer):
        ScoreWriter(tmp_path, {**SETTINGS, "dtype": "float16"})


def test_readers_refuse_shards_of_different_settings_but_join_shards_of_one_job_array(tmp_path):
    for name, settings in (("0", {"shard": "0/2"}), ("1", {"shard": "1/2"})):
        with ScoreWriter(tmp_path / "array" / name, {**SETTINGS, **settings}) as writer:
            writer.write(0, [row(f"a#{name}")])
    assert [record["key"] for record in rows_of(tmp_path / "array")] == ["a#0", "a#1"]
    with ScoreWriter(tmp_path / "array", SETTINGS) as writer:
        assert not writer.finished  # shards of folders within are not its own
    write_shard(tmp_path / "array" / "1", 1, [row("b")], {**SETTINGS, "model": "other"})
    with pytest.raises(SettingsDiffer, match=r"model: the first has 'm', the second 'other'"):
        rows_of(tmp_path / "array")
    with pytest.raises(StoreError, match="does not exist"):
        rows_of(tmp_path / "nowhere")


def test_any_reader_of_parquet_folders_reads_scores_and_selections(tmp_path):
    pandas = pytest.importorskip("pandas")
    for name, settings in (("whole", {}), ("array/shard-0-of-2", {"shard": "0/2"})):
        with ScoreWriter(tmp_path / name, {**SETTINGS, **settings}) as writer:
            writer.write(0, [row("a#0"), row("a#1", "text_only"), row("a#2", "error: lost")])
            writer.mark_complete()
    with ScoreWriter(tmp_path / "array" / "shard-1-of-2", {**SETTINGS, "shard": "1/2"}) as writer:
        writer.write(1, [row("a#3")])
    for name, keys in (("whole", ["a#0", "a#1", "a#2"]), ("array", ["a#0", "a#1", "a#2", "a#3"])):
        table = pq.read_table(tmp_path / name)
        assert table["key"].to_pylist() == keys and table["vig"][0].as_py() == row("a#0").vig
        assert table.schema.remove_metadata() == SCORE_SCHEMA
        assert pa.dataset.dataset(tmp_path / name).count_rows() == len(keys)
        assert pandas.read_parquet(tmp_path / name)["status"].tolist()[:2] == ["ok", "text_only"]
    write_selection(tmp_path / "selection", [selection_batch(["a#0"])], dict)
    assert pandas.read_parquet(tmp_path / "selection")["key"].tolist() == ["a#0"]


def test_folders_with_the_manifest_under_its_old_name_go_on(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
        writer.note("noise_floor", 0.5)
        writer.mark_complete()
    (tmp_path / "_manifest.json").rename(tmp_path / "manifest.json")
    assert not unfinished(tmp_path) and score_metadata(tmp_path)["notes"] == {"noise_floor": 0.5}
    with pytest.raises(SettingsDiffer):
        ScoreWriter(tmp_path, {**SETTINGS, "dtype": "float16"})
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        assert sorted(writer.finished) == [0] and writer.notes == {"noise_floor": 0.5} and writer.complete
    assert not (tmp_path / "manifest.json").exists() and not unfinished(tmp_path)
    assert score_metadata(tmp_path)["notes"] == {"noise_floor": 0.5}


def test_the_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    code = (
        "import sys, os; from vig.store.scores import ScoreWriter; w = ScoreWriter(sys.argv[1], {'model': 'm'});"
        "child = os.fork()\n"
        "if child == 0:\n import time; os.close(1); time.sleep(20)\n"
        "else:\n print(child, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        child = int(holder.stdout.readline())
        with pytest.raises(FolderInUse, match=f"process {holder.pid} on"):
            ScoreWriter(tmp_path, {"model": "m"})
    finally:
        holder.kill()
        holder.wait()
    try:
        with ScoreWriter(tmp_path, {"model": "m"}), pytest.raises(FolderInUse, match="in this process"):
            ScoreWriter(tmp_path, {"model": "m"})  # a worker that outlives its killed parent holds nothing
    finally:
        os.kill(child, 9)
    ScoreWriter(tmp_path, {"model": "m"}).close()


def test_retry_replaces_rows_in_place(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0"), row("a#1", "error: x"), row("a#2"), row("a#3", "error: y")])
        writer.mark_complete()
        writer.replace(0, [row("a#3", n=7, seed=5)])
        assert writer.failed() == {0: ["a#1"]} and writer.complete
        with pytest.raises(StoreError, match="no sample 'a#9'"):
            writer.replace(0, [row("a#9")])
    got = rows_of(tmp_path)
    assert [(record["key"], record["n_tokens"]) for record in got] == [
        ("a#0", 3),
        ("a#1", 0),
        ("a#2", 3),
        ("a#3", 7),
    ]
    assert got[3]["token_nll_null"] == list(row("a#3", n=7, seed=5).token_nll_null)
    assert score_metadata(tmp_path)["model"] == "m"


def test_shards_are_read_by_number_beyond_five_digits_too(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        for window in (100_000, 99_999):
            writer.write(window, [row(f"a#{window}")])
    assert [record["key"] for record in rows_of(tmp_path)] == ["a#99999", "a#100000"]


def test_notes_are_kept_and_shown(tmp_path):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
        writer.note("noise_floor", 0.02)
    with ScoreWriter(tmp_path, SETTINGS):
        assert score_metadata(tmp_path)["notes"] == {"noise_floor": 0.02}


def test_full_disk_is_explained_and_leaves_a_folder_that_resumes(tmp_path, monkeypatch):
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(0, [row("a#0")])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(StoreError, match="disk is full"):
                writer.write(1, [row("a#1", n=20_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        def no_space(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", no_space)
        with pytest.raises(StoreError, match="No space left"):
            writer.write(1, [row("a#1")])
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".lock",
            "_manifest.json",
            "scores-00000.parquet",
        ]
    with ScoreWriter(tmp_path, SETTINGS) as writer:
        assert sorted(writer.finished) == [0]
        writer.write(1, [row("a#1")])


def test_content_and_name_are_on_the_disk_when_a_write_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []

    def fsync(descriptor):
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    files.write_atomically(path, b"content")
    assert synced == [(False, False), (True, True)]  # the content, then the folder that holds the new name


def test_read_only_folder_and_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file, not a folder"):
        ScoreWriter(tmp_path / "file", SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(StoreError, match=r"cannot be written.*Choose another output folder"):
                ScoreWriter(folder, SETTINGS)
            with pytest.raises(StoreError, match="cannot be written"):
                write_selection(files.Path(folder) / "selection", [], dict)
        finally:
            os.seteuid(user)


def selection_batch(keys: list[str]) -> pa.RecordBatch:
    ids = [None if index % 5 == 4 else list(range(index % 7)) for index in range(len(keys))]
    kept = [None if item is None else [token % 2 == 0 for token in item] for item in ids]
    keep = [item is not None for item in ids]
    return pa.record_batch([keys, keys, keep, ids, kept], schema=SELECTION_SCHEMA)


@pytest.mark.parametrize("limit", [selections.IN_MEMORY_BYTES, 0], ids=["memory", "mapped"])
def test_selection_mapping(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(selections, "IN_MEMORY_BYTES", limit)
    monkeypatch.setattr(selections, "FILE_TOKENS", 500)
    keys = [f"data.json#{index}" for index in range(1000)]
    batches = [selection_batch(keys[start : start + 100]) for start in range(0, 1000, 100)]
    write_selection(tmp_path, batches, lambda: {"selection": {"tau": 0.5}})
    assert len(list(tmp_path.glob("selection-*.parquet"))) > 1
    table = read_selection(tmp_path)
    assert len(table) == 1000 and list(table) == keys and table.metadata["selection"]["tau"] == 0.5
    for mapping in (table, pickle.loads(pickle.dumps(table))):
        for index in (0, 3, 4, 6, 99, 100, 523, 999):
            entry, place = mapping[keys[index]], index % 100
            size = 0 if place % 5 == 4 else place % 7
            assert entry.keep == (place % 5 != 4)
            assert entry.token_ids.tolist() == list(range(size)) and entry.token_ids.dtype == np.int32
            assert entry.token_keep.tolist() == [token % 2 == 0 for token in range(size)]
    assert "data.json#1000" not in table and table.get("") is None
    assert bool(list(tmp_path.glob(".*.arrow"))) == (limit == 0)
    write_selection(tmp_path, [selection_batch(["only"])], lambda: {"selection": {"tau": 0.7}})
    assert not list(tmp_path.glob(".*"))  # the mapped copy of what was there is gone
    assert list(read_selection(tmp_path)) == ["only"]


def test_equal_hashes_are_told_apart_by_key(monkeypatch):
    monkeypatch.setattr(selections, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    table = selections.SelectionTable(pa.Table.from_batches([selection_batch(list("abcdefg"))]))
    assert [len(table[key].token_ids) for key in "gfedcba"] == [6, 5, 0, 3, 2, 1, 0]
    assert "h" not in table


def test_keys_in_the_order_of_the_rows_are_found_without_a_search(monkeypatch):
    batches = [selection_batch(keys) for keys in (["a", "b"], [], ["c", "d"], ["e"])]
    table = selections.SelectionTable(pa.Table.from_batches(batches))
    assert [len(table[key].token_ids) for key in "ecabd"] == [0, 0, 0, 1, 1]  # in any order
    search, searched = table._search, []
    monkeypatch.setattr(table, "_search", lambda key: searched.append(key) or search(key))
    assert [len(table[key].token_ids) for key in "abcde"] == [0, 1, 0, 1, 0]
    assert searched == ["a", "c"]  # the first, and behind rows that hold nothing
    assert "f" not in table and len(table["a"].token_ids) == 0


def test_key_hashes_are_fixed_and_do_not_depend_on_neighbours():
    keys = pa.array(["", "a", "b", "ab", "ba", "data.json#17", "é", "a\0"])
    hashes = hash_keys(keys)
    assert len(set(hashes.tolist())) == len(keys)
    assert hash_keys(keys[3:6]).tolist() == hashes[3:6].tolist()
    assert hex(int(hash_keys(pa.array(["data.json#17"]))[0])) == FIXED
    many = hash_keys(pa.array([f"file.json#{index}" for index in range(200_000)]))
    assert len(np.unique(many)) == 200_000 and len(np.unique(many >> np.uint64(40))) > 197_000


FIXED = "0x99223fd64400aae1"


def test_a_damaged_page_is_named_with_the_cure(tmp_path):
    write_shard(tmp_path, 0, [row(f"a#{i}", n=500, seed=i) for i in range(50)], SETTINGS)
    (shard,) = tmp_path.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{shard.name} is damaged .*Delete it and run"):
        rows_of(tmp_path)
