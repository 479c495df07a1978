"""Constructs of public training scripts, each in a small one that trains.  `# -> verdict` marks the lines that have one; each
script is judged for a chip that torch calls npu."""

TAIL = """
import torch.nn.functional as F
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    loss = F.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
START = """import torch
from torch import nn
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x, y = torch.randn(16, 6), torch.randn(16, 2)
"""

#: name -> script; those that only block are not run
TRAINED = {
    "device_from_availability": START + """device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # -> rewritten
model, x, y = model.to(device), x.to(device), y.to(device)
""",
    "numbered_device": START + """device = "cuda:0"  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "device_and_index": START + """device = torch.device("cuda", 0)  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "f_string_device": START + """local_rank = 0
device = torch.device(f"cuda:{local_rank}")  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "percent_device": START + """device = "cuda:%d" % 0  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "format_device": START + """device = "cuda:{}".format(0)  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "added_device": START + """device = "cuda:" + str(0)  # -> rewritten
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "cuda_methods": START + """model.cuda()  # -> rewritten
x = x.cuda(non_blocking=True)  # -> rewritten
y = y.cuda(0)  # -> rewritten
""",
    "cuda_of_rank": START + """rank = 0
torch.cuda.set_device(rank)  # -> rewritten
model = model.cuda(rank)  # -> rewritten
x, y = x.cuda(rank, non_blocking=True), y.cuda(device=rank)  # -> rewritten
""",
    "guarded_cuda": START + """if torch.cuda.is_available():  # -> rewritten
    model = model.cuda()  # -> rewritten
    x, y = x.cuda(), y.cuda()  # -> rewritten
""",
    "asserted_cuda": START + """assert torch.cuda.is_available(), "needs a GPU"  # -> rewritten
model, x, y = model.cuda(), x.cuda(), y.cuda()  # -> rewritten
""",
    "exit_without_cuda": START + """import sys
if not torch.cuda.is_available():  # -> rewritten
    sys.exit("needs a GPU")
""",
    "factory_device": START + """x = torch.ones(16, 6, device="cuda")  # -> rewritten
model.to("cuda")  # -> rewritten
y = y.to(device="cuda", dtype=torch.float32)  # -> rewritten
""",
    "device_of_argparse": "import argparse\n" + START + """parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])  # -> rewritten
