"""The projector: orthonormal, the top eigenspace of the public gradients, robust to degenerate ones."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpose_dp.engine import basis
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.projection import Projector

SHAPES = [(4, 3, 3), (7,), (2, 5)]


def split(flat):
    sizes = [int(torch.tensor(s).prod()) for s in SHAPES]
    return [part.view(-1, *s) for part, s in zip(flat.split(sizes, dim=1), SHAPES)]


def join(parts):
    return torch.cat([b.flatten(1) for b in parts], 1)


def fit_basis(projector, gradients, num_samples):
    basis.fit_basis(projector, basis.table_of(gradients, num_samples, projector.dtype))


def test_basis_is_the_top_eigenspace_of_the_second_moment():
    torch.manual_seed(0)
    g = torch.randn(20, 53) * torch.logspace(0, -3, 53)
    projector = Projector(rank=5)
    fit_basis(projector, [split(g[:8]), split(g[8:])], len(g))
    V = join(projector.basis)
    torch.testing.assert_close(V @ V.T, torch.eye(5), rtol=0, atol=1e-5)
    top = torch.linalg.eigh(g.T.double() @ g.double())[1][:, -5:].float()
    torch.testing.assert_close(V.T @ V, top @ top.T, rtol=0, atol=1e-4)


def test_expand_and_project_are_v_and_v_vt():
    torch.manual_seed(1)
    projector = Projector(rank=4)
    fit_basis(projector, [split(torch.randn(10, 53))], 10)
    V = join(projector.basis)
    c, g = torch.randn(4), torch.randn(1, 53)
    torch.testing.assert_close(join([x[None] for x in projector.expand(c)])[0], c @ V)
    torch.testing.assert_close(
        join([x[None] for x in projector.project([p[0] for p in split(g)])])[0], g[0] @ V.T @ V, rtol=1e-4, atol=1e-5
    )


def test_preconditioned_is_the_subspace_of_scaled_gradients():
    torch.manual_seed(3)
    g = torch.randn(60, 53) * torch.logspace(0, -1, 53)
    v = g.square().mean(0)
    scale = (v / v.mean() + 0.01) ** -0.25
    for rank in (5, 53):
        projector = Projector(rank=rank, preconditioned=True)
        fit_basis(projector, [split(g[:20]), split(g[20:])], len(g))
        V = join(projector.basis)
        top = torch.linalg.eigh((g * scale).T.double() @ (g * scale).double())[1][:, -rank:].float()
        wanted = scale[:, None] * top
        wanted *= rank**0.5 / wanted.norm()
        torch.testing.assert_close(V.T @ V, wanted @ wanted.T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(V.norm(), torch.tensor(rank**0.5))
    update = V.T @ V @ g[0]  # of full rank: RMSprop's direction
    torch.testing.assert_close(
        torch.cosine_similarity(update, g[0] * scale**2, dim=0), torch.tensor(1.0), rtol=0, atol=1e-4
    )


def test_half_precision_keeps_the_subspace():
    torch.manual_seed(2)
    g = torch.randn(12, 53)
    one, two = Projector(rank=6), Projector(rank=6, dtype='bfloat16')
    fit_basis(one, [split(g)], len(g)), fit_basis(two, [split(g)], len(g))
    assert two.basis[0].dtype == torch.bfloat16
    A, B = join(one.basis), join(two.basis).float()
    assert torch.linalg.svdvals(A @ B.T).min() > 0.98


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made inside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(x.alias_info for x in func._schema.returns):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize('preconditioned', [False, True])
def test_groups_and_chunks_do_not_change_the_basis(preconditioned, monkeypatch):
    torch.manual_seed(4)
    g = torch.randn(9, 53)
    found = []
    for sizes in ((1 << 22, 1 << 18), (10, 4)):
        for name, size in zip(('_GROUP', '_CHUNK'), sizes):
            monkeypatch.setattr(basis, name, size)
        projector = Projector(rank=4, preconditioned=preconditioned)
        fit_basis(projector, [split(g[:5]), split(g[5:])], 12)
        assert [part.shape[1:] for part in projector.basis] == [torch.Size(shape) for shape in SHAPES]
        found.append(projector.flat.T @ projector.flat)
    assert len(basis._grouped([torch.Size(shape) for shape in SHAPES])) == 2
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('preconditioned', [False, True])
def test_nothing_of_the_size_of_the_gradients_is_made_beside_them(preconditioned, monkeypatch):
    monkeypatch.setattr(basis, '_CHUNK', 16)
    g = torch.randn(40, 53 * 8).bfloat16()
    table = basis.table_of([[g]], len(g), torch.bfloat16)
    projector = Projector(rank=3, preconditioned=preconditioned, dtype='bfloat16')
    with Largest() as largest:
        basis.fit_basis(projector, table)
    assert largest.bytes < g.nbytes / 2
    assert projector.flat.untyped_storage().nbytes() == 3 * 53 * 8 * 2  # and the gradients are not kept


def test_fewer_directions_than_asked_for():
    projector = Projector(rank=10)
    g = torch.randn(3, 53)
    fit_basis(projector, [split(torch.cat([g, g]))], 2 * len(g))
    assert projector.rank == 3


def test_samples_that_are_not_finite_are_left_out():
    g = torch.randn(6, 53)
    dirty = torch.cat([g, torch.full((1, 53), float('nan'))])
    one, two = Projector(rank=4), Projector(rank=4)
    fit_basis(one, [split(g)], len(g)), fit_basis(two, [split(dirty)], len(dirty))
    torch.testing.assert_close(join(one.basis).abs(), join(two.basis).abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('batches', [[], [split(torch.zeros(3, 53))], [split(torch.full((2, 53), float('inf')))]])
def test_nothing_usable_is_an_error(batches):
    with pytest.raises(PrivacyError, match='no usable gradient'):
        fit_basis(Projector(rank=2), batches, 100)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(order='clip-then-project'), 'order'),
        (dict(rank=0), 'rank'),
        (dict(dtype='int8'), 'dtype'),
        (dict(preconditioned=True, order='noise-then-project'), 'preconditioned'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PrivacyError, match=message):
        Projector(**settings)


def test_coordinates_of_a_long_gradient_keep_their_digits():
    torch.manual_seed(5)
    flat, g = (
        torch.rand(2, 5_000_000),
        torch.rand(5_000_000),
    )  # of one sign: a single running sum would round each addend
    projector = Projector()
    projector.place(flat, [torch.Size([5_000_000])])
    torch.testing.assert_close(projector.coordinates_of([g]), (flat.double() @ g.double()).float(), rtol=2e-6, atol=0)


def test_no_basis_is_an_error():
    with pytest.raises(PrivacyError, match='ProjectorRefreshHook'):
        Projector().rank  # noqa: B018


@pytest.mark.parametrize('value', ['6', 2.5, True, None, 0, [6]], ids=str)
def test_settings_of_other_types_are_named(value):
    for name in ('rank', 'refresh_interval'):
        with pytest.raises(PrivacyError, match=f'projector.{name}=.*whole number'):
            Projector(**{name: value})
