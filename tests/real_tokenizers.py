"""Real tokenizers, each with the vision model that uses it, tiny; and prompts and answer masks written by hand.

tests/tokenizer_extracts has as much of some as the texts here need. `make test-tokenizers` fetches them whole and names
their folder in VIG_TOKENIZERS. The masks here know nothing of character offsets: they compare bytes.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import tiny_families
import trl
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vig.data.sample import Sample

EXTRACTS = Path(__file__).parent / "tokenizer_extracts"
FOLDER = Path(os.environ.get("VIG_TOKENIZERS", EXTRACTS))

ANSWERS = [
    "Yes",
    " two spaces  before and one behind ",
    "\n\nnewlines around\n",
    "tabs\tand  \u00a0 other\u2009spaces",
    "A 😀 and a family 👩‍👩‍👧‍👦, a flag 🇯🇵🏳️‍🌈",
    "一只猫坐在椅子上。",
    "これは赤いボールです",
    "빨간 공 두 개",
    "القطة على الكرسي، أليس كذلك؟",
    "החתול על הכיסא",
    "नमस्ते, यह बिल्ली है",
    "def f(x):\n    return {k: v for k, v in x.items()}  # why\n\n\nf({})",
    "| a | b |\n|---|---:|\n| 1 | 2.50 |",
    "e\u0301a\u0308n\u0303 and Zalgo z\u0335\u0321\u0300",
    "x",
    "。",
    " ".join(["cat"] * 50),
    "catcatcat" * 5,
    "It's 12345.678 km/h, isn't it? (50%)",
    "**Bold** <b>tag</b> [INST] USER: no </think>",
    "naïve café — “quoted” … ½ ﬁ",
    "\U0001d518\U00010348 rare\u200bzero-width\ufeff",
]
QUESTIONS = ["What is it?", "Describe the image.\n", "是什么？", " Is it red?", "And now 😀?"]

Turns = Sequence[tuple[str, str]]
Pieces = list[tuple[str, bool]]  # texts of a prompt, in order, and whether they are answers


# --- prompts as the models' own code writes them, without their templates


def _spaced(form: str) -> Callable[[Turns, str], Pieces]:
    """A space behind every text. The end of a turn is written behind the answer, as LLaVA's training code does."""

    def pieces_of(turns: Turns, image: str) -> Pieces:
        pieces = [("<s>", False)]
        for turn, (question, answer) in enumerate(turns):
            shown = image + "\n" if image and turn == 0 else ""
            pieces += [(form.format(shown + question), False), (f"{answer}</s>", True), (" ", False)]
        return pieces

    return pieces_of


llava15, llava_next_mistral = _spaced("USER: {} ASSISTANT: "), _spaced("[INST] {} [/INST] ")


def qwen3_vl(turns: Turns, image: str) -> Pieces:
    pieces: Pieces = []
    for turn, (question, answer) in enumerate(turns):
        shown = f"<|vision_start|>{image}<|vision_end|>" if image and turn == 0 else ""
        asked = f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
        pieces += [(asked, False), (f"{answer}<|im_end|>", True), ("\n", False)]
    return pieces


def gemma3(turns: Turns, image: str) -> Pieces:
    """Texts are stripped."""
    pieces = [("<bos>", False)]
    for turn, (question, answer) in enumerate(turns):
        shown = image if turn == 0 else ""
        asked = f"<start_of_turn>user\n{shown}{question.strip()}<end_of_turn>\n<start_of_turn>model\n"
        pieces += [(asked, False), (f"{answer.strip()}<end_of_turn>", True), ("\n", False)]
    return pieces


def smolvlm(turns: Turns, image: str) -> Pieces:
    pieces = [("<|im_start|>", False)]
    for turn, (question, answer) in enumerate(turns):
        shown = image if image and turn == 0 else " "
        asked = f"User:{shown}{question}<end_of_utterance>\nAssistant: "
        pieces += [(asked, False), (f"{answer}<end_of_utterance>", True), ("\n", False)]
    return pieces


class Real(NamedTuple):
    """A tokenizer, and the vision model that is released with it."""

    family: str  # of tests/tiny_families.py
    template: str  # the published one: a file of TRL's, or its text
    by_hand: Callable[[Turns, str], Pieces]
    image: str  # what stands for the image in the rendered prompt
    patch: str  # the token that the processor repeats in its place
    behind: str  # what the processor writes behind the image's tokens
    names: dict[str, str]
    added: tuple[str, ...] = ()  # tokens that the vision model's release adds
    byte_level: bool = False  # else SentencePiece
    prepends: bool = False  # SentencePiece's space before each stretch of text
    nfc: bool = False


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
GEMMA = {
    "bos_token": "<bos>", "eos_token": "<end_of_turn>", "unk_token": "<unk>", "pad_token": "<pad>",
    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
}  # fmt: skip
SMOLVLM = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}

