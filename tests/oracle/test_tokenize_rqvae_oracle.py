"""RQ-VAE's losses, gradients and codes against formulas, finite differences, scikit-learn and the reference library."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from support.trained_tokenizers import small_config, unit_embeddings

import recollect.tokenize.rq_vae as rq_vae
from recollect.rng import stream
from recollect.tokenize.neural_config import RQVAEConfig
from recollect.tokenize.rq_vae import RQVAE, ResidualQuantiser, nearest_codes, rotated
from recollect.tokenize.training_rows import Batch


def tensor(*shape, name="x", scale=1.0):
    return torch.from_numpy(stream(3, name).normal(scale=scale, size=shape))


def tiny(**options):
    """An untrained float64 tokenizer and its module, codes placed on latents of 60 rows (60, 6)."""
    config = small_config("rq-vae", codebook_size=4, code_dim=3, hidden=(5,), **options)
    tokenizer = RQVAE(config)
    module = tokenizer.build(6)
    rows = tensor(60, 6)
    with torch.no_grad():
        module.quantiser.initialise(module.encoder(rows.float()), None)
    return tokenizer, module.double(), rows


def batch_of(rows):
    return Batch(rows, torch.ones(len(rows)), None)


def plain_loss(module, rows, config):
    """The loss by the module's formula in NumPy, item by item."""
    books = [book.detach().numpy() for book in module.quantiser.codebooks]
    with torch.no_grad():
        latents = module.encoder(rows).numpy()
    losses = []
    for latent, row in zip(latents, rows.numpy(), strict=True):
        residual, total, penalty = latent.copy(), np.zeros_like(latent), 0.0
        for book in books:
            vector = book[((residual - book) ** 2).sum(1).argmin()]
            squares = (residual - vector) ** 2
            size = squares.sum() if config.quantisation_reduction == "sum" else squares.mean()
            penalty += (1 + config.commitment) * size
            residual, total = residual - vector, total + vector
        with torch.no_grad():
            squares = (row - module.decoder(torch.from_numpy(total)).numpy()) ** 2
        losses.append((squares.sum() if config.reconstruction_reduction == "sum" else squares.mean()) + penalty)
    return np.array(losses)


@pytest.mark.parametrize("reconstruction", ["sum", "mean"])
@pytest.mark.parametrize("quantisation", ["sum", "mean"])
@pytest.mark.parametrize("residual_gradient", ["detach_code", "straight_through"])
@pytest.mark.parametrize("estimator", ["straight-through", "rotation"])
def test_the_loss_is_the_papers_with_every_reduction_as_named(
    reconstruction, quantisation, residual_gradient, estimator
):
    tokenizer, module, rows = tiny(
        reconstruction_reduction=reconstruction,
        quantisation_reduction=quantisation,
        residual_gradient=residual_gradient,
        estimator=estimator,
    )
    found = tokenizer.row_losses(module.eval(), batch_of(rows)).detach().numpy()
    np.testing.assert_allclose(found, plain_loss(module, rows, tokenizer.config), rtol=1e-10)


def encoder_gradients(tokenizer, module, rows):
    module.zero_grad()
    tokenizer.row_losses(module.eval(), batch_of(rows)).mean().backward()
    return [parameter.grad.clone() for parameter in module.encoder.parameters()]


def finite_differences(tokenizer, module, rows, step=1e-6):
    """Gradient of the loss with codes, and what is added to a latent to reach its code, held fixed."""
    quantiser = module.quantiser
    with torch.no_grad():
        latent = module.encoder(rows)
        codes = quantiser(latent).codes
        offset = quantiser.vectors(codes) - latent
        above = [quantiser.vectors(codes[:, : level + 1]) for level in range(codes.shape[1])]

    def value():
        z = module.encoder(rows)
        pull = sum((z - total).square().sum(1) for total in above)  # r_l - sg[e_l] = z - (e_1 + … + e_l)
        error = (rows - module.decoder(z + offset)).square().sum(1)
        return (error + tokenizer.config.commitment * pull).mean()

    gradients = []
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            gradient = torch.zeros_like(parameter)
            for index in np.ndindex(*parameter.shape):
                before = parameter[index].item()
                parameter[index] = before + step
                higher = value()
                parameter[index] = before - step
                gradient[index] = (higher - value()) / (2 * step)
                parameter[index] = before
            gradients.append(gradient)
    return gradients


