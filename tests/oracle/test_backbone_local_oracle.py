"""The in-process engine against plain `transformers`, and against itself in other shapes."""

import json

import numpy as np
import pytest
import torch

from recollect.backbones.protocol import Choice, Message, Request, Scoring
from recollect.backbones.transformers_engine import TransformersBackbone

SYSTEM = Message("system", "You keep a diary of the films you watch.")
TITLES = ("Mulan", "The Exorcist", "A Bug's Life", "Amélie (2001)", "2001: A Space Odyssey", "東京物語")


def chat(text):
    return (SYSTEM, Message("user", text))


CONTEXTS = [
    chat("I loved Alien and Aliens. Which film should I watch next?"),
    chat("1. Heat\n\n2. Ronin\n\n3. Collateral\n\nWhat comes next?"),
    chat("Name one film." + " I like long walks and quiet stories." * 12),
]


@pytest.fixture(scope="module")
def exact(smollm2_dir):
    return TransformersBackbone(smollm2_dir, dtype="float32")


@pytest.fixture(scope="module")
def plain(smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_dir)


def cross_entropy_score(plain, messages, text):
    """-(cross-entropy x tokens) with the context masked, by transformers' own loss; and the token count."""
    model, tokenizer = plain
    turns = [{"role": role, "content": content} for role, content in messages]
    context = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([context + answer])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    with torch.inference_mode():
        loss = model(ids, labels=labels).loss
    return -float(loss) * len(answer), len(answer), len(context)


def test_score_equals_masked_cross_entropy_of_transformers(exact, plain):
    scored = exact.score([Scoring(context, TITLES) for context in CONTEXTS])
    for context, answer in zip(CONTEXTS, scored, strict=True):
        expected = [cross_entropy_score(plain, context, title) for title in TITLES]
        np.testing.assert_allclose(answer.log_probs, [value for value, _, _ in expected], atol=1e-4, rtol=1e-5)
        assert answer.n_tokens == tuple(n for _, n, _ in expected)
        assert answer.prompt_tokens == expected[0][2] + sum(answer.n_tokens)


def test_choose_equals_renormalised_score_for_labels_and_for_titles(exact):
    for options in (("A", "B"), TITLES[:3]):
        chosen = exact.choose([Choice(context, options) for context in CONTEXTS])
        scored = exact.score([Scoring(context, options) for context in CONTEXTS])
        for choice, score in zip(chosen, scored, strict=True):
            values = np.array(score.log_probs)
            np.testing.assert_allclose(choice.log_probs, values - np.logaddexp.reduce(values), atol=1e-9)
    assert score.n_tokens != (1, 1, 1), "titles must exercise the sum over several tokens"


def test_greedy_generation_is_the_same_alone_and_in_a_batch_of_sixteen(exact):
    requests = [
        Request(chat(f"Say something about the number {i}." + " Please." * i), max_tokens=10) for i in range(16)
    ]
    together = exact.generate(requests)
    assert [exact.generate([request])[0] for request in requests[:3]] == together[:3]


def test_greedy_generation_equals_generate_of_transformers(exact, plain):
    model, tokenizer = plain
    turns = [{"role": role, "content": content} for role, content in CONTEXTS[0]]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    n_context = inputs["input_ids"].shape[1]
    text = tokenizer.decode(expected[0, n_context:], skip_special_tokens=True)
    assert exact.generate([Request(CONTEXTS[0], max_tokens=20)])[0].text == text


def test_sampling_follows_the_distribution_of_the_model(exact):
    context = chat("Answer with one letter, A or B.")
    schema = json.dumps({"enum": ["A", "B"]})
    n = 120
    drawn = exact.generate([Request(context, max_tokens=6, temperature=1.0, schema=schema, seed=i) for i in range(n)])
    share = np.mean([answer.text == '"A"' for answer in drawn])
    p_quoted = exact.score([Scoring(context, ('"A', '"B'))])[0].log_probs
    expected = 1 / (1 + np.exp(p_quoted[1] - p_quoted[0]))
    assert {answer.text for answer in drawn} <= {'"A"', '"B"'}
    # '"A' may be one or two tokens and both spellings are sampled, hence the wide bound.
    assert abs(share - expected) < 0.25


def test_embedding_model_equals_sentence_transformers(minilm_dir):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from recollect.backbones.embedding import EmbeddingModel

    texts = ["a quiet novel", "loud guitars " * 300, "日本語", ""]
    expected = library.SentenceTransformer(str(minilm_dir)).encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(EmbeddingModel(minilm_dir).embed(texts), expected, atol=1e-5)


def test_embedding_model_equals_mean_pooling_written_out(minilm_dir):
    from transformers import AutoModel, AutoTokenizer

    from recollect.backbones.embedding import EmbeddingModel

    texts = ["a quiet novel about the sea", "loud guitars", "x " * 400]
    tokenizer, model = AutoTokenizer.from_pretrained(minilm_dir), AutoModel.from_pretrained(minilm_dir).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            rows.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0).numpy())
    embedded = EmbeddingModel(minilm_dir).embed(texts)
    np.testing.assert_allclose(embedded, rows, atol=1e-5)
    same = EmbeddingModel(minilm_dir).embed(["The cat sat.", "A cat was sitting.", "Stocks fell sharply."])
    assert same[0] @ same[1] > 0.6 > same[0] @ same[2]


def test_converted_tokenizer_splits_digits_before_everything_else(plain):
    """The published tokenizer keeps a run of blanks before a digit as one token; plain byte-level would cut it."""
    _, tokenizer = plain
    assert tokenizer.tokenize("film.\n\n12") == ["film", ".", "ĊĊ", "1", "2"]
