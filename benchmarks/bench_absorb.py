"""
Peak memory of `saelens-scaffold absorb` at the size of Gemma Scope: d_in 2304, d_sae 65,536.

    python benchmarks/bench_absorb.py

A random JumpReLU SAE, and a random language model of one layer. What is beyond the weights
of both includes Python and the libraries.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoConfig, AutoModelForCausalLM

from saelens_scaffold.models import embedded_model_path

D_IN, D_SAE = 2304, 65_536


def write_inputs(folder: Path) -> None:
    """A model and an SAE that fires on about 1 % of its latents."""
    embedded = embedded_model_path()
    config = AutoConfig.from_pretrained(embedded)
    config.update({"hidden_size": D_IN, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 8, "intermediate_size": 256})
    shutil.copytree(embedded, folder / "model")
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    hook_name = "blocks.0.hook_resid_post"
    metadata = SAEMetadata(model_name="model", hook_name=hook_name, context_size=64)
    sae = JumpReLUSAE(JumpReLUSAEConfig(D_IN, D_SAE, metadata=metadata))
    sae.b_enc.data.fill_(-2 * sae.W_enc.data.norm(dim=0).mean().item())
    sae.b_dec.data.fill_(1.0)  # which even few tokens show to be wrong
    sae.save_model(folder / "sae")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        argv = [sys.executable, "-m", "saelens_scaffold", "absorb", "sae"]
        argv += ["--model", "model", "--dataset", "python-stdlib", "--device", "cpu"]
        argv += ["--n_tokens", "2400", "--held_out_tokens", "300"]
        subprocess.run([*argv, "--output_path", "new"], cwd=folder, check=True)
        files = [*folder.glob("sae/*.safetensors"), *folder.glob("model/*.safetensors")]
        weights = sum(file.stat().st_size for file in files) / 1e9
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(
        f"weights {weights:.2f} GB, peak {peak:.2f} GB, beyond {peak - weights:.2f} GB"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
