"""Makes the directories beside it: one Llama of 11,000 weights, quantized and saved by the code of others, on a CPU.

    python make.py gptqmodel    # gptqmodel 7.7.0, torch 2.13.0, transformers 5.24.0
    python make.py autogptq     # auto-gptq 0.7.1, torch 2.13.0, transformers 4.51.3, which asks for a GPU by name only
    python make.py autoawq      # autoawq 0.2.9, as auto-gptq

Every directory gets `expected.json`: of each kernel as that code multiplies it out, float32 [in, out], the SHA-256, and
the logits of transformers with them in float32. Tests read what it made; nothing runs it.
"""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS, GROUP = 32, 16
CONFIG = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    head_dim=16,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=True,
)


def source(target: Path, positive: bool) -> None:
    """positive: two outputs of every projection have only positive weights, whose zero is 0."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).half()
    for name, kernel in model.named_parameters():
        if positive and "_proj" in name:
            kernel.data[2:4] = kernel.data[2:4].abs() + 0.5
    model.save_pretrained(target)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t1").save_pretrained(target)


def rows() -> list[list[int]]:
    random.seed(0)
    return [[random.randrange(WORDS) for _ in range(48)] for _ in range(24)]


def by_gptqmodel(start: Path, target: Path) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization.config import GPTQConfig

    config = GPTQConfig(bits=4, group_size=GROUP, sym=False, desc_act=True, offload_to_disk=False)
    model = GPTQModel.load(str(start), config, device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows()], batch_size=1)
    model.save(str(target))
    read = GPTQModel.load(str(target), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
    kernels = {}
    for name, layer in read.named_modules():
        if isinstance(layer, BaseQuantLinear):
            layer.scales = layer.scales.float()
            kernels[name] = layer.dequantize_weight()
    return kernels


def by_autogptq(start: Path, target: Path) -> dict[str, torch.Tensor]:
    import auto_gptq.modeling._base as base
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import LlamaGPTQForCausalLM
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    base.CUDA_0, torch.cuda.synchronize = torch.device("cpu"), lambda *_: None
    whole = LlamaForCausalLM.from_pretrained(start, torch_dtype=torch.float16)
    config = BaseQuantizeConfig(bits=4, group_size=GROUP, sym=False, desc_act=True)
    model = LlamaGPTQForCausalLM(whole, False, config)
    batches = [torch.tensor([row]) for row in rows()]
    model.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in batches],
        cache_examples_on_gpu=False,
    )
    model.save_quantized(str(target), use_safetensors=True)
    tensors, kernels = load_file(next(target.glob("*.safetensors"))), {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith("qweight")]:
        parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if name in key}
        inputs = 8 * len(parts["qweight"])
        layer = QuantLinear(4, GROUP, inputs, parts["qweight"].shape[1], bias="bias" in parts)
        layer.load_state_dict(parts)
        layer.autogptq_cuda_available = False
        kernels[name] = layer.float()(torch.eye(inputs))
    return kernels


def by_autoawq(start: Path, target: Path) -> dict[str, torch.Tensor]:
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    model = AutoAWQForCausalLM.from_pretrained(str(start), device_map="cpu", safetensors=True)
    config = {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}
    model.quantize(None, quant_config=config, calib_data=rows(), max_calib_seq_len=48, apply_clip=False)
    model.save_quantized(str(target))
    tensors = load_file(target / "model.safetensors")
    return {
        name.removesuffix(".qweight"): dequantize_gemm(
            words,
            tensors[name.replace("qweight", "qzeros")],
            tensors[name.replace("qweight", "scales")].float(),
            4,
            GROUP,
        )
        for name, words in tensors.items()
        if name.endswith("qweight")
    }


def main(peer: str) -> None:
    target = Path(__file__).parent / peer
    start = Path(f"{target}_source")
    source(start, positive=peer == "gptqmodel")
    kernels = {"gptqmodel": by_gptqmodel, "autogptq": by_autogptq, "autoawq": by_autoawq}[peer](start, target)
    stored = load_file(next(target.glob("*.safetensors")))
    model = LlamaForCausalLM(CONFIG).float()
    state = {name: value.float() for name, value in stored.items() if name in model.state_dict()}
    state |= {f"{name}.weight": kernel.T for name, kernel in kernels.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    tokens = rows()[0][:4]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    hashes = {
        name: hashlib.sha256(kernel.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, kernel in kernels.items()
    }
    expected = {
        "kernels": hashes,
        "tokens": tokens,
        "logits": [[round(x, 5) for x in row] for row in logits.tolist()],
    }
    (target / "expected.json").write_text(json.dumps(expected) + "\n")
    for path in target.iterdir():
        if path.name not in ("config.json", "expected.json") and path.suffix != ".safetensors":
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
