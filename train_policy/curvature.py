"""How a loss curves: Hessian-vector products of a workload, the trace of the Hessian and of its blocks, its top eigenvalue.

Nothing here forms a Hessian. A product with a vector is a second backward pass through the first (Pearlmutter 1994); the
trace comes from Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1), the eigenvalue from Lanczos.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Product = Callable[[Tensor], Tensor]                     # (N,) to (N,), linear and symmetric


@dataclass(frozen=True, slots=True)
class Trace:
    """An estimate of a trace."""

    value: float
    error: float                                         # its standard error; 0: the value is exact
    products: int                                        # matrix-vector products that it took


@dataclass(frozen=True, slots=True)
class TopEigenvalue:
    """The largest eigenvalue that Lanczos found."""

    value: float
    residual: float                                      # |A x - value x| of the unit vector found: an eigenvalue is that near
    products: int


class Hessian:
    """The Hessian of a loss where its parameters are now, known by its products with vectors.

    `loss()` is called once, and all products are of that one batch; the parameters must not change before the last of them.
    Vectors are flat and in the parameters' order.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> Hessian(lambda: (x**3).sum(), {"x": x}).product(torch.ones(2))
    tensor([ 6., 12.])
    """

    def __init__(self, loss: Callable[[], Tensor], params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)
        # Fused attention has no second derivative: the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            tensors = list(self.params.values())
            first = torch.autograd.grad(loss(), tensors, create_graph=True, materialize_grads=True)
        self.gradients = dict(zip(self.params, first, strict=True))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params.values())

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian times a vector (N,)."""
        return self._times(list(self.params), vector)

    def block(self, name: str) -> Product:
        """The product with the diagonal block of one parameter."""
        if name not in self.params:
            raise ValueError(f"no parameter {name!r}; there are {', '.join(self.params)}")
        return lambda vector: self._times([name], vector)

    def _times(self, names: list[str], vector: Tensor) -> Tensor:
        inputs = [self.params[name] for name in names]
        parts = [part.view_as(p) for part, p in zip(torch.split(vector, [p.numel() for p in inputs]), inputs, strict=True)]
        # A gradient that depends on no parameter (of a linear part of the loss) has nothing to give.
        given = [self.gradients[name] for name in names]
        curved = [(gradient, part) for gradient, part in zip(given, parts, strict=True) if gradient.requires_grad]
        if not curved:
            return torch.zeros_like(vector)
        gradients, directions = zip(*curved, strict=True)
        found = torch.autograd.grad(gradients, inputs, directions, retain_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in found])


def hutch_plus_plus(
    product: Product, size: int, *, generator: Generator, products: int = 30, dtype: torch.dtype = torch.float32
) -> Trace:
    """The trace of a symmetric matrix from `products` products: exact on a subspace that it finds, by chance on the rest.

    A third of the products find the subspace, a third measure the trace on it, and a third estimate what lies outside by
    Hutchinson's random signs. For a positive semi-definite matrix the error falls as 1 / products, for Hutchinson alone as
    1 / sqrt(products). A matrix with no more columns than that is measured column by column.

    >>> hutch_plus_plus(lambda v: 3 * v, 4, generator=Generator())
    Trace(value=12.0, error=0.0, products=4)
    """
    if products < 3:
        raise ValueError(f"products={products} must be at least 3: a third of them does each part")
    if size <= products:
        exact = sum(float(product(column)[i]) for i, column in enumerate(torch.eye(size, dtype=dtype)))
        return Trace(exact, 0.0, size)
    third = products // 3
    sketch = _times_all(product, _signs(size, third, generator, dtype))        # (N, K)
    basis = torch.linalg.qr(sketch.double())[0].to(dtype)                      # (N, K) orthonormal
    known = float((basis * _times_all(product, basis)).sum(dtype=torch.float64))
    rest = _signs(size, third, generator, dtype)
    rest -= basis @ (basis.T @ rest)
    each = (rest * _times_all(product, rest)).sum(0, dtype=torch.float64)      # (K,)
    error = float(each.std()) / math.sqrt(third) if third > 1 else math.nan
    return Trace(known + float(each.mean()), error, 3 * third)


def trace(hessian: Hessian, *, generator: Generator, products: int = 30) -> Trace:
    """The trace of the whole Hessian."""
    return hutch_plus_plus(hessian.product, hessian.size, generator=generator, products=products, dtype=_dtype(hessian))


def block_traces(hessian: Hessian, names: list[str], *, generator: Generator, products: int = 30) -> list[Trace]:
    """The trace of each named parameter's diagonal block; those of all parameters add up to the whole trace."""

    def of(name: str) -> Trace:
        param = hessian.params[name]
        return hutch_plus_plus(hessian.block(name), param.numel(), generator=generator, products=products, dtype=param.dtype)

    return [of(name) for name in names]


def top_eigenvalue(
    hessian: Hessian, *, generator: Generator, products: int = 40, tolerance: float = 1e-3
) -> TopEigenvalue:
    """The largest eigenvalue of the whole Hessian."""
    return lanczos(
        hessian.product, hessian.size, generator=generator, products=products, tolerance=tolerance, dtype=_dtype(hessian)
    )


def lanczos(
    product: Product, size: int, *, generator: Generator, products: int = 40, tolerance: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> TopEigenvalue:  # fmt: skip
    """The largest eigenvalue of a symmetric matrix by Lanczos with full reorthogonalisation (Parlett 1998, chapter 13).

    It stops when the residual is below `tolerance` times the eigenvalue, or after `products` products.

    >>> diagonal = torch.tensor([1.0, 2.0, 5.0])
    >>> round(lanczos(lambda v: diagonal * v, 3, generator=Generator()).value, 4)
    5.0
    """
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    basis = torch.empty(min(products, size), size, dtype=torch.float64)        # (K, N): rows are orthonormal
    diagonal: list[float] = []
    beside: list[float] = []
    value = residual = math.nan
    for k in range(len(basis)):
        basis[k] = vector / vector.norm()
        vector = product(basis[k].to(dtype)).double()
        diagonal.append(float(basis[k] @ vector))
        for _ in range(2):                               # once loses half the digits where much is taken away
            vector = vector - basis[: k + 1].T @ (basis[: k + 1] @ vector)
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        beside.append(float(vector.norm()))
        value, residual = float(values[-1]), beside[-1] * abs(float(vectors[-1, -1]))
        if residual <= tolerance * abs(value) or beside[-1] == 0:
            break
    return TopEigenvalue(value, residual, len(diagonal))


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)


def _times_all(product: Product, columns: Tensor) -> Tensor:
    return torch.stack([product(column) for column in columns.T.contiguous()], 1)


def _signs(size: int, count: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(2, (size, count), generator=generator).mul_(2).sub_(1).to(dtype)


def _dtype(hessian: Hessian) -> torch.dtype:
    return next(iter(hessian.params.values())).dtype
