"""Each clause of the rulebook names a test that is there, and each clause that the code cites is in the rulebook."""

import re
from pathlib import Path

RULES = {path.name: path.read_text() for path in sorted(Path("docs/rules").glob("*.md"))}
CLAUSE = re.compile(r"^\| ([A-Z]-[0-9]+) \|(.*)\|$", re.MULTILINE)


def clauses() -> dict[str, str]:
    """clause -> the rest of its row."""
    found: dict[str, str] = {}
    for text in RULES.values():
        for name, rest in CLAUSE.findall(text):
            assert name not in found, f"{name} stands twice"
            found[name] = rest
    return found


def test_every_clause_names_a_test_that_is_there():
    assert len(clauses()) >= 45
    for name, rest in clauses().items():
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", rest)
        assert named, f"{name} names no test"
        for file, test in named:
            assert re.search(rf"def {test}\(", Path(file).read_text()), f"{name}: {file} has no {test}"


def test_every_clause_that_the_code_cites_is_written():
    known = clauses()
    cited = {
        (clause, str(path))
        for folder in ("ledger", "market", "settlement")
        for path in Path("src/qipan", folder).rglob("*.py")
        for clause in re.findall(r"\"([ACLMRSTX]-[0-9]+)\"|clause ([ACLMRSTX]-[0-9]+)", path.read_text())
        for clause in clause
        if clause
    }
    assert len(cited) > 15
    assert not [entry for entry in sorted(cited) if entry[0] not in known]
