"""Read a script, judge it for a stack, rewrite it."""

import difflib
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper

from qipan.catalogue.stacks import Stack
from qipan.errors import InvalidInput
from qipan.portability.findings import Finding, Verdict
from qipan.portability.preamble import with_preamble
from qipan.portability.rewrite import Rewriter


@dataclass(frozen=True, slots=True)
class Checked:
    """`rewritten` equals `original` when nothing had to change.  It is given even when something blocks: the rest is
    done."""

    name: str
    target: str
    original: str
    rewritten: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        kinds = {finding.verdict for finding in self.findings}
        return "blocks" if "blocks" in kinds else "rewritten" if "rewritten" in kinds else "runs"

    def diff(self) -> str:
        before, after = (text.splitlines(keepends=True) for text in (self.original, self.rewritten))
        return "".join(difflib.unified_diff(before, after, self.name, f"{self.name} for {self.target}", n=1))


def check_script(text: str, stack: Stack, name: str = "script") -> Checked:
    """Raises InvalidInput when it is no Python, or torch has no device for the stack."""
    if stack.torch_device is None:
        raise InvalidInput(
            f"torch has no device for {stack.stack}; only a task that names its compiled kernel runs there",
            name,
        )
    try:
        module = cst.parse_module(text)
    except cst.ParserSyntaxError as error:
        raise InvalidInput(f"line {error.raw_line}: is no Python: {error.message}", name) from None
    wrapper = MetadataWrapper(module)
    rewriter = Rewriter(stack)
    changed = wrapper.visit(rewriter)
    code = with_preamble(changed, stack, rewriter.needs).code if rewriter.needs else changed.code
    findings = sorted(
        set(rewriter.findings), key=lambda finding: (finding.line, finding.construct, finding.verdict)
    )
    return Checked(name, stack.stack, text, code, tuple(findings))
