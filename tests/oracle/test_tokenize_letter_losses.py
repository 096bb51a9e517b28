"""LETTER's two added losses against their formulas, and what each does to the codes of a planted world."""

import numpy as np
import pytest
import torch
from support.trained_tokenizers import CODE_DIM, behaviour_vectors, fitted, small_config, unit_embeddings

import recollect.tokenize.letter as letter
from recollect.rng import stream
from recollect.tokenize.letter import LETTER, collaborative_loss, constrained_groups, diversity_loss
from recollect.tokenize.rq_vae import RQVAE
from recollect.tokenize.training_rows import Batch


def tensor(*shape, name="x"):
    return torch.from_numpy(stream(4, name).normal(size=shape))


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_the_collaborative_loss_is_the_cross_entropy_of_finding_ones_own_behaviour():
    vector, behaviour = tensor(6, 3), tensor(6, 3, name="h")
    found = collaborative_loss(vector, behaviour).numpy()
    for item in range(6):
        logits = np.array([float(vector[item] @ behaviour[other]) for other in range(6)])
        np.testing.assert_allclose(found[item], -log_softmax(logits)[item])


def test_items_without_behaviour_take_no_part_in_the_collaborative_loss():
    vector, behaviour = tensor(5, 3), tensor(5, 3, name="h")
    behaviour[[1, 3]] = 0.0
    found = collaborative_loss(vector, behaviour)
    assert found[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[[0, 2, 4]], collaborative_loss(vector[[0, 2, 4]], behaviour[[0, 2, 4]]))
    assert collaborative_loss(vector, torch.zeros_like(behaviour)).tolist() == [0.0] * 5


def test_the_diversity_loss_pulls_a_code_to_its_only_companion_against_all_codes_but_itself():
    book, groups = tensor(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    codes = torch.tensor([0, 4, 4, 5])
    found = diversity_loss(book, codes, groups).numpy()
    for item, code in enumerate(codes.tolist()):
        others = [other for other in range(6) if other != code]
        logits = np.array([float(book[code] @ book[other]) for other in others])
        companion = others.index((code + 3) % 6)
        np.testing.assert_allclose(found[item], -log_softmax(logits)[companion])


def test_the_companion_is_drawn_evenly_from_the_other_codes_of_the_group(monkeypatch):
    drawn = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *given: drawn.append(multinomial(*given)) or drawn[-1])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diversity_loss(tensor(6, 3), torch.full((3000,), 1), groups)
    counts = np.bincount(drawn[0][:, 0].numpy(), minlength=6)
    assert counts[[1, 4, 5]].tolist() == [0, 0, 0]
    assert (np.abs(counts[[0, 2, 3]] - 1000) < 4 * np.sqrt(1000)).all()


@pytest.mark.parametrize(("size", "n_groups", "bounds"), [(64, 10, (3, 13)), (16, 8, (2, 4)), (8, 1, (4, 8))])
def test_groups_of_codes_keep_their_bounds_and_their_seed(size, n_groups, bounds):
    book = stream(1, "book").normal(size=(size, 4)).astype(np.float32)
    groups = constrained_groups(book, n_groups, 3)
    counts = np.bincount(groups, minlength=n_groups)
    assert counts.sum() == size
    assert bounds[0] <= counts.min() <= counts.max() <= bounds[1]
    np.testing.assert_array_equal(groups, constrained_groups(book, n_groups, 3))


def test_well_parted_codes_are_grouped_by_where_they_are():
    centres = 10 * np.eye(4)
    book = (centres.repeat(6, axis=0) + 0.1 * stream(2, "book").normal(size=(24, 4))).astype(np.float32)
    groups = constrained_groups(book, 4, 0)
    assert len({tuple(sorted(np.flatnonzero(groups == group))) for group in range(4)}) == 4
    for start in range(0, 24, 6):
        assert len(set(groups[start : start + 6])) == 1


def test_the_loss_is_rq_vaes_plus_both_weighted_terms():
    rows, behaviour = torch.from_numpy(unit_embeddings(40, 12)), torch.from_numpy(behaviour_vectors(40))
    config = small_config("letter", collaborative_weight=0.3, diversity_weight=0.2)
    tokenizer = LETTER(config)
    module = tokenizer.build(12)
    module.quantiser.initialise(module.encoder(rows).detach(), None)
    batch = Batch(rows, torch.ones(40), behaviour)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = tokenizer.row_losses(module, batch)
    quantiser = module.quantiser.eval()
    quantised = quantiser(module.encoder(rows))
    expected = RQVAE.row_losses(tokenizer, module, batch) + 0.3 * collaborative_loss(quantised.vector, behaviour)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for level, book in enumerate(quantiser.codebooks):
            expected = expected + 0.2 * diversity_loss(book, quantised.codes[:, level], quantiser.groups[level])
    torch.testing.assert_close(found, expected)


def test_codes_are_grouped_when_training_begins_and_every_so_many_steps(monkeypatch):
    calls = []
    grouped = letter.constrained_groups
    monkeypatch.setattr(letter, "constrained_groups", lambda *given: calls.append(given) or grouped(*given))
    fitted("letter", unit_embeddings(), steps=20, regroup_every=8, levels=2)
    assert len(calls) == 2 * 3  # steps 0, 8 and 16
    assert len({seed for _, _, seed in calls}) == 6


def test_a_codebook_of_few_codes_has_fewer_groups():
    tokenizer = fitted("letter", unit_embeddings(), codebook_size=6, diversity_clusters=10, steps=2)
    for groups in tokenizer.module.quantiser.groups:
        assert np.bincount(groups.numpy()).tolist() == [2, 2, 2]


def test_without_either_weight_letter_learns_what_rq_vae_learns(monkeypatch):
    monkeypatch.setattr(LETTER, "name", "rq-vae")  # the name seeds the initial weights
    rows = unit_embeddings()
    plain = fitted("rq-vae", rows)
    without = fitted("letter", rows, collaborative=behaviour_vectors(), collaborative_weight=0.0, diversity_weight=0.0)
    for name, array in plain.arrays().items():
        np.testing.assert_array_equal(without.arrays()[name], array)


def agreement(codes, communities):
    """P(same first code | same community) over P(same first code | another)."""
    same = codes[:, None, 0] == codes[None, :, 0]
    together = communities[:, None] == communities[None, :]
    np.fill_diagonal(together, False)
    apart = communities[:, None] != communities[None, :]
    return same[together].mean() / same[apart].mean()


def test_the_collaborative_loss_brings_items_of_one_community_to_the_same_codes():
    """Communities are a faint direction of the embeddings, too weak for the reconstruction to code it first."""
    communities = np.arange(256) % 4
    rows = unit_embeddings(256, 24) + 0.4 * np.eye(4, 24, dtype=np.float32)[communities]
    behaviour = 4 * np.eye(4, CODE_DIM, dtype=np.float32)[communities]
    ratios = []
    for weight in (0.0, 1.0):
        options = {"collaborative_weight": weight, "steps": 200, "hidden": (64,)}
        tokenizer = fitted("letter", rows, collaborative=behaviour, **options)
        ratios.append(agreement(tokenizer.encode(rows).codes, communities))
    assert ratios[0] < 1.5
    assert ratios[1] > 2 * ratios[0], ratios
