"""Writes the sources of the documentation site: `python docs/pages.py FOLDER`.

README, notebooks and figures keep their relative places, so that links work in the repository and
on the site. Modules are read with `ast`: the site needs none of the library's requirements.
"""

import ast
import json
import re
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LAYERS = {  # subpackage -> what it is about; the order is that of the imports and chapters
    "core": "Profiles, store of results, files, training loop, images, weights, runtime.",
    "models": "Autoencoders, diffusion, architectures, the staged UNet, surrogates, losses.",
    "data": "Images, sources, benchmarks, degradations, stored latents, pairs for training.",
    "search": "The search space, the paper's search, baselines, ours, the tabular benchmark.",
    "inference": "Tiles, the pipeline, image files, batches, ONNX.",
    "evaluation": "Metrics, test sets, methods, statistics, claims, figures.",
    "stages": "One module per stage of the paper.",
    "cli": "The command `tocsr`.",
}
LONG = 20  # lines of code that are shown without unfolding them
DIRECTIVE = re.compile(r"#\| ?\w.*\n?")  # of nbdev, on lines of their own
TEXTS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES_OF = {  # places in the repository -> pages of the site
    "nbs/tools": "library/index.md",
    "README.md": "index.md",
    "tocsr/weights/README.md": "model_card.md",
}


def toctree(entries: list[str], *options: str) -> str:
    "A MyST table of contents; options are lines such as `:hidden:`."
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def without_badges(text: str) -> str:
    "Markdown whose images from other hosts are replaced by their descriptions."
    return re.sub(r"!\[([^]]*)\]\(https?://[^)]*\)", r"\1", text)


def to_site(text: str, out: Path) -> str:
    "Markdown of the repository's root with links to pages of the site and to copies of files."

    def link(match: re.Match) -> str:
        label, place, anchor = match.groups("")
        path = ROOT / place
        if place in PAGES_OF:
            return f"[{label}]({PAGES_OF[place]}{anchor})"
        if path.is_dir():
            return label
        if path.is_file() and path.suffix not in (".md", ".ipynb"):
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / place)
        return match[0]

    return re.sub(r"\[([^]]*)\]\(([^)#:\s]+)(#[^)]*)?\)", link, without_badges(text))


# --- notebooks ---


def title(path: Path) -> tuple[str, str]:
    "Title and subtitle of a notebook, its first two lines."
    lines = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
    heading, subtitle = [line for line in lines if line.strip()][:2]
    return heading.removeprefix("# "), subtitle.removeprefix("> ")


def fold_label(code: str, tags: list[str]) -> str | None:
    "The label of a folded cell; None for one that is shown."
    body = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)).body
    if "parameters" in tags:
        return "Parameters"
    if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
        return "Imports"
    if len(code.splitlines()) <= LONG:
        return None
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return "Code" + (": " + ", ".join(names) if names else "")


def site_output(output: dict) -> dict:
    "An output of a cell; the front matter of a Markdown text is shown as YAML."
    data = dict(output.get("data", {}))
    if "text/markdown" not in data:
        return output
    text = "".join(data["text/markdown"])
    text = re.sub(r"\A---\n(.*?)\n---\n", r"```yaml\n\1\n```\n", text, flags=re.S)
    return dict(output, data=dict(data, **{"text/markdown": text}))


def image_description(text: str) -> str:
    "The alternative text of an output's images: how the Markdown before them begins."
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)  # images
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # links
    lines = [re.sub(r"^#+ (.*)", r"\1.", line) for line in text.splitlines()]
    plain = re.sub(r"[*`$>]", "", " ".join(lines))
    return textwrap.shorten(plain, 200, placeholder=" ...")


def site_notebook(nb: dict) -> dict:
    """A notebook without directives of nbdev and remote badges, in which long cells are folded.

    Images in outputs are described by the Markdown before them."""
    cells = []
    description = ""
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = re.sub(rf"\A(?:{DIRECTIVE.pattern})+", "", text)
            if not text.strip():
                continue
            label = fold_label(text, cell["metadata"].get("tags", []))
            shown = dict(code_prompt_show=label) if label else {}
            shown |= dict(image=dict(alt=description)) if description else {}
            metadata = dict(mystnb=shown, tags=["hide-input"] if label else [])
            cell = dict(cell, metadata=metadata, outputs=[site_output(o) for o in cell["outputs"]])
        else:
            text = without_badges(text)
            description = image_description(text)
        cells.append(dict(cell, source=text))
    metadata = dict(nb["metadata"], language_info={"name": "python"})
    return dict(nb, cells=cells, metadata=metadata)


