"""The gallery of the notebooks: title, first sentence and a picture of each that exists."""

import base64
import io
import re
from pathlib import Path

import nbformat
from PIL import Image

SIZE = (640, 320)


def write(notebooks: Path, folder: Path) -> None:
    """Writes gallery.md and the thumbnails into a folder."""
    cards = []
    for path in sorted(notebooks.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title, sentence = head(notebook)
        image = picture(notebook)
        page = f"notebooks/{path.stem}"
        lines = [f"**{{doc}}`{title} <{page}>`**", "", sentence]
        if image:
            name = f"{path.stem}.png"
            thumbnail(image).save(folder / name)
            lines = [
                f"```{{image}} ../build/docs/generated/{name}",
                f":target: {page}.html",
                f":alt: {title}",
                "```",
                *lines,
            ]
        cards += [":::{container} card", *lines, ":::", ""]
    text = "\n".join(["::::{container} gallery", *cards, "::::", ""])
    (folder / "gallery.md").write_text(text)


def head(notebook) -> tuple[str, str]:
    """The heading of the first cell, and the first sentence below it."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title, _, rest = first.lstrip("# ").partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    sentence = re.match(r".*?[.!?](?= |$)", paragraph)
    return title.strip(), sentence[0] if sentence else paragraph.partition(":")[0] + "."


def picture(notebook) -> bytes | None:
    """Of the pictures among the outputs the one with most to see in a thumbnail."""
    found = [
        base64.b64decode(data)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind, data in output.get("data", {}).items()
        if kind in ("image/png", "image/jpeg", "image/gif")
    ]

    def seen(data: bytes) -> float:
        width, height = Image.open(io.BytesIO(data)).size
        ratio = width / height * SIZE[1] / SIZE[0]
        return len(data) * min(ratio, 1 / ratio)  # the part of the thumbnail that it fills

    return max(found, key=seen, default=None)


def thumbnail(data: bytes) -> Image.Image:
    """Scaled to fit SIZE, on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image.thumbnail(SIZE)
    canvas = Image.new("RGBA", SIZE, "white")
    corner = tuple((a - b) // 2 for a, b in zip(SIZE, image.size, strict=True))
    canvas.paste(image, corner, image)
    return canvas.convert("RGB")
