"""The peer of the training benchmark: the same decoder and the same update, as one writes them in PyTorch."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.bench.shapes import Shape
from research.errors import UserError


class Block(nn.Module):
    """Pre-norm block: causal attention with rotary positions, gated SiLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        width, hidden = shape.width, shape.hidden
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.attention_norm(x)
        query, key, value = (
            part(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, length, width))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, d]; cosines and sines [T, d / 2]; the two halves of a head form the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class Decoder(nn.Module):
    """tokens, targets int64 [B, T] -> mean nats."""

    def __init__(self, shape: Shape, length: int):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.RMSNorm(shape.width, eps=1e-6)
        dim = shape.width // shape.heads
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies).float()
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cosines, self.sines)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def load(self, params: dict[str, np.ndarray]) -> None:
        """Copies this project's parameters, {path: array}."""
        own = dict(self.named_parameters())
        for path, array in params.items():
            parts = path.replace("layer_", "layers.").split("/")
            names = [part for part in parts if part not in ("attention", "mlp")]
            names[-1] = "weight"
            # Kernels are [in, out] here, and [out, in] in a torch Linear.
            value = torch.tensor(array.T if parts[-1] == "kernel" else array)
            own.pop(".".join(names)).copy_(value)
        if own:
            raise ValueError(f"parameters left as they were: {', '.join(own)}")


class Peer:
    """Trains the decoder on one batch; `compiled` runs loss and gradient through torch.compile."""

    def __init__(
        self,
        shape: Shape,
        params: dict[str, np.ndarray],
        batch: dict[str, np.ndarray],
        hyper: dict[str, float],
        threads: int,
        compiled: bool,
    ):
        torch.set_num_threads(threads)
        self._tokens, self._targets = (torch.from_numpy(batch[n]).long() for n in ("tokens", "targets"))
        self._model = Decoder(shape, self._tokens.shape[1])
        self._model.load(params)
        self._loss = torch.compile(self._model) if compiled else self._model
        self._clip = hyper["clip"]
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": hyper["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (hyper["b1"], hyper["b2"])
        self._optimizer = torch.optim.AdamW(groups, hyper["rate"], betas=betas, eps=hyper["eps"], fused=True)

    def losses(self, steps: int) -> list[float]:
        """The losses of the next `steps` updates."""
        try:
            return [float(self._step()) for _ in range(steps)]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"torch.compile fails here ({first}); leave it out with --peers=eager") from error

    def turn(self, steps: int) -> float:
        """Seconds a step, over `steps` updates after one that is not timed."""
        float(self._step())
        start = time.perf_counter()
        for _ in range(steps):
            loss = self._step()
        float(loss)
        return (time.perf_counter() - start) / steps

    def peak(self, size: int = 2048, repeats: int = 3) -> float:
        """FLOP/s of torch's float32 product of two `size` x `size` matrices; the best run after one more."""
        a = torch.ones(size, size)
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.mm(a, a)
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds[1:])

    def _step(self) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._tokens, self._targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return loss.detach()
