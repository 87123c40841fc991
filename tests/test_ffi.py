"""The kernels check what they are given once more: a wrong call is an error, never a wrong address.

People do not get here, because the Python side refuses such calls; these are made past it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwarp import _ffi

OPTIONS = {
    "method": "linear",
    "boundary": ("constant",),
    "fill_value": 0.0,
    "derivative": (0, 0),
    "displacement": False,
    "deterministic": False,
    "channels_first": False,
    "cubic_a": -0.5,
    "reduce": "sum",
    "min_coverage": 0.0,
}
SHAPES = {
    "image": (5, 6, 3),
    "ct_image": (5, 6, 3),
    "values": (7, 3),
    "ct_values": (7, 3),
    "points": (7, 2),
    "ct_points": (7, 2),
    "importance": (7,),
    "ct_importance": (7,),
    "coverage": (5, 6),
    "weight": (5, 6),
    "peak": (5, 6),
    "ct_coverage": (5, 6),
    "d_image": (5, 6, 3),
    "d_values": (7, 3),
    "d_points": (7, 2),
    "d_importance": (7,),
    "d_coverage": (5, 6),
    "d_ct_values": (7, 3),
    "d_ct_points": (7, 2),
}
# name -> kernel, inputs, outputs, reductions
CALLS = {
    "gather": ("jaxwarp_gather", "image points", "values", ["sum"]),
    "gather-peak": ("jaxwarp_gather", "image points importance peak", "values", ["sum"]),
    "gather_tangent": (
        "jaxwarp_gather_tangent",
        "image points d_image d_points",
        "d_values",
        ["sum"],
    ),
    "gather_tangent-peak": (
        "jaxwarp_gather_tangent",
        "image points importance peak d_image d_points d_importance",
        "d_values",
        ["sum"],
    ),
    "gather_vjp": (
        "jaxwarp_gather_vjp",
        "image points ct_values",
        "ct_image ct_points",
        ["sum"],
    ),
    "gather_vjp_tangent": (
        "jaxwarp_gather_vjp_tangent",
        "image points ct_values d_image d_points d_ct_values",
        "d_ct_points",
        ["sum"],
    ),
    "splat": (
        "jaxwarp_splat",
        "values points importance",
        "image coverage weight",
        ["sum", "average"],
    ),
    "splat-peak": ("jaxwarp_splat", "values points importance peak", "image", ["sum"]),
    "splat-softmax": (
        "jaxwarp_splat",
        "values points importance",
        "image coverage weight peak",
        ["softmax"],
    ),
    "splat_tangent": (
        "jaxwarp_splat_tangent",
        "values points importance image coverage weight d_values d_points d_importance",
        "d_image d_coverage",
        ["sum", "average"],
    ),
    "splat_tangent-softmax": (
        "jaxwarp_splat_tangent",
        "values points importance image coverage weight peak d_values d_points d_importance",
        "d_image d_coverage",
        ["softmax", "sum"],
    ),
    "splat_vjp": (
        "jaxwarp_splat_vjp",
        "values points importance ct_image image coverage weight",
        "ct_values ct_points ct_importance",
        ["sum", "average"],
    ),
    "splat_vjp-softmax": (
        "jaxwarp_splat_vjp",
        "values points importance ct_image image coverage weight peak ct_coverage",
        "ct_values ct_points ct_importance",
        ["softmax"],
    ),
}
COMBINATIONS = [
    pytest.param(which, name, id=f"{which}-{name}")
    for which, (_, inputs, outputs, _) in CALLS.items()
    for name in f"{inputs} {outputs}".split()
]


def call(which, *, shapes=(), dtypes=(), drop=None, **options):
    """One call of a kernel with zeros, right but for what is passed here."""
    kernel, inputs, outputs, reductions = CALLS[which]
    shapes, dtypes = {**SHAPES, **dict(shapes)}, dict(dtypes)

    def described(names):
        return {
            name: jax.ShapeDtypeStruct(shapes[name], dtypes.get(name, np.float32))
            for name in names.split()
            if name != drop
        }

    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in described(inputs).items()}
    options = OPTIONS | {"reduce": reductions[0]} | options
    return jax.block_until_ready(_ffi.call(kernel, inputs, described(outputs), **options))


@pytest.mark.parametrize("which", CALLS)
def test_right_calls_succeed(which):
    for reduce in CALLS[which][-1]:
        for name, result in call(which, reduce=reduce).items():
            # Where no logit arrives, their maximum is -inf.
            assert (np.isfinite(result) | (name == "peak")).all()


def test_no_points_write_all_the_same():
    shapes = {"points": (0, 2), "values": (0, 3), "importance": (0,)}
    found = call("splat-softmax", shapes=shapes, reduce="softmax", fill_value=7.0)
    expected = {"image": 7, "coverage": 0, "weight": 0, "peak": -np.inf}
    for name, result in found.items():
        np.testing.assert_array_equal(result, np.full(SHAPES[name], expected[name]))


@pytest.mark.parametrize(
    "which",
    [
        "gather",
        "gather_tangent",
        "gather_vjp",
        "gather_vjp_tangent",
        "splat-peak",
        "splat_tangent",
    ],
)
def test_channels_first(which):
    shapes = {"image": (3, 5, 6), "values": (3, 7)}
    shapes |= {p + name: s for name, s in shapes.items() for p in ("ct_", "d_", "d_ct_")}
    assert all(
        np.isfinite(r).all() for r in call(which, shapes=shapes, channels_first=True).values()
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="jaxwarp_"):
        call(which, shapes=shapes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="jaxwarp_"):
        call(which, channels_first=True)


@pytest.mark.parametrize(
    ("which", "options"),
    [
        *((which, {"reduce": "average"}) for which in ("gather", "gather_vjp", "splat-peak")),
        *((which, {"reduce": "average"}) for which in ("gather_tangent", "gather_tangent-peak")),
        ("gather_vjp_tangent", {"reduce": "average"}),
        *((which, {"reduce": "softmax"}) for which in ("gather_tangent-peak", "splat_tangent")),
        *(
            ("splat_tangent-softmax", option)
            for option in ({"method": "cubic"}, {"channels_first": True})
        ),
        *((which, {"reduce": "softmax"}) for which in ("gather", "gather-peak", "splat")),
        *((which, {"reduce": "softmax"}) for which in ("splat-peak", "splat_vjp")),
        *((which, {"reduce": "sum"}) for which in ("splat-softmax", "splat_vjp-softmax")),
        *((which, {"method": "cubic"}) for which in ("splat-softmax", "splat_vjp-softmax")),
        *((which, {"method": "cubic"}) for which in ("gather-peak", "gather_tangent-peak")),
        ("splat-peak", {"method": "cubic"}),
        *((which, {"channels_first": True}) for which in ("splat-softmax", "splat_vjp-softmax")),
    ],
)
def test_combinations_without_meaning(which, options):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{CALLS[which][0]}: "):
        call(which, **options)


@pytest.mark.parametrize(("which", "name"), COMBINATIONS)
def test_wrong_shapes(which, name):
    kernel, shape = CALLS[which][0], SHAPES[name]
    free = 2 if (which, name) == ("gather", "image") else 0  # its size is its own affair
    for axis in range(free, len(shape)):
        for size in (1, shape[axis] - 1, shape[axis] + 1, 100):
            wrong = (*shape[:axis], size, *shape[axis + 1 :])
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kernel}: "):
                call(which, shapes={name: wrong})
    for wrong in ((), shape[1:], shape[:-1], (1, *shape), (2, *shape)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kernel}: "):
            call(which, shapes={name: wrong})


@pytest.mark.parametrize(("which", "name"), COMBINATIONS)
def test_wrong_dtypes(which, name):
    kernel = CALLS[which][0]
    wrong = [np.float64, np.int32, np.complex64, jnp.bfloat16]
    if kernel == "jaxwarp_splat" and name == "values":
        wrong.pop()  # its results are in the dtype of the sums
    for dtype in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kernel}: .*dtype"):
            call(which, dtypes={name: dtype})


@pytest.mark.parametrize("which", CALLS)
def test_batch_axes_that_do_not_broadcast(which):
    kernel, inputs, outputs, _ = CALLS[which]
    first, *others = f"{inputs} {outputs}".split()
    shapes = {first: (2, *SHAPES[first])} | {name: (3, *SHAPES[name]) for name in others}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kernel}: .*broadcast"):
        call(which, shapes=shapes)


@pytest.mark.parametrize("which", CALLS)
def test_missing_operands(which):
    kernel, inputs, *_ = CALLS[which]
    for name in ("points", inputs.split()[0]):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{kernel}: .*{name} is missing"):
            call(which, drop=name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "quintic"),
        ("boundary", ("?",)),
        ("boundary", ()),
        ("boundary", ("wrap", "?")),
        ("boundary", ("wrap", "wrap", "wrap")),
        ("reduce", "median"),
        ("derivative", (-1, 0)),
        ("derivative", (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("which", CALLS)
def test_wrong_options(which, option, value):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{CALLS[which][0]}: .*{option}"):
        call(which, **{option: value})


@pytest.mark.parametrize("boundary", ["nearest", "mirror", "reflect", "wrap"])
def test_empty_image(boundary):
    for given in ((boundary,), ("constant", boundary)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="an axis of size 0"):
            call("gather", shapes={"image": (0, 6, 3)}, boundary=given)
    call("gather", shapes={"image": (0, 6, 3)}, boundary=(boundary, "constant"))