def test_the_encoders_straight_through_gradient_equals_finite_differences():
    tokenizer, module, rows = tiny()
    expected = finite_differences(tokenizer, module, rows)
    for found, gradient in zip(encoder_gradients(tokenizer, module, rows), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def test_a_sum_of_straight_through_codes_would_be_noticed(monkeypatch):
    """Planted mistake: level by level with r - sg[e], the decoder's gradient would reach the encoder L times."""
    tokenizer, module, rows = tiny()
    expected = finite_differences(tokenizer, module, rows)
    monkeypatch.setattr(rq_vae, "straight_through", lambda source, target: 3 * source + (target - 3 * source).detach())
    found = encoder_gradients(tokenizer, module, rows)
    assert not torch.allclose(found[0], expected[0], rtol=1e-2)


def commitment_gradient(level, mode):
    """Gradient at the latents of the commitment term of one level alone."""
    latent = tensor(20, 3).requires_grad_()

    def penalty(levels):
        config = small_config("rq-vae", codebook_size=4, code_dim=3, residual_gradient=mode, levels=levels)
        quantiser = ResidualQuantiser(config).double()
        for number, codebook in enumerate(quantiser.codebooks):
            codebook.data.copy_(tensor(4, 3, name=f"book {number}"))
        return quantiser(latent).penalty.sum()

    without = penalty(level) if level else 0.0
    (gradient,) = torch.autograd.grad(penalty(level + 1) - without, latent)
    return gradient


def test_commitment_of_every_level_reaches_the_encoder_when_the_code_is_detached():
    for level in range(3):
        assert commitment_gradient(level, "detach_code").norm(dim=1).min() > 1e-6


def test_commitment_of_the_first_level_alone_reaches_the_encoder_when_straight_through_is_handed_on():
    assert commitment_gradient(0, "straight_through").norm(dim=1).min() > 1e-6
    for level in (1, 2):
        torch.testing.assert_close(
            commitment_gradient(level, "straight_through"), torch.zeros(20, 3).double(), rtol=0, atol=1e-15
        )


def rotation_between(u, q):
    """The rotation in the plane of unit vectors u and q that takes u to q, from the plane's orthonormal basis."""
    across = q - (q @ u) * u
    across = across / across.norm()
    cosine, sine = q @ u, q @ across
    turn = torch.eye(len(u), dtype=torch.float64)
    turn += (cosine - 1) * (torch.outer(u, u) + torch.outer(across, across))
    return turn + sine * (torch.outer(across, u) - torch.outer(u, across))


def test_the_rotation_trick_turns_and_stretches_the_gradient():
    source, target, upstream = tensor(7, 5).requires_grad_(), tensor(7, 5, name="t"), tensor(7, 5, name="g")
    value = rotated(source, target)
    torch.testing.assert_close(value, target)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), source)
    for row in range(7):
        x, q = source[row].detach(), target[row]
        matrix = rotation_between(x / x.norm(), q / q.norm()) * (q.norm() / x.norm())
        torch.testing.assert_close(matrix @ x, q)
        torch.testing.assert_close(gradient[row], matrix.T @ upstream[row])


def test_the_rotation_trick_equals_the_librarys():
    module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    source, target, upstream = tensor(50, 8).requires_grad_(), tensor(50, 8, name="t"), tensor(50, 8, name="g")
    (found,) = torch.autograd.grad((rotated(source, target) * upstream).sum(), source)
    (expected,) = torch.autograd.grad((module.rotate_to(source, target) * upstream).sum(), source)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", ["zero source", "zero target", "opposite"])
def test_the_rotation_trick_stays_finite_where_no_rotation_is_defined(case):
    source, target = tensor(3, 4), tensor(3, 4, name="t")
    source = torch.zeros_like(source) if case == "zero source" else source
    target = {"zero source": target, "zero target": torch.zeros_like(target), "opposite": -2 * source}[case]
    source.requires_grad_()
    value = rotated(source, target)
    torch.testing.assert_close(value, target)
    (gradient,) = torch.autograd.grad(value.sum(), source)
    assert gradient.isfinite().all()


def residual_kmeans(rows, sizes):
    """Codebooks and final residuals of scikit-learn's k-means on residuals."""
    books, residual = [], rows
    for size in sizes:
        kmeans = KMeans(size, n_init=2, random_state=0).fit(residual)
        books.append(kmeans.cluster_centers_)
        residual = residual - kmeans.cluster_centers_[kmeans.labels_]
    return books, residual


