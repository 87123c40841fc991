"""Registers the kernels of both platforms with JAX, and calls them.

The only file that imports the compiled modules _cpu and _cuda.
"""

import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from jax.export import DisabledSafetyCheck


def flag(name: str, default: bool) -> bool:
    """The value of an environment variable, `default` where it is unset or empty."""
    value = os.environ.get(name, "").lower()
    if value not in ("", "0", "false", "1", "true"):
        raise ValueError(f"{name}: expected 0 or 1, got {value!r}; change the environment variable")
    return value in ("1", "true") if value else default


def _compiled() -> dict[str, ModuleType]:
    """Imports the modules with kernels, by jax's name of their platform, unless JAXWARP_KERNELS=0
    asks for none."""
    if not flag("JAXWARP_KERNELS", True):
        return {}
    try:
        import jaxwarp._cpu as _cpu
    except ModuleNotFoundError as error:
        raise ImportError(
            f"jaxwarp: expected the compiled module _cpu, found only Python sources in "
            f"{Path(__file__).parent}; install jaxwarp and import it from outside its source "
            "folder, or run `make dev` in it; JAXWARP_KERNELS=0 does without kernels"
        ) from error
    try:
        import jaxwarp._cuda as _cuda
    except ModuleNotFoundError:  # built without CUDA
        return {"cpu": _cpu}
    return {"cpu": _cpu, "cuda": _cuda}


def _runtime_api_version() -> tuple[int, ...]:
    """XLA FFI API version (major, minor) of the running jaxlib: that of the headers it carries."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    return tuple(map(int, re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)))


def _register(modules: dict[str, ModuleType]) -> None:
    """Registers each platform's handlers, or none of them if this jaxlib would refuse one.

    XLA looks at a handler's API version only when a backend starts, and a refused handler takes
    the whole backend down with it. So the same comparison is made here, before registering.
    """
    runtime = _runtime_api_version()
    for module in modules.values():
        if module.ffi_api_version > runtime:
            built, running = (".".join(map(str, v)) for v in (module.ffi_api_version, runtime))
            raise ImportError(
                f"jaxwarp: expected a jaxlib with XLA FFI API {built} or later, got jaxlib "
                f"{importlib.metadata.version('jaxlib')} with {running}; upgrade jax, or reinstall "
                "jaxwarp with pip's build isolation, which builds for the oldest supported jaxlib"
            )
    for platform, module in modules.items():
        for name, handler in module.registrations().items():
            jax.ffi.register_ffi_target(name, handler, platform=FFI_PLATFORMS[platform])


FFI_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}  # XLA's names
MODULES = _compiled()
_register(MODULES)


def check_without_kernels(platforms: Sequence[str], deterministic: bool) -> None:
    """Warns or refuses where a program is lowered to plain jnp for these platforms.

    `deterministic`: its scatters must give the same bits in every run.
    """
    if "cuda" in platforms:
        _warn_of_missing_kernels()
    atomic = [p for p in platforms if p not in ("cpu", "tpu")]
    if deterministic and atomic:
        raise ValueError(
            f"deterministic: expected False on platform {atomic[0]!r}, where jaxwarp has no "
            "kernels and XLA adds in any order, got True; pass deterministic=False or unset "
            "JAXWARP_DETERMINISTIC, or run this part on the CPU"
        )


@functools.cache
def _warn_of_missing_kernels() -> None:
    if MODULES:  # without any, JAXWARP_KERNELS=0 has asked for plain jnp
        warnings.warn(
            "jaxwarp: this installation has no CUDA kernels, so plain jnp runs on the GPU, more "
            "slowly; install a wheel with them, or build one where nvcc is found "
            "(`python -c 'import jaxwarp._cuda'` then passes)",
            stacklevel=2,
        )


def export_checks() -> list[DisabledSafetyCheck]:
    """What `jax.export` must be told to let a program with these kernels pass.

    Returns:
      For ``disabled_checks`` of `jax.export.export`: the kernels' names and their signatures stay,
      so that a program exported by this version runs with later ones.

    Example:
      >>> import jax, jax.numpy as jnp, jaxwarp
      >>> image, flow = jnp.ones((4, 5, 3)), jnp.zeros((4, 5, 2))
      >>> program = jax.jit(jaxwarp.backward_warp)
      >>> checks = jaxwarp.export_checks()
      >>> exported = jax.export.export(program, disabled_checks=checks)(image, flow)
      >>> exported.out_avals
      (ShapedArray(float32[4,5,3]),)
    """
    names = {name for module in MODULES.values() for name in module.registrations()}
    return [DisabledSafetyCheck.custom_call(name) for name in sorted(names)]


# Results in which several points may meet; Decoder::place_sums has the same rule.
_SUMS = {"image", "coverage", "weight", "ct_image", "d_image", "d_coverage"}


def call(
    target: str,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    method: str,
    boundary: tuple[str, ...],
    fill_value: float,
    derivative: tuple[int, ...],
    displacement: bool,
    deterministic: bool,
    channels_first: bool,
    cubic_a: float,
    reduce: str = "sum",
    min_coverage: float = 0.0,
) -> dict[str, jax.Array]:
    """Calls a kernel. Operands are matched by name: see the signatures in src/geometry.h.

    `deterministic` is for a GPU, where it needs memory; on a CPU, results always are.
    """
    if deterministic and (sums := [x for name, x in outputs.items() if name in _SUMS]):
        words = sum(x.size * (6 if x.dtype == np.float64 else 3) for x in sums)
        outputs = outputs | {"scratch": jax.ShapeDtypeStruct((words,), np.uint32)}
    results = jax.ffi.ffi_call(target, list(outputs.values()))(
        *inputs.values(),
        inputs=" ".join(inputs),
        outputs=" ".join(outputs),
        method=method,
        boundary=" ".join(boundary),
        fill_value=np.float64(fill_value),
        derivative=np.asarray(derivative, np.int64),
        displacement=displacement,
        deterministic=deterministic,
        channels_first=channels_first,
        cubic_a=np.float64(cubic_a),
        reduce=reduce,
        min_coverage=np.float64(min_coverage),
    )
    named = zip(outputs, results, strict=True)
    return {name: result for name, result in named if name != "scratch"}
