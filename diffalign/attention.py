"""Which kernel attention runs on, by name: one for policy and reference, forward and backward.

`sdpa` leaves the choice to PyTorch; `flash`, `cudnn` and `mem_efficient` are PyTorch's own kernels, alone; `xformers`
and `flash3` are packages, put into the network's attention layers. `auto` is the fastest of those that can do the
network's head dimensions in the run's type, measured on the spot. All but `sdpa` need a CUDA GPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffalign.errors import InputError

Attention = Literal["auto", "sdpa", "flash", "cudnn", "mem_efficient", "xformers", "flash3"]
NAMES: tuple[str, ...] = get_args(Attention)
ALONE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Kernels of PyTorch that can be asked for."""
PACKAGES = {"xformers": "xformers", "flash3": "flash_attn_interface"}
"""Package of each of the others, as it is imported."""
HEAD_DIMS = {"sd": (40, 80, 160), "sd3": (64,)}
"""Head dimensions of the published models of a family."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_SIZES = {"cuda": (4, 1024), "cpu": (1, 64)}
"""Batch and tokens of a trial: enough to keep a GPU busy; little on a CPU, which has one kernel to choose from."""
_WIDTH = 640


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kernel on one head dimension and type."""

    name: str
    head_dim: int
    dtype: str
    seconds: float | None
    """Of a forward and a backward pass; None if it does not work."""
    reason: str = ""
    """Why it does not."""


def head_dims(net: nn.Module) -> tuple[int, ...]:
    """Head dimensions of a Diffusers network's attention layers, ascending."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention as Layer

    layers: list[Any] = [m for m in net.modules() if isinstance(m, (Layer, AttentionModuleMixin))]
    return tuple(sorted({layer.inner_dim // layer.heads for layer in layers}))


def missing(name: str, device: torch.device) -> str | None:
    """Why a kernel cannot run here whatever its input is; None if it may."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this is {'a' if device.type == 'cpu' else 'an'} {device.type.upper()}"
    package = PACKAGES.get(name)
    if package is None:
        return None
    if find_spec(package) is None:
        extra = "; pip install 'diffalign[xformers]'" if name == "xformers" else ""
        return f"the package {package!r} is missing{extra}"
    return _mismatch() if name == "xformers" else None


def trial(name: str, head_dim: int, dtype: str, device: torch.device) -> Trial:
    """Runs a kernel forward and backward on random input, and times it."""
    reason = missing(name, device)
    if reason is not None:
        return Trial(name=name, head_dim=head_dim, dtype=dtype, seconds=None, reason=reason)
    batch, tokens = _SIZES[device.type]
    heads = max(1, _WIDTH // head_dim)
    q, k, v = (
        torch.randn(batch, heads, tokens, head_dim, device=device, dtype=DTYPES[dtype], requires_grad=True)
        for _ in range(3)
    )
    try:
        with used(name):
            seconds = _timed(lambda: _call(name)(q, k, v).sum().backward(), device)
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        short = " ".join(str(error).split())[:160]
        return Trial(name=name, head_dim=head_dim, dtype=dtype, seconds=None, reason=short)
    return Trial(name=name, head_dim=head_dim, dtype=dtype, seconds=seconds)


def table(dims: Sequence[int], dtypes: Sequence[str], device: torch.device) -> list[Trial]:
    """Every kernel on every head dimension and type."""
    return [trial(name, d, dtype, device) for name in NAMES if name != "auto" for d in dims for dtype in dtypes]


def choose(name: str, net: nn.Module, dtype: str, device: torch.device) -> str:
    """The kernel that a run takes: the one that was asked for, checked, or for `auto` the fastest that works.

    Args:
        dtype: "fp16", "bf16" or "fp32", in which attention runs.

    Raises:
        InputError: An unknown name, or a kernel that cannot run here, or not at the network's head dimensions.
    """
    if name not in NAMES:
        raise InputError(f"config.train.attention must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "sdpa" or (name == "auto" and device.type != "cuda"):
        return "sdpa"
    dims = head_dims(net)
    if name == "auto":
        return fastest(table(dims, (dtype,), device))
    for d in dims:
        found = trial(name, d, dtype, device)
        if found.seconds is None:
            what = "" if missing(name, device) else f" for heads of {d} in {dtype}"
            raise InputError(
                f"config.train.attention must be a kernel that works here, got {name!r}{what}: {found.reason}; "
                'train.attention = "sdpa" works everywhere'
            )
    return name


def fastest(trials: Sequence[Trial]) -> str:
    """The kernel that is the quickest over all head dimensions among those that can do each of them."""
    totals: dict[str, float] = {}
    for name in dict.fromkeys(t.name for t in trials):
        seconds = [t.seconds for t in trials if t.name == name]
        if all(s is not None for s in seconds):
            totals[name] = sum(s for s in seconds if s is not None)
    return min(totals, key=lambda name: totals[name])


@contextmanager
def used(name: str) -> Iterator[None]:
    """Inside, PyTorch's attention runs on this kernel; one of a package has been put into the network by `install`."""
    with sdpa_kernel([ALONE[name]]) if name in ALONE else nullcontext():
        yield


def install(net: Any, name: str) -> None:
    """Puts a package's kernel into a network's attention layers; does nothing for those of PyTorch.

    Raises:
        InputError: The network's layers do not take it.
    """
    if name not in PACKAGES:
        return
    from diffusers import UNet2DConditionModel

    if not isinstance(net, UNet2DConditionModel):
        net.set_attention_backend({"xformers": "xformers", "flash3": "_flash_3"}[name])
    elif name == "xformers":
        net.enable_xformers_memory_efficient_attention()
    else:
        raise InputError(
            f"config.train.attention must be a kernel that a U-Net takes, got {name!r}, for which Diffusers has none; "
            'train.attention = "cudnn" is the quickest of the others on such GPUs'
        )


def _call(name: str) -> Callable[[Tensor, Tensor, Tensor], Float[Tensor, "b heads tokens d"]]:
    if name == "xformers":
        from xformers.ops import memory_efficient_attention as own
    elif name == "flash3":
        from flash_attn_interface import flash_attn_func as own
    else:
        return scaled_dot_product_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = own(*(x.transpose(1, 2) for x in (q, k, v)))  # these take tokens before heads
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _mismatch() -> str | None:
    """Why an xformers that is installed cannot be used: its kernels are built for one version of torch."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import xformers
        except (ImportError, OSError, RuntimeError) as error:
            return f"xformers does not import: {' '.join(str(error).split())[:120]}"
    if xformers._has_cpp_library:
        return None
    return (
        f"xformers {metadata.version('xformers')} is built for another torch than {torch.__version__}, its kernels do "
        "not load; install the release that was built for this one"
    )


def _timed(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Seconds of the quickest of some rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
