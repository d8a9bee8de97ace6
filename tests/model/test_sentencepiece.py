"""Sentencepiece's BPE as a fast tokenizer against the procedure written out, on a vocabulary made here."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer

from kedit_fast.model.sentencepiece import BYTE, CONTROL, NORMAL, OWN, merges_of, sentencepiece_tokenizer

TEXT = (
    "The tower is in the city of the towers. aaaa aaaaaa aa aaaaaaaaa ---- ------ == ======\n\n"
    "The other town, the town of São Paulo, is on the river; über the river is an ant.\n"
) * 3
UNKNOWN, START = 3, 2
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
OWNED = ["\n", "\n\n", "\n\n\n", "  ", "   ", "<table>", "</table>"]


def join_all(pieces: list, goodness) -> list:
    """Pieces, the best adjacent pair of which is joined, the leftmost of equals, until goodness knows none of them."""
    while True:
        pairs = [(goodness(left + right), -i) for i, (left, right) in enumerate(pairwise(pieces))]
        best, at = max((pair for pair in pairs if pair[0] is not None), default=(None, 0))
        if best is None:
            return pieces
        pieces[-at : 2 - at] = [pieces[-at] + pieces[1 - at]]


def learned(text: str, n: int) -> dict[str, float]:
    """Pieces by their scores: n joined ones, each the most frequent pair of those before, then the characters."""
    words = [list(f"▁{word}") for word in text.split()]
    letters, joined = sorted({letter for word in words for letter in word} - {"ü"}), []
    for _ in range(n):
        pairs = Counter(pair for word in words for pair in pairwise(word) if "ü" not in pair)
        joined.append("".join(min(pairs, key=lambda pair: (-pairs[pair], pair))))
        rank = {piece: -i for i, piece in enumerate(joined)}
        words = [join_all(list("".join(word)), rank.get) for word in words]
    return {piece: -float(i) for i, piece in enumerate(dict.fromkeys(joined + letters))}


SCORES = learned(TEXT, 60)
PIECES = (
    [(token, CONTROL, -1000.0) for token in SPECIAL]
    + [(token, OWN, -1000.0) for token in OWNED]
    + [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    + [(piece, NORMAL, score) for piece, score in SCORES.items()]
)
METADATA = {
    "tokenizer.ggml.tokens": [token for token, _, _ in PIECES],
    "tokenizer.ggml.token_type": [kind for _, kind, _ in PIECES],
    "tokenizer.ggml.scores": [score for _, _, score in PIECES],
    "tokenizer.ggml.bos_token_id": START,
    "tokenizer.ggml.unknown_token_id": UNKNOWN,
    "tokenizer.ggml.add_space_prefix": False,
}


def longest(tokens: list[str], text: str, at: int) -> str:
    return max((token for token in tokens if text.startswith(token, at)), key=len, default="")


def reference(text: str) -> list[str]:
    """The pieces of a text: control tokens and own ones found from the left, the rest joined, then spelled in bytes."""
    found, at = [], 0
    owned = [token.replace(" ", "▁") for token in OWNED]
    normal = []
    while at <= len(text):
        special = longest(SPECIAL, text, at)
        own = "" if special else longest(owned, text.replace(" ", "▁"), at)
        if special or own or at == len(text):
            joined = join_all(normal, SCORES.get)
            for piece in joined:
                found += [piece] if piece in SCORES else [f"<0x{byte:02X}>" for byte in piece.encode()]
            normal = []
            found += [special or own] if special or own else []
        else:
            normal.append(text[at].replace(" ", "▁"))
        at += len(special or own) or 1
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """As it comes back from its file."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    sentencepiece_tokenizer(METADATA).save(str(path))
    return Tokenizer.from_file(str(path))


def test_the_vocabulary_is_worth_a_test():
    joined = [piece for piece in SCORES if len(piece) > 1]
    assert len(joined) > 50 and any(len(set(piece)) == 1 and len(piece) > 2 for piece in joined)
    assert max(Counter(left + right for left, right in merges_of(SCORES)).values()) > 1  # made in several ways
    assert "ü" not in SCORES and "ã" in SCORES


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("The tower", ["The", "▁tower"]),
        ("ü", ["<0xC3>", "<0xBC>"]),
        ("a東", ["a", "<0xE6>", "<0x9D>", "<0xB1>"]),
        ("a  a\n\na", ["a", "▁▁", "a", "\n\n", "a"]),
        (" " * 7 + "x", ["▁▁▁", "▁▁▁", "▁", "<0x78>"]),
        ("\n" * 5, ["\n\n\n", "\n\n"]),
        ("a<start_of_turn>\na", ["a", "<start_of_turn>", "\n", "a"]),
        ("<table></table>", ["<table>", "</table>"]),
        ("<tabl", None),
        ("", []),
        ("aaaaaaaaaaa-------=====", None),
        ("👩\u200d👩 e\u0301 \t\r\n", None),
    ],
)
def test_pieces(text, pieces, tokenizer):
    found = tokenizer.encode(text, add_special_tokens=False).tokens
    assert found == reference(text)
    assert pieces is None or found == pieces


def test_random_texts_are_cut_as_the_procedure_cuts_them(tokenizer):
    draw = random.Random(0)
    parts = [*"aaehtorw.-=;  \nüãS東\u0301👩", *SPECIAL, *OWNED, "▁", "the", "tow", "aaa"]
    for _ in range(600):
        text = "".join(draw.choice(parts) * draw.choice((1, 1, 2, 5)) for _ in range(draw.randint(1, 25)))
        found = tokenizer.encode(text, add_special_tokens=False)
        assert found.tokens == reference(text), text
        plain = text.replace("▁", " ")  # sentencepiece does not tell a space from its sign
        assert tokenizer.decode(found.ids, skip_special_tokens=False) == plain
        for (begin, end), piece in zip(found.offsets, found.tokens, strict=True):  # where each piece lies in the text
            spelled = piece.startswith("<0x")
            assert spelled or text[begin:end].replace(" ", "▁") == piece


def test_the_start_token_goes_first_unless_the_file_says_no(tokenizer):
    assert tokenizer.encode("The").tokens == ["<bos>", "The"]
    assert tokenizer.encode("The", "city").tokens == ["<bos>", "The", "<bos>", *reference("city")]
    bare = sentencepiece_tokenizer(METADATA | {"tokenizer.ggml.add_bos_token": False})
    assert bare.encode("The").tokens == ["The"]


def test_a_space_in_front_is_refused():
    for metadata in (METADATA | {"tokenizer.ggml.add_space_prefix": True}, {}):
        with pytest.raises(ValueError, match="a space in front of a text, which is not read"):
            sentencepiece_tokenizer(metadata)


def test_special_tokens_are_left_out_of_a_text_and_own_ones_stay(tokenizer):
    ids = tokenizer.encode("a<start_of_turn>\n\n<table>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\n\n<table>"
