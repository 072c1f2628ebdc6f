#!/usr/bin/env python3
"""The pages: every relative link in a *.md file leads to a file and a heading that exist, and README.md has fewer than
900 words.

usage: links_test.py"""
import pathlib
import re
import subprocess
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages():
    """The *.md files under version control or about to be; all of them where there is no git."""
    listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "*.md"], capture_output=True,
                             text=True)
    if listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.splitlines()]
    else:
        found = [path for path in ROOT.rglob("*.md")
                 if path.relative_to(ROOT).parts[0] not in ("build", "results", "data")]
    return sorted(path for path in found if path.is_file())


def anchors(text):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """(as written, file, heading or "") for every relative link of a page."""
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", link):
            name, _, heading = link.partition("#")
            yield link, (page.parent / name).resolve() if name else page, heading


class LinksTest(unittest.TestCase):
    def test_links_lead_somewhere(self):
        for page in pages():
            for link, target, heading in links(page):
                with self.subTest(page=str(page.relative_to(ROOT)), link=link):
                    self.assertTrue(target.exists(), "no such file")
                    if heading:
                        self.assertIn(heading, anchors(target.read_text()), "no such heading")

    def test_the_readme_is_short(self):
        self.assertLess(len((ROOT / "README.md").read_text().split()), 900)


if __name__ == "__main__":
    unittest.main()
