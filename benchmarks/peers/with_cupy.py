"""CuPy: the usual splat on a GPU, one thread per source and one scalar atomic per channel."""

import cupy
import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import ROTATED, Program, Unsupported

SPLAT = cupy.RawKernel(
    r"""
extern "C" __global__ void splat(const float* values, const float* flow, float* total,
                                 long long pixels, int height, int width, int channels, int count) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= pixels) return;
  int plane = height * width, r = i % plane;
  float x = r % width + flow[2 * i], y = r / width + flow[2 * i + 1];
  int left = floorf(x), top = floorf(y);
  for (int k = 0; k < 4; ++k) {
    int u = left + k % 2, v = top + k / 2;
    if (u < 0 || u >= width || v < 0 || v >= height) continue;
    float weight = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
    float* target = total + (i - r + v * width + u) * count;
    for (int c = 0; c < channels; ++c) atomicAdd(target + c, weight * values[i * channels + c]);
    if (count > channels) atomicAdd(target + channels, weight);
  }
}""",
    "splat",
)


def versions() -> dict[str, str]:
    return {"cupy": cupy.__version__}


def build(*, peer: str, case: Case, threads: int) -> Program:
    average = case.operation == "forward_average"
    if case.order != "value" or not (average or case.operation == "forward_sum"):
        raise Unsupported("values of a sum or an average only")
    if case.dtype != "float32" or len(case.spatial) != 2 or len(case.image) != len(case.flow):
        raise Unsupported("2-D float32 with a flow for each image only")
    inputs = cases.inputs(case)
    sets = [{n: cupy.array(array) for n, array in inputs.items()} for _ in range(ROTATED)]
    channels = case.image[-1]
    totals = [cupy.empty((*case.out[:-1], channels + average), np.float32) for _ in sets]

    def call(arrays: dict[str, cupy.ndarray], total: cupy.ndarray) -> cupy.ndarray:
        total.fill(0)
        sizes = (np.int64(case.pixels), *map(np.int32, (*case.spatial, channels, total.shape[-1])))
        SPLAT((-(-case.pixels // 256),), (256,), (arrays["image"], arrays["flow"], total, *sizes))
        if not average:
            return total
        below = total[..., -1:]
        return total[..., :-1] / cupy.where(below > 0, below, 1)

    def wait(result: cupy.ndarray) -> cupy.ndarray:
        cupy.cuda.Device().synchronize()
        return result

    def warm(count: int) -> cupy.ndarray:
        for _ in range(count):
            for arrays, total in zip(sets, totals, strict=True):
                result = call(arrays, total)
        return wait(result)

    return Program(
        cold=lambda: wait(call(sets[0], cupy.empty_like(totals[0]))),
        warm=warm,
        read=lambda result: [cupy.asnumpy(result)],
        work=len(sets),
    )
