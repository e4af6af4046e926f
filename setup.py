"""Packaging of megamem: three source folders, one import root.

`kernels/` and `patches/` sit at the top of the repository because people look for them there; they
are installed as `megamem.kernels` and `megamem.patches`, so that nothing with a generic name lands in
site-packages. torch is never a build requirement: planning and `--help` run without it.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = {"megamem": "megamem", "megamem.kernels": "kernels", "megamem.patches": "patches"}

# 0.15 is the first release whose layers carry process-group collections; 0.20 is not out yet.
MEGATRON = "megatron-core>=0.15.3,<0.20"

EXTRAS = {
    "train": ["torch>=2.6", MEGATRON, "numpy", "psutil", "tensorboard"],
    "te": ["transformer-engine[pytorch]>=2.10"],
    "nemo": ["megatron-bridge>=0.3.1"],
    # What Megatron-Bridge imports where there is no GPU; itself it asks for packages that only a GPU machine can build
    # (Transformer Engine, Mamba), so ci/environment.sh adds it without what it asks for.
    "nemo-cpu": [
        # Bridge 0.3, the last one on Python 3.11, is written for transformers 4; 0.6 does not import without 5.
        # Without the floor, pip goes back to releases that must be compiled.
        "transformers>=4.57,<5; python_version < '3.12'",
        "transformers>=5.8,<=5.12.1; python_version >= '3.12'",
        "huggingface-hub<1; python_version < '3.12'",  # as transformers 4 asks: said here, pip need not search for it
        "datasets>=2.20",
        "accelerate",
        "omegaconf>=2.3",
        "hydra-core>1.3,<=1.3.2; python_version < '3.12'",
        "hydra-core>=1.3.4,<1.4; python_version >= '3.12'",
        "megatron-energon; python_version >= '3.12'",  # imported by Bridge 0.6
        "rich",
        "six",
        "regex",
        "einops",
        "wandb",
        "nvidia-modelopt",
        "defusedxml",
        "nvidia-ml-py",
    ],
    # What a checkout of Megatron-LM imports, and compiles its data set's helpers with.
    "megatron-lm": ["six", "regex", "einops", "pydantic", "pybind11"],
    "plot": ["matplotlib"],
    "solver": ["ortools>=9.10"],
    "solve": ["scipy>=1.9"],  # the solver mip; the others need nothing but a C++ compiler
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML",
        "types-psutil",
        "scipy>=1.9",
        "setuptools>=77",
        "wheel",
        "pydantic>=2",  # this and einops: Transformer Engine's Python, which tests run
        "einops",
        "triton; sys_platform == 'linux'",  # its interpreter runs kernels on the CPU; PyTorch brings it only with CUDA
    ],
}

setup(
    name="megamem",
    version="0.1.0.dev0",
    description="Longer sequences on the GPUs you have: token-wise activation swap and recompute for Megatron-Core.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=["pyyaml>=6", "packaging>=23"],
    extras_require=EXTRAS,
    packages=[
        name if sub == "" else f"{name}.{sub}" for name, folder in ROOMS.items() for sub in ["", *find_packages(folder)]
    ],
    package_dir=ROOMS,
    package_data={
        "megamem": ["py.typed"],
        "megamem.native": ["src/*", "src/torch/*"],
        "megamem.planner": ["data/*.yaml"],
        "megamem.report": ["page.css", "page.js"],
    },
    entry_points={"console_scripts": ["megamem = megamem.cli:main"]},
)
