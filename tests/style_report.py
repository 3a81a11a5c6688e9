"""Measure the library's style: line lengths, tokens per line, semicolons, lengths of functions.

    python tests/style_report.py [folder]

prints the figures and every place beyond a limit; exit code 1 if there is one.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

P95_COLUMNS = 100  # of lines with code
MAX_COLUMNS = 120
MAX_TOKENS = 10.0  # per line, on average
MAX_FUNCTION = 60  # lines
LAYOUT = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass
class Style:
    lengths: list[int] = field(default_factory=list)  # columns of each line with code
    tokens: int = 0
    wide: list[str] = field(default_factory=list)  # places, "file:line: what"
    semicolons: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)

    def add(self, name: str, text: str):
        "Measure one file."
        for i, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                self.lengths.append(len(line))
                if len(line) > MAX_COLUMNS:
                    self.wide.append(f"{name}:{i}: {len(line)} columns")
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            self.tokens += t.type not in LAYOUT
            if t.type == tokenize.OP and t.string == ";":
                self.semicolons.append(f"{name}:{t.start[0]}: semicolon")
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = n.end_lineno - n.lineno + 1
                if lines > MAX_FUNCTION:
                    self.long_functions.append(f"{name}:{n.lineno}: {n.name} has {lines} lines")

    @property
    def p95(self) -> int:
        "95th percentile of the line lengths, columns."
        return sorted(self.lengths)[int(0.95 * len(self.lengths))]

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / len(self.lengths)

    @property
    def faults(self) -> list[str]:
        "Everything beyond a limit."
        bad = [*self.wide, *self.semicolons, *self.long_functions]
        if self.p95 > P95_COLUMNS:
            bad.append(f"95th percentile of line lengths: {self.p95} columns > {P95_COLUMNS}")
        if self.tokens_per_line > MAX_TOKENS:
            bad.append(f"{self.tokens_per_line:.1f} tokens per line > {MAX_TOKENS:.0f}")
        return bad


def measure(folder: Path) -> Style:
    "Style of all modules below a folder, without nbdev's index."
    style = Style()
    for f in sorted(folder.rglob("*.py")):
        if f.name != "_modidx.py":
            style.add(str(f.relative_to(folder.parent)), f.read_text())
    return style


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "tocsr"
    style = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    print("\n".join(style.faults))
    print(
        f"{len(style.lengths)} lines, p95 {style.p95} columns, {len(style.wide)} above "
        f"{MAX_COLUMNS}, {len(style.semicolons)} semicolons, "
        f"{style.tokens_per_line:.1f} tokens per line, "
        f"{len(style.long_functions)} functions above {MAX_FUNCTION} lines"
    )
    sys.exit(bool(style.faults))
