"""Random sequences of what may befall an adapted Whisper, against weights put together in float64 at each step."""

import copy
import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, unfuse_whisper
from fused_s2lora.kernels.choice import VARIABLE
from tests.fused_s2lora.adapters import adapted, batch

BACKENDS = ("auto", "merged", "split", "augmented", "reference")
TARGETS = (["q_proj", "k_proj", "v_proj"], ["fc1", "fc2"], r".*decoder.*(k_proj|v_proj|fc2)")
SMALL = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 24, "encoder_layers": 1}


class Life:
    """A model and what it is to be: which adapters are active, disabled or merged. Methods without _ are the events."""

    def __init__(self, seed: int, tiny_whisper, folder) -> None:
        self._random, self._folder, self._made = random.Random(seed), folder, 1
        torch.manual_seed(seed)
        self._original = tiny_whisper(**SMALL).double().requires_grad_(False)
        self._shared = {"sharing": self._random.choice(["module", "stack", "all", "none"]), "sparsity_weight": 0.0}
        config = {"r": 17, "backend": self._random.choice(BACKENDS), **self._shared}
        self._model = adapted(lambda: tiny_whisper(**SMALL), **config).double()
        self._active, self._merged, self._disabled = ["default"], set(), False

    def _layers(self) -> dict[str, S2LoraLinear]:
        found = self._model.get_base_model().named_modules()
        return {name: module for name, module in found if isinstance(module, S2LoraLinear)}

    def _update(self, layer: S2LoraLinear, name: str, leaves: dict[int, Tensor]) -> Tensor:
        parameters = (layer.s2lora_up[name], layer.s2lora_down[name], layer.s2lora_coefficients[name])
        up, down, e = (leaves.setdefault(id(p), p.detach().clone().requires_grad_(p.requires_grad)) for p in parameters)
        if len(up) != layer.out_features:
            up, down = down.T, up.T
        config = layer.configs[name]
        return config.scaling * up @ torch.diag(e.expand(config.r)) @ down

    def _check(self) -> None:
        inputs, leaves, weights = batch(self._random.randrange(100)), {}, {}
        for path, layer in self._layers().items():
            weight = self._original.get_submodule(path).weight
            merged = [name for name in self._merged if name in layer.configs]
            weight = weight + sum(self._update(layer, name, leaves).detach() for name in merged)
            if not self._disabled:
                torch.testing.assert_close(layer.base_linear.weight, weight)
            names = [] if merged or self._disabled else [name for name in self._active if name in layer.configs]
            weights[f"{path}.weight"] = weight + sum(self._update(layer, name, leaves) for name in names)
        features, labels = inputs["input_features"].double(), inputs["labels"]
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        expected = torch.func.functional_call(self._original, weights, (), {"input_features": theirs, "labels": labels})
        self._model.zero_grad()
        got = self._model(input_features=ours, labels=labels)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-11)
        for logits in (got.logits, expected.logits):
            cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
        for name, parameter in self._model.named_parameters():
            expected = leaves[id(parameter)].grad if id(parameter) in leaves else None
            both = [torch.zeros_like(parameter) if grad is None else grad for grad in (parameter.grad, expected)]
            torch.testing.assert_close(*both, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

    def adds(self) -> None:
        backend, rank = self._random.choice(BACKENDS), self._random.choice([1, 3, 20])
        options = {"coefficient": self._random.choice(["rank", "scalar"]), "scaling": self._random.choice([1.0, 0.5])}
        options["target_modules"] = self._random.choice(TARGETS)
        self._model.add_adapter(f"a{self._made}", S2LoraConfig(r=rank, backend=backend, **options, **self._shared))
        self._made, self._merged = self._made + 1, set()

    def activates(self) -> None:
        names = sorted(self._model.peft_config)
        self._active = self._random.sample(names, self._random.randint(1, min(2, len(names))))
        self._model.base_model.set_adapter(self._active)
        self._model.base_model.enable_adapter_layers()
        self._disabled, self._merged = False, set()

    def switches(self) -> None:
        self._disabled = not self._disabled
        tuner = self._model.base_model
        (tuner.disable_adapter_layers if self._disabled else tuner.enable_adapter_layers)()
        self._merged = set() if self._disabled else self._merged  # the next call takes them out

    def writes(self) -> None:
        if not self._merged:
            kept, share = self._random.choice([0.0, 0.3, 1.0]), self._random.choice([0.3, 1.0])
            with torch.inference_mode(self._random.random() < 0.3), torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    if ".s2lora_" in name and self._random.random() < share:
                        alive = torch.rand(parameter.shape) < (kept if "coefficients" in name else 1.0)
                        parameter.copy_(0.3 * torch.randn(parameter.shape) * alive)

    def freezes(self) -> None:
        kind = self._random.choice(["s2lora_coefficients"] * 3 + ["s2lora_up", "s2lora_down"])
        for layer in self._layers().values():
            getattr(layer, kind).requires_grad_(False)

    def merges(self) -> None:
        if not self._disabled:
            self._model.merge_adapter(safe_merge=self._random.random() < 0.5)
            self._merged |= set(self._active)

    def unmerges(self) -> None:
        if self._merged:
            self._model.unmerge_adapter()
            self._merged = set()

    def fuses(self) -> None:
        self._random.choice([fuse_whisper, fuse_whisper, unfuse_whisper])(self._model)

    def is_copied(self) -> None:
        self._model = copy.deepcopy(self._model)

    def loads(self) -> None:
        name = self._random.choice(sorted(self._model.peft_config))
        self._model.save_pretrained(self._folder)
        self._model.load_adapter(self._folder / name if name != "default" else self._folder, f"a{self._made}")
        self._made, self._merged = self._made + 1, set()


@pytest.mark.parametrize("seed", range(6))
def test_a_life_is_what_it_is_to_be(seed, tiny_whisper, tmp_path, monkeypatch):
    life = Life(seed, tiny_whisper, tmp_path)
    events = [name for name in vars(Life) if not name.startswith("_")] + ["adds", "activates", "writes", "freezes"] * 2
    for _ in range(20):
        getattr(life, life._random.choice(events))()
        monkeypatch.setenv(VARIABLE, life._random.choice(BACKENDS))
        life._check()
