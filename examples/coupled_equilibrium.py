"""Two coupled equilibria of different sizes: (x*, y*) = f(x*, y*; u).

x in R^3 and y in R^5 hold each other in place:

    x = tanh(A y + u)
    y = tanh(B x + C y)

One equilibrium layer solves for both at once, because a state is any tuple of tensors. The gradients are checked
against the implicit function theorem, solved densely.

python examples/coupled_equilibrium.py
"""

import torch
from torch import Tensor, nn

from zoo.implicit import DEQ, Anderson, ImplicitGradient


class CoupledCell(nn.Module):
    """f((x, y); u) with x ``(B, 3)``, y ``(B, 5)`` and u ``(B, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(0.3 * torch.randn(3, 5))
        self.B = nn.Parameter(0.3 * torch.randn(5, 3))
        self.C = nn.Parameter(0.1 * torch.randn(5, 5))

    def forward(self, state: tuple[Tensor, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        x, y = state
        return torch.tanh(y @ self.A.T + u), torch.tanh(x @ self.B.T + y @ self.C.T)

    def initial_state(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(u), u.new_zeros(u.shape[0], 5)


def dense_gradient(cell: CoupledCell, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """d(sum x* + sum y*)/du of one sample, from the 8 x 8 system (I - J^T) w = 1."""
    J = torch.autograd.functional.jacobian(
        lambda z: torch.cat(cell((z[None, :3], z[None, 3:]), u[None]), 1)[0], z(x, y)
    )
    w = torch.linalg.solve(torch.eye(8, dtype=u.dtype) - J.T, torch.ones(8, dtype=u.dtype))
    df_du = torch.autograd.functional.jacobian(lambda u: torch.cat(cell((x[None], y[None]), u[None]), 1)[0], u)
    gradient: Tensor = df_du.T @ w
    return gradient


def z(x: Tensor, y: Tensor) -> Tensor:
    """The two parts of one sample, end to end."""
    return torch.cat([x, y])


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    cell = CoupledCell()
    tight = Anderson(tol=1e-12)
    deq = DEQ(cell, solver=tight, gradient=ImplicitGradient(tight))

    u = torch.randn(4, 3, requires_grad=True)
    (x, y), report = deq(u)
    (x.sum() + y.sum()).backward()

    print(f"x* {tuple(x.shape)}, y* {tuple(y.shape)}: {report.summary()}")
    dense = torch.stack([dense_gradient(cell, x[i].detach(), y[i].detach(), u[i].detach()) for i in range(len(u))])
    assert u.grad is not None
    print(f"largest difference from the dense implicit gradient: {float((u.grad - dense).abs().max()):.1e}")
    assert torch.allclose(u.grad, dense, atol=1e-10)
