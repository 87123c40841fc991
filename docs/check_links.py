"""Checks that every link inside the built site leads somewhere: python docs/check_links.py DIR."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.links.append(value)


def main(root: Path) -> int:
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    assert pages, f"no pages in {root}"
    broken, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(root.resolve())}: {link}: no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(root.resolve())}: {link}: no such place")
    print(*broken, f"{count} links on {len(pages)} pages, {len(broken)} broken", sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
