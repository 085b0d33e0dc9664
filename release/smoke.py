"""What an installed wheel must do: import quickly, and serve a loss and an adapter by C++ kernels.

Runs in the wheel's own environment, where PyTorch is all that is installed beside it.
"""

import sys
import time

start = time.perf_counter()
import torch  # noqa: E402

torch_seconds = time.perf_counter() - start
import gist_kernels as gk  # noqa: E402

own_seconds = time.perf_counter() - start - torch_seconds
cpu = gk.backends()["cpu"]
native = "--no-native" not in sys.argv[1:]
if cpu.available is not native:
    sys.exit(f"the C++ kernels: {cpu.detail}")

torch.manual_seed(0)
found = {}
for backend in ("auto", "reference"):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 100, requires_grad=True).unbind()
    x, up = torch.randn(64, 48, requires_grad=True), torch.randn(48, 4)
    with gk.use_backend(backend):
        loss = gk.gist_loss(a, b, torch.arange(32))
        out = gk.adapter(x, torch.ones(4, 48) / 48, None, up, None, residual=x)
        found[backend] = [loss, *torch.autograd.grad(loss, (a, b)),
                          out, *torch.autograd.grad(out.square().sum(), x)]  # fmt: skip
for ours, exact in zip(found["auto"], found["reference"], strict=True):
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
python = sys.version.split()[0]
print(
    f"gist_kernels {gk.__version__} on Python {python}, PyTorch {torch.__version__}: "
    f"imported in {own_seconds:.2f} s after PyTorch's {torch_seconds:.1f} s; {cpu.detail}"
)
