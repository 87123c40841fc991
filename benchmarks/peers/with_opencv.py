"""OpenCV's remap: values of a 2-D backward warp, one image at a time, maps made beforehand."""

import cv2
import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import Program, Unsupported


def versions() -> dict[str, str]:
    return {"opencv": cv2.__version__}


def build(*, peer: str, case: Case, threads: int) -> Program:
    if (case.operation, case.order) != ("backward_warp", "value") or len(case.spatial) != 2:
        raise Unsupported("values of a 2-D backward_warp only")
    if case.dtype == "bfloat16":
        raise Unsupported("no bfloat16")
    cv2.setNumThreads(threads)
    arrays = cases.inputs(case)
    points = cases.positions(arrays["flow"]).astype(np.float32).reshape(-1, *case.flow[-3:])
    images = arrays["image"].reshape(-1, *case.image[-3:])
    images = np.broadcast_to(images, (len(points), *images.shape[1:]))
    results = np.empty(case.out, images.dtype).reshape(-1, *case.out[-3:])

    def remap(image: np.ndarray, at: np.ndarray, result: np.ndarray | None = None) -> np.ndarray:
        return cv2.remap(image, at, None, cv2.INTER_LINEAR, result, cv2.BORDER_CONSTANT, 0)

    def warm(count: int) -> np.ndarray:
        for _ in range(count):
            for image, at, result in zip(images, points, results, strict=True):
                remap(image, at, result)
        return results

    return Program(
        cold=lambda: [remap(image, at) for image, at in zip(images, points, strict=True)],
        warm=warm,
        read=lambda results: [np.stack(list(results)).reshape(case.out)],
    )