def write_notebooks(out: Path):
    "The notebooks, and an overview of the library's chapters per subpackage."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(site_notebook(json.loads(path.read_text()))))
    for number, (layer, about) in enumerate(LAYERS.items()):
        chapters = sorted((ROOT / "nbs/tools").glob(f"{number}*.ipynb"))
        lines = [f"# {layer}: chapters", about, ""]
        for path in chapters:
            heading, subtitle = title(path)
            lines.append(f"- [{heading}](../nbs/tools/{path.name}): {subtitle}")
        entries = [f"/nbs/tools/{path.stem}" for path in chapters]
        page = "\n".join([*lines, "", toctree(entries, ":hidden:")])
        (out / f"library/{layer}.md").write_text(page)
    layers = [f"- [{name}]({name}.md): {about}" for name, about in LAYERS.items()]
    intro = "The library, notebook by notebook: each definition with what it does and its checks."
    page = "\n".join(["# Library chapters", intro, "", *layers, "", toctree(LAYERS, ":hidden:")])
    (out / "library/index.md").write_text(page)


# --- modules ---


@dataclass
class Module:
    "The source of a module and the comments in it."

    name: str  # "core.image"
    source: str
    tree: ast.Module
    comments: dict[int, str]  # line -> its comment

    @classmethod
    def read(cls, path: Path) -> "Module":
        "Read a file of the library."
        source = path.read_text()
        with path.open("rb") as f:
            tokens = [t for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT]
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if "noqa" not in t.string}
        name = ".".join(path.relative_to(ROOT / "tocsr").with_suffix("").parts)
        return cls(name, source, ast.parse(source), comments)

    def comment(self, first: int, last: int) -> str:
        "The comments of some lines as one text."
        return " ".join(self.comments[i] for i in range(first, last + 1) if i in self.comments)

    def public(self) -> list[ast.stmt]:
        "The definitions of `__all__`, in the order of the source."
        defined = {name: n for n in self.tree.body for name in names_of(n)}
        (exported,) = (ast.literal_eval(n.value) for n in [defined["__all__"]])
        return sorted((defined[name] for name in exported), key=lambda n: n.lineno)

    def chapter(self) -> str:
        "The notebook that the module is exported from, relative to the repository."
        return re.search(r"File to edit: (?:\.\./)*(nbs/.+\.ipynb)", self.source)[1]


def names_of(node: ast.stmt) -> list[str]:
    "The names that a statement at module or class level defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return []


@dataclass
class Parameter:
    "A parameter of a function or a field of a data class."

    name: str
    type: str
    default: str
    about: str

    def __str__(self) -> str:
        default = self.default if len(self.default) <= 40 else "..."
        return self.name + (f"={default}" if default else "")


def unparse(node: ast.expr | None) -> str:
    return ast.unparse(node) if node else ""


def option(default: ast.expr | None) -> tuple[str, str]:
    "Default and description of a parameter; those of typer's options are in a call."
    if isinstance(default, ast.Call) and unparse(default.func).startswith("typer."):
        about = [k.value.value for k in default.keywords if k.arg == "help"]
        return unparse(default.args[0]) if default.args else "", "".join(about)
    return unparse(default), ""


def parameters(module: Module, f: ast.FunctionDef) -> Iterator[Parameter | str]:
    "The parameters of a function, and the bare `/` and `*` between them."
    a = f.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    known = [*zip(positional, defaults, [""] * len(positional), strict=True)]
    known += [(a.vararg, None, "*")] if a.vararg else []
    known += [*zip(a.kwonlyargs, a.kw_defaults, [""] * len(a.kwonlyargs), strict=True)]
    known += [(a.kwarg, None, "**")] if a.kwarg else []
    above = f.lineno - 1
    for i, (arg, default, stars) in enumerate(known):
        last = (default or arg).end_lineno
        value, about = option(default)
        about = module.comment(above + 1, last) or about
        above = last
        if i == len(positional) and not a.vararg and a.kwonlyargs:
            yield "*"
        if arg.arg not in ("self", "cls"):
            yield Parameter(stars + arg.arg, unparse(arg.annotation), value, about)
        if i + 1 == len(a.posonlyargs):
            yield "/"


