"""The inverse of sampling: equation (3) in the least-squares sense, by JAX's conjugate gradients on
the gather and the splat of this package, with derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Inexact
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from jaxwarp import _checks, _formulas, _primitives
from jaxwarp._primitives import Reduction, Sampling

AVERAGE = Reduction("average", 0.0, False)


def reconstruct(
    values: Inexact[ArrayLike, "*S C"],
    points: Float[ArrayLike, "*S dims"],
    shape: Sequence[int],
    *,
    boundary: _checks.Boundary | Sequence[_checks.Boundary] = "constant",
    damping: float = 0.0,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> Inexact[Array, "*shape C"]:
    """Finds the image whose samples at the points are the values: the inverse of `gather`.

    The result x minimises ``|gather(x, points) - values|^2 + damping |x|^2``, with linear
    interpolation. It is sharper than the average of `forward_warp`, with which the search starts.
    One image; batches come from `jax.vmap`, and each image of a batch then has its own last step.

    Args:
      values: ``(*S, C)``; float16, bfloat16, float32, float64, complex64 or complex128.
      points: ``(*S, 2)`` or ``(*S, 3)``, positions ``(x, y[, z])`` in pixels; float32 or float64.
      shape: spatial shape of the result, ``(H, W)`` or ``(D, H, W)``.
      boundary: as in `gather`, with 0 outside under ``"constant"``.
      damping: weight of ``|x|^2``, in units of coverage, of which every point adds 1. 0 fits the
        values as they are, also where that takes large numbers: points that fold, or that lie half
        way between pixels, hardly see the finest detail. 0.01 keeps such detail small, takes fewer
        steps, and darkens what few points see.
      tol: the search ends when the residual ``splat(values - gather(x)) - damping x`` is at most
        `tol` times as long as ``splat(values)``, over all pixels and channels. Less than the
        machine epsilon counts as that.
      max_steps: the search ends after this many steps at the latest; each takes one gather and one
        splat. Derivatives are found by searches of their own, with the same two limits.

    Returns:
      ``(*shape, C)`` in the values' dtype, computed in float32 (float64 for float64). Without
      damping, what the values leave open is decided thus: a pixel that no point touches is 0, and
      of all images that fit equally well, x is the one with the smallest ``sum(coverage x^2)``.

      A point with a non-finite coordinate is dropped, and all of its gradients are 0. A non-finite
      value at another point makes the whole image NaN.

      Derivatives of every order, in both modes, are those of this minimum: they presume that `tol`
      has been reached. Without damping they hold as long as moving the points does not change how
      many pixels they determine. A gradient costs one search with damping, and three without.

    Raises:
      TypeError: an array of another dtype; half-precision `points`; an option of another type.
      ValueError: `values` and `points` that do not fit each other or `shape`; an option out of its
        range; an empty `shape` under a boundary other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> points = jnp.array([[0.0, 0.0], [0.5, 0.0], [1.5, 0.0], [2.0, 0.0]])
      >>> values = jnp.array([[1.0], [2.0], [2.5], [2.0]])  # of an image 1, 3, 2
      >>> image = jaxwarp.reconstruct(values, points, (1, 3))
      >>> bool(jnp.allclose(image[0, :, 0], jnp.array([1.0, 3.0, 2.0]), atol=1e-4))
      True

    Source: equation (3) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021), in the least-squares sense; the first guess is (5). Derivatives without damping: Golub
    and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose
    variables separate" (1973).
    """
    values, points, sizes = _checks.sources(values, points, shape)
    if jnp.iscomplexobj(values):
        limits: dict[str, Any] = {"damping": damping, "tol": tol, "max_steps": max_steps}
        parts = _formulas.parts_of(values)
        found = reconstruct(parts, points, shape, boundary=boundary, **limits)
        return _formulas.complex_of(found)
    sampling = _checks.sampling("linear", boundary, (0,) * len(sizes), False, None)
    _checks.spatial("shape", sizes, sampling.boundary)
    problem = _Problem(sizes, sampling, *_limits(damping, tol, max_steps))
    exact = values.astype(_primitives.accumulator(values.dtype))
    return _least_squares(problem, exact, points).astype(values.dtype)


def _limits(damping: Any, tol: Any, max_steps: Any) -> tuple[float, float, int]:
    weight, least = _checks.number("damping", damping), _checks.number("tol", tol)
    if not 0 <= weight < np.inf:
        raise ValueError(
            f"damping: expected a finite number >= 0, got {damping!r}; 0 fits the values alone"
        )
    if not least >= 0:
        raise ValueError(f"tol: expected a number >= 0, got {tol!r}; 1e-5 is the default")
    if not isinstance(max_steps, int | np.integer):
        raise TypeError(
            f"max_steps: expected a Python int, got {type(max_steps).__name__}; it is part of the "
            "compiled program"
        )
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}; 100 is the default")
    return weight, least, int(max_steps)


class _Problem(NamedTuple):
    """All that is static, hashable; and the products and solves with G, the weights g(p_i, j).

    image: (*shape, C). samples: (N, C). points: (N, d). D = G^T 1 is the coverage.
    """

    shape: tuple[int, ...]
    sampling: Sampling
    damping: float
    tol: float
    max_steps: int

    def gather(self, image: Array, points: Array) -> Array:
        """G x, with a row of 0 for a point that is not finite, as in the splat."""
        finite = jnp.isfinite(points).all(-1, keepdims=True)
        samples = _primitives.gather(image, jnp.where(finite, points, 0), self.sampling)
        return jnp.where(finite, samples, 0)

    def splat(self, samples: Array, points: Array) -> Array:
        """G^T f."""
        return _primitives.splat(samples, points, None, self.shape, self.sampling)["image"]

    def average(self, samples: Array, points: Array) -> Array:
        """D^-1 G^T f, which is (5); 0 in holes."""
        results = _primitives.splat(samples, points, None, self.shape, self.sampling, AVERAGE)
        return results["image"]

    def weight(self, points: Array, dtype: np.dtype) -> Array:
        """D + damping, (*shape, 1): the row sums of `normal`, up to what lies outside."""
        return self.splat(jnp.ones((len(points), 1), dtype), points) + self.damping

    def normal(self, points: Array) -> Callable[[Array], Array]:
        """x -> (G^T G + damping) x."""
        return lambda image: self.splat(self.gather(image, points), points) + self.damping * image

    def search(self, operator: Callable[[Array], Array], weight: Array, b: Array) -> Array:
        """x of operator(x) = b by conjugate gradients, preconditioned by 1 / weight and started
        from b / weight; 0 where the weight is 0."""
        # An epsilon of the weight, about the rounding of the operator, makes it definite: without
        # it the steps grow without limit along what rounding leaves of b outside its range.
        epsilon = np.finfo(b.dtype).eps
        scale = _reciprocal(weight)
        size = jnp.max(jnp.abs(b), initial=0)  # b / size has a square that is neither 0 nor inf,
        size = jnp.where(size == 0, 1, size)  # and is NaN all over if one value is not finite
        x, _ = cg(
            lambda x: operator(x) + epsilon * weight * x,
            b / size,
            scale * (b / size),
            tol=max(self.tol, float(epsilon)),
            maxiter=self.max_steps,
            M=lambda residual: scale * residual,
        )
        return x * size

    # The derivatives need two linear solves. Linear: their transposes are solves again.

    def solve_normal(self, b: Array, points: Array) -> Array:
        """x of (G^T G + damping) x = b; undamped, of the part of b in the range of G^T. Points that
        coincide and differ in value push b out of it. In the transposed solve it lies there, by the
        projection that follows this one."""

        def search(operator: Callable[[Array], Array], b: Array) -> Array:
            return self.search(operator, self.weight(points, b.dtype), b)

        def project_and_search(operator: Callable[[Array], Array], b: Array) -> Array:
            averaged = _reciprocal(self.weight(points, b.dtype)) * b
            shown = self.solve_averaged(self.gather(averaged, points), points)
            return search(operator, self.splat(shown, points))

        return jax.lax.custom_linear_solve(
            self.normal(points),
            b,
            search if self.damping > 0 else project_and_search,
            search,
            symmetric=True,
        )

    def solve_averaged(self, b: Array, points: Array) -> Array:
        """f of G D^-1 G^T f = b, where b are samples of an image: the samples whose average (5) is
        that image, up to what no sample shows."""

        def search(operator: Callable[[Array], Array], b: Array) -> Array:
            return self.search(operator, jnp.ones((), b.dtype), b)

        return jax.lax.custom_linear_solve(
            lambda f: self.gather(self.average(f, points), points), b, search, symmetric=True
        )


def _reciprocal(weight: Array) -> Array:
    """1 / weight, 0 where the weight is 0."""
    return jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _least_squares(problem: _Problem, values: Array, points: Array) -> Array:
    """x with the least |G x - f|^2 + damping |x|^2, which is where `normal`(x) = G^T f."""
    weight = problem.weight(points, values.dtype)
    return problem.search(problem.normal(points), weight, problem.splat(values, points))


def _least_squares_jvp(problem: _Problem, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """By the implicit function theorem, normal(dx) = d(G^T (f - G x)) with x at rest."""
    values, points = primals
    x = _least_squares(problem, values, points)
    at = {"values": values, "points": points}
    d = dict(zip(at, tangents, strict=True))
    d = {name: t for name, t in d.items() if type(t) is not SymbolicZero}

    def residual(values: Array, points: Array) -> Array:
        return problem.splat(values - problem.gather(x, points), points)

    _, d_residual = jax.jvp(lambda moved: residual(**(at | moved)), ({n: at[n] for n in d},), (d,))
    d_x = problem.solve_normal(d_residual, points)
    if problem.damping > 0:
        return x, d_x

    # The normal equations are silent about what no sample shows. x is an average (5), of samples f,
    # since it has the least sum(D x^2); that part moves as the average of f does.
    unseen = jnp.zeros_like(x)
    if "points" in d:
        f = problem.solve_averaged(problem.gather(x, points), points)
        _, unseen = jax.jvp(lambda points: problem.average(f, points), (points,), (d["points"],))
    seen = problem.solve_averaged(problem.gather(d_x - unseen, points), points)
    return x, unseen + problem.average(seen, points)


_least_squares.defjvp(_least_squares_jvp, symbolic_zeros=True)
