"""What can go wrong, in words a user can act on: the errors that are raised and the reasons that are reported."""

from __future__ import annotations

import enum


class LqError(Exception):
    """Base of every error that lqcompile raises on purpose."""


class ArgumentError(LqError, ValueError):
    """An argument is unusable. The message names it, the value it had and what is accepted."""

    def __init__(self, name: str, value: object, accepted: str) -> None:
        shown = repr(value)
        super().__init__(f"{name} is {shown if len(shown) <= 200 else shown[:200] + '...'}; accepted: {accepted}")
        self.name, self.value, self.accepted = name, value, accepted


class StrictError(LqError):
    """Raised instead of falling back when options={"strict": True}."""


class Reason(enum.Enum):
    """Why a matmul was kept as it was. The value is `(sentence, advice)`."""

    INPUT_WEIGHT = (
        "both operands depend on the input",
        "nothing to do: attention scores and the like have no constant weight",
    )
    SCALE_FROM_INPUT = (
        "the weight's codes are constant, but its dequantization depends on the input",
        "store scales and zero points as parameters or buffers of the module",
    )
    GRAPH_BREAK = (
        "the weight comes out of another graph, from before a graph break",
        "remove the graph break between dequantization and matmul, or compile with lqcompile.prepare(model, *inputs)",
    )
    FREE_TENSOR = (
        "the weight is not a parameter or buffer of the model",
        "register it with register_buffer or nn.Parameter; closures and arguments may change on every call",
    )
    NOT_QUANTIZED = (
        "the weight is not quantized",
        "quantize it with lqcompile.quantize(model) or a library you like",
    )
    MUTATED = (
        "the weight is written to inside the compiled function",
        "move the update out of forward",
    )
    UNSUPPORTED_OP = (
        "the weight is computed by an operation that cannot be evaluated ahead of time",
        "move the operation out of forward, or keep its result in a buffer",
    )
    UNSUPPORTED_SPELLING = (
        "this form of the operation is not a plain matmul",
        "use stride 1, no padding and one group in 1x1 convolutions; contract each index once",
    )
    DTYPE = (
        "the matmul's dtype is not supported",
        "float16, bfloat16 and float32 activations are; cast before the matmul",
    )
    NEEDS_GRAD = (
        "the weight is being trained",
        "freeze it: requires_grad_(False), or run under torch.no_grad()",
    )
    TOO_MANY_LEVELS = (
        "the weight has a low-bit source but more than 256 levels, or levels without a pattern",
        "quantize to at most 8 bits with one scale per group",
    )
    GROUPS = (
        "scales do not come in equal groups along K",
        "quantize with groups along the input features (axis=1) that divide them evenly",
    )
    NON_FINITE = (
        "the dequantized weight holds inf or NaN",
        "check the checkpoint's scales; half precision may overflow",
    )
    PROOF_FAILED = (
        "the recovered codes and scales do not reproduce the weight exactly",
        "please report this model: lq doctor prints what to attach",
    )
    EAGER_DIFFERS = (
        "eager's own low-precision weight is further from the exact one than rounding explains",
        "the dequantization overflows or loses its codes; use a wider dtype for it",
    )
    FUSED = (
        "a library's own operation multiplies by the packed weight",
        "nothing to do: it already reads low-bit data, in a way that only the library knows",
    )
    HIGHER_ORDER = (
        "the matmul is inside a higher-order operation (checkpointing, a custom autograd function, cond, vmap)",
        "run inference under torch.no_grad(), or move the matmul out of it",
    )
    NO_KERNEL = (
        "no kernel accepts this format on this device",
        "see lq kernels for the formats that each kernel accepts",
    )
    NO_NVRTC = (
        "NVRTC, which compiles kernels for the GPU, was not found",
        "pip install nvidia-cuda-nvrtc, of the major CUDA version that torch.version.cuda names",
    )
    NO_COMPILER = (
        "there is no C++ compiler that compiles the kernels for this CPU, so its matmuls run dense",
        "install g++ 11 or newer, or clang 13 (Debian: apt install g++), or set CXX to one",
    )
    PACKED = (
        "the weight is packed already",
        "nothing to do: lqcompile.convert packed it, or the file that it was loaded from holds it packed",
    )
    LAYER = (
        "the layer is more than one matmul against its own weight",
        'leave it as it is: torch.compile(model, backend="lq") rewrites the matmuls inside it',
    )
    HOOKED = (
        "hooks or parametrizations are attached to the layer",
        "remove them before lqcompile.convert, and attach them again after it",
    )
    SLOWER = (
        "no kernel is predicted to be faster than leaving it to Inductor",
        "nothing to do",
    )
    PASS_FAILED = (
        "a pass of lqcompile failed and was rolled back",
        "please report this: options={'strict': True} shows the traceback",
    )

    @property
    def sentence(self) -> str:
        return self.value[0]

    @property
    def advice(self) -> str:
        return self.value[1]


class Refused(LqError):
    """A match, or a kernel, was refused. Raised by recogniser, planner and build; their callers make it a NearMiss or
    take another kernel: it never reaches the user.
    """

    def __init__(self, reason: Reason, at: str = "", depth: int = 0) -> None:
        super().__init__(f"{reason.name.lower()} at {at}" if at else reason.name.lower())
        self.reason, self.at, self.depth = reason, at, depth