def fields(module: Module, c: ast.ClassDef) -> list[Parameter]:
    "The fields of a data class, or of another class with annotations."
    lines = [n.lineno for n in c.body]
    out = []
    for before, n in pairwise([None, *c.body]):
        if isinstance(n, ast.AnnAssign):
            first = before.end_lineno + 1 if before else lines[0]
            about = module.comment(first, n.end_lineno)
            out.append(Parameter(n.target.id, unparse(n.annotation), unparse(n.value), about))
    return out


def prose(text: str) -> str:
    "A docstring or comment as MyST: `$`, `*`, `<` and `_` stand for themselves outside of code."
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.S)
    return "".join(p if p.startswith("`") else re.sub(r"([$*<_])", r"\\\1", p) for p in parts)


def field_list(given: list, returns: tuple[str, str] = ("", "")) -> list[str]:
    "Sphinx's field list of parameters and result."
    lines = []
    for p in (p for p in given if isinstance(p, Parameter)):
        lines.append(f":param {p.name.replace('*', chr(92) + '*')}: {prose(p.about)}".rstrip())
        lines += [f":type {p.name.replace('*', chr(92) + '*')}: {p.type}"] if p.type else []
    kind, about = returns
    lines += [f":returns: {prose(about)}"] if about else []
    return lines + ([f":rtype: {kind}"] if kind and kind != "None" else [])


def directive(kind: str, signature: str, body: list[str], fence: str = "```") -> str:
    return "\n".join([f"{fence}{{py:{kind}}} {signature}", "", *body, fence, ""])


def docstring(node: ast.AST) -> list[str]:
    return [prose(ast.get_docstring(node) or ""), ""]


def function(module: Module, f: ast.FunctionDef, kind: str = "function") -> str:
    "The directive of a function or method."
    given = list(parameters(module, f))
    returns = unparse(f.returns)
    last = max((n.end_lineno for n in ast.walk(f.args) if hasattr(n, "end_lineno")), default=0)
    about = module.comment(max(last, f.lineno) + 1, f.body[0].lineno - 1)
    signature = f"{f.name}({', '.join(map(str, given))})"
    decorators = [unparse(d) for d in f.decorator_list]
    if "property" in decorators:
        return directive("property", f.name, docstring(f))
    options = [f":{d}:" for d in ("classmethod", "staticmethod") if d in decorators]
    body = [*options, "", *docstring(f), *field_list(given, (returns, about))]
    return directive(kind, signature, body)


def is_public(f: ast.stmt) -> bool:
    if not isinstance(f, ast.FunctionDef):
        return False
    return not f.name.startswith("_") or (f.name == "__call__" and bool(ast.get_docstring(f)))


