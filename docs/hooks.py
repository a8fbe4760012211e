"""Hooks of the site's build: pages outside docs/, and links that leave it."""

import pathlib
import posixpath
import re

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
# Links of Markdown, and of the HTML that a notebook becomes, but for addresses and anchors.
LINK = re.compile(r"""(\]\(|(?:href|src)=")(?![\w+.-]+:|[#/])([^)\s"#]+)""")


@event_priority(50)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    """Adds the pages that the repository has outside docs/."""
    pages = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("notebooks/*.ipynb")]
    for path in sorted(pages):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(text, page, config, files, address="src_uri"):
    """Turns links from file to file of the repository into those of the site, or to GitHub."""
    places = {str(file.abs_src_path): getattr(file, address) for file in files}

    def replace(link):
        path = (pathlib.Path(page.file.abs_src_path).parent / link[2]).resolve()
        place = places.get(str(path))
        if place is not None:
            here = posixpath.join("/", getattr(page.file, address), "..")
            return link[1] + posixpath.relpath(posixpath.join("/", place), here)
        if ROOT not in path.parents or not path.exists():
            return link[0]  # code, as `parts[0](x)`, or a mistake, which the build reports
        kind = "tree" if path.is_dir() else "blob"
        return f"{link[1]}{config.repo_url}/{kind}/main/{path.relative_to(ROOT).as_posix()}"

    return LINK.sub(replace, text)


def on_page_content(html, page, config, files):
    """Does the same for notebooks, which come as HTML."""
    is_notebook = page.file.src_uri.endswith(".ipynb")
    return on_page_markdown(html, page, config, files, "dest_uri") if is_notebook else html


def on_post_page(output, page, config):
    """Keeps pages from asking other servers: for badges, and for the number of stars on GitHub."""
    badges = re.sub(r'<img [^>]*src="https?:[^>]*>', _alternative_text, output)
    return badges.replace(' data-md-component="source"', "")


def _alternative_text(image):
    found = re.search(r'alt="([^"]*)"', image[0])
    return found[1] if found else ""
