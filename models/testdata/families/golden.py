"""Writes tiny models of random weights and what transformers says of them: `python golden.py`, transformers 5.24, torch 2."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

HERE = Path(__file__).parent
TOKENS = [3, 17, 42, 5, 29, 8, 61, 0]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Frequencies of every kind at 16 channels: kept, on the line, divided.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}


class FatRelu(torch.nn.Module):
    """As in modeling_sparsellama.py of ProSparse."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        return torch.where(x > self.threshold, x, torch.zeros_like(x))


def drelu(mlp):
    """As in modeling_bamboo.py."""
    relu = torch.nn.functional.relu
    mlp.forward = lambda x: mlp.down_proj(relu(mlp.gate_proj(x)) * relu(mlp.up_proj(x)))


def fatrelu(mlp):
    mlp.act_fn = FatRelu(0.05)


# The class, what it is made with, what config.json says beside it, and what is changed of each MLP.
FAMILIES = {
    "arcee": (ArceeForCausalLM, ArceeConfig(**SHAPE, hidden_act="relu2", rope_parameters=YARN), {}, None),
    "llama-relu-yarn": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE,
            hidden_act="relu",
            rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
        ),
        {},
        None,
    ),
    "mistral-yarn": (
        MistralForCausalLM,
        MistralConfig(
            **SHAPE, hidden_act="silu", sliding_window=4, rope_parameters=YARN | {"attention_factor": 1.5}
        ),
        {},
        None,
    ),
    "sparsellama-fatrelu": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, hidden_act="relu"),
        {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.05},
        fatrelu,
    ),
    "bamboo": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, hidden_act="relu", sliding_window=4),
        {"model_type": "bamboo"},
        drelu,
    ),
}


def main():
    for seed, (name, (model, config, says, change)) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = model(config).eval()
        for p in model.parameters():
            # Large enough that every part has a say in the logits.
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 1.2 * p.shape[-1] ** -0.5)
        if change:
            for layer in model.model.layers:
                change(layer.mlp)
        # In f16 the file has half the size; what it holds is what both compute with.
        model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0]
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config.to_diff_dict() | SHAPE | says, indent=1) + "\n")
        rows = [[round(float(v), 6) for v in row] for row in logits]
        (folder / "logits.json").write_text(json.dumps({"tokens": TOKENS, "logits": rows}) + "\n")


if __name__ == "__main__":
    main()
