"Sphinx configuration of the documentation site; `make docs` builds it."

import re

import latex2mathml.converter

project = "tocsr"
author = "the tocsr authors"
copyright = f"2026 {author}"
html_title = "tocsr"

extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"  # outputs as committed
nb_render_markdown_format = "gfm"  # tables in outputs
myst_enable_extensions = ["dollarmath", "fieldlist", "strikethrough"]
myst_dmath_double_inline = True  # `$$` within a paragraph
myst_heading_anchors = 3
suppress_warnings = [
    "myst.header",  # the model card has no second level of headings
    "ref.python",  # types of one name in two modules
]

smartquotes = False  # outputs of cells hold options such as `--profile`

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False
copybutton_exclude = ".linenos, .gp, .go"


def write_mathml(display: str):
    "A function that writes a formula as MathML, which browsers render without a script."

    def visit(self, node):
        from docutils import nodes

        formula = re.sub(r"\\(mathbb|mathcal) (\w)", r"\\\1{\2}", node.astext())
        self.body.append(latex2mathml.converter.convert(formula, display=display))
        raise nodes.SkipNode

    return visit


def setup(app):
    inline, block = write_mathml("inline"), write_mathml("block")
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
