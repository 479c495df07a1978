"""The pass over a script's syntax tree: each construct gets its verdict, and what has a vendor-neutral form gets it."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import libcst as cst
import yaml
from libcst import matchers as m
from libcst.metadata import PositionProvider, QualifiedNameProvider, ScopeProvider

from qipan.catalogue.stacks import Stack
from qipan.portability.findings import Finding, Verdict

AVAILABLE = "torch.accelerator.is_available()"
MODULE = "torch.get_device_module(QIPAN_DEVICE)"
AMP = ("torch.cuda.amp.", "torch.amp.")
OPTIONAL = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")


@lru_cache
def constructs() -> dict[str, Any]:
    text = resources.files("qipan.portability").joinpath("constructs.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


class Rewriter(cst.CSTTransformer):
    """`needs`: what the preamble has to define: device, backend, contextlib."""

    METADATA_DEPENDENCIES = (PositionProvider, QualifiedNameProvider, ScopeProvider)

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.is_cuda = stack.torch_device == "cuda"
        self.findings: list[Finding] = []
        self.needs: set[str] = set()
        self.kept: set[cst.CSTNode] = set()  # strings and names that must stay as they are
        self.claimed: set[cst.CSTNode] = set()  # attributes that their call answers for
        self.checks: set[cst.CSTNode] = set()  # calls of is_available that end the script when false
        self.optional: set[cst.CSTNode] = set()  # imports whose failure the script handles
        self.quotes: list[str] = []  # of the f-strings that we are in: their expressions must not use them

    # --- what every rule ends in

    def line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def tell(self, node: cst.CSTNode, verdict: Verdict, construct: str, why: str, new: str = "") -> None:
        self.findings.append(Finding(self.line(node), verdict, construct, why, new))

    def rewrite(
        self, node: cst.CSTNode, updated: cst.BaseExpression, construct: str, why: str, new: str, *needs: str
    ) -> cst.BaseExpression:
        """`new` in the place of `updated`, unless the target is a device "cuda" itself."""
        if self.is_cuda:
            self.tell(node, "runs", construct, f"{self.stack.stack} calls itself cuda in torch")
            return updated
        if self.stack.torch_device == "xla":
            self.tell(
                node,
                "blocks",
                construct,
                "XLA devices are lazy: the script needs torch_xla's own steps and marks",
            )
            return updated
        if any(len(quote) == 1 for quote in self.quotes) and not isinstance(node, cst.FormattedString):
            outer = next(quote for quote in self.quotes if len(quote) == 1)
            inner = "'" if outer == '"' else '"'
            if outer in new and inner in new:
                self.tell(
                    node,
                    "blocks",
                    construct,
                    "stands in an f-string where it cannot be quoted; take it out of there",
                )
                return updated
            new = new.replace(outer, inner)
        self.tell(node, "rewritten", construct, why, new)
        self.needs |= {"device", *needs}
        return cst.parse_expression(new)

    def block(self, node: cst.CSTNode, construct: str, why: str, on: Sequence[str] = ()) -> None:
        if self.stack.stack in on:
            self.tell(node, "runs", construct, f"exists for {self.stack.stack}")
        else:
            self.tell(node, "blocks", construct, why)

    def name(self, node: cst.CSTNode) -> str:
        """Of a name or a chain of attributes; "" of what is worked out first, such as f().x."""
        if not _is_chain(node):
            return ""
        names = self.get_metadata(QualifiedNameProvider, node, set())
        return min((name.name for name in names), default="")

    # --- what must be known before its children are seen

    def visit_Expr(self, node: cst.Expr) -> None:
        if isinstance(node.value, cst.SimpleString | cst.ConcatenatedString):
            self.kept.add(node.value)  # a docstring

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        self.quotes.append(node.quote)

    def visit_ConcatenatedString(self, node: cst.ConcatenatedString) -> None:
        self.kept |= set(m.findall(node, m.SimpleString()))

    def visit_Annotation(self, node: cst.Annotation) -> None:
        self.kept |= set(m.findall(node, m.SimpleString()))

    def visit_MatchValue(self, node: cst.MatchValue) -> None:
        for text in m.findall(node, m.SimpleString()):
            self.kept.add(text)
            if _value(text) in ("cuda", "nccl"):
                self.tell(
                    node,
                    "blocks",
                    f"case {_code(text)}",
                    "a pattern must be a literal; compare with `if` instead",
                )

    def visit_Assert(self, node: cst.Assert) -> None:
        self.checks |= set(m.findall(node.test, m.Call()))

    def visit_If(self, node: cst.If) -> None:
        ends = m.findall(
            node.body,
            m.Raise()
            | m.Call(
                func=m.Name("exit") | m.Name("quit") | m.Attribute(attr=m.Name("exit") | m.Name("_exit"))
            ),
        )
        if isinstance(node.test, cst.UnaryOperation) and isinstance(node.test.operator, cst.Not) and ends:
            self.checks |= set(m.findall(node.test, m.Call()))

    def visit_Try(self, node: cst.Try) -> None:
        types = [handler.type for handler in node.handlers]
        handled = {_code(name) for kind in types if kind for name in m.findall(kind, m.Name())}
        handled |= set(OPTIONAL) if None in types else set()
        if handled & set(OPTIONAL):
            self.optional |= set(m.findall(node.body, m.Import() | m.ImportFrom()))

    def visit_Call(self, node: cst.Call) -> None:
        name = self.name(node.func)
        self.claimed.add(node.func)
        if name in (
            "builtins.getattr",
            "builtins.hasattr",
            "builtins.setattr",
            "builtins.delattr",
        ) or name.endswith(".add_argument"):
            self.kept |= {
                arg.value for arg in node.args if arg.keyword is None or arg.keyword.value == "dest"
            }
        if isinstance(node.func, cst.Attribute) and node.func.attr.value == "add_argument":
            self.kept |= {
                arg.value for arg in node.args if arg.keyword is None or arg.keyword.value in ("dest", "help")
            }

    # --- imports

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        names = []
        for alias, changed in zip(original_node.names, updated_node.names, strict=True):
            name = _code(alias.name)
            self._package(original_node, name)
            if name == "torch.cuda.amp" and alias.asname is not None:
                changed = changed.with_changes(
                    name=self._amp(original_node, f"import {name}", "import torch.amp", changed.name)
                )
            names.append(changed)
        return updated_node.with_changes(names=names)

    def leave_ImportFrom(self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom) -> cst.ImportFrom:
        if original_node.module is None or original_node.relative:
            return updated_node
        module = _code(original_node.module)
        names = (
            []
            if isinstance(original_node.names, cst.ImportStar)
            else [_code(alias.name) for alias in original_node.names]
        )
        if module == "torch.cuda.amp":
            made = self._amp(
                original_node,
                f"from {module} import {', '.join(names)}",
                f"from torch.amp import {', '.join(names)}",
                updated_node.module,
            )
            return updated_node.with_changes(module=made)
        if module == "torch.cuda" and names == ["amp"]:
            made = self._amp(
                original_node,
                "from torch.cuda import amp",
                "from torch import amp",
                updated_node.module,
                "torch",
            )
            return updated_node.with_changes(module=made)
        if module == "torch.utils" and "cpp_extension" in names:
            self.block(original_node, "torch.utils.cpp_extension", "compiles a CUDA extension", ["nvidia"])
        elif module == "torch.utils.cpp_extension":
            self.block(
                original_node,
                f"from {module} import {', '.join(names)}",
                "compiles a CUDA extension",
                ["nvidia"],
            )
        elif module == "torch.cuda":
            for name in names:
                if name in constructs()["blocked"]:
                    self.block(
                        original_node,
                        f"torch.cuda.{name}",
                        constructs()["blocked"][name],
                        self._cuda_stacks(),
                    )
        elif any(f"{module}.{name}" in constructs()["packages"] for name in names):
            for name in names:
                self._package(original_node, f"{module}.{name}")
        else:
            self._package(original_node, module)
        return updated_node

    def _amp(self, node: cst.CSTNode, construct: str, new: str, old: Any, module: str = "torch.amp") -> Any:
        if self.is_cuda or self.stack.torch_device == "xla":
            self.rewrite(node, cst.Name("torch"), construct, "", "torch")
            return old
        self.tell(node, "rewritten", construct, "torch.amp takes the device as an argument", new)
        self.needs.add("device")
        return cst.parse_expression(module)

    def _package(self, node: cst.CSTNode, module: str) -> None:
        packages, notes = constructs()["packages"], constructs()["notes"]
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if name in packages:
                if node in self.optional and self.stack.stack not in packages[name]["has"]:
                    self.tell(node, "runs", f"import {module}", "the script goes on without it")
                else:
                    self.block(node, f"import {module}", packages[name]["why"], packages[name]["has"])
                return
            if name in notes:
                self.tell(node, "runs", f"import {module}", notes[name])
                return

    # --- calls

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        name = self.name(original_node.func)
        code = _code(original_node.func)
        args = _code_of_args(updated_node.args)
        if name.startswith("torch.cuda."):
            return self._cuda_call(original_node, updated_node, name.removeprefix("torch.cuda."), args)
        if name in ("torch.set_default_tensor_type",) and "cuda" in _code_of_args(original_node.args):
            return self.rewrite(
                original_node,
                updated_node,
                code,
                "types belong to a device",
                "torch.set_default_device(QIPAN_DEVICE)",
            )
        if name == "torch.distributed.is_nccl_available":
            return self.rewrite(
                original_node,
                updated_node,
                code,
                "",
                "torch.distributed.is_backend_available(QIPAN_BACKEND)",
                "backend",
            )
        if name == "torch.backends.cuda.is_built":
            return self.rewrite(
                original_node, updated_node, code, "", "(torch.accelerator.current_accelerator() is not None)"
            )
        if name in ("torch.amp.autocast", "torch.autocast") and not original_node.args:
            return self.rewrite(
                original_node, updated_node, code, "the device is an argument", f"{code}(QIPAN_DEVICE)"
            )
        if isinstance(original_node.func, cst.Attribute):
            method = original_node.func.attr.value
            if method == "cuda" and name != "torch.cuda":
                return self._moved(original_node, updated_node)
            if method == "type" and any(
                self.name(arg.value).startswith("torch.cuda.") for arg in original_node.args
            ):
                return self._typed(original_node, updated_node)
        for start, entry in constructs()["functions"].items():
            if name == start or name.startswith(start + "."):
                if "runs" in entry:
                    self.tell(original_node, "runs", name, entry["runs"])
                else:
                    self.block(original_node, name, entry["why"], entry["has"])
        for start, why in constructs()["notes"].items():
            if name == start or name.startswith(start + "."):
                self.tell(original_node, "runs", name, why)
        if name in ("ctypes.CDLL", "ctypes.cdll.LoadLibrary") and "cud" in args:
            self.block(original_node, f"{name}({args})", "loads a CUDA library", ["nvidia"])
        return self._keywords(original_node, updated_node, name)

    def _cuda_call(self, node: cst.Call, updated: cst.Call, rest: str, args: str) -> cst.BaseExpression:
        table = constructs()
        construct = f"torch.cuda.{rest}"
        first = rest.split(".")[0]
        if rest == "is_available":
            if node in self.checks:
                return self.rewrite(
                    node,
                    updated,
                    construct,
                    "ends the script where there is none",
                    f'({AVAILABLE} or QIPAN_DEVICE == "cpu")',
                )
            return self.rewrite(node, updated, construct, "any vendor's accelerator", AVAILABLE)
        if rest == "device_count":
            return self.rewrite(
                node,
                updated,
                construct,
                "any vendor's accelerators; one for a trial on a CPU",
                "max(1, torch.accelerator.device_count())",
            )
        if rest in table["calls"]:
            call, otherwise = table["calls"][rest]
            new = f"({call.format(module=MODULE) if '{module}' in call else call}({args}) if {AVAILABLE} else {otherwise})"
            needs = ["contextlib"] if "contextlib" in otherwise else []
            return self.rewrite(node, updated, construct, "any vendor's accelerator", new, *needs)
        if rest in ("amp.autocast", "amp.autocast_mode.autocast"):
            given = list(updated.args)
            if given and given[0].keyword is None and not given[0].star:
                given[0] = cst.Arg(
                    given[0].value,
                    cst.Name("enabled"),
                    comma=given[0].comma,
                    equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
                )
            func = (
                "torch.autocast"
                if _code(node.func).endswith("torch.cuda.amp.autocast")
                or _code(node.func).startswith("torch.")
                else _code(node.func)
            )
            return self.rewrite(
                node, updated, construct, "the device is an argument", _call(func, "QIPAN_DEVICE", given)
            )
        if rest in ("amp.GradScaler", "amp.grad_scaler.GradScaler"):
            func = "torch.amp.GradScaler" if _code(node.func).startswith("torch.") else _code(node.func)
            return self.rewrite(
                node,
                updated,
                construct,
                "the device is an argument",
                _call(func, "QIPAN_DEVICE", updated.args),
            )
        if rest in ("amp.custom_fwd", "amp.custom_bwd"):
            func = f"torch.{rest}" if _code(node.func).startswith("torch.") else _code(node.func)
            return self.rewrite(
                node,
                updated,
                construct,
                "the device is an argument",
                _call(func, "device_type=QIPAN_DEVICE", updated.args),
            )
        if first in table["tensors"]:
            return self.rewrite(
                node,
                updated,
                construct,
                "types belong to a device",
                f"torch.{first}({args}).to(QIPAN_DEVICE)",
            )
        if first == "nvtx":
            if rest == "nvtx.range":
                return self.rewrite(
                    node,
                    updated,
                    construct,
                    "torch's own profiler marks",
                    f"torch.profiler.record_function({args})",
                )
            return self.rewrite(
                node,
                updated,
                construct,
                "NVIDIA's profiler marks",
                f'(torch.cuda.{rest}({args}) if QIPAN_DEVICE == "cuda" else None)',
            )
        why = table["blocked"].get(first, "nothing vendor-neutral stands for it")
        self.block(node, construct, why, self._cuda_stacks())
        return updated

    def _moved(self, node: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        """x.cuda(...) -> x.to(...)."""
        assert isinstance(updated.func, cst.Attribute), "the caller looked"
        place, others = "QIPAN_DEVICE", []
        for number, arg in enumerate(updated.args):
            keyword = arg.keyword.value if arg.keyword else ("device", "non_blocking")[min(number, 1)]
            if keyword == "device":
                place = _place(arg.value)
            else:
                others.append(f"{keyword}={_code(arg.value)}")
        new = f"{_code(updated.func.value)}.to({', '.join([place, *others])})"
        needs = ["numbered"] if "qipan_device(" in new else []
        return self.rewrite(
            node, updated, f".cuda({_code_of_args(node.args)})", "the device of this machine", new, *needs
        )

    def _typed(self, node: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        assert isinstance(updated.func, cst.Attribute), "the caller looked"
        kind = self.name(node.args[0].value).rsplit(".", 1)[-1]
        dtype = constructs()["tensors"].get(kind)
        if dtype is None:
            return updated
        new = f"{_code(updated.func.value)}.to(QIPAN_DEVICE, torch.{dtype})"
        return self.rewrite(node, updated, f".type(torch.cuda.{kind})", "types belong to a device", new)

    def _keywords(self, node: cst.Call, updated: cst.Call, name: str) -> cst.BaseExpression:
        """Arguments that mean a vendor: device_ids of DDP, attention kernels, Lightning's accelerator."""
        last = name.rsplit(".", 1)[-1] or _code(node.func).rsplit(".", 1)[-1]
        args, changed = [], False
        for arg in updated.args:
            keyword, value = arg.keyword.value if arg.keyword else "", _code(arg.value)
            new = ""
            if (
                last in ("DistributedDataParallel", "DDP")
                and keyword in ("device_ids", "output_device")
                and value != "None"
            ):
                new = f'{value} if QIPAN_DEVICE != "cpu" else None'
            elif keyword == "attn_implementation" and value.strip("\"'").startswith("flash_attention"):
                new = '"sdpa"'
            elif keyword == "use_flash_attention_2" and value == "True":
                new = "False"
            elif last == "Trainer" and keyword == "accelerator" and value.strip("\"'") in ("gpu", "cuda"):
                new = '"auto"'
            elif keyword in ("load_in_8bit", "load_in_4bit") and value == "True":
                self.block(
                    node,
                    f"{keyword}=True",
                    "weights in CUDA kernels of bitsandbytes",
                    constructs()["packages"]["bitsandbytes"]["has"],
                )
            if new:
                made = self.rewrite(node, arg.value, f"{keyword}={value}", "", new)
                changed |= made is not arg.value
                arg = arg.with_changes(value=made)
            args.append(arg)
        return updated.with_changes(args=args) if changed else updated

    # --- names and strings

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        if original_node in self.claimed:
            return updated_node
        name = self.name(original_node)
        if original_node.attr.value == "is_cuda" and not name.startswith("torch.cuda"):
            new = f'({_code(updated_node.value)}.device.type != "cpu")'
            return self.rewrite(original_node, updated_node, ".is_cuda", "on any accelerator", new)
        if name == "torch.cuda.OutOfMemoryError":
            return self.rewrite(
                original_node, updated_node, name, "of any accelerator", "torch.OutOfMemoryError"
            )
        if name == "torch.cuda.is_available":
            return self.rewrite(
                original_node,
                updated_node,
                name,
                "any vendor's accelerator",
                "torch.accelerator.is_available",
            )
        rest = name.removeprefix("torch.cuda.")
        if name.startswith("torch.cuda.") and "." not in rest:
            if rest in constructs()["tensors"]:
                return updated_node  # the call around it answers for it, or default types do
            if rest in constructs()["blocked"]:
                self.block(original_node, name, constructs()["blocked"][rest], self._cuda_stacks())
            elif rest in constructs()["calls"]:
                self.block(
                    original_node,
                    name,
                    "is handed on without being called; call it here",
                    self._cuda_stacks(),
                )
        elif name.startswith(("torch.backends.cudnn.", "torch.backends.cuda.matmul.")):
            self.tell(original_node, "runs", name, constructs()["notes"]["torch.backends.cudnn"])
        return updated_node

    def leave_Decorator(self, original_node: cst.Decorator, updated_node: cst.Decorator) -> cst.Decorator:
        name = self.name(original_node.decorator)
        if name in ("torch.cuda.amp.custom_fwd", "torch.cuda.amp.custom_bwd"):
            func = (
                f"torch.{name.removeprefix('torch.cuda.')}"
                if _code(original_node.decorator).startswith("torch.")
                else _code(original_node.decorator)
            )
            made = self.rewrite(
                original_node,
                updated_node.decorator,
                name,
                "the device is an argument",
                f"{func}(device_type=QIPAN_DEVICE)",
            )
            return updated_node.with_changes(decorator=made)
        return updated_node

    def leave_Comparison(
        self, original_node: cst.Comparison, updated_node: cst.Comparison
    ) -> cst.BaseExpression:
        """x.type == "cuda" asks whether x is on an accelerator."""
        if (
            len(original_node.comparisons) == 1
            and isinstance(original_node.left, cst.Attribute)
            and original_node.left.attr.value == "type"
        ):
            one = original_node.comparisons[0]
            if _value(one.comparator) == "cuda" and isinstance(one.operator, cst.Equal | cst.NotEqual):
                sign = "!=" if isinstance(one.operator, cst.Equal) else "=="
                self.findings = [
                    f for f in self.findings if (f.line, f.construct) != (self.line(one.comparator), '"cuda"')
                ]
                return self.rewrite(
                    original_node,
                    updated_node,
                    f'.type {"==" if sign == "!=" else "!="} "cuda"',
                    "on any accelerator",
                    f'{_code(updated_node.left)} {sign} "cpu"',
                )
        return updated_node

    def leave_SimpleString(
        self, original_node: cst.SimpleString, updated_node: cst.SimpleString
    ) -> cst.BaseExpression:
        value = _value(original_node)
        if original_node in self.kept or value is None:
            return updated_node
        if value == "cuda":
            return self.rewrite(
                original_node, updated_node, '"cuda"', "the device of this machine", "QIPAN_DEVICE"
            )
        if re.fullmatch(r"cuda:\d+", value):
            new = f"qipan_device({value[5:]})"
            return self.rewrite(
                original_node, updated_node, f'"{value}"', "the device of this machine", new, "numbered"
            )
        if value.startswith("cuda:"):
            return self.rewrite(
                original_node,
                updated_node,
                f'"{value}"',
                "the device of this machine",
                f"(QIPAN_DEVICE + {value[4:]!r})",
            )
        if value == "nccl":
            return self.rewrite(
                original_node,
                updated_node,
                '"nccl"',
                "the device's own collectives",
                "QIPAN_BACKEND",
                "backend",
            )
        if value in ("cpu:gloo,cuda:nccl", "cuda:nccl,cpu:gloo"):
            new = '(f"cpu:gloo,{QIPAN_DEVICE}:{QIPAN_BACKEND}" if QIPAN_DEVICE != "cpu" else "gloo")'
            return self.rewrite(
                original_node, updated_node, f'"{value}"', "the device's own collectives", new, "backend"
            )
        if value == "CUDA_VISIBLE_DEVICES":
            return self._visible(original_node, updated_node)
        if re.fullmatch(r"NCCL_[A-Z0-9_]+", value) and "NCCL_" not in self.stack.tuning_prefixes:
            theirs = ", ".join(self.stack.tuning_prefixes) or "none"
            self.tell(
                original_node,
                "runs",
                value,
                f"only NCCL reads it; the target's variables begin with {theirs}",
            )
        elif re.fullmatch(r"(PYTORCH_)?CUDA_[A-Z0-9_]+|CUBLAS_[A-Z0-9_]+", value) and not self.is_cuda:
            self.tell(original_node, "runs", value, "only CUDA reads it; without effect on the target")
        elif re.search(r"\bnvidia-smi\b", value):
            self.block(
                original_node, "nvidia-smi", "NVIDIA's tool; use `qipan chips probe --json`", ["nvidia"]
            )
        return updated_node

    def _visible(self, node: cst.SimpleString, updated: cst.SimpleString) -> cst.BaseExpression:
        if "CUDA_VISIBLE_DEVICES" in self.stack.visible:
            self.tell(node, "runs", "CUDA_VISIBLE_DEVICES", f"{self.stack.stack} reads it too")
            return updated
        if not self.stack.visible or self.stack.torch_device in ("cpu", "xla"):
            self.tell(node, "runs", "CUDA_VISIBLE_DEVICES", "without effect on the target")
            return updated
        new = f'"{self.stack.visible[0]}"'
        self.tell(node, "rewritten", "CUDA_VISIBLE_DEVICES", "the target's own variable", new)
        return cst.SimpleString(new)

    def leave_FormattedString(
        self, original_node: cst.FormattedString, updated_node: cst.FormattedString
    ) -> cst.BaseExpression:
        self.quotes.pop()
        parts = updated_node.parts
        if parts and isinstance(parts[0], cst.FormattedStringText) and parts[0].value.startswith("cuda:"):
            if (
                len(parts) == 2
                and parts[0].value == "cuda:"
                and m.matches(parts[1], m.FormattedStringExpression(conversion=None, format_spec=None))
            ):
                assert isinstance(parts[1], cst.FormattedStringExpression), "it was matched"
                new = f"qipan_device({_code(parts[1].expression)})"
                return self.rewrite(
                    original_node,
                    updated_node,
                    _code(original_node),
                    "the device of this machine",
                    new,
                    "numbered",
                )
            made = [
                cst.FormattedStringExpression(cst.Name("QIPAN_DEVICE")),
                parts[0].with_changes(value=parts[0].value.removeprefix("cuda")), *parts[1:],
            ]  # fmt: skip
            new = _code(updated_node.with_changes(parts=made))
            return self.rewrite(
                original_node, updated_node, _code(original_node), "the device of this machine", new
            )
        return updated_node

    def _cuda_stacks(self) -> list[str]:
        return [self.stack.stack] if self.is_cuda else []


def _is_chain(node: cst.CSTNode) -> bool:
    while isinstance(node, cst.Attribute):
        node = node.value
    return isinstance(node, cst.Name)


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _code_of_args(args: Iterable[cst.Arg]) -> str:
    return "".join(_code(arg) for arg in args).strip().rstrip(",")


def _call(func: str, first: str, args: Iterable[cst.Arg]) -> str:
    rest = _code_of_args(args)
    return f"{func}({first}, {rest})" if rest else f"{func}({first})"


def _place(value: cst.BaseExpression) -> str:
    """An index, or an expression that is a device already."""
    code = _code(value)
    if isinstance(value, cst.Integer):
        return f"qipan_device({code})"
    if code == "None":
        return "QIPAN_DEVICE"
    named = value.func if isinstance(value, cst.Call) else value
    last = named.attr.value if isinstance(named, cst.Attribute) else _code(named)
    if code == "QIPAN_DEVICE" or re.fullmatch(r"(?i)\w*(device|dev)\d*", last):
        return code
    return f"qipan_device({code})"


def _value(node: cst.CSTNode) -> str | None:
    if not isinstance(node, cst.SimpleString):
        return None
    value = node.evaluated_value
    return value if isinstance(value, str) else None