parser.add_argument("--no-cuda", action="store_true")
args = parser.parse_args([])
device = torch.device(args.device if not args.no_cuda else "cpu")
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "seeds": START + """torch.cuda.manual_seed(5)  # -> rewritten
torch.cuda.manual_seed_all(5)  # -> rewritten
x = torch.randn(16, 6)
""",
    "memory_figures": START + """torch.cuda.reset_peak_memory_stats()  # -> rewritten
torch.cuda.empty_cache()  # -> rewritten
print(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB, {torch.cuda.memory_reserved()}")  # -> rewritten
free, total = torch.cuda.mem_get_info()  # -> rewritten
""",
    "synchronised_time": "import time\n" + START + """torch.cuda.synchronize()  # -> rewritten
began = time.perf_counter()
""",
    "device_names": START + """print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")  # -> rewritten
index = torch.cuda.current_device()  # -> rewritten
""",
    "amp_old": START + """from torch.cuda.amp import GradScaler, autocast  # -> rewritten
scaler = GradScaler()  # -> rewritten
inner = model
model = lambda batch: wrapped(batch)
def wrapped(batch):
    with autocast():  # -> rewritten
        return inner(batch).float()
model.parameters = inner.parameters
""",
    "amp_by_full_name": START + """scaler = torch.cuda.amp.GradScaler(enabled=False)  # -> rewritten
with torch.cuda.amp.autocast(enabled=True, dtype=torch.bfloat16):  # -> rewritten
    y = y + model(x).detach().float()
""",
    "amp_from_cuda": START + """from torch.cuda import amp  # -> rewritten
with amp.autocast(True):  # -> rewritten
    y = y + model(x).detach().float()
""",
    "autocast_of_a_device": START + """with torch.autocast("cuda", dtype=torch.bfloat16):  # -> rewritten
    y = y + model(x).detach().float()
with torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16):  # -> rewritten
    y = y + model(x).detach().float()
""",
    "autocast_decorator": START + """inner = model.forward
@torch.cuda.amp.autocast()  # -> rewritten
def forward(batch):
    return inner(batch)
model.forward = lambda batch: forward(batch).float()
""",
    "custom_fwd": START + """class Double(torch.autograd.Function):
    @staticmethod
    @torch.cuda.amp.custom_fwd  # -> rewritten
    def forward(ctx, value):
        return value * 2
    @staticmethod
    @torch.cuda.amp.custom_bwd  # -> rewritten
    def backward(ctx, grad):
        return grad * 2
model.append(nn.Identity())
model[-1].forward = Double.apply
""",
    "process_group": START + """import os, tempfile
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
store = tempfile.mktemp()
dist.init_process_group(backend="nccl", init_method=f"file://{store}", rank=0, world_size=1)  # -> rewritten
model = DDP(model.cuda(), device_ids=[0], output_device=0)  # -> rewritten
dist.destroy_process_group() if False else None
""",
    "both_backends": START + """import tempfile
torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)  # -> rewritten
torch.distributed.all_reduce(x)
torch.distributed.destroy_process_group()
""",
    "data_parallel": START + """if torch.cuda.device_count() > 1:  # -> rewritten
    model = nn.DataParallel(model)  # -> runs
""",
    "visible_devices": """import os
os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # -> rewritten
os.environ.setdefault("NCCL_IB_DISABLE", "1")  # -> runs
os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # -> runs
""" + START,
    "kind_of_device": START + """device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # -> rewritten
if device.type == "cuda":  # -> rewritten
    torch.backends.cudnn.benchmark = True  # -> runs
model.to(device)
x, y = x.to(device), y.to(device)
""",
    "is_cuda": START + """moved = x.is_cuda  # -> rewritten
x = x if moved else x.clone()
""",
    "tensor_types": START + """y = torch.cuda.FloatTensor(16, 2).zero_()  # -> rewritten
x = x.type(torch.cuda.FloatTensor)  # -> rewritten
""",
    "default_type": START + """torch.set_default_tensor_type(torch.cuda.FloatTensor)  # -> rewritten
torch.set_default_tensor_type("torch.cuda.FloatTensor")  # -> rewritten
""",
    "default_device": START + """torch.set_default_device("cuda")  # -> rewritten
""",
    "map_location": START + """import io
buffer = io.BytesIO()
torch.save(model.state_dict(), buffer)
buffer.seek(0)
model.load_state_dict(torch.load(buffer, map_location="cuda:0"))  # -> rewritten
""",
    "device_context": START + """with torch.cuda.device(0):  # -> rewritten
    x = x * 2
""",
    "out_of_memory": START + """try:
    x = x + 1
except torch.cuda.OutOfMemoryError:  # -> rewritten
    torch.cuda.empty_cache()  # -> rewritten
""",
    "bf16_support": START + """dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16  # -> rewritten
x = x.to(dtype).float()
""",
    "random_state": START + """state = torch.cuda.get_rng_state_all()  # -> rewritten
torch.cuda.set_rng_state_all(state)  # -> rewritten
""",
    "profiler_marks": START + """torch.cuda.nvtx.range_push("forward")  # -> rewritten
torch.cuda.nvtx.range_pop()  # -> rewritten
""",
    "torch_by_another_name": """import torch as th
th.manual_seed(3)
model = th.nn.Linear(6, 2).to("cuda")  # -> rewritten
x, y = th.randn(16, 6).cuda(), th.randn(16, 2).cuda()  # -> rewritten
th.cuda.synchronize()  # -> rewritten
torch = th
""",
    "cuda_by_import": START + """from torch import cuda
if cuda.is_available():  # -> rewritten
    cuda.empty_cache()  # -> rewritten
""",
    "optional_kernels": START + """try:
    from flash_attn import flash_attn_func  # -> runs
except ImportError:
    flash_attn_func = None
try:
    import apex  # -> runs
except Exception:
    apex = None
""",
    "settings": START + """torch.backends.cudnn.deterministic = True  # -> runs
torch.backends.cuda.matmul.allow_tf32 = True  # -> runs
torch.set_float32_matmul_precision("high")  # -> runs
""",
    "words_that_are_only_words": '"""Train on "cuda" with nccl."""\n' + START + '''def move(value, kind: "cuda" = None):
    """cuda"""
    return value
print("cuda is fast", hasattr(torch, "cuda"))
''',
}  # fmt: skip

BLOCKED = {
    "streams": "import torch\nstream = torch.cuda.Stream()  # -> blocks\nwith torch.cuda.stream(stream):  # -> blocks\n    pass\ntorch.cuda.current_stream().wait_stream(stream)  # -> blocks\n",
    "events": "import torch\nstart = torch.cuda.Event(enable_timing=True)  # -> blocks\n",
    "graphs": "import torch\ngraph = torch.cuda.CUDAGraph()  # -> blocks\nwith torch.cuda.graph(graph):  # -> blocks\n    pass\n",
    "extension": "from torch.utils.cpp_extension import load  # -> blocks\nmine = load(name='mine', sources=['a.cpp', 'a.cu'])  # -> blocks\n",
    "inline_extension": "import torch\nmine = torch.utils.cpp_extension.load_inline('mine', cuda_sources='')  # -> blocks\n",
    "triton": "import torch\nimport triton  # -> blocks\nimport triton.language as tl  # -> blocks\n@triton.jit\ndef kernel(): pass\n",
    "apex": "from apex import amp  # -> blocks\nfrom apex.optimizers import FusedAdam  # -> blocks\n",
    "flash_attention": "from flash_attn.flash_attn_interface import flash_attn_func  # -> blocks\n",
    "xformers": "import xformers.ops as xops  # -> blocks\n",
    "bitsandbytes": "import bitsandbytes as bnb  # -> blocks\n",
    "transformer_engine": "import transformer_engine.pytorch as te  # -> blocks\n",
    "cupy": "import cupy as cp  # -> blocks\n",
    "numba": "from numba import cuda  # -> blocks\n",
    "pynvml": "import pynvml  # -> blocks\n",
    "nvidia_smi": "import subprocess\nsubprocess.check_output(['nvidia-smi', '-L'])  # -> blocks\n",
    "eight_bits": "from transformers import AutoModel\nAutoModel.from_pretrained('x', load_in_8bit=True)  # -> blocks\n",
    "capability": "import torch\nif torch.cuda.get_device_capability()[0] >= 8:  # -> blocks\n    pass\n",
    "library": "import torch\ntorch.ops.load_library('kernels.so')  # -> blocks\n",
    "runtime": "import ctypes\nctypes.CDLL('libcudart.so')  # -> blocks\n",
}
