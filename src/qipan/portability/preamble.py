"""What a rewritten script needs at its top: the device of the machine that it runs on, and its collective backend."""

import libcst as cst
from libcst import matchers as m

from qipan.catalogue.stacks import Stack

PLUGINS = {
    "npu": "torch_npu",
    "mlu": "torch_mlu",
    "musa": "torch_musa",
    "gcu": "torch_gcu",
    "hpu": "habana_frameworks.torch",
    "supa": "torch_br",
}


def with_preamble(module: cst.Module, stack: Stack, needs: set[str]) -> cst.Module:
    """After the first top-level import of torch (variables that are set before it stay before it), else after the docstring and
    the __future__ imports."""
    body = list(module.body)
    at = next((i + 1 for i, statement in enumerate(body) if _imports_torch(statement)), None)
    plain_at = next(
        (i + 1 for i, statement in enumerate(body) if _imports_torch(statement, plainly=True)), None
    )
    at = plain_at or at
    if at is None:
        at = next((i for i, statement in enumerate(body) if not _is_opening(statement)), len(body))
    text = "\n".join(_lines(stack, needs, plain_at is not None)) + "\n"
    made = cst.parse_module("pass\n" + text, config=module.config_for_parsing).body[1:]
    return module.with_changes(body=[*body[:at], *made, *body[at:]])


def _lines(stack: Stack, needs: set[str], has_torch: bool) -> list[str]:
    lines = [
        "# put here by `qipan check`: whatever accelerator this machine has",
        *([] if has_torch else ["import torch"]),
    ]
    if "contextlib" in needs:
        lines.append("import contextlib")
    plugin = PLUGINS.get(stack.torch_device or "")
    if plugin:
        lines += [
            "import importlib.util",
            f'if importlib.util.find_spec("{plugin.split(".")[0]}"):',
            f"    import {plugin}",
        ]
    if stack.torch_device == "cpu":
        lines.append('QIPAN_DEVICE = "cpu"')
    else:
        lines.append('QIPAN_DEVICE = getattr(torch.accelerator.current_accelerator(), "type", "cpu")')
    if "numbered" in needs:
        lines += [
            "def qipan_device(index):",
            '    return QIPAN_DEVICE if QIPAN_DEVICE == "cpu" else f"{QIPAN_DEVICE}:{index}"',
        ]
    if "backend" in needs:
        lines.append("QIPAN_BACKEND = torch.distributed.get_default_backend_for_device(QIPAN_DEVICE)")
    return lines


def _imports_torch(statement: cst.BaseStatement | cst.BaseCompoundStatement, plainly: bool = False) -> bool:
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    for imported in m.findall(statement, m.Import()):
        for alias in m.findall(imported, m.ImportAlias()):
            assert isinstance(alias, cst.ImportAlias), "that was asked for"
            if m.matches(
                alias, m.ImportAlias(name=m.Name("torch"), asname=None if plainly else m.DoNotCare())
            ):
                return True
    return not plainly and bool(
        m.findall(statement, m.ImportFrom(module=m.Name("torch") | m.Attribute(value=m.Name("torch"))))
    )


def _is_opening(statement: cst.BaseStatement | cst.BaseCompoundStatement) -> bool:
    docstring = m.SimpleStatementLine(body=[m.Expr(value=m.SimpleString() | m.ConcatenatedString())])
    future = m.SimpleStatementLine(body=[m.ImportFrom(module=m.Name("__future__"))])
    return m.matches(statement, docstring | future)