def test_with_identity_networks_and_kmeans_codes_the_loss_is_the_distortion_of_residual_kmeans():
    rows = unit_embeddings(200, 6).astype(np.float64)
    books, residual = residual_kmeans(rows, (8, 8, 8))
    tokenizer = RQVAE(small_config("rq-vae", hidden=(), code_dim=6, codebook_size=8, commitment=0.0))
    module = tokenizer.build(6).double().eval()
    for network in (module.encoder, module.decoder):
        network[0].weight.data.copy_(torch.eye(6))
    for parameter, book in zip(module.quantiser.codebooks, books, strict=True):
        parameter.data.copy_(torch.from_numpy(book))
    quantised = module.quantiser(module.encoder(torch.from_numpy(rows)))
    errors = (torch.from_numpy(rows) - module.decoder(quantised.vector)).square().sum(1)
    distortion = (residual**2).sum(1)
    np.testing.assert_allclose(errors.detach().numpy(), distortion, rtol=1e-9)
    total, left = 0.0, rows
    for depth in range(3):
        left = left - books[depth][((left[:, None] - books[depth]) ** 2).sum(2).argmin(1)]
        total = total + (left**2).sum(1)
    loss = tokenizer.row_losses(module, batch_of(torch.from_numpy(rows))).detach().numpy()
    np.testing.assert_allclose(loss, distortion + total, rtol=1e-9)


def random_quantiser(levels=3, size=6, dimension=4):
    quantiser = ResidualQuantiser(RQVAEConfig(levels=levels, codebook_size=size, code_dim=dimension)).double()
    for level, codebook in enumerate(quantiser.codebooks):
        codebook.data.copy_(tensor(size, dimension, name=f"book {level}", scale=0.5**level))
    return quantiser.requires_grad_(False)


def all_tuples(quantiser):
    return torch.cartesian_prod(*[torch.arange(size) for size in quantiser.sizes])


def error_of(quantiser, latent, codes):
    return (latent - quantiser.vectors(codes)).square().sum(1)