def class_(module: Module, c: ast.ClassDef) -> str:
    "The directive of a class with its public methods."
    made = [n for n in c.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    given = list(parameters(module, made[0])) if made else fields(module, c)
    signature = f"{c.name}({', '.join(map(str, given))})" if given else c.name
    methods = [function(module, f, "method") for f in filter(is_public, c.body)]
    return directive("class", signature, [*docstring(c), *field_list(given), "", *methods], "`" * 5)


def constant(module: Module, n: ast.Assign | ast.AnnAssign) -> str:
    "The directive of a constant."
    about = module.comment(n.lineno, n.lineno)
    value = unparse(n.value)
    options = [f":value: {value}"] if len(value) <= 60 else []
    return "".join(directive("data", x, [*options, "", prose(about)]) for x in names_of(n))


def module_page(module: Module) -> str:
    "The page of a module."
    lines = [f"# {module.name}", f"```{{py:module}} tocsr.{module.name}", "```", ""]
    lines += docstring(module.tree)
    heading, _ = title(ROOT / module.chapter())
    lines += [f"Explained and tested in [{heading}](/{module.chapter()}).", ""]
    for n in module.public():
        if isinstance(n, ast.FunctionDef):
            lines.append(function(module, n))
        elif isinstance(n, ast.ClassDef):
            lines.append(class_(module, n))
        else:
            lines.append(constant(module, n))
    return "\n".join(lines)


def write_modules(out: Path):
    "A page per module and one per subpackage."
    for layer, about in LAYERS.items():
        modules = [Module.read(p) for p in sorted((ROOT / f"tocsr/{layer}").glob("[!_]*.py"))]
        lines = [f"# tocsr.{layer}", about, ""]
        for m in modules:
            path = out / f"api/{m.name.replace('.', '/')}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(module_page(m))
            first = (ast.get_docstring(m.tree) or "").split("\n")[0]
            lines.append(f"- [{m.name}]({m.name.replace('.', '/')}.md): {prose(first)}")
        entries = [m.name.replace(".", "/") for m in modules]
        page = "\n".join([*lines, "", toctree(entries, ":hidden:")])
        (out / f"api/{layer}.md").write_text(page)
    lines = [f"- [tocsr.{name}]({name}.md): {about}" for name, about in LAYERS.items()]
    intro = (
        "`from tocsr import TOCSRPipeline, compress, get_profile, run_stage` is the public "
        "interface: {py:class}`~tocsr.inference.pipeline.TOCSRPipeline`, "
        "{py:func}`~tocsr.stages.compress.compress`, {py:func}`~tocsr.core.config.get_profile` "
        "and {py:func}`~tocsr.core.store.run_stage`. Everything else may change between minor "
        "versions."
    )
    page = "\n".join(["# API", intro, "", *lines, "", toctree(LAYERS, ":hidden:")])
    (out / "api/index.md").write_text(page)


# --- texts ---


def questions_page() -> str:
    "What the paper leaves open or contradicts, and what is done here."
    from tocsr.evaluation.reported import AMBIGUITIES

    lines = [
        "# Questions about the paper",
        "Points that the paper leaves open or on which it contradicts itself, and what is done "
        "here. [Notebook 07](nbs/07_paper.ipynb) has them as a table.",
    ]
    for a in AMBIGUITIES:
        lines += [f"## {a.topic}", f"**Paper.** {prose(a.paper)}", f"**Here.** {prose(a.ours)}"]
    return "\n\n".join(lines) + "\n"


def home_page(out: Path) -> str:
    "README.md, with a link to the page of `make try` where that page has been made."
    home = to_site((ROOT / "README.md").read_text(), out)
    if not (ROOT / "build/try/index.html").is_file():
        return home
    # HTML, because the page is copied next to this one when Sphinx has finished
    link = '<a href="try/index.html"><b>Upscale an image in your browser</b></a>: no upload.'
    return home.replace("<!-- image -->", f"{link}\n\n<!-- image -->", 1)


def write_texts(out: Path):
    "Home page, texts of the repository, and the questions."
    tables = shutil.ignore_patterns("*.md")  # they are no pages
    shutil.copytree(ROOT / "paper_figures", out / "paper_figures", ignore=tables)
    for name in TEXTS:
        (out / name).write_text(to_site((ROOT / name).read_text(), out))
    (out / "model_card.md").write_text((ROOT / "tocsr/weights/README.md").read_text())
    (out / "questions.md").write_text(questions_page())
    sections = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
    contents = {
        "The paper": [f"nbs/{name}" for name in sections],
        "Library": ["library/index", "api/index"],
        "Project": ["questions", "model_card", "CONTRIBUTING", "CHANGELOG", "SECURITY"],
    }
    trees = [toctree(v, ":hidden:", f":caption: {k}") for k, v in contents.items()]
    (out / "index.md").write_text("\n".join([home_page(out), *trees]))


def write_pages(out: Path):
    "Write all sources of the site to the folder `out`, which is emptied first."
    shutil.rmtree(out, ignore_errors=True)
    for name in ("library", "api"):
        (out / name).mkdir(parents=True)
    write_notebooks(out)
    write_modules(out)
    write_texts(out)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
