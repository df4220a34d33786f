"""docs/recipes.md: every block is run as it stands, and compared with plain PyTorch on whole logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vig_kernels

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
BLOCKS = {
    section.split("\n", 1)[0].split(":")[0]: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for section in PAGE.split("\n## ")[1:]
}
B, T, D, V = 4, 6, 16, 50


def inputs() -> dict:
    """What a recipe's block may name."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape, scale=1.0):
        return (torch.randn(shape, generator=draw) * scale).requires_grad_()

    target = torch.randint(0, V, (B, T), generator=draw)
    target[:, :2] = target[0, 3] = -100
    return {
        "hidden": leaf(B, T, D),
        "weight": leaf(V, D, scale=0.4),
        "reference_hidden": leaf(B, T, D).detach(),
        "reference_weight": leaf(V, D, scale=0.4).detach(),
        "hidden_image": leaf(B, T, D),
        "hidden_null": leaf(B, T, D),
        "class_weight": torch.rand(V, generator=draw).masked_fill(torch.arange(V) % 5 == 0, 0.0),
        "old_log_p": -3 + 0.3 * leaf(B, T).detach(),
        "advantage": leaf(B, 1).detach(),
        "target": target,
        "smoothing": 0.1, "beta": 0.5, "epsilon": 0.2, "alpha": 0.7, "ratio": 0.4, "temperature": 1.7,
        "torch": torch, "F": F, **{name: getattr(vig_kernels, name) for name in vig_kernels.__all__},
    }  # fmt: skip


class Plain:
    """The same from logits of shape (B, T, V), in float64."""

    def __init__(self, names: dict):
        self.__dict__.update(names)
        self.kept = self.target != -100
        self.logits = self.hidden.double() @ self.weight.double().T
        self.flat = self.logits.flatten(0, 1), self.target.flatten()

    def log_p(self, logits: torch.Tensor) -> torch.Tensor:
        found = torch.distributions.Categorical(logits=logits).log_prob(self.target.clamp_min(0))
        return found.masked_fill(~self.kept, 0.0)

    def reference_log_p(self) -> torch.Tensor:
        return self.log_p(self.reference_hidden.double() @ self.reference_weight.double().T)

    def class_weights(self):
        return {"loss": F.cross_entropy(*self.flat, weight=self.class_weight.double())}

    def label_smoothing(self):
        return {"loss": F.cross_entropy(*self.flat, label_smoothing=self.smoothing)}

    def dft(self):
        probability = self.logits.softmax(-1).gather(-1, self.target.clamp_min(0)[..., None])[..., 0]
        return {"loss": -(probability.detach() * probability.log())[self.kept].mean()}

    def dpo(self):
        (mine_0, mine_1), (its_0, its_1) = (
            log_p.sum(-1).view(2, -1) for log_p in (self.log_p(self.logits), self.reference_log_p())
        )
        return {"loss": F.softplus(-self.beta * ((mine_0 - mine_1) - (its_0 - its_1))).mean()}

    def grpo(self):
        log_p, reference = self.log_p(self.logits), self.reference_log_p()
        ratio = (log_p - self.old_log_p).exp()
        beyond = torch.where(self.advantage > 0, ratio > 1 + self.epsilon, ratio < 1 - self.epsilon)
        edge = torch.where(self.advantage > 0, 1 + self.epsilon, 1 - self.epsilon)
        gain = torch.where(beyond, edge, ratio) * self.advantage
        penalty = (reference - log_p).exp() - (reference - log_p) - 1
        assert 0 < beyond[self.kept].sum() < self.kept.sum()  # both branches are met
        entropy = torch.distributions.Categorical(logits=self.logits).entropy()[self.kept].mean()
        return {"loss": -(gain - self.beta * penalty)[self.kept].mean(), "entropy": entropy.detach()}

    def vcd(self):
        image, null = (
            hidden.double() @ self.weight.double().T for hidden in (self.hidden_image, self.hidden_null)
        )
        logits = (1 + self.alpha) * image - self.alpha * null
        return {"nll": -self.log_p(logits), "greedy": logits.argmax(-1).masked_fill(~self.kept, -1)}

    def rho_1(self):
        excess = (self.reference_log_p() - self.log_p(self.logits)).detach()
        order = excess.masked_fill(~self.kept, float("-inf")).flatten().argsort(descending=True)
        count = round(self.ratio * int(self.kept.sum()))
        picked = order[:count]
        assert count == 6
        return {"loss": F.cross_entropy(self.flat[0][picked], self.flat[1][picked])}

    def temperature_(self):
        logits = self.logits / self.temperature
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return {"nll": -self.log_p(logits), "entropy": entropy.masked_fill(~self.kept, 0.0)}


PLAIN = {
    "Class weights": Plain.class_weights,
    "Label smoothing": Plain.label_smoothing,
    "DFT": Plain.dft,
    "DPO": Plain.dpo,
    "GRPO": Plain.grpo,
    "VCD": Plain.vcd,
    "Rho-1": Plain.rho_1,
    "Temperature": Plain.temperature_,
}


def test_every_recipe_of_the_page_is_compared():
    assert BLOCKS.keys() == PLAIN.keys()
    assert all(BLOCKS.values())


@pytest.mark.parametrize("name", PLAIN)
def test_recipe(name):
    given = inputs()
    expected = PLAIN[name](Plain(given))
    names = dict(given)
    exec(compile(BLOCKS[name], f"docs/recipes.md, {name}", "exec"), names)
    leaves = [value for value in given.values() if torch.is_tensor(value) and value.requires_grad]
    for result, value in expected.items():
        torch.testing.assert_close(names[result], value.to(names[result].dtype), rtol=1e-5, atol=1e-5)
        if value.requires_grad:
            mine, plain = (
                torch.autograd.grad(one.square().sum(), leaves, allow_unused=True, retain_graph=True)
                for one in (names[result], value)
            )
            assert any(grad is not None for grad in plain)
            for one, other in zip(mine, plain, strict=True):
                # Sums of products in float32 are as exact as the largest of them.
                largest = 1.0 if other is None else max(1.0, other.abs().max().item())
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest)
