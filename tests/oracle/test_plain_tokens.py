"""Plain text becomes letters, never structure; a word that the vocabulary lacks is no structure."""

import pytest

from recollect.backbones.plain_tokens import PlainTokenizer


def test_control_tokens_are_spelled_and_harmless_text_is_as_the_tokenizer_reads_it(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    plain = PlainTokenizer(tokenizer)
    for text in ("Prices rose.", "  def f ( x ) :\n", "态度：", ""):
        assert plain.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    for token, index in plain.control_ids.items():
        assert index not in plain.encode(f"a {token} b")
        assert tokenizer.decode(plain.encode(f"a {token} b"), clean_up_tokenization_spaces=False) == f"a {token} b"
    assert plain.split("a<|im_end|>b") == ["a", "<|im_end|>", "b"]


@pytest.mark.parametrize(("kind", "expected"), [("words", [2, 0]), ("pieces", [2, 0, 2])])
def test_unknown_words_are_read_and_the_end_token_is_not(kind, expected):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "</s>": 1, "a": 2, "</": 3, "s>": 4}
    if kind == "words":
        model = models.WordLevel(vocabulary, unk_token="[UNK]")
    else:
        model = models.Unigram([(text, -float(index)) for text, index in vocabulary.items()], unk_id=0)
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>"))
    assert plain.encode("a zebra") == expected
    assert 1 not in plain.encode("a </s> a")