def test_greedy_codes_are_the_nearest_of_each_residual_and_a_full_beam_finds_the_best_tuple():
    quantiser, latent = random_quantiser(), tensor(80, 4, name="latent")
    residual, expected = latent.clone(), []
    for codebook in quantiser.codebooks:
        expected.append(torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[expected[-1]]
    greedy = quantiser.codes_of(latent, 1)
    assert torch.equal(greedy, torch.stack(expected, dim=1))
    tuples = all_tuples(quantiser)
    best = tuples[torch.cdist(latent, quantiser.vectors(tuples)).argmin(1)]
    full = quantiser.codes_of(latent, 36)
    torch.testing.assert_close(error_of(quantiser, latent, full), error_of(quantiser, latent, best))
    errors = [error_of(quantiser, latent, quantiser.codes_of(latent, beam)).mean() for beam in (1, 4, 36)]
    assert errors[0] > errors[1] >= errors[2]


def test_alternatives_are_ordered_by_distance_given_the_codes_above():
    quantiser, latent = random_quantiser(), tensor(30, 4, name="latent")
    codes = quantiser.codes_of(latent, 1)
    found = quantiser.alternatives(latent, codes, 6)
    assert torch.equal(found[:, :, 0], codes)
    for level in range(3):
        residual = latent - quantiser.vectors(codes[:, :level])
        assert torch.equal(found[:, level], torch.cdist(residual, quantiser.codebooks[level]).argsort(1))


def test_equal_codes_go_to_the_lower_number():
    book = tensor(5, 3, name="book")
    doubled = torch.cat([book, book, book])
    rows = tensor(200, 3, name="rows")
    assert torch.equal(nearest_codes(rows, doubled, 1)[:, 0], torch.cdist(rows, book).argmin(1))


def test_codes_no_item_used_are_placed_on_residuals_of_the_batch():
    config = RQVAEConfig(levels=2, codebook_size=5, code_dim=3, reseed_every=2)
    quantiser, latent = ResidualQuantiser(config).double().train(), tensor(40, 3, name="latent")
    quantiser.initialise(latent, None)
    lost = torch.full((2, 3), 1e3, dtype=torch.float64)
    quantiser.codebooks[1].data[3:] = lost
    for _ in range(2):
        quantiser(latent)
    assert torch.equal(quantiser.codebooks[1][3:], lost)
    kept = quantiser.codebooks[1][:3].clone()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codes = quantiser(latent).codes
    residual = latent - quantiser.codebooks[0][codes[:, 0]]
    assert torch.cdist(quantiser.codebooks[1][3:], residual).min(1).values.max() < 1e-6
    assert torch.equal(quantiser.codebooks[1][:3], kept)
    assert quantiser.reseeded.tolist() == [0, 2]
    assert quantiser.uses[1].sum() == 40
    assert {3, 4} <= set(codes[:, 1].tolist())


def relative_mse(rows, decoded):
    return float(((rows - decoded) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum())


def latent_spread(tokenizer, rows):
    return float(tokenizer.module.encoder(torch.from_numpy(rows).double()).var(0).sum())


@pytest.fixture(scope="module")
def learnt():
    """768 unit rows, 400 steps, with the default sum/sum reductions."""
    rows = unit_embeddings(768, 48, 12)
    config = RQVAEConfig(hidden=(64,), code_dim=16, codebook_size=32, steps=400, batch_size=256, reseed_every=50)
    return rows, config, RQVAE(config).fit(rows)


def test_code_usage_stays_healthy_with_summed_losses(learnt):
    _, _, tokenizer = learnt
    assert all(level["usage"] >= 0.8 for level in tokenizer.report.levels)
    assert not any("of its" in warning for warning in tokenizer.report.warnings)
    assert tokenizer.report.levels[0]["objective_after"] < tokenizer.report.levels[0]["objective_before"]


@pytest.mark.parametrize(
    ("options", "is_healthy"),
    [
        ({}, True),
        ({"reseed_every": None}, False),
        ({"reconstruction_reduction": "mean"}, False),
    ],
    ids=["as it is", "codes stay dead", "averaged reconstruction"],
)
def test_codes_die_in_steep_training_unless_they_are_placed_anew_and_the_losses_are_summed(options, is_healthy):
    """In small batches and large steps codes lose their items: .97, .47 and .09 of a level are used in the end."""
    rows = unit_embeddings(512, 32, 12)
    config = RQVAEConfig(
        hidden=(32,),
        code_dim=8,
        codebook_size=32,
        levels=2,
        steps=240,
        batch_size=64,
        reseed_every=10,
        learning_rate=0.06,
        schedule="constant",
    )
    usage = min(level["usage"] for level in RQVAE(replace(config, **options)).fit(rows).report.levels)
    assert usage >= 0.8 if is_healthy else usage < 0.7


def test_a_loss_that_still_falls_is_reported(learnt):
    _, config, tokenizer = learnt
    assert any("still fell by" in warning and "raise steps" in warning for warning in tokenizer.report.warnings)
    small = replace(config, hidden=(8,), levels=1, codebook_size=4, learning_rate=1e-9, batch_size=40)
    settled = RQVAE(small).fit(unit_embeddings(40, 12))
    assert not any("still fell by" in warning for warning in settled.report.warnings)


def test_training_beats_the_codes_it_started_from(learnt):
    rows, config, tokenizer = learnt
    start = RQVAE(replace(config, steps=1, learning_rate=1e-9)).fit(rows)
    errors = [relative_mse(rows, one.decode(one.encode(rows).codes)) for one in (start, tokenizer)]
    assert errors[1] < 0.35 < 0.8 < errors[0]


def test_a_wider_beam_lowers_the_latent_error(learnt):
    rows, _, tokenizer = learnt
    latent = tokenizer.module.encoder(torch.from_numpy(rows).double())
    errors = []
    for beam in (1, 4):
        codes = torch.from_numpy(tokenizer.encode(rows, beam=beam).codes.astype(np.int64))
        errors.append(float(error_of(tokenizer.module.quantiser, latent, codes).mean()))
    assert errors[1] < errors[0]


def test_averaging_the_reconstruction_alone_makes_quantisation_d_times_as_heavy():
    """Trap 1, in the gradients at the encoder: its share of the reconstruction is divided by D, the other's is not."""
    norms = {}
    for reduction in ("sum", "mean"):
        tokenizer, module, rows = tiny(reconstruction_reduction=reduction, commitment=0.0)
        norms[reduction] = encoder_gradients(tokenizer, module, rows)[0].norm()
    torch.testing.assert_close(norms["sum"] / norms["mean"], torch.tensor(6.0, dtype=torch.float64))


def test_averaging_the_reconstruction_alone_shrinks_the_latents_and_ruins_the_reconstruction(learnt):
    rows, config, healthy = learnt
    trapped = RQVAE(replace(config, reconstruction_reduction="mean")).fit(rows)
    assert latent_spread(trapped, rows) < 0.25 * latent_spread(healthy, rows)
    errors = [relative_mse(rows, one.decode(one.encode(rows).codes)) for one in (healthy, trapped)]
    assert errors[1] > 1.3 * errors[0]


def test_an_unhealthy_codebook_is_reported():
    rows = np.repeat(unit_embeddings(6, 12), 20, axis=0)
    tokenizer = RQVAE(small_config("rq-vae")).fit(rows)
    assert tokenizer.report.levels[0]["used_codes"] <= 6
    assert any("level 1 of rq-vae uses" in warning and "80%" in warning for warning in tokenizer.report.warnings)


@pytest.mark.slow
def test_code_usage_stays_healthy_at_the_published_size():
    rows = unit_embeddings(4096, 768, 64)
    tokenizer = RQVAE(RQVAEConfig(steps=2000)).fit(rows)
    assert all(level["usage"] >= 0.8 for level in tokenizer.report.levels)