REAL = {
    "llama2": Real(
        "llava", tiny.LLAVA15, llava15, "<image>", "<image>", "", LLAMA, ("<image>", "<pad>"), prepends=True
    ),
    "mistral": Real(
        "llava_next", "llava_next.jinja", llava_next_mistral, "<image>", "<image>", "", LLAMA, ("<image>", "<pad>"),
        prepends=True,
    ),
    "qwen3": Real(
        "qwen3_vl", "qwen3_vl.jinja", qwen3_vl, "<|image_pad|>", "<|image_pad|>", "",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, byte_level=True, nfc=True,
    ),
    "gemma3": Real(
        "gemma3", "gemma3.jinja", gemma3, "<start_of_image>", "<image_soft_token>", "<end_of_image>\n\n", GEMMA
    ),
    "smollm2": Real(
        "smolvlm", "smolvlm.jinja", smolvlm, "<image>", "<image>", "<fake_token_around_image>", SMOLVLM,
        ("<image>", *tiny_families.IDEFICS), byte_level=True,
    ),
}  # fmt: skip
HERE = [name for name in REAL if (FOLDER / f"{name}.json").is_file()]


@functools.cache
def tokenizer(name: str, folder: Path = FOLDER) -> PreTrainedTokenizerFast:
    core, real = Tokenizer.from_file(str(folder / f"{name}.json")), REAL[name]
    core.add_special_tokens(list(real.added))
    return PreTrainedTokenizerFast(tokenizer_object=core, **real.names)


@functools.cache
def processor(name: str) -> Any:
    template = REAL[name].template
    if template.endswith(".jinja"):
        template = (Path(trl.__file__).parent / "chat_templates" / template).read_text(encoding="utf-8")
    return tiny_families.FAMILIES[REAL[name].family].processor(tokenizer(name), template)


@functools.cache
def model(name: str) -> Any:
    return tiny_families.model_for(REAL[name].family, tokenizer(name))


def turns_of(sample: Sample) -> Turns:
    texts = [message["content"][-1]["text"] for message in sample.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def sample(number: int, turns: Turns, *, image: bool = True, picture: int = 0) -> Sample:
    messages = []
    for turn, texts in enumerate(turns):
        for role, text in zip(("user", "assistant"), texts, strict=True):
            shown = [{"type": "image"}] * (image and turn == 0 and role == "user")
            messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}]})
    pictures = (tiny.picture(picture, (30 + picture % 3, 20)),) if image else ()
    return Sample(f"real.json#{number}", str(number), pictures, tuple(messages), "real.json")


def samples(count: int) -> list[Sample]:
    """One or two turns each, every tenth without an image; some share their picture."""
    drawn = []
    for n in range(count):
        answers = [ANSWERS[n % 22], ANSWERS[(7 * n + n // 22 + 3) % 22]][: 1 + n % 2]
        questions = [QUESTIONS[n % 5], QUESTIONS[(n + n // 5) % 5]]
        turns = list(zip(questions, answers, strict=False))
        drawn.append(sample(n, turns, image=n % 10 != 9, picture=n % 37))
    return drawn


# --- answer masks from bytes


@functools.cache
def bytes_of_characters() -> dict[str, int]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    table, others = {chr(byte): byte for byte in printable}, 0
    for byte in range(256):
        if byte not in printable:
            table[chr(256 + others)] = byte
            others += 1
    return table


def bytes_of_token(name: str, id: int) -> bytes:
    named = tokenizer(name)
    token = named.convert_ids_to_tokens(id)
    if REAL[name].byte_level:
        if token in named.get_added_vocab():
            return token.encode()
        return bytes(bytes_of_characters()[character] for character in token)
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def bytes_of_pieces(name: str, pieces: Pieces) -> tuple[bytes, list[bool]]:
    """What the tokens of a prompt must spell, and which bytes are an answer's."""
    real, named = REAL[name], tokenizer(name)
    if real.nfc:
        pieces = [(unicodedata.normalize("NFC", text), answer) for text, answer in pieces]
    text = "".join(text for text, _ in pieces)
    owners = [answer for text, answer in pieces for _ in text]
    special = "|".join(map(re.escape, sorted(named.get_added_vocab(), key=len, reverse=True)))
    spelled, is_answer, done = b"", [], 0
    for found in re.finditer(f"({special})|(?:(?!{special}).)+", text, re.DOTALL):
        if real.prepends and not found[1]:
            spelled, is_answer = spelled + b" ", [*is_answer, False]
        for character, owner in zip(found[0], owners[found.start() : found.end()], strict=True):
            spelled += character.encode()
            is_answer += [owner] * len(character.encode())
        done = found.end()
    assert done == len(text)
    return spelled, is_answer


def answer_mask(name: str, ids: Sequence[int], sample: Sample) -> list[bool]:
    """Which tokens hold a byte of an answer. Raises AssertionError where the tokens spell something else."""
    real, named = REAL[name], tokenizer(name)
    pieces = real.by_hand(turns_of(sample), real.image if sample.images else "")
    start = 0
    if sample.images:  # compared from behind the image's last token on
        start = len(ids) - list(ids)[::-1].index(named.convert_tokens_to_ids(real.patch))
        first, *rest = [n for n, (text, _) in enumerate(pieces) if real.image in text]
        assert not rest
        pieces = [(real.behind + pieces[first][0].partition(real.image)[2], False), *pieces[first + 1 :]]
    elif named.convert_ids_to_tokens(ids[0]) == pieces[0][0]:
        start, pieces = 1, pieces[1:]
    spelled, owners = bytes_of_pieces(name, pieces)
    mask, done = [False] * start, 0
    for id in ids[start:]:
        piece = bytes_of_token(name, id)
        assert spelled[done : done + len(piece)] == piece, (spelled[done : done + 40], piece)
        mask.append(any(owners[done : done + len(piece)]))
        done += len(piece)
    assert done == len(spelled)
    return mask
