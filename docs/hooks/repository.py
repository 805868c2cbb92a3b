"""Pages and results of the repository outside of docs/ are pages of the site too.

A link such as ../examples/lm/README.md works on GitHub. In the site docs/ is the root,
and the other folders of the repository lie in it: a link is resolved in the repository
and written again as it is in the site.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    "examples/**/*.md",
    "benchmarks/results/**/*.*",
    "benchmarks/study/studies/*.toml",
)
# MkDocs takes a README.md for the index of its folder, which the site has in docs/.
OVERVIEW = "overview.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files, config):
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    readme = str(ROOT / "README.md")
    files.append(File.generated(config, OVERVIEW, abs_src_path=readme))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    in_docs = (ROOT / "docs" / name).exists()
    place = posixpath.dirname(f"docs/{name}" if in_docs else name)

    def in_site(link):
        target = posixpath.normpath(posixpath.join(place, link[1]))
        if (ROOT / target / "README.md").exists():
            target += "/README.md"
        target = OVERVIEW if target == "README.md" else target.removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(name) or ".")

    return LINK.sub(in_site, markdown)
