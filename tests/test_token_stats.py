"""Statistics of tokens beside the likelihoods: stored, resumed, merged, ranked by, shown; folders without them read."""

import json
import re
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from typer.testing import CliRunner

from vig.cli import app
from vig.data.files import StoreError
from vig.data.samples import read_samples
from vig.reporting.report import report
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.scoring.settings import ScoreSettings
from vig.selection.select import select
from vig.store.folder import SettingsDiffer
from vig.store.rows import SCORE_SCHEMA, ScoreBlock, ScoreRow, score_schema
from vig.store.scores import ScoreWriter, read_scores

COLUMNS = ("token_kl", "token_entropy_image", "token_entropy_null")
BOTH = ("kl", "entropy")


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint, and twelve records: one of text alone, one whose image is missing."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save_llava(folder / "model")
    records = []
    for number in range(12):
        tiny.save_picture(folder / f"{number}.png", number)
        turns = [("human", "<image>\nWhat?"), ("gpt", "red ball " * (1 + number % 3))]
        record = {"id": str(number), "image": f"{number}.png"}
        if number == 4:
            turns, record = [("human", "Say it"), ("gpt", "no ball")], {"id": "4"}
        if number == 7:
            record["image"] = "nowhere.png"
        record["conversations"] = [{"from": role, "value": text} for role, text in turns]
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def scored(given, out, stats=BOTH, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the missing image
        score_dataset(Scorer(given / "model", stats=stats), given / "data.json", out, window=4, **options)
    return out


@pytest.fixture(scope="module")
def scores(given, tmp_path_factory):
    return scored(given, tmp_path_factory.mktemp("with") / "scores")


@pytest.fixture(scope="module")
def plain(given, tmp_path_factory):
    return scored(given, tmp_path_factory.mktemp("without") / "scores", stats=())


def test_values_are_those_of_the_models_own_logits(given, scores):
    """Each sample fed through the model alone, its logits in float64, with its image and with the null's pixels."""
    scorer = Scorer(given / "model")
    stored = {row["key"]: row for row in rows_of(scores)}
    checked = 0
    for sample in read_samples(given / "data.json"):
        row = stored[sample.key]
        if row["status"] != "ok":
            continue
        log_p, log_q = (log_probabilities(scorer, sample, null) for null in (False, True))
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        entropies = [-(logs.exp() * logs).sum(1) for logs in (log_p, log_q)]
        for name, values in zip(COLUMNS, (kl, *entropies), strict=True):
            np.testing.assert_allclose(row[name], values.numpy(), rtol=1e-3, atol=2e-4)
        assert max(row["token_kl"]) > 1e-3
        checked += 1
    assert checked == 10


@torch.no_grad()
def log_probabilities(scorer, sample, null: bool) -> torch.Tensor:
    """(n, V) float64, of the distributions that predict the answer tokens of one sample."""
    from vig.scoring.loader import load_record

    item = load_record(sample, scorer.encoder, "pixels")
    batch = scorer.passes.padded([item.view])
    inputs = scorer.passes._nulled(batch.inputs, batch.tables, batch.rows) if null else batch.inputs
    logits = scorer.loaded.model(**inputs).logits[0]
    return logits[batch.answers.index].double().log_softmax(-1)


def test_likelihoods_keep_their_bits_and_old_columns_their_place(scores, plain):
    for ours, theirs in zip(rows_of(scores), rows_of(plain), strict=True):
        assert {name: value for name, value in ours.items() if name not in COLUMNS} == theirs
    tables = [pq.read_table(folder / "scores-00001.parquet") for folder in (scores, plain)]
    assert tables[0].schema.remove_metadata() == score_schema(BOTH)
    assert tables[1].schema.remove_metadata() == SCORE_SCHEMA
    assert b'"stats": ["kl", "entropy"]' in tables[0].schema.metadata[b"vig"]
    assert b"stats" not in tables[1].schema.metadata[b"vig"]


def test_rows_without_an_image_and_errors(scores):
    rows = rows_of(scores)
    text, lost = rows[4], rows[7]
    assert text["status"] == "text_only" and text["token_kl"] is None and text["token_entropy_null"] is None
    assert len(text["token_entropy_image"]) == text["n_tokens"] > 0
    assert lost["status"].startswith("error: ") and all(lost[name] is None for name in COLUMNS)


def test_jobs_and_resumed_runs_have_the_same_rows(given, scores, tmp_path):
    for job in range(2):
        scored(given, tmp_path / "jobs", shard=(job, 2))
    assert rows_of(tmp_path / "jobs") == rows_of(scores)
    (tmp_path / "again").mkdir()
    for name in ("scores-00000.parquet", "scores-00001.parquet", "_manifest.json"):
        (tmp_path / "again" / name).write_bytes((scores / name).read_bytes())
    assert rows_of(scored(given, tmp_path / "again")) == rows_of(scores)
    assert rows_of(scored(given, tmp_path / "again", retry_failed=True)) == rows_of(scores)


def test_another_choice_is_refused_on_resumption_and_read_together(given, scores, plain, tmp_path):
    with pytest.raises(SettingsDiffer, match=r"stats: the folder has None, this run has \['kl', 'entropy'\]"):
        scored(given, plain)
    with pytest.raises(
        SettingsDiffer, match=r"stats: the folder has \['kl', 'entropy'\], this run has \['kl'\]"
    ):
        scored(given, scores, stats=("kl",))
    assert len(rows_of([scores, plain])) == 24


def test_rows_of_a_scorer_in_memory(given, scores):
    scorer = Scorer(given / "model", stats=["entropy", "kl"])
    rows = scorer.score(read_samples(given / "data.json"))
    assert scorer.settings.stats == BOTH
    assert sorted(rows[0].token_stats) == sorted(COLUMNS) and list(rows[4].token_stats) == [
        "token_entropy_image"
    ]
    chosen = select(rows, 40, by="kl")  # rows alone do not say what ends turns
    assert (
        chosen.counts == select(scores, 40, by="kl", stop_tokens="select").counts
        and chosen.metadata["selection"]["by"] == "kl"
    )
    with pytest.raises(ValueError, match="stats: 'lse' is not one of kl, entropy"):
        ScoreSettings(stats=("lse",))


def test_a_row_without_what_was_asked_for_is_refused(tmp_path):
    row = ScoreRow("a#0", "0", "", "ok", [1, 2], [0, 1], [1.0, 2.0], [1.0, 3.0], {"token_kl": [0.1, 0.2]})
    with ScoreWriter(tmp_path, {"model": "m", "stats": ["kl", "entropy"]}) as writer:
        with pytest.raises(ValueError, match="a#0: no token_entropy_image"):
            writer.write(0, [row])
        with pytest.raises(ValueError, match=r"a#1 \(ok\): 2 token_ids but 0 values of token_kl"):
            writer.write(0, [row, ScoreRow("a#1", "1", "", "ok", [1, 2], [0, 1], [1.0, 2.0], [1.0, 3.0])])
        writer.write(
            0, [ScoreRow("a#2", "2", status="error: lost")]
        )  # a window of errors has the columns as well
        assert pq.read_schema(tmp_path / "scores-00000.parquet").names[-3:] == list(COLUMNS)


@pytest.fixture(scope="module")
def ranked():
    """Random rows whose KL has nothing to do with their VIG, as a table."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 9, 300)
    total = int(lengths.sum())
    kl = rng.gamma(1, 1, total).astype(np.float32)
    names = [f"d#{number}" for number in range(300)]
    status = ["text_only" if number % 7 == 3 else "ok" for number in range(300)]
    nll = rng.gamma(1, 1, (2, total))
    ids, places = rng.integers(0, 99, total), np.arange(total)
    block = ScoreBlock(names, names, ["s"] * 300, status, lengths, ids, places, *nll, {"token_kl": kl})
    return block.table(["kl"])


@pytest.mark.parametrize("level", ["both", "sample", "token"])
def test_by_kl_is_the_rule_with_kl_for_vig(ranked, level):
    chosen = select(ranked, 40, level=level, by="kl")
    ok = [row for row in ranked.to_pylist() if row["status"] == "ok"]
    means = {row["key"]: float(np.mean(np.float64(row["token_kl"]))) for row in ok}
    tau = float(np.percentile(list(means.values()), 60))
    assert chosen.tau == pytest.approx(tau, abs=1e-12)
    entries = chosen.table()
    for row in ok:
        passed = np.float64(row["token_kl"]) >= chosen.tau
        keep = means[row["key"]] >= chosen.tau if level != "token" else bool(passed.any())
        tokens = (
            passed if level == "token" else passed & keep if level == "both" else np.full(len(passed), keep)
        )
        assert entries[row["key"]][0] == keep and list(entries[row["key"]][2]) == tokens.tolist()
    assert any("of KL" in line for line in chosen.figures())
    assert (
        chosen.counts["samples_kept"] != select(ranked, 40, level=level).counts["samples_kept"]
        or level != "token"
    )


def test_random_with_kl_keeps_as_many(ranked):
    assert select(ranked, 40, level="random", by="kl").counts == select(ranked, 40, by="kl").counts


def test_by_loss_is_the_loss_filter_of_the_evidence(ranked, tmp_path):
    """As many samples as VIG keeps, those of the lowest mean loss with the image, whole; text-only samples too."""
    ok = [row for row in ranked.to_pylist() if row["status"] == "ok"]
    count = select(ranked, 40, level="sample").counts["samples_kept"]
    losses = np.array([np.float64(row["token_nll_image"]).mean() for row in ok])
    wanted = {ok[place]["key"] for place in np.argsort(losses, kind="stable")[:count]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither of a low tau nor of a model that barely looks
        chosen = select(ranked, 40, level="sample", by="loss", out=tmp_path)
    table = chosen.table()
    assert {row["key"] for row in ok if table[row["key"]].keep} == wanted
    for row in ranked.to_pylist():
        keep = row["status"] == "text_only" or row["key"] in wanted
        assert table[row["key"]].keep == keep and set(table[row["key"]].token_keep.tolist()) == {keep}
    assert chosen.tau == pytest.approx(np.percentile(-losses, 60), abs=1e-12) and chosen.tau < 0
    assert "nats of log-likelihood" in chosen.figures()[0]
    page = report(ranked, tmp_path / "r.html", selection=tmp_path).read_text()
    assert "The selection ranks by loss" in page and "nats of log-likelihood" in page


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "filters whole samples. Give --level sample"),
        ({"level": "sample", "clip": -1.0}, "clip bounds the log-probabilities of VIG"),
        ({"level": "sample", "tau_floor": 0.1}, "tau_floor is a lowest VIG"),
    ],
)
def test_by_loss_takes_no_option_of_vig(ranked, options, said):
    with pytest.raises(ValueError, match=said):
        select(ranked, 40, by="loss", **options)


def test_by_kl_without_kl_says_what_helps(plain, ranked, tmp_path):
    said = CliRunner().invoke(app, ["select", str(plain), "--by", "kl", "-o", str(tmp_path / "selection")])
    cure = r"has no column 'token_kl'\. Score the data again with `vig score --stats kl` into another folder"
    assert isinstance(said.exception, StoreError) and re.search(cure, str(said.exception))
    with pytest.raises(StoreError, match=cure):
        select(ranked.drop_columns(["token_kl"]), 40, by="kl")
    with pytest.raises(ValueError, match="clip bounds the log-probabilities of VIG"):
        select(ranked, 40, by="kl", clip=-1.0)


def test_commands(given, scores, tmp_path):
    """score --stats, select --by kl, inspect: the stored values."""

    def call(*arguments, code=0):
        said = CliRunner().invoke(app, [str(one) for one in arguments])
        assert said.exit_code == code, said.output
        return said.output

    place = (given / "model", given / "data.json")
    call("score", *place, "-o", tmp_path / "scores", "--window", 4, "--stats", "entropy, kl", code=3)
    assert rows_of(tmp_path / "scores") == rows_of(scores)
    assert "of KL" in call(
        "select", tmp_path / "scores", "--by", "kl", "--p", 40, "-o", tmp_path / "selection"
    )
    call("score", *place, "-o", tmp_path / "x", "--stats", "lse", code=2)
    row = rows_of(scores)[2]
    said = json.loads(
        call("inspect", *place, "--index", 2, "-o", tmp_path / "p.png", "--json").splitlines()[-1]
    )
    for name in COLUMNS:
        np.testing.assert_allclose(said[name], row[name], rtol=1e-3, atol=2e-4)
    table = call("inspect", *place, "--index", 2, "-o", tmp_path / "p.png")
    assert (
        re.search(r"entropy.*entropy.*\n.*KL.*image.*null", table) and f"{row['token_kl'][0]:+.3f}" in table
    )
    values = next(line for line in table.splitlines() if line.count("│") == 8)
    assert len(re.findall(r"[+-]\d\.\d{3}", values)) == 6
    table = call("inspect", *place, "--index", 4, "-o", tmp_path / "p.png")  # of text alone
    assert "entropy" in table and "KL" not in table


def test_the_report_shows_them(scores, plain, tmp_path):
    selection = select(scores, 40, by="kl", out=tmp_path / "selection")
    page = report(scores, tmp_path / "r.html", selection=selection.out).read_text()
    samples = json.loads(re.search(r'<script[^>]*id="samples"[^>]*>(.*?)</script>', page, re.S)[1])
    rows = {row["key"]: row for row in rows_of(scores)}
    shown = [sample for sample in samples if sample["st"] == "ok"]
    assert len(shown) == 10
    for sample in shown:
        found = sample["x"][0]
        assert list(found) == ["KL", "entropy image", "entropy null"]
        np.testing.assert_allclose(np.array(found["KL"]) * 1e-4, rows[sample["k"]]["token_kl"], atol=6e-5)
    assert "mean KL" in page and "The selection ranks by KL" in page
    page = report(plain, tmp_path / "plain.html").read_text()
    assert "mean KL" not in page and '"x":[{}]' in page


def test_a_table_joins_what_has_them(scores):
    table = pa.Table.from_batches(read_scores(scores, ["key", *COLUMNS]))
    assert table.num_rows == 12 and table["token_kl"].type == pa.list_(pa.float32())
