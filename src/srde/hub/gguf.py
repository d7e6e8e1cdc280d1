"""A merged model as one GGUF file, through llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from srde.errors import ArtifactError, ConfigError

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
_PLACES = ("", "vendor/llama.cpp")


def find_converter(llama_cpp: str | Path) -> Path:
    """The converter's script in a folder: a clone of llama.cpp, or the unpacked source package of llama-cpp-python.

    Raises:
        ConfigError: It is not there.
    """
    for place in _PLACES:
        script = Path(llama_cpp) / place / CONVERTER
        if script.is_file():
            return script
    raise ConfigError.of(
        "llama_cpp", str(llama_cpp), rule=f"it must be a folder with llama.cpp's {CONVERTER}",
        fix="run `pip download --no-deps --no-binary llama-cpp-python llama-cpp-python`, unpack it, and name its folder",
    )  # fmt: skip


def to_gguf(folder: str | Path, file: str | Path, converter: Path, outtype: str = "auto") -> None:
    """Converts a plain model.

    Args:
        folder: The model, as `save_pretrained` wrote it, with its tokenizer.
        file: The GGUF file to write.
        converter: What `find_converter` found. It is run with this Python and needs the packages gguf and sentencepiece.
        outtype: Type of the numbers in it, one of `TYPES`.

    Raises:
        ArtifactError: The converter failed, or wrote nothing.
    """
    command = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not Path(file).is_file():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[
            -1
        ]
        raise ArtifactError.of(
            "gguf", Path(file).name, rule=f"llama.cpp's converter did not write it ({said})",
            fix="install what it asks for (`pip install gguf sentencepiece`), or use a llama.cpp that knows the architecture",
        )  # fmt: skip
