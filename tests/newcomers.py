"""Five scripts as newcomers write them, and five that go wrong: what `lq explain` is tried on."""

INT4 = """
class Int4(torch.nn.Module):
    def __init__(self, n=64, k=128):
        super().__init__()
        self.register_buffer("codes", torch.randint(0, 16, (n, k // 32, 32), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(n, k // 32, 1) / 16)

    def weight(self):
        return (self.codes.float() * self.scale).flatten(1)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight())
"""

PLAIN = """
import torch

model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
with torch.no_grad():
    print(torch.compile(model, backend="lq")(torch.randn(3, 128)).shape)
"""

OURS = """
import torch
import lqcompile

model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
model = lqcompile.quantize(model, bits=4, group=64)
inputs = (torch.randn(3, 128),)
"""

HALF = """
import torch
import lqcompile

model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
lqcompile.quantize(model, bits=4, group=64, modules=lambda name, layer: name == "0")
x = torch.randn(3, 128)
"""

DYNAMIC = f"""
import torch
{INT4}
class Dynamic(Int4):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight() * x.abs().amax())

model = torch.nn.Sequential(Dynamic()).eval()
inputs = torch.randn(3, 128)
"""

BREAKS = f"""
import torch
{INT4}
class Breaks(Int4):
    def forward(self, x):
        w = self.weight()
        print("the weight is ready")
        return torch.nn.functional.linear(x, w)

model = torch.nn.Sequential(Breaks(), torch.nn.ReLU(), Int4(32, 64)).eval()
inputs = {{"input": torch.randn(3, 128)}}
"""

# name: (script, words of the first screen, words of what to do)
MODELS = {
    "plain": (PLAIN, "nothing is quantized", "quantize it with lqcompile.quantize(model)"),
    "ours": (OURS, "2 of 2 matmuls rewritten", "nothing: every quantized weight is packed"),
    "half": (
        HALF,
        "1 of 2 matmuls rewritten",
        "nothing: every quantized weight is packed; without a quantized weight: 1",
    ),
    "dynamic": (DYNAMIC, "0 of 1 matmuls rewritten", "1 quantized but kept: start with lq why 0"),
    "breaks": (BREAKS, "1 of 2 matmuls rewritten", "1 quantized but kept: start with lq why 'forward#2'"),
}

# name: (script, words of the error)
FAILING = {
    "raises": (
        "import torch\n\nmodel = torch.nn.Linear(4, 4)\nmodel(torch.randn(2, 5))\n",
        "script.py:4: RuntimeError",
    ),
    "syntax": ("model = (\n", "script.py:1: SyntaxError"),
    "nothing": ("import torch\n", "call torch.compile(model, backend"),
    "no_inputs": ("import torch\n\nmodel = torch.nn.Linear(4, 4)\n", "let it define `model` and `inputs`"),
    "wrong_inputs": ("import torch\n\nmodel, x = torch.nn.Linear(4, 4), torch.randn(2, 5)\n", "Error"),
    "not_installed": ("import no_such_library\n", "script.py:1: ModuleNotFoundError"),
    "our_argument": (
        "import torch\nimport lqcompile\n\nlqcompile.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), bits=99)\n",
        "script.py:4: ArgumentError: bits is 99",
    ),
    "exits": ("raise SystemExit(3)\n", "exit code 3"),
    "unknown_option": (
        "import torch\n\nf = torch.compile(torch.nn.Linear(4, 4), backend='lq', options={'strikt': 1})\n"
        "f(torch.randn(2, 4))\n",
        "strikt",
    ),
}
