"""Whether something watches or rewrites operations: a tracer, an exporter, a counter, a transform."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext


def watched(x: Tensor) -> bool:
    """Return whether operations on ``x`` are recorded, counted or rewritten, by anything but torch.compile.

    True under torch.jit.trace, torch.export and what builds on them, under any TorchDispatchMode or TorchFunctionMode
    (but for torch.set_default_device), in torch.func's transforms and forward-mode differentiation, and for tensors of
    a subclass. What runs then has to be the readable specification: operations that write into given memory, and
    kernels, hide what they compute.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(
            not isinstance(torch._C._get_function_stack_at(i), DeviceContext)
            for i in range(torch._C._len_torch_function_stack())
        )
    )
